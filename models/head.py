"""What all heads share."""

from torch import Tensor, nn


class Head(nn.Module):
    """Backbone stages -> {"head": ..., "logits": ...}. A new head defines `features` and calls `__init__` with the channels that it
    returns; its constructor takes (channels of c1..c4, width, num_classes, *, stride, head_after_dropout).

    Class attributes:
        stride: of the logits; None: that of c4. Where it depends on the backbone the constructor sets it.
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

    def extend(self, stages: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The backbone's stages, and after them what auxiliary heads read inside this head; all methods here get what it returns."""
        return stages

    def auxiliary(self, channels: tuple[int, ...], num_classes: int) -> dict[str, "Head"]:
        """This head's own auxiliary heads, on the extended stages, by the field that their logits become; {}: the model has the usual
        one, `FCNHead` on c3."""
        return {}

    def forward(self, stages: tuple[Tensor, ...]) -> dict[str, Tensor]:
        head = self.features(stages)
        dropped = self.dropout(head)
        return {"head": dropped if self.head_after_dropout else head, "logits": self.classifier(dropped)}
