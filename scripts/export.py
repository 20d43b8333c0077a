"""A checkpoint as one file that runs without this project: ONNX, torch.export or TorchScript.

    python -m scripts.export --checkpoint runs/kd/student_best.pth --output student.onnx
    python -m scripts.export --checkpoint ... --output student.onnx --check --data DIR                    # against PyTorch, on real pictures
    python -m scripts.export --checkpoint ... --output student_int8.onnx --quantize int8 --check --data DIR
    python -m scripts.export --checkpoint ... --output student.pt2 --format torch.export --scores

Input `image`: (B, 3, H, W) uint8, RGB, not normalised; any batch, any height and width of at least 32 pixels, unless --size fixes these
two. Outputs: `labels` (B, H, W) uint8 as eval.py predicts them (whole pictures, one scale), with --scores also `scores` (B, K, h, w)
float32 at the model's stride. Auxiliary heads are dropped, BatchNorms folded. The file holds `segkd.json`: classes, colours,
normalisation, checkpoint and its SHA-256, commit; FILE.json beside it says the same, and with --check what was measured. --check ends
with status 1 where fewer than 99.9 % of the labels of a file in float32 agree, or a score differs by more than a thousandth of the
largest one. Files of torch.export and TorchScript run on the CPU, where they were traced. ONNX takes 10 to 60 s on one core, and onnx and
onnxscript, with --check or --quantize also onnxruntime, which are optional.

    session = onnxruntime.InferenceSession("student.onnx")
    labels = session.run(["labels"], {"image": picture.transpose(2, 0, 1)[None]})[0]          # picture: (H, W, 3) uint8 RGB
    classes = json.loads(session.get_modelmeta().custom_metadata_map["segkd.json"])["classes"]
"""

import importlib
import io
import json
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental import _config as shape_config

from dataset import build_dataset
from models.deploy import Labeller, deployable
from models.normalization import NORMALIZATIONS
from models.weights import model_from_checkpoint, read_state
from scripts.benchmark import cpu_name
from utils import checkpoint, distributed
from utils.distill import is_label_assisted
from utils.files import replace_file
from utils.log import logger, progress_bar
from utils.metrics import Inference, Scores, confusion
from utils.options import export_options
from utils.run import command, commit, environment, write_text, writing
from utils.session import check_classes, run_script

METADATA = "segkd.json"
AGREEMENT = 0.999  # share of labels; what is missing are pixels whose two best scores are equal but for rounding
EXAMPLE = (2, 3, 97, 131)  # every stride gives maps of another size, so that no two are equal by chance
TOLERANCE = 1e-3  # difference of a score, as a share of the largest score
SMALLEST = 32  # pixels of a side: what is done to smaller maps, as in SegFormer's attention, is not in the file
CROPS = 8  # pictures that are also checked in parts of odd size
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def main(options, device) -> int:
    if distributed.world() > 1:
        raise ValueError(f"a file is exported by one process, {distributed.world()} were started; start it without torchrun")
    if options.format == "onnx":
        need_packages(run=bool(options.check or options.quantize))
    model, found = model_from_checkpoint(options.checkpoint, normalization=options.normalization)
    if is_label_assisted(model):
        raise ValueError(f"{options.checkpoint}: a label-assisted teacher needs the labels that it would predict; give a student")
    spec, output = options.spec, Path(options.output)
    beside = output.with_name(output.name + ".json")
    if spec is not None:
        check_classes(model, options.checkpoint, spec)
    if output.is_dir():
        raise ValueError(f"--output {output}: is a folder; give the name of the file")
    if output.exists() and output.samefile(options.checkpoint):
        raise ValueError(f"--output {output}: is the checkpoint itself; choose another name")
    if output.exists() and not beside.exists():
        raise ValueError(f"--output {output}: exists, and was not written by scripts.export ({beside.name} is missing); choose another name")
    pictures = calibration = None
    if options.check:
        pictures = build_dataset(spec, options.data, options.split or spec.report_split)
        check_sizes(pictures.items[: options.limit], options.size)
    if options.quantize:
        calibration = build_dataset(spec, options.data, spec.train_split)
        calibration.items = spread(calibration.items, options.calibration)
        check_sizes(calibration.items, options.size)
    logger.info("%s", found)

    network, folded = deployable(model)
    labeller = Labeller(network, options.scores).eval()
    metadata = describe(model, options) | {"batchnorms_folded": folded}
    if options.quantize:
        used = {"dataset": spec.name, "split": spec.train_split, "pictures": len(calibration), "part": part_of(options.size)}
        metadata["quantization"] = {"kind": "int8", "calibration": used}
    start = time.perf_counter()
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    content = convert(labeller, options, metadata)
    if options.quantize:
        content = quantized(content, (picture_of(calibration, k, options.size)[0] for k in range(len(calibration))), metadata)
    with writing(output):
        replace_file(output, content)
    size = "any size" if options.size is None else "x".join(map(str, options.size))
    logger.info("%s: %.2f MB, pictures of %s, %d BatchNorms folded, %.0f s", output, len(content) / 1e6, size, folded, time.perf_counter() - start)
    report = metadata | {"file": output.name, "bytes": len(content), "sha256": checkpoint.fingerprint(output)}
    report |= {"command": command(), "environment": environment()}
    write_text(beside, json.dumps(report, indent=1) + "\n")  # before the check, which may be interrupted: the file is ours all the same
    status = 0
    if options.check:
        report["check"] = check(model, options, pictures)
        logger.info("%s", table(report["check"], len(content)))
        for fault in faults(report["check"]) if not options.quantize else ():
            logger.error("error: %s: %s; do not ship it", output, fault)
            status = 1
        write_text(beside, json.dumps(report, indent=1) + "\n")
    return status


