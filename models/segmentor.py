"""Image -> SegOutput: input normalisation, backbone, head, auxiliary head."""

from collections.abc import Iterable
from contextlib import nullcontext

from torch import Tensor, nn

from .fcn import FCNHead
from .head import Head
from .layers import inputs_of
from .normalization import Normalized
from .output import AUXILIARY, FIELDS, SegOutput


class Segmentor(Normalized):
    """A segmentation network with its normalisation.

    `models.build_model` builds one from names. Attributes:
        config: arguments that make `build_model` build the same architecture again.
        channels: field of SegOutput -> number of channels; "aux", "aux2" and "detail" are there only if the model has such a head.
        stride, num_classes: of `logits`.

    Args:
        backbone: module with `.channels` whose forward returns (c1, c2, c3, c4).
        head: (c1, c2, c3, c4) -> {"head": ..., "logits": ...}.
        config: see above; what is read here are aux, detail, num_classes, normalization, in_channels and output_stride.
    """

    def __init__(self, backbone: nn.Module, head: Head, config: dict):
        super().__init__(config)
        self.backbone = backbone
        self.head = head
        wanted = {"aux": config["aux"], "aux2": config["aux"], "detail": config["detail"]}
        auxiliary = head.auxiliary(backbone.channels, config["num_classes"]) if any(wanted.values()) else {}
        if config["aux"] and not auxiliary and "aux" not in head.intrinsic:
            stage = getattr(backbone, "aux_stage", 2)
            auxiliary["aux"] = FCNHead(backbone.channels, backbone.channels[stage] // 4, config["num_classes"], stage=stage)
        self.aux_head, self.aux2_head, self.detail_head = (auxiliary.get(name) if wanted[name] else None for name in AUXILIARY)

        self.num_classes = config["num_classes"]
        self.stride = head.stride or config["output_stride"]
        self.channels = {"logits": self.num_classes, "head": head.classifier.in_channels}
        for kind in "cp":
            self.channels.update({f"{kind}{number}": width for number, width in enumerate(backbone.channels, 1)})
        if "aux" in head.intrinsic:
            self.channels["aux"] = self.num_classes
        self.channels.update({name: part.classifier.out_channels for name, part in self.auxiliary.items()})

    @property
    def auxiliary(self) -> dict[str, Head]:
        """The auxiliary heads by the field that each computes."""
        heads = {name: getattr(self, f"{name}_head") for name in AUXILIARY}
        return {name: head for name, head in heads.items() if head is not None}

    @property
    def norms(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight and bias of the last BatchNorm in front of p1..p4 by their names; {} for backbones whose stages end in no ReLU, or in
        that of a sum of several maps."""
        blocks = getattr(self.backbone, "last_blocks", ())
        layers = [getattr(block, "bn3", block.bn2) for block in blocks]
        return {f"p{number}": (layer.weight.detach(), layer.bias.detach()) for number, layer in enumerate(layers, 1)}

    def forward(self, image: Tensor, needs: Iterable[str] = ("logits",)) -> SegOutput:
        """(B, 3, H, W) uint8 or float, RGB in 0..255 -> SegOutput with the fields that are named in `needs`.

        The heads run only if something they compute is asked for.
        """
        needs = set(needs)
        if unknown := sorted(needs - set(FIELDS)):
            raise ValueError(f"no output is called {', '.join(map(repr, unknown))}; possible: {', '.join(FIELDS)}")
        for name in AUXILIARY:
            if name in needs and name not in self.channels:
                head, flag = {"aux": ("auxiliary", "aux"), "aux2": ("second auxiliary", "aux"), "detail": ("detail", "detail")}[name]
                raise ValueError(f"{name!r} was asked for, but this model has no {head} head; build it with {flag}=True")

        last = enumerate(getattr(self.backbone, "last_relus", ()), 1)
        relus = {f"p{number}": relu for number, relu in last if f"p{number}" in needs}
        with inputs_of(relus) if relus else nullcontext({}) as before_relu:
            stages = self.backbone(self.normalize(image))
        fields = {f"{kind}{number}": stage for kind in "cp" for number, stage in enumerate(stages[:4], 1)} | before_relu
        auxiliary = {name: head for name, head in self.auxiliary.items() if name in needs}
        of_head = needs & {"head", "logits", *self.head.intrinsic}
        if of_head or auxiliary:
            stages = self.head.extend(stages)
        if of_head:
            fields |= self.head(stages)
        fields |= {name: head(stages)["logits"] for name, head in auxiliary.items()}
        return SegOutput(**{name: fields[name] for name in FIELDS if name in needs})
