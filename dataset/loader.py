"""The DataLoader of the project: its workers survive a graceful stop, and it never touches the global random state."""

import atexit
import functools
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.batch import Batch, Sample, collate
from dataset.reading import DataError
from dataset.sampler import EndlessSampler, EvalSampler
from dataset.segmentation import SegDataset


def _start_worker(main: int, worker: int) -> None:
    # torchrun and Ctrl-C signal the whole process group; the main process decides when to stop, and needs its workers to get there.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere SIGTERM keeps its meaning
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(main,), daemon=True).start()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _obey(main: int) -> None:
    """End this worker on the main process's own SIGTERM, its last resort, or once that process is gone.

    PyTorch's worker asks whether its parent has changed since it was ready: one whose parent was killed before that would stay for ever.
    """
    while os.getppid() == main:
        sent = signal.sigtimedwait({signal.SIGTERM}, 5)
        if sent and sent.si_pid == main:
            break
    os._exit(0)


def _stop_workers(iterator: weakref.ref) -> None:
    if hasattr(iterator(), "_shutdown_workers"):  # neither collected already nor without workers
        iterator()._shutdown_workers()


class _Carried(Dataset):
    """Hands a DataError over as a value: one that is raised in a worker arrives with a traceback in its message."""

    def __init__(self, dataset: SegDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, address: int | tuple[int, int]) -> Sample | DataError:
        try:
            return self.dataset[address]
        except DataError as error:
            return error


def _collate(samples: list[Sample | DataError]) -> Batch | DataError:
    return next((sample for sample in samples if isinstance(sample, DataError)), None) or collate(samples)


class _Loader(DataLoader):
    """A DataLoader that raises a worker's DataError as it is, and whose workers end at once when the program does.

    An uncaught exception keeps its frames, and with them a live iterator, until the interpreter exits; there PyTorch waits
    5 seconds for each worker before it sends SIGTERM. Exit hooks run last in, first out, so one per iterator comes before that.
    """

    def __iter__(self) -> Iterator[Batch]:
        self.worker_init_fn = functools.partial(_start_worker, os.getpid())
        iterator = super().__iter__()
        stop = functools.partial(_stop_workers, weakref.ref(iterator))
        if self.num_workers:
            atexit.register(stop)
        for batch in iterator:
            if isinstance(batch, DataError):
                stop()
                raise batch
            yield batch


def build_loader(dataset: SegDataset, sampler: EndlessSampler | EvalSampler, *, workers: int = 0,
                 device: torch.device | str = "cpu") -> DataLoader:
    """A loader of Batch: the sampler's micro batches for training, one picture at a time for evaluation (sizes differ).

    `workers` processes read ahead (0: this one reads). Memory is pinned where `device` is cuda. Iterating raises DataError.
    """
    cv2.setNumThreads(0)  # OpenCV's own threads contend with the workers, and 360x360 crops are too small for them
    if isinstance(sampler, EvalSampler):
        batching = {"sampler": sampler, "batch_size": 1}
    else:
        batching = {"batch_sampler": sampler}
    # Not the fork server, Python 3.14's default: its workers outlive a training that is killed, and copy what a fork shares.
    context = "fork" if workers and sys.platform == "linux" else None
    # An iterator draws its workers' base seed from this generator; from the global one it would make a resume inexact.
    generator = torch.Generator().manual_seed(0)
    return _Loader(_Carried(dataset), **batching, num_workers=workers, collate_fn=_collate, multiprocessing_context=context,
                   persistent_workers=workers > 0, pin_memory=torch.device(device).type == "cuda", generator=generator)
