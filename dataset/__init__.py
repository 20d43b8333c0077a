"""Data: name + split -> pictures (uint8 RGB) and train ids (uint8, 255 = ignore)."""

from dataset.batch import Batch, Sample, collate
from dataset.cache import Cache
from dataset.loader import build_loader
from dataset.reading import IGNORE, DataError
from dataset.sampler import EndlessSampler, EvalSampler
from dataset.segmentation import SegDataset, build_dataset
from dataset.specs import ALIASES, SPECS, Recipe, Spec, get_spec
from dataset.transforms import Augment

__all__ = [
    "ALIASES", "IGNORE", "SPECS", "Augment", "Batch", "Cache", "DataError", "EndlessSampler", "EvalSampler", "Recipe", "Sample", "SegDataset",
    "Spec", "build_dataset", "build_loader", "collate", "get_spec",
]
