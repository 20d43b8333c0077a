"""What all heads share, and the one-convolution head that the auxiliary loss uses."""

from torch import Tensor, nn

from .layers import conv_bn_relu


class Head(nn.Module):
    """Backbone stages -> {"head": ..., "logits": ...}. A new head defines `features` and calls `__init__` with the channels that it
    returns; its constructor takes (channels of c1..c4, width, num_classes, *, stride, head_after_dropout).

    Class attributes:
        stride: of the logits; None: that of c4.
        intrinsic: names of further fields of SegOutput that `forward` returns, since the logits depend on them; the model then
            builds no auxiliary head of its own for them.

    Args:
        width: channels of what `features` returns, the input of the 1x1 classifier.
        num_classes: K.
        head_after_dropout: return `head` behind the Dropout(0.1) instead of before it. The released CIRKD code does, so that the
            student's features carry dropout noise in training; in evaluation both are equal.
    """

    stride: int | None = None
    intrinsic: tuple[str, ...] = ()

    def __init__(self, width: int, num_classes: int, head_after_dropout: bool = False):
        super().__init__()
        self.head_after_dropout = head_after_dropout
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def features(self, stages: tuple[Tensor, ...]) -> Tensor:
        """(c1, c2, c3, c4) -> (B, width, h, w)."""
        raise NotImplementedError

    def forward(self, stages: tuple[Tensor, ...]) -> dict[str, Tensor]:
        head = self.features(stages)
        dropped = self.dropout(head)
        return {"head": dropped if self.head_after_dropout else head, "logits": self.classifier(dropped)}


class FCNHead(Head):
    """3x3 convolution to a quarter of a stage's channels, then the classifier (Long et al., CVPR 2015, in its common short form).

    Args:
        in_channels: channels of the stage.
        stage: its position in (c1, c2, c3, c4).
    """

    def __init__(self, in_channels: int, num_classes: int, stage: int):
        width = in_channels // 4
        super().__init__(width, num_classes)
        self.stage = stage
        self.fuse = conv_bn_relu(in_channels, width, 3)

    def features(self, stages):
        return self.fuse(stages[self.stage])
