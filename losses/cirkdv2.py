"""CIRKDv2: CIRKD with a context module in front, feature mimicking, and relations between channels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import option, term_weight
from losses.cirkd import CIRKD, Projection, minibatch_relation
from losses.functional import full_precision, similarity_kl, unit
from models.layers import regional_means
from utils import distributed


class CIRKDv2(CIRKD):
    """CIRKD's terms, FitNet's and three on channels; a context module refines the student's `head` in front of all of them.

    The context module belongs to the method: it sees the student's feature in every term but `kd`, and is dropped after training.
    Term `fitnet`: mean (W f_S - f_T)^2. For the channel terms a channel is its map, pooled by 4x4 and made a unit vector over the
    positions; the student's are first projected to the teacher's width. Term `minibatch_channel`: for all ordered pairs of images,
    KL(teacher || student) of softmax(F_i F_j^T / 0.1) over the channels of j, averaged over channels and pairs; `channel_mse`: mean
    (F_S - F_T)^2; `memory_channel`: the relation to a sample of a queue of the teacher's channels.

    All terms are means with the published weights: factor 1 to the paper's numbers. The published weight of `fitnet` is 10 but for
    DeepLabV3-ResNet18 on Cityscapes, where it is 1 (PSPNet-MobileNetV3-Small there: 10).

    The channel queue needs channels of one length, ceil(H/8/4) x ceil(W/8/4) positions of the crop (H, W), the 4x4 pooling of a map
    of stride 8. A map of another stride (SegFormer's 4) is averaged to that very grid.

    Differs from the released code: as CIRKD does; and in the grid of maps of other strides.
    """

    title = "Cross-image relational knowledge distillation, version 2"
    paper = "Yang et al.: CIRKDv2, 2025 (pixel-wise and channel-wise relations; released beside CIRKD)"
    url = "https://github.com/winycg/CIRKD"

    @dataclass(frozen=True)
    class Options(CIRKD.Options):
        fitnet_weight: float = term_weight(10.0, "weight of the squared difference of the features", citys=1.0)
        minibatch_channel_weight: float = term_weight(1.0, "weight of the relation between the channels of a batch")
        channel_mse_weight: float = term_weight(100.0, "weight of the squared difference of the normalised channels")
        memory_channel_weight: float = term_weight(0.1, "weight of the relation to remembered channels")
        channel_queue: int = option(10000, "remembered channels", minimum=1, terms=("memory_channel",))
        channel_updates: int = option(256, "channels that one step adds to the memory, from all ranks together", minimum=1, terms=("memory_channel",))
        channel_samples: int = option(2048, "remembered channels that one step compares with", minimum=1, terms=("memory_channel",))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        student, teacher = setup.student.get("head"), setup.teacher.get("head")
        if "head" in self.needs:
            self.context = Context(student)
        if self.active("fitnet"):
            self.regress = nn.Conv2d(student, teacher, 1, bias=False)
        self.channel_terms = [term for term in self.weights if "channel" in term]
        if self.channel_terms:
            self.project_channels = Projection(student, teacher)
        if self.active("memory_channel") and options.channel_updates > options.channel_queue:
            raise ValueError(f"--{self.name}-channel-updates {options.channel_updates}: must be at most --{self.name}-channel-queue, "
                             f"{options.channel_queue}")  # fmt: skip

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the pooled channels."""
        return tuple(-(-side // 32) for side in self.setup.crop)  # is ceil(ceil(side / 8) / 4)

    def queue_shapes(self):
        channel = {"channel": (1, self.options.channel_queue, self.grid[0] * self.grid[1])} if self.active("memory_channel") else {}
        return super().queue_shapes() | channel

    def relations(self, student, teacher, batch):
        student = self.context(student)
        terms = super().relations(student, teacher, batch)
        if self.active("fitnet"):
            terms["fitnet"] = mean_square(self.regress(student), teacher)
        if self.channel_terms:
            terms |= self.channels(student, teacher, batch)
        return terms

    def minibatch_pixel(self, student, teacher):
        if min(student.shape[-2:]) >= 256:
            student, teacher = F.avg_pool2d(student, 4), F.avg_pool2d(teacher, 4)
        return super().minibatch_pixel(student, teacher)

    def channels(self, student: Tensor, teacher: Tensor, batch) -> dict[str, Tensor]:
        """The active terms between channels."""
        options, terms = self.options, {}
        student = unit(self.project_channels(pool_to(student, self.grid)).flatten(2), -1)  # (B, Ct, P)
        teacher = unit(pool_to(teacher, self.grid).flatten(2), -1)
        if self.active("minibatch_channel"):
            terms["minibatch_channel"] = minibatch_relation(student, teacher, options.temperature, options.gather)
        if self.active("channel_mse"):
            terms["channel_mse"] = mean_square(student, teacher)
        if self.active("memory_channel"):
            queue = self.queues["channel"]
            noise = self.uniform(batch, teacher.shape[1])
            new = random_rows(distributed.gather(teacher), distributed.gather(noise), options.channel_updates)
            queue.enqueue(new[None, None], torch.full((1, 1), len(new), device=new.device))
            keys = queue.sample(self.common_noise(batch, queue.size), options.channel_samples)[None]
            terms["memory_channel"] = similarity_kl(student.flatten(0, 1), keys, teacher.flatten(0, 1), keys, options.temperature)
        return terms


class Context(nn.Module):
    """Every position attends to all others, in half the channels; the result is joined to the feature: (B, C, h, w), same shape."""

    def __init__(self, channels: int):
        super().__init__()
        inner = channels // 2
        self.query, self.key, self.value = (nn.Conv2d(channels, inner, 1, bias=False) for _ in range(3))
        self.expand = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.join = nn.Sequential(nn.Conv2d(2 * channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        # (B, 1, N, C/2); torch's attention keeps no N x N map
        query, key, value = (layer(x).flatten(2).transpose(1, 2)[:, None] for layer in (self.query, self.key, self.value))
        context = F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])
        return self.join(torch.cat([x, self.expand(context)], 1))


@full_precision
def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """mean (student - teacher)^2 over all elements."""
    return F.mse_loss(student, teacher)


@full_precision
def pool_to(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """x (B, C, h, w) averaged over 4x4 windows, smaller ones at the far edges, where that gives the grid; else over windows that do."""
    if tuple(-(-side // 4) for side in x.shape[-2:]) == grid:
        return F.avg_pool2d(x, 4, ceil_mode=True)
    return regional_means(x, grid)


def random_rows(vectors: Tensor, noise: Tensor, count: int) -> Tensor:
    """The `count` of the vectors (B, N, C), or all, with the smallest of the numbers noise (B, N): (count, C)."""
    chosen = noise.flatten().topk(min(count, noise.numel()), largest=False).indices
    return vectors.flatten(0, 1)[chosen]
