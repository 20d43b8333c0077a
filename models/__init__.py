"""Segmentation networks by name: `build_model("deeplabv3", "resnet18", 19)`. `python -m models` lists them with their cost."""

from difflib import get_close_matches
from typing import NamedTuple

from .backbones import BACKBONES, build_backbone, output_strides
from .cost import count_macs, count_parameters
from .ddrnet import DDRHead
from .deeplabv3 import DeepLabV3Head
from .deeplabv3plus import DeepLabV3PlusHead
from .fcn import FCNHead
from .head import Head
from .lraspp import LRASPPHead
from .normalization import NORMALIZATIONS
from .ocrnet import OCRHead
from .output import AUXILIARY, FIELDS, SegOutput
from .pspnet import PSPHead
from .segformer import MIX_TRANSFORMERS, SegFormerHead
from .segmentor import Segmentor
from .stdc import STDCHead
from .upernet import UPerHead

__all__ = [
    "AUXILIARY", "BACKBONES", "FIELDS", "MODELS", "NORMALIZATIONS", "SegOutput", "Segmentor", "backbones_of",
    "build_model", "count_macs", "count_parameters", "list_models",
]  # fmt: skip


class Model(NamedTuple):
    """One entry of MODELS.

    head: the class. widths, width: the head's width on the backbones where it is not `width`. output_stride: of c4, on backbones
    that can have it. backbones: the only ones the model is built on; empty: every one that serves several models, SHARED, and those
    of `beside`. aux: published with auxiliary heads on every backbone (True), none (False), ResNets alone (None). detail: with a detail head.
    backbone_options, head_options: further arguments of the constructors on single backbones, where the published model has them.
    """

    head: type[Head]
    widths: dict[str, int]
    width: int = 128
    output_stride: int = 8
    backbones: tuple[str, ...] = ()
    backbone_options: dict[str, dict] = {}
    head_options: dict[str, dict] = {}
    beside: tuple[str, ...] = ()
    aux: bool | None = None
    detail: bool = False


# Widths of CIRKD v1 and Af-DCD. CIRKDv2 has 512 for DeepLabV3 on every ResNet and 256 for PSPNet-R101: pass head_width.
MODELS = {
    "deeplabv3": Model(
        DeepLabV3Head, {"resnet50": 256, "resnet101": 256, "mobilenetv3_large_vanilla": 256},
        head_options={"mobilenetv3_large_vanilla": {"rates": (12, 24, 36)}},
    ),
    "deeplabv3plus": Model(
        DeepLabV3PlusHead, {}, 256, 16, aux=False,
        backbone_options={**{f"resnet{n}": {"at_once": True} for n in (18, 34, 50)}, "resnet101": {"at_once": True, "multi_grid": (1, 2, 4)}},
    ),  # fmt: skip
    "ddrnet": Model(DDRHead, {}, 64, 32, ("ddrnet23_slim",), aux=True),
    "fcn": Model(
        FCNHead, {"resnet50": 512, "resnet101": 512, "mobilenetv2": 80, "mobilenetv3_small": 144, "mobilenetv3_large": 240, "hrnet_w18": 270},
        head_options={"hrnet_w18": {"parallel": True}}, beside=("hrnet_w18",),
    ),
    "lraspp": Model(LRASPPHead, {}, output_stride=16, aux=False),
    "ocrnet": Model(OCRHead, {}, 512, head_options={"hrnet_w18": {"parallel": True}}, beside=("hrnet_w18",)),
    "pspnet": Model(PSPHead, {"resnet50": 512, "resnet101": 512}),
    "stdc": Model(STDCHead, {}, 256, 32, ("stdc1", "stdc2"), aux=True, detail=True),
    "upernet": Model(UPerHead, {}, 512),
    "upernet_lite": Model(UPerHead, {}),
    "segformer": Model(SegFormerHead, {"mit_b0": 256, "mit_b1": 256}, 768, output_stride=32, backbones=tuple(MIX_TRANSFORMERS)),
}
SHARED = tuple(name for name in BACKBONES if not any(name in entry.backbones + entry.beside for entry in MODELS.values()))
ALIASES = {"psp": "pspnet", "psp_mobile": "pspnet", "deeplab_mobile": "deeplabv3"}  # as the CIRKD line calls them


def of_backbone(table: dict, backbone: str, default):
    """The table's entry for a backbone; one for `resnet18` serves `resnet18_vanilla` too, unless that has its own."""
    return table.get(backbone, table.get(backbone.removesuffix("_vanilla"), default))


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
    detail: bool | None = None,
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
        aux: with auxiliary heads for training, one on c3 where the model has none of its own; None: as published, on ResNets and for
            some models. A head that needs its own says so by refusing False.
        detail: with a detail head, for training; None where the model can have one.
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
    if detail and not entry.detail:
        able = ", ".join(name for name, other in MODELS.items() if other.detail)
        raise ValueError(f"{model} has no detail head; possible with: {able}")
    if output_stride is None:
        possible = output_strides(backbone)
        output_stride = entry.output_stride if entry.output_stride in possible else possible[-1]
    if aux is None:
        aux = "aux" in entry.head.intrinsic or (backbone.startswith("resnet") if entry.aux is None else entry.aux)
    config = {
        "model": model,
        "backbone": backbone,
        "num_classes": num_classes,
        "head_width": head_width or default_width(model, backbone),
        "aux": aux,
        "detail": entry.detail if detail is None else detail,
        "normalization": normalization,
        "in_channels": in_channels,
        "head_after_dropout": head_after_dropout,
        "output_stride": output_stride,
    }
    trunk = build_backbone(backbone, output_stride, in_channels, **of_backbone(entry.backbone_options, backbone, {}))
    options = of_backbone(entry.head_options, backbone, {})
    head = entry.head(
        trunk.channels, config["head_width"], num_classes, stride=output_stride, head_after_dropout=head_after_dropout, **options
    )
    return Segmentor(trunk, head, config)


def default_width(model: str, backbone: str) -> int:
    """Channels of `SegOutput.head` of the published model."""
    return of_backbone(MODELS[model].widths, backbone, MODELS[model].width)


def backbones_of(model: str) -> tuple[str, ...]:
    """The backbones that a model of MODELS is built on."""
    return MODELS[model].backbones or SHARED + MODELS[model].beside


def list_models() -> list[tuple[str, str]]:
    """Every (model, backbone) that `build_model` builds."""
    return [(model, backbone) for model in MODELS for backbone in backbones_of(model)]