def need_packages(run: bool) -> None:
    """ValueError with the command that installs what ONNX takes, where it is missing; onnxruntime is taken by what runs the file alone."""
    packages = PACKAGES if run else PACKAGES[:2]
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            flags = "--format onnx" + (" with --check or --quantize" if name == "onnxruntime" else "")
            raise ValueError(f"{flags} needs {name}; pip install {' '.join(packages)}, or choose --format torch.export") from error


def describe(model, options) -> dict:
    """What a user of the file has to know, as plain values. ValueError where the checkpoint contradicts itself."""
    config = read_state(options.checkpoint)[1]["config"] or {}
    spec, built = options.spec, model.config
    classes, colours = (config.get(name) or (spec and [*getattr(spec, name)]) for name in ("classes", "colours"))
    for name, values in (("classes", classes), ("colours", colours)):
        if values is not None and not (isinstance(values, (list, tuple)) and len(values) == model.num_classes):
            found = len(values) if isinstance(values, (list, tuple)) else "no list of"
            raise ValueError(f"{options.checkpoint}: its config has {found} {name}, the network {model.num_classes}; use another copy of it")
    if classes is None:
        logger.warning("%s does not name its classes, nor does the exported file; --dataset does", options.checkpoint)
    order, mean, std = NORMALIZATIONS[built["normalization"]]
    height, width = options.size or ("H", "W")
    meaning = "RGB, 0..255, not normalised" + ("" if options.size else f"; at least {SMALLEST}x{SMALLEST} pixels")
    outputs = {"labels": {"dtype": "uint8", "shape": ["B", height, width], "meaning": "class number of every pixel"}}
    if options.scores:
        outputs["scores"] = {"dtype": "float32", "shape": ["B", model.num_classes, "h", "w"], "meaning": f"class scores at stride {model.stride}"}
    return {
        "format": options.format, "model": built["model"], "backbone": built["backbone"], "head_width": built["head_width"],
        "input": {"image": {"dtype": "uint8", "shape": ["B", 3, height, width], "meaning": meaning}}, "outputs": outputs,
        "size": options.size and list(options.size), "num_classes": model.num_classes, "classes": classes,
        "colours": colours and [list(colour) for colour in colours], "quantization": None,
        "normalization": {"name": built["normalization"], "order": order, "mean": list(mean), "std": list(std), "inside": True},
        "dataset": config.get("dataset") or (spec and spec.name),
        "checkpoint": {"file": os.path.basename(options.checkpoint), "sha256": checkpoint.fingerprint(options.checkpoint)}, "commit": commit(),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- formats


@torch.no_grad()
def convert(labeller: Labeller, options, metadata: dict) -> bytes:
    """The content of the file.

    Raises:
        ValueError: one line; the exporter cannot do this model.
    """
    image = torch.zeros(*EXAMPLE[:2], *(options.size or EXAMPLE[2:]), dtype=torch.uint8)
    dynamic = dict.fromkeys((0, 2, 3) if options.size is None else (0,), torch.export.Dim.DYNAMIC)
    remedy = "choose another --format" + ("" if options.size or options.format == "torchscript" else ", or fix the size with --size HEIGHT WIDTH")
    with foreign(f"{metadata['model']} on {metadata['backbone']} cannot be exported to {options.format}", remedy):
        if options.format == "torchscript":
            return torchscript(labeller, image, metadata)
        # without this, an exported program takes no batch of one, and none of the sizes at which a map shrinks to one position
        with shape_config.patch(backed_size_oblivious=True):
            program = torch.export.export(labeller, (image,), dynamic_shapes=(dynamic,))
        return onnx_file(program, labeller, metadata) if options.format == "onnx" else exported_program(program, metadata)


@contextmanager
def foreign(fault: str, remedy: str):
    """Around exporters and runtimes: without their warnings about themselves, and their errors, which may be of any kind, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{fault} ({reason}); {remedy}") from error


def torchscript(labeller: Labeller, image: Tensor, metadata: dict) -> bytes:
    file = io.BytesIO()
    traced = torch.jit.trace(labeller, (image,), check_trace=False)
    torch.jit.save(traced, file, _extra_files={METADATA: json.dumps(metadata)})
    return file.getvalue()


def exported_program(program, metadata: dict) -> bytes:
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths on this machine
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
    return file.getvalue()


def onnx_file(program, labeller: Labeller, metadata: dict) -> bytes:
    names = ["labels", *["scores"] * labeller.scores]
    proto = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["image"], output_names=names).model_proto
    for node in [*proto.graph.node, *(node for function in proto.functions for node in function.node)]:
        del node.metadata_props[:]  # stack traces with paths on this machine
    del proto.graph.value_info[:]
    height, width = metadata["size"] or ("height", "width")
    shapes = {"image": ("batch", 3, height, width), "labels": ("batch", height, width),
              "scores": ("batch", metadata["num_classes"], "scores_height", "scores_width")}  # fmt: skip
    for value in [*proto.graph.input, *proto.graph.output]:
        for side, name in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            side.Clear()
            setattr(side, "dim_value" if isinstance(name, int) else "dim_param", name)
    return with_metadata(proto, metadata).SerializeToString()


def with_metadata(proto, metadata: dict):
    import onnx

    proto.producer_name = "segkd"
    onnx.helper.set_model_props(proto, {METADATA: json.dumps(metadata)})
    return proto


def quantized(content: bytes, pictures: Iterable[np.ndarray], metadata: dict) -> bytes:
    """The ONNX file with convolutions in int8: one scale per output channel of a weight, one per activation from its smallest and largest
    value on the pictures. Everything else stays in float32: the normalisation of the picture and the upsampling of the scores, which decide
    more labels than they take time.

    Activations have eight bits, unsigned, and weights seven, signed. CPUs without instructions for their products (VNNI on x86) add two of
    them in 16 bits, where those of eight-bit weights saturate: the labels of one file would depend on the CPU that it runs on."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.images = iter(pictures)  # (1, 3, H, W) uint8

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {"image": image}

    with foreign("the file cannot be quantized", "export it without --quantize"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        logging.disable(logging.WARNING)  # advice to fuse BatchNorms, which are folded
        try:
            quantize_static(
                onnx.load_from_string(content), path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=["Conv"],
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=True,
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        return with_metadata(onnx.load(path), metadata).SerializeToString()


# ------------------------------------------------------------------------------------------------------------------- check


def runner(options) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The file just written, as a function of a picture. No other file is loaded: TorchScript and torch.export run what they hold."""
    path = options.output
    with foreign(f"{path} does not load", "do not ship it, and choose another --format"):
        if options.format == "onnx":
            import onnxruntime

            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

            def function(image):
                return map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
        else:
            function = torch.jit.load(path, map_location="cpu") if options.format == "torchscript" else torch.export.load(path).module()

    def run(image):
        with foreign(f"{path} does not run on a picture of {'x'.join(map(str, image.shape[2:]))}", "do not ship it, and choose another --format"):
            result = function(image)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return run


@torch.no_grad()
def check(model, options, pictures) -> dict:
    """The file against the checkpoint's own network, which is evaluated as eval.py does it."""
    spec, run = options.spec, runner(options)
    model = model.eval().to(memory_format=torch.channels_last)
    count = min(options.limit or len(pictures), len(pictures))
    labelled = spec.splits[pictures.split].labelled
    matrices = torch.zeros(2, model.num_classes, model.num_classes, dtype=torch.int64)
    times, whole, crops = ([], []), Agreement(), Agreement()
    with progress_bar(count, unit="image", description="check") as bar:
        for number in range(count):
            image, target = picture_of(pictures, number, options.size)
            image = torch.from_numpy(image)
            forms = (lambda image=image: (Inference()(model, image),), lambda image=image: run(image))
            if not number:
                forms[0](), forms[1]()  # the first pass allocates
            results = [None, None]
            for form in (0, 1) if number % 2 else (1, 0):
                start = time.perf_counter()
                results[form] = forms[form]()
                times[form].append(time.perf_counter() - start)
            whole.add(model, image, *results)
            if number < CROPS and options.size is None:
                for part in odd_parts(image):
                    crops.add(model, part, (Inference()(model, part),), run(part))
            if labelled:
                for matrix, (labels, *_) in zip(matrices, results, strict=True):
                    matrix += confusion(labels[0], torch.from_numpy(target), model.num_classes)
            bar.update()
    miou = [Scores.of(matrix, count, spec.scored).miou for matrix in matrices] if labelled and matrices.any() else [None, None]
    milliseconds = [1000 * statistics.median(form) for form in times]
    return {
        "dataset": spec.name, "split": pictures.split, "pictures": count, "part": part_of(options.size), **whole.plain(),
        "crops": crops.plain(), "threads": torch.get_num_threads(), "cpu": cpu_name(),
        "miou": dict(zip(("pytorch", "exported"), miou, strict=True)),
        "milliseconds_per_image": dict(zip(("pytorch", "exported"), milliseconds, strict=True)),
    }  # fmt: skip


class Agreement:
    """How far two networks agree, picture after picture."""

    def __init__(self):
        self.pictures, self.equal, self.pixels, self.difference, self.largest = 0, 0, 0, None, None

    def add(self, model, image: Tensor, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        labels, *scores = theirs
        self.pictures += len(image)
        self.equal += int((labels == ours[0]).sum())
        self.pixels += ours[0].numel()
        if scores:
            logits = model(image).logits
            difference = float((scores[0] - logits).abs().nan_to_num(nan=math.inf, posinf=math.inf).max())
            self.difference, self.largest = max(self.difference or 0.0, difference), max(self.largest or 0.0, float(logits.abs().max()))

    def plain(self) -> dict:
        share = self.equal / self.pixels if self.pixels else 1.0
        return {"label_agreement": share, "pixels": self.pixels, "largest_score_difference": self.difference, "largest_score": self.largest}


def faults(found: dict) -> list[str]:
    """What a check found that a file in float32 must not have."""
    lines, parts = [], (found, found["crops"])
    share = min(part["label_agreement"] for part in parts)
    if share < AGREEMENT:
        lines.append(f"{100 * share:.3f} % of the labels agree with PyTorch, below {100 * AGREEMENT:.1f} %")
    for part in parts:
        difference, largest = part["largest_score_difference"], part["largest_score"]
        if difference is not None and not difference <= TOLERANCE * largest:
            lines.append(f"a score differs from PyTorch's by {difference:.2g}, more than {TOLERANCE:g} of the largest, {largest:.2g}")
            break
    return lines


def odd_parts(image: Tensor) -> list[Tensor]:
    """Of a picture (1, 3, H, W): a part with odd sides, and two of another shape as a batch; no part is smaller than 33 pixels if the
    picture is not."""
    height, width = image.shape[2:]

    def odd(side: int, share: float) -> int:
        return min(side, max(33, int(side * share) | 1))

    low, wide = odd(height, 0.5), odd(width, 0.8)
    pair = torch.cat([image[..., :low, :wide], image[..., -low:, -wide:]])
    return [image[..., : odd(height, 0.7), : odd(width, 0.45)].contiguous(), pair.contiguous()]


def picture_of(pictures, number: int, size: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Picture (1, 3, H, W) uint8 and labels (H, W); for a file of fixed size their upper left part."""
    image, target = pictures.read(number)
    if size is not None:
        image, target = image[: size[0], : size[1]], target[: size[0], : size[1]]
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None]), np.ascontiguousarray(target)


def part_of(size: tuple[int, int] | None) -> str:
    """What `picture_of` takes of a picture."""
    return "whole" if size is None else "upper left"


def check_sizes(items, size: tuple[int, int] | None) -> None:
    """ValueError where a picture is smaller than the file takes."""
    for item in items:
        height, width = item.size()
        if size and (height < size[0] or width < size[1]):
            raise ValueError(f"--size {size[0]} {size[1]}: picture {item.name} has {height} {width}; choose at most that")
        if min(height, width) < SMALLEST:
            raise ValueError(f"picture {item.name} has {height} {width}, the file takes at least {SMALLEST} {SMALLEST}; use larger pictures")


def spread(items: list, count: int) -> list:
    """`count` items spread evenly over the list: neighbours in a data set are often frames of one drive."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def table(found: dict, size: int) -> str:
    """What was measured, for the console."""
    rows = [f"{found['pictures']} pictures of {found['dataset']} {found['split']}: {100 * found['label_agreement']:.4f} % of the labels agree"]
    if found["crops"]["pixels"]:
        rows[0] += f", {100 * found['crops']['label_agreement']:.4f} % on parts of odd sizes"
    if found["largest_score_difference"] is not None:
        rows.append(f"  largest difference of a score: {found['largest_score_difference']:.2g}")
    for name in ("pytorch", "exported"):
        miou = "" if found["miou"][name] is None else f", mIoU {found['miou'][name]:.2f}"
        rows.append(f"  {name:<9} {found['milliseconds_per_image'][name]:8.1f} ms per picture on {found['threads']} threads{miou}")
    return "\n".join([*rows, f"  file      {size / 1e6:8.2f} MB"])


if __name__ == "__main__":
    run_script(main, export_options(description=__doc__))
