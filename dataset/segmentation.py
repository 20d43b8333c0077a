"""The one Dataset class: any data set of the table, for training (augmented crops) and evaluation (native resolution)."""

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from dataset.batch import Sample
from dataset.cache import Cache
from dataset.layout import Part
from dataset.reading import DataError
from dataset.specs import Spec, get_spec
from dataset.transforms import Augment, apply, draw


class SegDataset(Dataset):
    """One split of a data set.

    With `augment`, items are addressed by (index, position): `position` counts the samples of the run and is, besides `seed`, the
    only source of randomness, so an item does not depend on workers, ranks or what was read before. Without it, items are
    addressed by index and come at native resolution. DataError where the split is missing, empty or does not match up.
    """

    def __init__(self, spec: Spec, root: str | Path | None, split: str, *, augment: Augment | None = None, seed: int = 0):
        self.spec, self.root, self.split, self.augment, self.seed = spec, root, split, augment, seed
        self.items, problems = spec.find(root, split)
        if problems:
            more = f" (and {len(problems) - 1} more: python -m dataset.prepare {spec.name} --data {root})" if len(problems) > 1 else ""
            raise DataError(problems[0] + more)

    def __len__(self) -> int:
        return len(self.items)

    def keep(self, cache: Cache) -> None:
        """Read from decoded pictures from now on; DataError where they cannot be kept."""
        layout = self.spec.splits[self.split]
        share = f"-{layout.share}" if isinstance(layout, Part) else ""  # another share, other pictures
        self.items = cache.items(self.items, f"{self.spec.name}-{self.split}{share}", self.root)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The decoded picture (H, W, 3) uint8 RGB and its train ids (H, W) uint8, before any augmentation; read-only where they are kept."""
        return self.items[index].read()

    def __getitem__(self, address: int | tuple[int, int]) -> Sample:
        if self.augment is None:
            return Sample(*self.read(address), self.items[address].name)
        index, position = address
        image, target = self.read(index)
        rng = np.random.default_rng([self.seed, position])
        return Sample(*apply(draw(rng, *target.shape, self.augment), image, target), self.items[index].name)


def build_dataset(name: str | Spec, root: str | Path | None, split: str, *, augment: Augment | None = None, seed: int = 0) -> SegDataset:
    """A split of the data set called `name` (or described by a Spec) below `root`; augmented for training if `augment` is given."""
    return SegDataset(get_spec(name, root) if isinstance(name, str) else name, root, split, augment=augment, seed=seed)
