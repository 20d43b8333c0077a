"""Weights into models: ImageNet backbones, this project's checkpoints, checkpoints of other codebases.

No file can run code: every load says `weights_only=True` literally (the environment variable
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 overrides a default, not an argument). Every key that finds no counterpart is reported.
"""

import functools
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from utils import checkpoint

from . import BACKBONES, MODELS, backbones_of, build_model, default_width, of_backbone
from .backbones import output_strides
from .layouts import UNREAD, normalization_of, translate_keys
from .output import AUXILIARY
from .segmentor import Segmentor

FORMAT_PREFIX = "segkd/"  # what this project's checkpoints start their "format" with
TORCHVISION_NAMES = {**{f"resnet{n}_vanilla": f"resnet{n}" for n in (18, 34, 50, 101)}, "mobilenetv2": "mobilenet_v2"}
TORCHVISION_NAMES |= {f"mobilenetv3_{size}{plain}": f"mobilenet_v3_{size}" for size in ("small", "large") for plain in ("", "_vanilla")}
# what their authors call the file, where it is not NAME-imagenet.pth, the CIRKD line's name
IMAGENET_FILES = {f"mit_b{size}": f"mit_b{size}.pth" for size in range(6)} | {
    "hrnet_w18": "hrnetv2_w18_imagenet_pretrained.pth", "stdc1": "STDCNet813M_73.91.tar", "stdc2": "STDCNet1446_76.47.tar",
    "ddrnet23_slim": "DDRNet23s_imagenet.pth",
}  # fmt: skip
MOBILENETV3_EPSILON = 1e-3  # of BatchNorm in torchvision


class Difference(NamedTuple):
    """A tensor that a model and a file do not share: "missing" in the file, "unexpected" there, of "wrong shape" or "wrong type"."""

    problem: str
    key: str
    model: str
    file: str


