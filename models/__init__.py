"""Segmentation networks by name: `build_model("deeplabv3", "resnet18", 19)`. `python -m models` lists them with their cost."""

from difflib import get_close_matches
from typing import NamedTuple

from .backbones import BACKBONES, build_backbone, output_strides
from .cost import count_macs, count_parameters
from .deeplabv3 import DeepLabV3Head
from .head import Head
from .output import FIELDS, SegOutput
from .pspnet import PSPHead
from .segmentor import NORMALIZATIONS, Segmentor

__all__ = [
    "BACKBONES", "FIELDS", "MODELS", "NORMALIZATIONS", "SegOutput", "Segmentor", "backbones_of",
    "build_model", "count_macs", "count_parameters", "list_models",
]  # fmt: skip


class Model(NamedTuple):
    """One entry of MODELS.

    head: the class. widths, width: the head's width on the backbones where it is not `width`. output_stride: of c4, on backbones
    that can have it. backbones: the only ones the model is built on; empty: every one that serves several models, SHARED.
    """

    head: type[Head]
    widths: dict[str, int]
    width: int = 128
    output_stride: int = 8
    backbones: tuple[str, ...] = ()


# Widths of CIRKD v1 and Af-DCD. CIRKDv2 has 512 for DeepLabV3 on every ResNet and 256 for PSPNet-R101: pass head_width.
MODELS = {
    "deeplabv3": Model(DeepLabV3Head, {"resnet50": 256, "resnet101": 256}),
    "pspnet": Model(PSPHead, {"resnet50": 512, "resnet101": 512}),
}
SHARED = tuple(name for name in BACKBONES if not any(name in entry.backbones for entry in MODELS.values()))
ALIASES = {"psp": "pspnet", "psp_mobile": "pspnet", "deeplab_mobile": "deeplabv3"}  # as the CIRKD line calls them


def choose(kind: str, name: str, possible) -> str:
    """The name if it is possible; else a ValueError with the closest one."""
    if name in possible:
        return name
    close = get_close_matches(str(name), possible, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"there is no {kind} {name!r}{hint}; possible: {', '.join(possible)}")


def build_model(
    model: str,
    backbone: str,
    num_classes: int,
    *,
    head_width: int | None = None,
    aux: bool | None = None,
    normalization: str = "imagenet",
    in_channels: int = 3,
    head_after_dropout: bool = False,
    output_stride: int | None = None,
) -> Segmentor:
    """A network with random weights.

    Args:
        model: a name in MODELS or ALIASES.
        backbone: a name in BACKBONES. `resnet18` has the CIRKD line's deep stem, `resnet18_vanilla` torchvision's 7x7.
        num_classes: K.
        head_width: channels of `SegOutput.head`; None for the width of the published CIRKD v1 and Af-DCD models.
        aux: with an auxiliary head on c3; None for ResNets only, as published. A head that needs its own says so by refusing False.
        normalization: a name in NORMALIZATIONS.
        in_channels: 3, or 4 for label-assisted teachers.
        head_after_dropout: see `Head`.
        output_stride: of c4: 8, 16 or 32; None for the published one.

    Raises:
        ValueError: a name is unknown or a number impossible.
    """
    model = choose("model", ALIASES.get(model, model), MODELS)
    choose("backbone", backbone, BACKBONES)
    choose("normalization", normalization, NORMALIZATIONS)
    if in_channels not in (3, 4):
        raise ValueError(f"in_channels is {in_channels}; possible: 3 (RGB), 4 (RGB and a label plane)")
    entry = MODELS[model]
    if backbone not in backbones_of(model):
        raise ValueError(f"{model} is not built on {backbone}; possible: {', '.join(backbones_of(model))}")
    if aux is False and "aux" in entry.head.intrinsic:
        raise ValueError(f"{model} reads its auxiliary head to predict; it cannot be built with aux=False")
    if output_stride is None:
        possible = output_strides(backbone)
        output_stride = entry.output_stride if entry.output_stride in possible else possible[-1]
    config = {
        "model": model,
        "backbone": backbone,
        "num_classes": num_classes,
        "head_width": head_width or entry.widths.get(backbone.removesuffix("_vanilla"), entry.width),
        "aux": backbone.startswith("resnet") or "aux" in entry.head.intrinsic if aux is None else aux,
        "normalization": normalization,
        "in_channels": in_channels,
        "head_after_dropout": head_after_dropout,
        "output_stride": output_stride,
    }
    trunk = build_backbone(backbone, output_stride, in_channels)
    head = entry.head(trunk.channels, config["head_width"], num_classes, stride=output_stride, head_after_dropout=head_after_dropout)
    return Segmentor(trunk, head, config)


def backbones_of(model: str) -> tuple[str, ...]:
    """The backbones that a model of MODELS is built on."""
    return MODELS[model].backbones or SHARED


def list_models() -> list[tuple[str, str]]:
    """Every (model, backbone) that `build_model` builds."""
    return [(model, backbone) for model in MODELS for backbone in backbones_of(model)]
