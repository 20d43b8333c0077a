"""Image -> SegOutput: input normalisation, backbone, head, auxiliary head."""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .head import FCNHead, Head
from .layers import inputs_of
from .output import FIELDS, SegOutput

# name: (channel order, mean, standard deviation) in units of 0..255
NORMALIZATIONS = {
    "imagenet": ("RGB", (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)),
    "caffe-bgr": ("BGR", (104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0)),  # the published weights of the CIRKD line
    "none": ("RGB", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # fed as it is
}


class Segmentor(nn.Module):
    """A segmentation network that owns its normalisation, since that is part of what its weights mean.

    `models.build_model` builds one from names. Attributes:
        config: arguments that make `build_model` build the same architecture again.
        channels: field of SegOutput -> number of channels; "aux" is there only if the model has an auxiliary head.
        stride, num_classes: of `logits`.

    Args:
        backbone: module with `.channels` whose forward returns (c1, c2, c3, c4).
        head: (c1, c2, c3, c4) -> {"head": ..., "logits": ...}.
        config: see above; what is read here are aux, num_classes, normalization, in_channels and output_stride.
    """

    def __init__(self, backbone: nn.Module, head: Head, config: dict):
        super().__init__()
        self.backbone = backbone
        self.head = head
        extra = config["aux"] and "aux" not in head.intrinsic
        self.aux_head = FCNHead(backbone.channels[2], config["num_classes"], stage=2) if extra else None

        self.config = dict(config)
        self.num_classes = config["num_classes"]
        self.stride = head.stride or config["output_stride"]
        self.channels = {"logits": self.num_classes, "head": head.classifier.in_channels}
        for kind in "cp":
            self.channels.update({f"{kind}{number}": width for number, width in enumerate(backbone.channels, 1)})
        if config["aux"]:
            self.channels["aux"] = self.num_classes

        order, mean, std = NORMALIZATIONS[config["normalization"]]
        self.bgr = order == "BGR"
        # not persistent: the name in `config` says it all, and published checkpoints have no such keys
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def norms(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight and bias of the last BatchNorm in front of p1..p4 by their names; {} for backbones whose stages end in no ReLU."""
        blocks = getattr(self.backbone, "last_blocks", ())
        layers = [getattr(block, "bn3", block.bn2) for block in blocks]
        return {f"p{number}": (layer.weight.detach(), layer.bias.detach()) for number, layer in enumerate(layers, 1)}

    def normalize(self, image: Tensor) -> Tensor:
        """(B, 3 or 4, H, W) RGB in 0..255, any dtype -> what the backbone expects, in the model's dtype.

        A model with four input channels gets the fourth as it is, zeros if the image has none.
        """
        expected = self.config["in_channels"]
        if image.dim() != 4 or image.shape[1] not in (3, expected):
            possible = "3" if expected == 3 else "3 or 4"
            raise ValueError(f"image has shape {tuple(image.shape)}; this model takes (B, {possible}, H, W)")
        image = image.to(torch.promote_types(self.mean.dtype, torch.float32))  # 0..255 minus a mean needs more than bfloat16's 8 bits
        colour = image[:, :3].flip(1) if self.bgr else image[:, :3]
        colour = (colour - self.mean) / self.std
        if expected == 4:
            fourth = image[:, 3:] if image.shape[1] == 4 else torch.zeros_like(image[:, :1])
            colour = torch.cat([colour, fourth], dim=1)
        return colour.to(self.mean.dtype)

    def forward(self, image: Tensor, needs: Iterable[str] = ("logits",)) -> SegOutput:
        """(B, 3, H, W) uint8 or float, RGB in 0..255 -> SegOutput with the fields that are named in `needs`.

        The heads run only if something they compute is asked for.
        """
        needs = set(needs)
        if unknown := sorted(needs - set(FIELDS)):
            raise ValueError(f"no output is called {', '.join(map(repr, unknown))}; possible: {', '.join(FIELDS)}")
        if "aux" in needs and not self.config["aux"]:
            raise ValueError("'aux' was asked for, but this model has no auxiliary head; build it with aux=True")

        last = enumerate(getattr(self.backbone, "last_blocks", ()), 1)
        relus = {f"p{number}": block.relu for number, block in last if f"p{number}" in needs}
        with inputs_of(relus) if relus else nullcontext({}) as before_relu:
            stages = self.backbone(self.normalize(image))
        fields = {f"{kind}{number}": stage for kind in "cp" for number, stage in enumerate(stages[:4], 1)} | before_relu
        if needs & {"head", "logits", *self.head.intrinsic}:
            fields |= self.head(stages)
        if "aux" in needs and self.aux_head is not None:
            fields["aux"] = self.aux_head(stages)["logits"]
        return SegOutput(**{name: fields[name] for name in FIELDS if name in needs})
