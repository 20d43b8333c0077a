"""FCN: one convolution on a backbone stage (Long et al., CVPR 2015, https://arxiv.org/abs/1411.4038, in its common short form)."""

from torch import nn

from .head import Head
from .hrnet import join
from .layers import conv_bn_relu


class FCNHead(Head):
    """A stage -> 3x3 to `width`, a quarter of the stage's channels as published -> classifier. On c4 it is the network FCN (LAD's,
    and torchvision's), on an earlier stage the auxiliary head of other networks.

    Args:
        channels: of (c1, c2, c3, c4).
        stride: of c4; plays no part.
        stage: position of the stage in (c1, c2, c3, c4).
        parallel: the stages are branches of one depth, all of which are read: `hrnet.join`. The convolution is then 1x1, the logits have
            stride 4 and no dropout before them, as HRNetV2 is published.
    """

    def __init__(
        self, channels: tuple[int, ...], width: int, num_classes: int, *, stride: int = 8, head_after_dropout: bool = False, stage: int = 3,
        parallel: bool = False,
    ):  # fmt: skip
        super().__init__(width, num_classes, head_after_dropout)
        self.stage, self.parallel = stage, parallel
        if parallel:
            self.stride, self.dropout = 4, nn.Identity()
            self.fuse = conv_bn_relu(sum(channels), width, 1)
        else:
            self.fuse = conv_bn_relu(channels[stage], width, 3)

    def features(self, stages):
        return self.fuse(join(stages) if self.parallel else stages[self.stage])
