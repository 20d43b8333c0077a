"""The key names of other codebases' checkpoints, and their translation. Another codebase is one more entry of LAYOUTS."""

import re
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """The key names of another codebase.

    mark: a regular expression found in some key of its files. rules: (pattern, replacement), all applied in order to every key.
    normalization: what its networks expect at their input; None where the layout is only a part of a file.
    """

    mark: str
    rules: tuple[tuple[str, str], ...]
    normalization: str | None = None


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
            (r"^(head|aux_head)\.block\.4\.", r"\1.classifier."),
            (r"^(head|aux_head)\.block\.", r"\1.fuse."),
        ),
        "caffe-bgr",
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
    return state


def apply(rules: tuple[tuple[str, str], ...], key: str) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
