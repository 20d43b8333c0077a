"""What travels from the data set to the engine: Sample (one picture) and Batch (a stack of them)."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One picture: image (H, W, 3) uint8 RGB, target (H, W) uint8 train ids with 255 = ignore, and its name."""

    image: np.ndarray
    target: np.ndarray
    name: str


@dataclass
class Batch:
    """A stack of pictures: image (B, 3, H, W) uint8 RGB in channels_last strides, target (B, H, W) uint8, B names.

    The engine fills in where in the training it stands: `step`, `progress` in [0, 1], `offset` (place of its first picture in the
    global batch of `global_size` pictures), and `valid`, what the summed cross-entropy is divided by.
    """

    image: Tensor
    target: Tensor
    names: list[str]
    valid: Tensor | None = None
    step: int = 0
    progress: float = 0.0
    offset: int = 0
    global_size: int = 1

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device; names are shared, strides are kept."""
        valid = None if self.valid is None else self.valid.to(device, non_blocking=non_blocking)
        return replace(self, image=self.image.to(device, non_blocking=non_blocking),
                       target=self.target.to(device, non_blocking=non_blocking), valid=valid)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (the DataLoader calls this by its name)."""
        return replace(self, image=self.image.pin_memory(), target=self.target.pin_memory())


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of one size; ValueError names the sizes where they differ."""
    sizes = {sample.target.shape for sample in samples}
    if len(sizes) > 1:
        raise ValueError(f"a batch needs pictures of one size, got {sorted(sizes)}; evaluate with batch size 1 or give a crop")
    # Stacked as (B, H, W, 3) and permuted: channels_last strides without a transposing copy.
    image = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)  # (B, 3, H, W)
    target = torch.from_numpy(np.stack([sample.target for sample in samples]))
    return Batch(image, target, [sample.name for sample in samples])
