"""Predict a split without public labels and pack the files that its test server takes.

    python -m scripts.submit --checkpoint runs/afdcd/student_best.pth --dataset citys --data DIR --output submission
    torchrun --nproc-per-node 4 -m scripts.submit --checkpoint ... --dataset voc --data DIR --output submission --scales 0.75 1 1.25 --flip

Cityscapes: one grey PNG of label ids per picture, 1024x2048, as a zip file. Pascal VOC: palette PNGs below results/VOC2012, as a
tar.gz. Every file is read back before it is packed: number of files, size, mode and values. The archive appears as a whole or not at all.
"""

import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset import EvalSampler, Spec, build_dataset, build_loader
from dataset.specs import Submission
from models.weights import model_from_checkpoint
from utils import distributed
from utils.distill import is_label_assisted
from utils.engine import AMP, memory_format
from utils.log import logger, progress_bar
from utils.metrics import Inference
from utils.options import submit_options
from utils.run import writing
from utils.session import check_classes, run_script
from utils.visualize import save_palette


def main(options, device) -> None:
    spec, form = options.spec, options.spec.submission
    if form is None:
        raise ValueError(f"{spec.name} has no test server that this project knows; eval.py --save-predictions writes label pictures")
    split = options.split or form.split
    model, found = model_from_checkpoint(options.checkpoint, normalization=options.normalization)
    check_classes(model, options.checkpoint, spec)
    if is_label_assisted(model):
        raise ValueError(f"{options.checkpoint}: a label-assisted teacher needs the labels that it would predict; give a student")
    pictures = build_dataset(spec, options.data, split)
    expected = spec.pictures.get(split)
    if expected is not None and len(pictures) != expected:
        wanted = "the server scores" if split == form.split else "the complete release has"
        raise ValueError(f"{options.data}: {len(pictures)} pictures in split {split}, {wanted} {expected}; complete the data set")
    paths = [form.path.format(name=item.name.rsplit("/", 1)[-1]) for item in pictures.items]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{options.data}: pictures of the same name in two folders of split {split}; the server tells them apart by name")
    sizes = [item.size() for item in pictures.items]
    if form.size is not None and set(sizes) != {form.size}:
        odd, (height, width) = next((item, size) for item, size in zip(pictures.items, sizes, strict=True) if size != form.size)
        raise ValueError(f"{odd.files()[0]}: is {width}x{height}, the server takes {form.size[1]}x{form.size[0]}; give the original files")
    output = Path(options.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output}: is not an empty folder; choose another one, so that nothing of an older submission is sent")
    distributed.barrier()  # nobody writes before everybody has looked
    logger.info("%s\n%s, %s, %d pictures", found, spec.title, split, len(pictures))
    predict(model, options, pictures, [output / path for path in paths], device)
    distributed.barrier()
    if distributed.is_main():
        check_files(output, dict(zip(paths, sizes, strict=True)), form, spec.palette() if form.palette else None)
        archive = pack(output, sorted(paths), output / f"{spec.name}_{split}.{form.archive}", form)
        logger.info("%d files checked and packed: %s; send it to %s", len(paths), archive, form.server)


@torch.no_grad()
def predict(model, options, pictures, paths: list[Path], device) -> None:
    """Write this rank's share of the label pictures, in the server's label ids."""
    spec: Spec = options.spec
    form, inference = spec.submission, Inference(options.mode, options.window, options.stride, tuple(options.scales), options.flip)
    label_ids = np.array(form.label_ids, np.uint8)
    sampler, amp = EvalSampler(len(pictures), distributed.rank(), distributed.world()), AMP[options.amp]
    loader = build_loader(pictures, sampler, workers=options.workers, device=device)
    model = model.eval().to(device=device, memory_format=memory_format(options, device))
    with progress_bar(len(sampler), unit="image", description="prediction") as bar:
        for index, batch in zip(sampler, loader, strict=True):
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                prediction = inference(model, batch.image.to(device))
            labels = label_ids[prediction[0].cpu().numpy()]
            with writing(paths[index]):
                paths[index].parent.mkdir(parents=True, exist_ok=True)
                if form.palette:
                    save_palette(paths[index], labels, spec.palette())
                else:
                    Image.fromarray(labels).save(paths[index])
            bar.update()


def check_files(folder: Path, sizes: dict[str, tuple[int, int]], form: Submission, palette: np.ndarray | None) -> None:
    """Read the files back as the server will.

    Args:
        sizes: {path below the folder: (height, width) that the file must have}.
        palette: (256, 3) uint8 colours that palette files must have, None for grey files.

    Raises:
        ValueError: one line; a file is missing or too many, or one has another size, mode, palette or value than the server takes.
    """
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for path in sorted(found ^ sizes.keys()):
        raise ValueError(f"{folder / path}: {'does not belong to the submission' if path in found else 'is missing'}; predict again")
    for path, (height, width) in sizes.items():
        with Image.open(folder / path) as picture:
            labels = np.array(picture)
            colours = None if picture.palette is None else np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
        mode = "P" if form.palette else "L"
        wrong = np.setdiff1d(labels, form.label_ids)
        if picture.format != "PNG" or picture.mode != mode:
            raise ValueError(f"{folder / path}: is a {picture.format} of mode {picture.mode}, the server takes PNG of mode {mode}; predict again")
        if labels.shape != (height, width):
            raise ValueError(f"{folder / path}: is {labels.shape[1]}x{labels.shape[0]}, the server takes {width}x{height}; "
                             "predict the pictures at their original size")  # fmt: skip
        if len(wrong):
            raise ValueError(f"{folder / path}: has the label {wrong[0]}, the server knows {sorted(form.label_ids)}; predict again")
        if palette is not None and not np.array_equal(colours, palette[: len(colours)]):
            raise ValueError(f"{folder / path}: has another palette than {form.server} shows; predict again")


def pack(folder: Path, paths: list[str], archive: Path, form: Submission) -> Path:
    """The archive of the files at `paths` below the folder, which appears as a whole or not at all. PNGs are not compressed again."""
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}.tmp")
    try:
        if form.archive == "zip":
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as packed:
                for path in paths:
                    packed.write(folder / path, path)
        else:
            with tarfile.open(temporary, "w:gz", compresslevel=1) as packed:
                for path in paths:
                    packed.add(folder / path, path)
        os.replace(temporary, archive)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{archive}: cannot be written ({error.strerror}); free space, the label pictures are in {folder}") from error
    return archive


if __name__ == "__main__":
    run_script(main, submit_options(description=__doc__))
