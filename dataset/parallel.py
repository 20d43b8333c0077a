"""One function over many files in several processes, with a progress bar."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import cv2
from tqdm import tqdm

from dataset.reading import DataError

CHUNK = 16  # items a process takes at a time: a picture takes milliseconds, a message between processes a tenth of one


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(function: Callable, items: Sequence, workers: int, description: str, unit: str = "picture") -> Iterator:
    """function(item) of every item, in their order; `function` and `items` can be pickled. In this process where that is enough.

    Raises DataError where the system has ended one of the processes.
    """
    # disable=None: a bar on a terminal, nothing in a log file
    with tqdm(total=len(items), desc=description, unit=unit, disable=None, leave=False) as bar:
        for result in _results(function, items, min(workers, -(-len(items) // CHUNK))):
            yield result
            bar.update()


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one decides
    cv2.setNumThreads(0)  # a fork has none of the threads that OpenCV may have started before
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed main process cannot end this one, which would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _results(function: Callable, items: Sequence, workers: int) -> Iterator:
    if workers <= 1:
        for item in items:  # not map, which a StopIteration out of `function` would end without a word
            yield function(item)
        return
    # Unlike multiprocessing.Pool, an executor says so when a worker is killed for its memory instead of waiting for ever.
    executor = ProcessPoolExecutor(workers, initializer=_start)
    try:
        yield from executor.map(function, items, chunksize=CHUNK)
    except BrokenProcessPool:
        raise DataError(f"one of {workers} processes that read files was killed, probably for want of memory; give it fewer --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)
