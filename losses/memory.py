"""Memory queues: features of earlier steps that a loss contrasts with, class by class, identical on every rank.

Every rank enqueues the entries of all ranks and draws with random numbers that depend on no rank, so that queues which start
equal stay equal without being sent. All functions are pure tensor arithmetic: no loop over images or classes, nothing read back.
"""

import logging
from zlib import crc32

import torch
from torch import Tensor, nn

from losses.functional import full_precision, unit

logger = logging.getLogger("segkd")


class Queue(nn.Module):
    """K ring buffers of `size` vectors: random unit vectors at first, drawn from `seed` on the CPU whatever the device.

    Buffers, saved with the checkpoint: `rows` (K * size + 1, C), whose last row is a spare one that takes what is not to be stored
    (an index of fixed length needs no look at the data), and `pointer` (K,), each class's next slot.
    """

    def __init__(self, num_classes: int, size: int, width: int, seed: int):
        super().__init__()
        self.num_classes, self.size = num_classes, size
        rows = torch.randn(num_classes * size + 1, width, generator=torch.Generator().manual_seed(seed))
        rows /= rows.norm(dim=1, keepdim=True)  # in place: the published queues take up to 3.5 GiB
        rows[-1] = 0
        self.register_buffer("rows", rows)
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.long))

    @property
    def entries(self) -> Tensor:
        """(K, size, C)"""
        return self.rows[:-1].view(self.num_classes, self.size, -1)

    @torch.no_grad()
    def enqueue(self, entries: Tensor, counts: Tensor) -> None:
        """Store the first counts[b, k] of the m vectors entries[b, k], image after image; entries (B, K, m, C), counts (B, K).

        n vectors of one image go to the next n slots. Where fewer than n + 1 slots are left before the end, they go to the last n
        slots instead, and the pointer returns to 0 (the released rule). Needs size >= B * m, so that a call wraps once at most.
        """
        slot, stored, pointer = self.slots(counts, entries.shape[2])
        row = torch.where(stored, slot + self.size * torch.arange(self.num_classes, device=slot.device)[:, None], len(self.rows) - 1)
        self.rows[row.flatten()] = (entries.to(self.rows.dtype) * stored[..., None]).flatten(0, 2)
        self.pointer.copy_(pointer)

    def slots(self, counts: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where `enqueue` writes: the slot of every vector and whether it is stored, both (B, K, most), and the next pointer (K,)."""
        assert len(counts) * most <= self.size
        ends = counts.cumsum(0) + self.pointer  # (B, K): where the pointer would stand after each image on an endless queue
        wrapped = ends >= self.size
        first = wrapped & (wrapped.cumsum(0) == 1)  # the image that reaches the end
        overhang = (ends * first).sum(0)  # (K,): what the images after it start from
        tail = self.size - (counts * first).sum(0)  # (K,): its first slot; `size` where no image reaches the end
        start = torch.where(first, tail, ends - counts - overhang * wrapped)
        number = torch.arange(most, device=counts.device)
        slot = start[..., None] + number
        # what the wrapping image overwrites in this very call is not written: on a GPU two writes to one row have no order
        stored = (number < counts[..., None]) & (wrapped[..., None] | (slot < tail[:, None]))
        return slot, stored, ends[-1] - overhang

    def sample(self, noise: Tensor, count: int) -> Tensor:
        """`count` slots, the same for every class, those with the smallest of the numbers noise (size,): (K * count, C)."""
        slots = noise.topk(min(count, self.size), largest=False).indices
        return self.entries[:, slots].flatten(0, 1)


def build_queues(method: str, shapes: dict[str, tuple[int, int, int]], seed: int, limit_mib: int) -> nn.ModuleDict:
    """A queue per name for shapes (K, size, width), whose sizes are the options `--METHOD-NAME-queue`; says what they take.

    Raises:
        ValueError: together they need more than `limit_mib`.
    """
    need = {name: num_classes * size * width * 4 / 2**20 for name, (num_classes, size, width) in shapes.items()}
    if sum(need.values()) > limit_mib:
        largest = max(need, key=need.get)
        raise ValueError(
            f"the queues of {method} need {sum(need.values()):.0f} MiB on every process, {need[largest]:.0f} of them for "
            f"{' x '.join(map(str, shapes[largest]))} numbers of the {largest} queue; lower --{method.replace('_', '-')}-{largest}-queue, "
            f"or raise --{method.replace('_', '-')}-memory-limit-mib {limit_mib}"
        )
    queues = nn.ModuleDict()
    for name, (num_classes, size, width) in shapes.items():
        logger.info("%s: %s queue of %d x %d vectors of %d numbers, %.0f MiB", method, name, num_classes, size, width, need[name])
        queues[name] = Queue(num_classes, size, width, crc32(f"{method}/{seed}/{name}".encode()))
    return queues


@full_precision
def class_pixels(
    features: Tensor, labels: Tensor, noise: Tensor, num_classes: int, most: int = 16, released: bool = False
) -> tuple[Tensor, Tensor]:
    """Up to `most` random pixels of every class and image: vectors (B, K, most, C), of which the first counts (B, K) are meant.

    Args:
        features: (B, C, N).
        labels: (B, N).
        noise: (B, N); the pixels with the smallest numbers are taken.
        released: take, for a class with n pixels, from the first n positions of the image, as the released code does by a slip.
    """
    members = labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None]  # (B, K, N)
    sizes = members.sum(-1)
    if released:
        members = torch.arange(labels.shape[1], device=labels.device) < sizes[..., None]
    most = min(most, labels.shape[1])
    picked = noise[:, None].masked_fill(~members, torch.inf).topk(most, largest=False).indices  # (B, K, most)
    vectors = features.gather(2, picked.flatten(1)[:, None].expand(-1, features.shape[1], -1))  # (B, C, K * most)
    return vectors.transpose(1, 2).unflatten(1, (num_classes, most)), sizes.clamp(max=most)


@full_precision
def class_means(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The direction of every class's mean per image, unit vectors (B, K, 1, C), and (B, K) whether (1) or not (0) the class is there."""
    members = labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None]  # (B, K, N)
    sums = members.to(features.dtype) @ features.transpose(1, 2)  # (B, K, C): the mean's direction needs no division
    return unit(sums, -1)[:, :, None], members.any(-1).long()