# ---------------------------------------------------------------------------------------------------------------- reading files


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The state dict in a file, on the CPU, and what else is known: `{"format": str, "config": the run's or None}`.

    Understands a bare state dict, {"state_dict": ..., ...}, this project's checkpoints (their student) and NAME.safetensors; a `module.`
    prefix is stripped. Key names are otherwise the file's.

    Raises:
        ValueError: one line with file, reason and remedy: no such file, damaged (this project's files carry a checksum), holds
            code, or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give the path of a checkpoint file")
    if path.suffix == ".safetensors":
        content = read_safetensors(path)
    else:
        checkpoint.check_unpacked(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise almost anything, from EOFError to UnicodeDecodeError
            raise ValueError(f"{path}: not loaded: {why_unreadable(error)}") from error
    checkpoint.check_values(path, content)

    info = {"format": "state_dict", "config": None}
    state = content
    if isinstance(content, dict) and str(content.get("format")).startswith(FORMAT_PREFIX):
        checkpoint.verify(path)
        info = {"format": content["format"], "config": content.get("config")}
        if not isinstance(info["config"], dict) or not isinstance(info["config"].get("model"), dict):
            raise ValueError(f"{path}: a {content['format']} checkpoint without the model's config; use another copy of it")
        state = content.get("student")
        if content.get("average"):  # last.pth and best.pth of a run with --ema: what was evaluated
            state = {key.removeprefix("module."): value for key, value in content["average"].items() if key != "n_averaged"}
    elif isinstance(content, dict) and "state_dict" in content:
        state = content["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        found = f"a dict with {', '.join(printable(str(k)) for k in [*state][:4]) or 'no keys'}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: no weights but {found}; give a state_dict, a dict with 'state_dict', or a checkpoint of this project")
    # a tensor may show the same few numbers many times
    checkpoint.check_growth(path, sum(value.numel() * value.element_size() for value in state.values()), "holds tensors of")
    if all(key.startswith("module.") for key in state):  # saved from within DataParallel or DDP
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state), info


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of the package safetensors. ValueError where that is not installed, or the file is damaged."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{path}: needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not loaded ({printable(str(error))}); it is damaged, fetch it again") from error


def why_unreadable(error: Exception) -> str:
    """What an error of `torch.load` means, and what to do; its own text advises to let the file run code."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a file of TorchScript, which holds code; give the checkpoint that it was exported from"
    foreign = re.search(r"GLOBAL ([\w.]+)", text)
    if foreign:
        return (f"it holds more than tensors and plain values, which could run code ({foreign[1]}); take out its weights with "
                "python -m scripts.convert_checkpoint")  # fmt: skip
    line = (text.splitlines() or [""])[0]
    detail = type(error).__name__ + (f": {printable(line)}" if line and "weights_only" not in line else "")
    return (f"it is damaged, or no checkpoint of torch ({detail}); fetch it again, or try python -m scripts.convert_checkpoint, "
            "which reads old files too")  # fmt: skip


def printable(name: str) -> str:
    """A name out of a file, without what could steer a terminal or break a line."""
    return name if name.isprintable() else ascii(name)


def infer_config(state: dict[str, Tensor]) -> dict:
    """Arguments of `build_model` that fit a state dict: the backbone and the head that share most of its names and shapes.

    Names cannot tell the generation of a published model (CIRKD v1, CIRKDv2), widths do. The tensors do not show two things: the
    output stride, taken to be the published one, and the normalisation: that of the codebase whose names the file has, the default
    "imagenet" for this project's.

    Raises:
        ValueError: one line; the model is like none that this project has.
    """
    normalization = normalization_of(state) or "imagenet"
    first = next(iter(state))
    state = translate_keys(state)
    classifier = state.get("head.classifier.weight")
    backbone, in_channels = find_backbone(part(state, "backbone."))
    model = None
    if backbone and classifier is not None and classifier.dim() == 4:
        model = find_head(part(state, "head."), backbone, classifier.shape[1], classifier.shape[0])
    if model is None:
        raise ValueError(
            f"the weights fit no known model (backbone: {backbone or 'unknown'}, head: unknown, first key: {printable(first)}); "
            f"possible: {', '.join(MODELS)} on {', '.join(BACKBONES)}"
        )
    return {
        "model": model,
        "backbone": backbone,
        "num_classes": classifier.shape[0],
        "head_width": classifier.shape[1],
        "aux": any(key.startswith("aux_head.") for key in state) or "aux" in MODELS[model].head.intrinsic,
        "detail": any(key.startswith("detail_head.") for key in state),
        "normalization": normalization,
        "in_channels": in_channels,
    }


def part(state: dict[str, Tensor], prefix: str) -> dict[str, tuple[int, ...]]:
    """{name without the prefix: shape} of one part of a network. `num_batches_tracked` is left out: old files lack it."""
    return {
        key.removeprefix(prefix): tuple(value.shape)
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith("num_batches_tracked")
    }


def find_backbone(shapes: dict[str, tuple[int, ...]]) -> tuple[str | None, int]:
    """(name, input planes) of the backbone that is nearest to these tensors, which may have a fourth input plane; (None, 3): no near one."""
    candidates = {name: part(empty_backbone(name).state_dict(), "") for name in BACKBONES}
    name = nearest(candidates, shapes)
    stems = [(candidates[name][key], shapes[key]) for key in candidates[name] if key in shapes] if name else []
    four = any(len(own) == 4 and own[1] == 3 and theirs == (own[0], 4, *own[2:]) for own, theirs in stems)
    return name, 4 if four else 3


def find_head(shapes: dict[str, tuple[int, ...]], backbone: str, width: int, num_classes: int) -> str | None:
    """The model whose head on this backbone is nearest to these tensors; None: no near one."""
    channels, candidates = empty_backbone(backbone).channels, {}
    for name in sorted(MODELS, key=lambda name: default_width(name, backbone) != width):  # UPerNet and its lite form differ in width alone
        if backbone in backbones_of(name):
            with torch.device("meta"):
                head = MODELS[name].head(channels, width, num_classes, **of_backbone(MODELS[name].head_options, backbone, {}))
            candidates[name] = part(head.state_dict(), "")
    return nearest(candidates, shapes)


def nearest(candidates: dict[str, dict[str, tuple[int, ...]]], shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The candidate that shares most tensors, by name and shape, and the first of equals; None where it is not even half of them.

    Loading compares every tensor: of a file that is nearly a known network, the user sees the table of what differs.
    """
    def share(name: str) -> float:
        own = candidates[name]
        return sum(own.get(key) == shape for key, shape in shapes.items()) / max(len(own), len(shapes), 1)

    best = max(candidates, key=share, default=None)
    return best if best is not None and share(best) > 0.5 else None


@functools.cache
def empty_backbone(name: str) -> nn.Module:
    """A backbone on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        return BACKBONES[name](output_stride=output_strides(name)[-1], in_channels=3)


# ------------------------------------------------------------------------------------------------------------ comparing, loading


def compare(module: nn.Module, state: dict[str, Tensor]) -> list[Difference]:
    """Every tensor that module and state do not share. `num_batches_tracked`, which old files lack and nothing reads, may be missing."""
    own, rows = module.state_dict(), []
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            rows.append(Difference("wrong shape", key, str(tuple(value.shape)), str(tuple(state[key].shape))))
        elif key in state and not same_kind(value, state[key]):
            rows.append(Difference("wrong type", key, kind(value), kind(state[key])))
        elif key not in state and not key.endswith("num_batches_tracked"):
            rows.append(Difference("missing", key, str(tuple(value.shape)), "-"))
    return rows + [Difference("unexpected", key, "-", str(tuple(value.shape))) for key, value in state.items() if key not in own]


def kind(value: Tensor) -> str:
    """What a tensor consists of: "float32", "float32 sparse", "float32 on meta"."""
    layout = "" if value.layout == torch.strided else f" {str(value.layout).removeprefix('torch.')}"
    return str(value.dtype).removeprefix("torch.") + layout + (" on meta" if value.is_meta else "")


def same_kind(own: Tensor, value: Tensor) -> bool:
    """Whether a file's tensor holds numbers as the model's does, of whatever precision. torch (2.14) drops imaginary parts and rounds to
    integers without a word, and raises a table of its own for what is sparse or quantised."""
    plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta and not value.is_complex()
    return plain and (value.is_floating_point() or not own.is_floating_point())


def table(rows: list[Difference]) -> str:
    """The differences as aligned lines under a header."""
    rows = [Difference("problem", "key", "model", "file"), *(row._replace(key=printable(row.key)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def compare_allowed(module: nn.Module, state: dict[str, Tensor], source: str, allowed: Callable[[Difference], bool]) -> list[Difference]:
    """As `compare`.

    Raises:
        ValueError: one line with the first difference that is not allowed, then the table of all.
    """
    rows = compare(module, state)
    refused = [row for row in rows if not allowed(row)]
    if refused:
        first = refused[0]
        raise ValueError(
            f"{source} does not fit the model: {len(refused)} tensors differ, the first is {printable(first.key)} ({first.problem}; "
            f"model {first.model}, file {first.file}); choose the model that it was saved from\n{table(rows)}"
        )
    return rows


def load_matching(module: nn.Module, state: dict[str, Tensor], source: str, allowed: Callable[[Difference], bool]) -> str:
    """Load the tensors that fit; every difference must be allowed. Returns the report: one line, then a table of the differences.

    Raises:
        ValueError: as `compare_allowed`; or a tensor to load holds NaN or infinite values.
    """
    rows = compare_allowed(module, state, source, allowed)
    unmatched = {row.key for row in rows}
    matching = {key: value for key, value in state.items() if key not in unmatched}
    module.load_state_dict(matching, strict=False)
    bad = [key for key, value in module.state_dict().items() if key in matching and not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{source}: {len(bad)} of {len(state)} tensors hold NaN or infinite values, the first is {bad[0]}; "
            f"fetch the file again, or take an earlier checkpoint"
        )
    return f"{len(matching)} of {len(state)} tensors loaded from {source}" + (f", except\n{table(rows)}" if rows else "")


def model_from_checkpoint(
    path: str | Path,
    *,
    num_classes: int | None = None,
    normalization: str | None = None,
) -> tuple[Segmentor, str]:
    """The model in a file, built from the file's own config or, without one, from its tensors; and a report for the log.

    Args:
        num_classes: what the data set has; another number in the file is refused.
        normalization: overrides the file's.

    Raises:
        ValueError: see `read_state` and `infer_config`; wrong number of classes; tensors that do not fit (line, then table).
    """
    def allowed(row: Difference) -> bool:
        return row.key.startswith(UNREAD)

    state, info = read_state(path)
    try:
        config = dict(info["config"]["model"]) if info["config"] else infer_config(state)
        if normalization:
            config["normalization"] = normalization
        state = translate_keys(state)
        classifier = state.get("head.classifier.weight")
        unproven = classifier is None or [*classifier.shape[:2]] != [config.get(name) for name in ("num_classes", "head_width")]
        with torch.device("meta") if unproven else nullcontext():  # without memory: a file may ask for any width
            model = build_model(**config)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: its config describes no model of this version ({error}); use the version that wrote it") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if num_classes not in (None, model.num_classes):
        raise ValueError(f"{path} has {model.num_classes} classes, the data set has {num_classes}; give a checkpoint trained on it")
    if unproven:
        compare_allowed(model, state, str(path), allowed)
        model = build_model(**config)
    report = load_matching(model, state, str(path), allowed)
    built = model.config
    return model, (
        f"{built['model']} {built['backbone']}, {model.num_classes} classes, head width {built['head_width']}, "
        f"normalization {built['normalization']}{'' if info['config'] else ' (architecture inferred from the tensors)'}; {report}"
    )


def fit_label_plane(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with a stem of the module's number of input planes, 3 or 4 (label-assisted, `losses/lad.py`).

    A fourth plane that the file lacks is drawn from N(0, 0.1^2), as LAD does; one that the module lacks is left out: in published
    students its input is always 0, and a convolution of zeros adds nothing.
    """
    state = dict(state)
    for key, own in module.state_dict().items():
        theirs = state.get(key)
        if theirs is not None and own.dim() == theirs.dim() == 4 and (own.shape[1], theirs.shape[1]) in ((3, 4), (4, 3)):
            plane = 0.1 * torch.randn_like(theirs[:, :1])
            state[key] = theirs[:, :3] if own.shape[1] == 3 else torch.cat([theirs, plane], 1)
    return state


def load_into(model: Segmentor, path: str | Path, *, allow_classifier_mismatch: bool = False) -> str:
    """Start an existing model from a whole checkpoint; returns a report for the log with every key that was not matched.

    The auxiliary head may be on one side only. Backbone and head must fit; a file that holds a backbone alone fills that.

    Args:
        allow_classifier_mismatch: keep the model's own classifiers where the file's have another number of classes.

    Raises:
        ValueError: see `read_state`; tensors that do not fit (one line, then the table).
    """
    state, info = read_state(path)
    expected, state = expected_normalization(state, info), translate_keys(state)
    if not any(key.startswith("backbone.") for key in state):
        return f"a backbone alone: {load_backbone(model, path)}"

    def allowed(row: Difference) -> bool:
        if row.problem == "wrong shape":
            return allow_classifier_mismatch and "classifier." in row.key
        return row.key.startswith((UNREAD, *(f"{name}_head." for name in AUXILIARY)))

    return load_matching(model, fit_label_plane(model, state), str(path), allowed) + normalization_note(model, expected)


def expected_normalization(state: dict[str, Tensor], info: dict) -> str | None:
    """What the network in a file, as `read_state` returns it, expects at its input; None where nothing tells."""
    if info["config"]:
        return info["config"]["model"].get("normalization")
    # the CIRKD line's ImageNet files are known by their deep stem
    return normalization_of(state) or ("caffe-bgr" if "conv3.weight" in state else None)


def load_backbone(model: Segmentor, source: str | Path) -> str:
    """Start the backbone of `model` from "imagenet", a file, or not at all ("none"); returns a report for the log.

    Files: torchvision's state dicts of the ResNets and MobileNets, the CIRKD line's (deep stem, MobileNetV3), those of the authors of
    SegFormer (MiT), HRNet, STDC and DDRNet. Their ImageNet classifier is not used.

    Raises:
        ValueError: see `load_imagenet` and `read_state`; tensors that do not fit (one line, then the table).
    """
    if str(source) == "none":
        return "random weights"
    if str(source) == "imagenet":
        return load_imagenet(model.backbone, model.config["backbone"]) + normalization_note(model, "imagenet")
    state, info = read_state(source)
    expected = expected_normalization(state, info) or ("imagenet" if model.config["backbone"] in IMAGENET_FILES else None)
    return load_trunk(model.backbone, state, str(source)) + normalization_note(model, expected)


def load_imagenet(backbone: nn.Module, name: str) -> str:
    """torchvision's ImageNet weights (IMAGENET1K_V1, those of the published results) into the backbone called `name`.

    Returns a report for the log.

    Raises:
        ValueError: torchvision has none for this backbone; or they cannot be downloaded (one line with the address and the place
            for the file).
    """
    if name not in TORCHVISION_NAMES:
        sibling = f"use {name}_vanilla, which has its stem, or " if f"{name}_vanilla" in TORCHVISION_NAMES else ""
        file = IMAGENET_FILES.get(name, f"{name}-imagenet.pth")
        raise ValueError(f"torchvision has no ImageNet weights for {name}; {sibling}give a file, such as {file}, or 'none'")
    url = torchvision.models.get_model_weights(TORCHVISION_NAMES[name]).IMAGENET1K_V1.url
    try:
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except Exception as error:  # no network, no space, wrong hash, a damaged file in the cache
        place = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        raise ValueError(
            f"no ImageNet weights for {name} from {url} ({' '.join(str(error).split())}); put that file at {place}, "
            f"or give its path instead of 'imagenet', or 'none'"
        ) from error
    return load_trunk(backbone, state, Path(url).name)


def load_trunk(backbone: nn.Module, state: dict[str, Tensor], source: str) -> str:
    """A classification network's weights into a backbone; only its classifier may be left over."""
    # the last two: MobileNetV2's 1280 channels before its classifier
    leftover = ("fc.", "classifier.", "head.", "features.18.", "conv.", *getattr(backbone, "leftover", ()))
    state = translate_keys(state)
    if backbone.state_dict().keys().isdisjoint(state):  # the names of torchvision's segmentation networks, which lack this part
        state = {key.removeprefix("features."): value for key, value in state.items()}
    state = fit_label_plane(backbone, fit_epsilon(backbone, state))
    return load_matching(backbone, state, source, lambda row: row.problem == "unexpected" and row.key.startswith(leftover))


def fit_epsilon(backbone: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's MobileNetV3 with variances that give the same outputs in a backbone whose BatchNorm adds another epsilon."""
    if "classifier.3.weight" not in state:  # the ImageNet classifier, which files of other origin lack
        return state
    state = dict(state)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{name}.running_var" in state:
            state[f"{name}.running_var"] = state[f"{name}.running_var"] + (MOBILENETV3_EPSILON - module.eps)
    return state


def normalization_note(model: Segmentor, expected: str | None) -> str:
    """A line for the report when the weights were trained on inputs that are normalised in another way."""
    own = model.config["normalization"]
    return "" if expected in (None, own) else f"\nnote: these weights expect normalization {expected}, the model has {own}"
