"""Predict pictures that no data set knows: one picture, a folder of them, or a video.

    python -m scripts.predict --checkpoint runs/afdcd/student_best.pth --input photos --output predicted
    python -m scripts.predict --checkpoint runs/afdcd/student_best.pth --input drive.mp4 --output predicted --batch-size 4 --amp bf16
    torchrun --nproc-per-node 4 -m scripts.predict --checkpoint ... --dataset citys --input photos --output predicted --mode slide --window 512

    labels/NAME.png        class numbers at the picture's size, as a palette picture in the classes' colours; of a video labels/VIDEO/FRAME.png
    overlays/NAME.jpg      the picture with these colours laid over it, to judge the prediction by (beyond 65500 pixels a side a png);
                           of a video overlays/VIDEO.mp4 at its frame rate
    legend.png             the classes' colours, numbers and names
    classes.txt            the same as a folder data set has them
    report.json            per picture and in all: share of the pixels per class, size, time; checkpoint, options, environment

Pictures (png, jpg, jpeg) keep their names and subfolders and may have any size. A photo with an EXIF mark is predicted upright, as viewers
show it, and so are its label picture and its overlay; the report names the mark. What cannot be read is named, left out and counted, and the
exit status is then 1. A video is decoded frame by frame by one process; pictures go round the ranks.
"""

import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
import torch

from dataset import DataError, EvalSampler, Spec
from dataset.layout import PICTURES, FilePair, Folders, find_files
from dataset.reading import read_upright
from models.weights import model_from_checkpoint
from utils import checkpoint, distributed
from utils.distill import is_label_assisted
from utils.engine import AMP, memory_format
from utils.log import logger, progress_bar
from utils.metrics import Inference, Timed
from utils.options import predict_options
from utils.run import command, environment, write_text, writing
from utils.session import check_classes, run_script
from utils.visualize import legend, overlay, save_overlay, save_palette

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
RATE = 25.0  # frames per second of a video that does not say
FASTEST = 1000.0  # a higher rate is a video's unit of time


@dataclass
class Frame:
    """A picture (H, W, 3) uint8 RGB as viewers show it; its name is the place of what is predicted, without an ending, and `about` is
    what the report says of it."""

    name: str
    image: np.ndarray
    about: dict


@dataclass
class Unread:
    """A picture that cannot be read, and why, in one line."""

    about: dict
    reason: str


