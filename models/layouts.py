"""The key names of other codebases' checkpoints, and their translation. Another codebase is one more entry of LAYOUTS."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The key names of another codebase.

    mark: a regular expression found in some key of its files. rules: (pattern, replacement), all applied in order to every key.
    normalization: what its networks expect at their input; None where the layout is only a part of a file.
    adapt: what renaming key by key cannot do, on the renamed tensors.
    """

    mark: str
    rules: tuple[tuple[str, str], ...]
    normalization: str | None = None
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


def number_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """MobileNetV3's blocks: torchvision numbers the parts that a block has, in the order in which they run."""
    order = ("expand_conv", "depthwise_conv", "se", "linear_conv")
    pattern = re.compile(rf"features\.(\d+)\.({'|'.join(order)})\.")
    present = {match.groups() for match in map(pattern.search, state) if match}

    def number(match):
        block, part = match.groups()
        return f"features.{block}.block.{sum((block, before) in present for before in order[: order.index(part)])}."

    return {pattern.sub(number, key): value for key, value in state.items()}


UNREAD = "decode_head.conv_seg."  # a classifier that mmsegmentation's heads hold and SegFormer's never reads


def adapt_segformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' fusion has no bias, this project's one of 0."""
    norm = state.get("head.fuse.1.bias")
    return state if norm is None else {**state, "head.fuse.0.bias": torch.zeros_like(norm)}


STAGES = (1, 2, 3, 4)
TORCHVISION_AUX = ((r"^aux_classifier\.([01])\.", r"aux_head.fuse.\1."), (r"^aux_classifier\.4\.", "aux_head.classifier."))
SEGFORMER_HEAD = (*((rf"^linear_c{n}\.proj\.", f"head.project.{n - 1}.") for n in STAGES), (r"^linear_pred\.", "head.classifier."))

LAYOUTS = {
    # CIRKD, CIRKDv2, Af-DCD, DIST, LAD
    "CIRKD line": Layout(
        r"^pretrained\.",
        (
            (r"^pretrained\.(net\.)?", "backbone."),
            (r"^head\.aspp\.b0\.", "head.aspp.0."),
            (r"^head\.aspp\.b([123])\.block\.", r"head.aspp.\1."),
            (r"^head\.aspp\.b4\.gap\.1\.", "head.pool.0."),  # gap.0 is the pooling itself
            (r"^head\.aspp\.b4\.gap\.2\.", "head.pool.1."),
            (r"^head\.aspp\.project\.", "head.project."),
            (r"^head\.psp\.conv1\.", "head.pyramid.0."),
            (r"^head\.psp\.conv2\.", "head.pyramid.1."),
            (r"^head\.psp\.conv3\.", "head.pyramid.2."),
            (r"^head\.psp\.conv4\.", "head.pyramid.3."),
            (r"^auxlayer\.", "aux_head."),
            (r"^head\.ppm_conv\.", "head.pyramid."),
            (r"^head\.ppm_last_conv\.", "head.deepest."),
            (r"^head\.fpn_in\.", "head.lateral."),
            (r"^head\.fpn_out\.(\d)\.0\.", r"head.smooth.\1."),
            (r"^head\.conv_last\.0\.", "head.fuse."),
            (r"^head\.conv_last\.1\.", "head.classifier."),
            (r"^(head|aux_head)\.block\.4\.", r"\1.classifier."),
            (r"^(head|aux_head)\.block\.", r"\1.fuse."),
        ),
        "caffe-bgr",
    ),
    # torchvision's segmentation networks, whose backbones have this project's names
    "torchvision's DeepLabV3": Layout(
        r"^classifier\.0\.convs\.",
        (
            (r"^classifier\.0\.convs\.4\.1\.", "head.pool.0."),  # 4.0 is the pooling itself
            (r"^classifier\.0\.convs\.4\.2\.", "head.pool.1."),
            (r"^classifier\.0\.convs\.", "head.aspp."),
            (r"^classifier\.0\.project\.", "head.project."),
            (r"^classifier\.1\.", "head.fuse.0."),
            (r"^classifier\.2\.", "head.fuse.1."),
            (r"^classifier\.4\.", "head.classifier."),
            *TORCHVISION_AUX,
        ),
        "imagenet",
    ),
    "torchvision's FCN": Layout(
        r"^classifier\.1\.running_mean$",
        ((r"^classifier\.([01])\.", r"head.fuse.\1."), (r"^classifier\.4\.", "head.classifier."), *TORCHVISION_AUX),
        "imagenet",
    ),
    "torchvision's LR-ASPP": Layout(
        r"^classifier\.low_classifier\.",
        (
            (r"^classifier\.cbr\.", "head.reduce."),
            (r"^classifier\.scale\.1\.", "head.gate."),
            (r"^classifier\.low_classifier\.", "head.low_classifier."),
            (r"^classifier\.high_classifier\.", "head.classifier."),
        ),
        "imagenet",
    ),
    # DeepLabV3+; on ResNets the backbone has this project's names
    "AICSD": Layout(
        r"^aspp\.aspp1\.",
        (
            *((rf"^aspp\.aspp{n}\.atrous_conv\.", f"head.aspp.{n - 1}.0.") for n in STAGES),
            *((rf"^aspp\.aspp{n}\.bn\.", f"head.aspp.{n - 1}.1.") for n in STAGES),
            (r"^aspp\.global_avg_pool\.1\.", "head.pool.0."),  # 0 is the pooling itself
            (r"^aspp\.global_avg_pool\.2\.", "head.pool.1."),
            (r"^aspp\.conv1\.", "head.project.0."),
            (r"^aspp\.bn1\.", "head.project.1."),
            (r"^decoder\.conv1\.", "head.low.0."),
            (r"^decoder\.bn1\.", "head.low.1."),
            (r"^decoder\.last_conv\.8\.", "head.classifier."),
            (r"^decoder\.last_conv\.", "head.fuse."),
        ),
        "imagenet",
    ),
    # MobileNetV2 blocks as one flat list (conv, BN, ReLU6, conv, ...); torchvision nests each conv, BN, ReLU6 in a list of its own
    "flat MobileNetV2": Layout(
        r"features\.1\.conv\.0\.weight$",
        (
            (r"(features\.\d+\.conv)\.([01])\.(?=[a-z])", r"\1.0.\2."),
            (r"(features\.1\.conv)\.3\.", r"\1.1."),  # block 1 has no expansion, hence one list less
            (r"(features\.1\.conv)\.4\.", r"\1.2."),
            (r"(features\.(?!1\.)\d+\.conv)\.3\.", r"\1.1.0."),
            (r"(features\.(?!1\.)\d+\.conv)\.4\.", r"\1.1.1."),
            (r"(features\.(?!1\.)\d+\.conv)\.6\.", r"\1.2."),
            (r"(features\.(?!1\.)\d+\.conv)\.7\.", r"\1.3."),
        ),
    ),
    # torchvision numbers the layers of a block
    "MobileNetV3 with named parts": Layout(
        r"(^|\.)layer\d+\.depthwise_conv\.",
        (
            (r"(^|\.)layer(\d+)\.", r"\1features.\2."),
            (r"(_conv|features\.\d+)\.conv\.", r"\1.0."),
            (r"(_conv|features\.\d+)\.bn\.", r"\1.1."),
            (r"\.se\.conv([12])\.conv\.", r".se.fc\1."),
        ),
        adapt=number_parts,
    ),
    # CIRKD's and CIRKDv2's
    "SegFormer": Layout(
        r"^linear_pred\.",
        ((r"^(?=(patch_embed|block|norm)\d\.)", "backbone."), (r"^linear_fuse\.", "head.fuse."), *SEGFORMER_HEAD),
        "caffe-bgr",
    ),
    # its authors', within mmsegmentation
    "official SegFormer": Layout(
        r"^decode_head\.linear_pred\.",
        (
            (r"^decode_head\.(?!conv_seg)", ""),
            (r"^linear_fuse\.conv\.", "head.fuse.0."),
            (r"^linear_fuse\.bn\.", "head.fuse.1."),
            *SEGFORMER_HEAD,
        ),
        "imagenet",
        adapt_segformer,
    ),
    "Mix Transformer": Layout(
        r"(^|\.)patch_embed1\.proj\.",
        (
            *((rf"(^|\.)patch_embed{n}\.proj\.", rf"\1stages.{n - 1}.patch.") for n in STAGES),
            *((rf"(^|\.)patch_embed{n}\.norm\.", rf"\1stages.{n - 1}.patch_norm.") for n in STAGES),
            *((rf"(^|\.)block{n}\.", rf"\1stages.{n - 1}.blocks.") for n in STAGES),
            *((rf"^(backbone\.)?norm{n}\.", rf"\1stages.{n - 1}.norm.") for n in STAGES),
            (r"\.dwconv\.dwconv\.", ".dwconv."),
        ),
    ),
}


def found(state: dict[str, Tensor]) -> list[Layout]:
    """The layouts whose mark some key bears."""
    return [layout for layout in LAYOUTS.values() if any(re.search(layout.mark, key) for key in state)]


def normalization_of(state: dict[str, Tensor]) -> str | None:
    """What the networks of the file's codebase expect at their input; None for this project's own key names."""
    return next((layout.normalization for layout in found(state) if layout.normalization), None)


def translate_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under this project's names; names that no layout knows stay, so translated keys stay too."""
    for layout in LAYOUTS.values():
        if any(re.search(layout.mark, key) for key in state):
            state = {apply(layout.rules, key): value for key, value in state.items()}
            state = layout.adapt(state) if layout.adapt else state
    return state


def apply(rules: tuple[tuple[str, str], ...], key: str) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
