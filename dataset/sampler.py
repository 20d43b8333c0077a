"""Which picture is trained on when: pure functions of (seed, step), so a resume at any step continues the same stream."""

from collections.abc import Iterator

import numpy as np

_ORDER = 1  # keeps the stream of an epoch's order apart from the augmentation's streams, which are seeded [seed, position]


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order in which an epoch visits its pictures: a permutation of range(num_images)."""
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(num_images)


class EndlessSampler:
    """Micro batches of (index, position) for one rank, from `start_step` on, without end.

    Position p = step * global_batch + j counts the samples of the whole run; its picture is the (p mod n)-th of epoch p // n. Rank r
    takes the r-th contiguous slice of each global batch and splits it into `accumulate` micro batches, so the pictures of
    a step do not depend on the number of ranks. ValueError where the global batch cannot be divided so.
    """

    def __init__(self, num_images: int, global_batch: int, *, rank: int = 0, world: int = 1, seed: int = 0, start_step: int = 0,
                 accumulate: int = 1):
        if num_images < 1 or global_batch < 1 or accumulate < 1:
            raise ValueError(f"pictures, batch size and accumulation are at least 1, got {num_images}, {global_batch}, {accumulate}")
        if global_batch % (world * accumulate):
            raise ValueError(f"batch size {global_batch} (all ranks together) is not divisible by {world} ranks x {accumulate} accumulated "
                             f"micro batches; use a multiple of {world * accumulate}")
        self.num_images, self.global_batch, self.seed, self.start_step = num_images, global_batch, seed, start_step
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_rank = self.global_batch // self.world
        micro = per_rank // self.accumulate
        first = self.start_step * self.global_batch + self.rank * per_rank
        epoch, order = -1, None
        while True:
            for start in range(first, first + per_rank, micro):
                addresses = []
                for position in range(start, start + micro):
                    if position // self.num_images != epoch:
                        epoch = position // self.num_images
                        order = epoch_order(self.seed, epoch, self.num_images)
                    addresses.append((int(order[position % self.num_images]), position))
                yield addresses
            first += self.global_batch


class EvalSampler:
    """Indices rank, rank + world, ... below n: every picture exactly once over all ranks, none twice, none padded."""

    def __init__(self, n: int, rank: int = 0, world: int = 1):
        self.indices = range(rank, n, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