def main(options, device) -> int | None:
    spec, source = options.spec, Path(options.input)
    items, problems = find(source)
    video = None if items else Video(source)
    output = check_output(Path(options.output), source)
    model, found = model_from_checkpoint(options.checkpoint, normalization=options.normalization)
    check_classes(model, options.checkpoint, spec)
    if is_label_assisted(model):
        raise ValueError(f"{options.checkpoint}: a label-assisted teacher needs the labels that it would predict; give a student")
    distributed.barrier()  # nobody writes before everybody has looked
    what = f"{len(items)} pictures" if items else f"{video.announced} frames at {video.rate:g} per second"
    logger.info("%s\n%s, %d classes; %s: %s", found, spec.name, spec.num_classes, source, what)
    if distributed.is_main():
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            legend(spec.classes, spec.colours).save(output / "legend.png")
        lines = [" ".join(map(str, (name, *colour))) for name, colour in zip(spec.classes, spec.colours, strict=True)]
        write_text(output / "classes.txt", "\n".join(lines) + "\n")
        for problem in problems:
            logger.warning("%s", problem)
    distributed.barrier()

    start = time.perf_counter()
    pictures = Pictures(output, spec, options.overlays) if items else VideoPictures(output, spec, options.overlays, video)
    batches = read_pictures(items, options) if items else video.read(options.batch_size, options.workers)
    with pictures:
        rows = predict(model, options, batches, -(-len(items) // distributed.world()) or video.announced, device, pictures)
    for problem in pictures.problems:
        logger.warning("%s", problem)
    problems += pictures.problems
    rows = gather_rows(rows)
    seconds = time.perf_counter() - start
    if video and (problem := video.problem(len(rows))):
        logger.warning("%s", problem)
        problems.append(problem)
    place = {relative(item.image, source): number for number, item in enumerate(items)}
    rows.sort(key=lambda row: place.get(row.get("file"), row.get("frame")))
    problems += [row["unread"] for row in rows if "unread" in row]
    rows = [row for row in rows if "unread" not in row]
    median = statistics.median(row["milliseconds"] for row in rows) if rows else None
    if distributed.is_main():
        total = np.sum([row["pixels"] for row in rows], axis=0) if rows else np.zeros(spec.num_classes, np.int64)
        report = {
            "model": model.config, "checkpoint": {"file": str(options.checkpoint), "sha256": checkpoint.fingerprint(options.checkpoint)},
            "dataset": spec.name, "classes": list(spec.classes), "input": str(source), "video": video and video.about(len(rows)),
            "predicted": len(rows), "problems": problems, "seconds": seconds, "milliseconds_per_picture": median,
            "share": shares(total, spec.classes) if rows else None,
            "pictures": [{key: value for key, value in row.items() if key != "pixels"} | {"share": shares(row["pixels"], spec.classes, present=True)}
                         for row in rows],
            "options": options.plain(), "command": command(), "environment": environment(),
        }  # fmt: skip
        write_text(output / "report.json", json.dumps(report, indent=1) + "\n")
    speed = f"{median:.1f} ms per picture (median, without reading and writing), " if rows else ""
    logger.info("%d %s predicted, %s%.1f s in all%s", len(rows), "frames" if video else "pictures", speed, seconds,
                f"; problems, named above and in the report: {len(problems)}" if problems else "")  # fmt: skip
    if turned := sum("turned_from_exif" in row for row in rows):
        logger.info("turned upright as their EXIF marks say, label pictures and overlays with them: %d", turned)
    logger.info("%s", output / "report.json")
    return 1 if problems else None


# --------------------------------------------------------------------------------------------------------------- input and output


def find(source: Path) -> tuple[list[FilePair], list[str]]:
    """The pictures at a path, in the order of their names, and one line for every file there that is not predicted; no picture: a video.

    Raises:
        ValueError: one line; there is nothing, nothing that can be predicted, or a video on several ranks.
    """
    if source.is_dir():
        items, problems = Folders("").find(source)
        problems += [f"{path}: a video in a folder is not predicted; give it as --input"
                     for path in sorted(path for files in find_files(source, "", VIDEOS).values() for _, path in files)]  # fmt: skip
        if not items:
            raise ValueError(f"--input {source}: no picture to predict ({' '.join(PICTURES)})" + (f"; {problems[0]}" if problems else ""))
        return items, problems
    if not source.is_file():
        raise ValueError(f"--input {source}: no such file or folder; give a picture, a folder of pictures, or a video")
    if source.suffix.lower() in PICTURES:
        return [FilePair(source.stem, str(source), None, None)], []
    if source.suffix.lower() not in VIDEOS:
        raise ValueError(f"--input {source}: {source.suffix or 'no ending'} is not read; possible are pictures ({' '.join(PICTURES)}), a folder "
                         f"of them, and videos ({' '.join(VIDEOS)})")  # fmt: skip
    if distributed.world() > 1:
        raise ValueError(f"--input {source}: a video is decoded by one process, {distributed.world()} were started; start it without torchrun")
    return [], []


def check_output(output: Path, source: Path) -> Path:
    """The output folder. ValueError where files of another prediction are in it, or where the next one would take it for input."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output}: is not an empty folder; choose another one, so that two predictions are not mixed")
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--output {output}: lies in --input {source}, where its overlays would be pictures the next time; choose another one")
    return output


def relative(path: str | Path, source: Path) -> str:
    """How the report names a file: its path below the input folder, or its name."""
    return Path(path).relative_to(source).as_posix() if source.is_dir() else Path(path).name


# -------------------------------------------------------------------------------------------------------------------------- reading


def read_pictures(items: list[FilePair], options) -> Iterator[list[Frame | Unread]]:
    """This rank's pictures, each batch once; whoever reads them next finds up to twice `workers` batches read already."""
    batches = plan(items, options.batch_size)
    mine = [batches[index] for index in EvalSampler(len(batches), distributed.rank(), distributed.world())]
    source = Path(options.input)
    return ahead(lambda batch: [read_picture(items[index], source) for index in batch], mine, options.workers)


def plan(items: list[FilePair], batch_size: int) -> list[list[int]]:
    """Batches of pictures that have one size by their headers, as numbers of items; in the order of each batch's first picture."""
    if batch_size == 1:
        return [[index] for index in range(len(items))]
    sizes: dict[tuple[int, int] | None, list[int]] = {}
    for index, item in enumerate(items):
        try:
            size = item.size()
        except DataError:  # said when it is read
            size = None
        sizes.setdefault(size, []).append(index)
    return sorted(group[start : start + batch_size] for group in sizes.values() for start in range(0, len(group), batch_size))


def read_picture(item: FilePair, source: Path) -> Frame | Unread:
    about = {"file": relative(item.image, source)}
    try:
        image, mark = read_upright(item.image)
    except DataError as error:
        return Unread(about, str(error))
    return Frame(item.name, image, about | ({"turned_from_exif": mark} if mark > 1 else {}))


def ahead(function: Callable, items: Iterable, workers: int) -> Iterator:
    """function(item) of every item, in their order. Threads, at most twice as many items ahead: decoders work beside each other, and
    nothing is copied between processes."""
    if not workers:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as threads:
        waiting = deque()
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Video:
    """A video file, its frames decoded one after the other and upright, as players show them.

    Raises:
        ValueError: it cannot be opened. Whether it has frames shows when it is read (`problem`).
    """

    def __init__(self, path: Path):
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: what it says of a damaged file is no line of ours
        self.path, self.capture = path, cv2.VideoCapture(str(path))
        if not self.capture.isOpened():
            raise ValueError(f"--input {path}: cannot be read as a video; it is damaged or of an unknown kind, convert it to mp4")
        self.announced = max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        said = self.capture.get(cv2.CAP_PROP_FPS)
        self.rate = said if 0 < said <= FASTEST else RATE
        if self.rate != said:
            logger.warning("%s: does not say its frame rate; the overlays have %g frames per second", path, RATE)

    def read(self, batch_size: int, workers: int) -> Iterator[list[Frame]]:
        """Batches of frames of one size; with `workers` one thread decodes ahead."""
        batch: list[Frame] = []
        for number, image in enumerate(ahead(lambda _: self.next(), repeat(None), min(workers, 1))):
            if image is None:
                break
            if batch and (len(batch) == batch_size or image.shape != batch[0].image.shape):
                yield batch
                batch = []
            batch.append(Frame(f"{self.path.stem}/{number:06d}", image, {"frame": number}))
        if batch:
            yield batch

    def next(self) -> np.ndarray | None:
        there, image = self.capture.read()
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if there else None

    def problem(self, frames: int) -> str | None:
        """One line where the video ends early. Some containers only estimate their length: that is let pass up to a second."""
        if frames and self.announced - frames <= self.rate:
            return None
        return f"{self.path}: {frames} frames could be decoded, the file announces {self.announced}; it is damaged, restore it"

    def about(self, frames: int) -> dict:
        turned = self.capture.get(cv2.CAP_PROP_ORIENTATION_META)
        return {"frames": frames, "announced": self.announced, "rate": self.rate, "turned_by_degrees": turned}


# ----------------------------------------------------------------------------------------------------------------------- prediction


@torch.no_grad()
def predict(model, options, batches: Iterable[list[Frame | Unread]], expected: int, device, pictures) -> list[dict]:
    """Predict and write this rank's pictures; a row for the report of each, `pixels` per class among it, or why it is `unread`.

    Args:
        expected: number of pictures, for the progress bar.
        pictures: called with (frame, labels (H, W) uint8); returns the path of the label picture.
    """
    rows, num_classes, amp = [], options.spec.num_classes, AMP[options.amp]
    timed = Timed(Inference(options.mode, options.window, options.stride, tuple(options.scales), options.flip), device)
    model = model.eval().to(device=device, memory_format=memory_format(options, device))
    with progress_bar(expected, unit="image", description="prediction") as bar:
        for batch in batches:
            sizes: dict[tuple[int, ...], list[Frame]] = {}
            for frame in batch:
                if isinstance(frame, Unread):
                    logger.warning("%s", frame.reason)
                    rows.append(frame.about | {"unread": frame.reason})
                else:  # of one size, but for what was turned upright
                    sizes.setdefault(frame.image.shape, []).append(frame)
            for frames in sizes.values():
                image = torch.from_numpy(np.stack([frame.image for frame in frames])).permute(0, 3, 1, 2).to(device)  # (B, 3, H, W)
                with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                    prediction = timed(model, image)
                for frame, labels in zip(frames, prediction.cpu().numpy(), strict=True):
                    height, width = labels.shape
                    rows.append(frame.about | {
                        "labels": pictures(frame, labels), "height": height, "width": width, "milliseconds": 1000 * timed.seconds[-1],
                        "pixels": np.bincount(labels.ravel(), minlength=num_classes).tolist(),
                    })  # fmt: skip
            bar.update(len(batch))
    return rows


def gather_rows(rows: list[dict]) -> list[dict]:
    """The rows of all ranks, on every rank."""
    text = json.dumps(rows)  # without any other character than ASCII
    longest = -int(distributed.minimum(torch.tensor(-len(text))))
    return [row for part in distributed.gather_text(text, longest) for row in json.loads(part)]


def shares(pixels, classes, present: bool = False) -> dict[str, float]:
    """Share of the pixels by class; with `present`, of the classes that occur alone."""
    total = sum(pixels)
    return {name: int(count) / int(total) for name, count in zip(classes, pixels, strict=True) if count or not present}


class Pictures:
    """Writes label pictures and, where wanted, overlays; `problems` has one line for what did not come out whole."""

    def __init__(self, output: Path, spec: Spec, overlays: bool):
        self.problems: list[str] = []
        self.output, self.palette, self.overlays = output, spec.palette(), overlays

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        pass

    def __call__(self, frame: Frame, labels: np.ndarray) -> str:
        """Write what belongs to a picture; the path of its labels below the output folder."""
        path = f"labels/{frame.name}.png"
        with writing(self.place(path)):
            save_palette(self.place(path), labels, self.palette)
        if self.overlays:
            self.show(frame, overlay(frame.image, labels, self.palette))
        return path

    def show(self, frame: Frame, mixed: np.ndarray) -> None:
        path = self.place(f"overlays/{frame.name}.jpg")
        with writing(path):
            save_overlay(path, mixed)

    def place(self, path: str) -> Path:
        """The path below the output folder, in a folder that is there."""
        place = self.output / path
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        return place


class VideoPictures(Pictures):
    """Writes the frames' label pictures and one overlay video, which is closed whatever happens: what was written can be played.

    A video has one size, that of the first frame: overlays of another one are scaled to it, labels are not.
    """

    def __init__(self, output: Path, spec: Spec, overlays: bool, video: Video):
        super().__init__(output, spec, overlays)
        self.name, self.rate, self.writer, self.frames = f"overlays/{video.path.stem}.mp4", video.rate, None, 0
        self.size: tuple[int, int] | None = None  # width, height

    def show(self, frame: Frame, mixed: np.ndarray) -> None:
        height, width = mixed.shape[:2]
        self.size = self.size or (width, height)
        if self.size != (width, height):
            mixed, (width, height) = cv2.resize(mixed, self.size, interpolation=cv2.INTER_AREA), self.size
        mixed = np.pad(mixed, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # the codec halves the size of the colours
        path = self.place(self.name)
        if self.writer is None:
            self.writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), self.rate, (mixed.shape[1], mixed.shape[0]))
            if not self.writer.isOpened():
                raise ValueError(f"{path}: this OpenCV cannot write the video; pass --no-overlays, or install opencv-python of PyPI")
        self.writer.write(cv2.cvtColor(mixed, cv2.COLOR_RGB2BGR))
        self.frames += 1

    def __exit__(self, kind, error, trace):
        if self.writer is not None:
            self.writer.release()
        if self.writer is None or kind is not None:
            return
        path = self.output / self.name
        written = int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT))
        if written != self.frames:  # the writer itself says nothing, not even of a full disk
            self.problems.append(f"{path}: holds {max(0, written)} of {self.frames} frames, the others could not be written, as on a full disk; "
                                 "the labels are whole; free space or choose another folder, or pass --no-overlays")


if __name__ == "__main__":
    run_script(main, predict_options(description=__doc__))
