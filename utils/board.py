"""What --tensorboard writes: the rows of metrics.jsonl as curves, and pictures of every validation.

    tensorboard --logdir runs

Two folders, which TensorBoard shows as two runs: `train` has the rows of the log, `val` those of the validations. Each is cut off by
itself where a resumed training goes on: after the last step, and after the last validation, which may be an earlier step. (TensorBoard's
fast loader hides what was after it from the first new row on, its other loader at once.)

Records are written and flushed at once, in the training's own thread: a row in ten steps takes a fraction of a millisecond. The thread of
TensorBoard's own writer loses what it still holds when a process ends at once, and meets a full disk where nobody can catch it.
"""

import io
import os
import time
from contextlib import suppress
from functools import wraps
from pathlib import Path

import numpy as np

from dataset import Spec
from utils.log import logger
from utils.visualize import overlay, sheet

PICTURES = 4  # of the selection split, the same ones at every validation


def require_tensorboard() -> None:
    """ValueError where the package is missing; to be asked before anything takes time."""
    try:
        from tensorboard.compat.proto import event_pb2  # noqa: F401
        from tensorboard.summary.writer import record_writer  # noqa: F401
    except Exception as error:  # a protobuf of another version raises TypeError
        raise ValueError(f"--tensorboard needs the package tensorboard ({error}): python -m pip install tensorboard; or drop the flag") from error


def never_fails(method):
    """A board that cannot be written costs one warning, and all that it would have shown from then on; never the training."""
    @wraps(method)
    def wrapper(self, *args):
        if self.broken:
            return
        try:
            method(self, *args)
        except Exception as error:
            self.broken = True
            for file in self.files.values():
                with suppress(OSError):  # its buffer cannot be written either
                    file.close()
            logger.warning("%s: cannot be written (%s); going on without TensorBoard", self.folder, error)
    return wrapper


class Board:
    """The event files of a run; used on rank 0 alone.

    As a function it is the `visit` of an evaluation: it keeps the pictures that the next validation's row is shown with, which costs no
    further prediction.

    Args:
        folder: of the event files; made where it is missing.
        step, validated: where the training goes on, 0 and 0 for a new one; what older files hold after that is hidden.
        names: of the pictures that this rank predicts in a validation, of which some evenly spaced ones are shown.
    """

    def __init__(self, folder: Path, step: int, validated: int, spec: Spec, names: list[str]):
        self.folder, self.spec, self.broken, self.files = folder, spec, False, {}
        chosen = np.unique(np.linspace(0, len(names) - 1, min(PICTURES, len(names))).round().astype(int))
        self.seen = dict.fromkeys(names[number] for number in chosen)  # name -> (picture, label, prediction)
        self._open(step, validated)

    @never_fails
    def _open(self, step: int, validated: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        for kind, last in (("train", step), ("val", validated)):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
            # files are read in the order of their names; microseconds, since two starts may share a second
            path = self.folder / kind / f"events.out.tfevents.{time.time():017.6f}.{os.uname().nodename}.{os.getpid()}"
            self.files[kind] = open(path, "wb")  # noqa: SIM115 - open as long as the training lasts
            self._write(kind, file_version="brain.Event:2")
            self._write(kind, step=last + 1, session_log=SessionLog(status=SessionLog.START))  # hides this step and later ones in older files

    def _write(self, kind: str, **event) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self.files[kind]).write(Event(wall_time=time.time(), **event).SerializeToString())
        self.files[kind].flush()

    @never_fails
    def __call__(self, batch, prediction) -> None:
        for name, image, target, labels in zip(batch.names, batch.image, batch.target, prediction, strict=True):
            if name in self.seen:
                self.seen[name] = image.permute(1, 2, 0).cpu().numpy(), target.cpu().numpy(), labels.cpu().numpy()

    @never_fails
    def add(self, step: int, values: dict) -> None:
        """A row of metrics.jsonl: a curve for every name; a validation's row brings its pictures."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        kind = "val" if "val/mIoU" in values else "train"
        shown = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if value is not None]
        if kind == "val" and (seen := [pictures for pictures in self.seen.values() if pictures]):
            shown.append(Summary.Value(tag="predictions", image=self._pictures(seen)))
        self._write(kind, step=step, summary=Summary(value=shown))

    def _pictures(self, seen: list):
        from tensorboard.compat.proto.summary_pb2 import Summary

        palette = self.spec.palette()
        columns = {
            "input": [image for image, _, _ in seen],
            "label": [overlay(image, target, palette) for image, target, _ in seen],
            "prediction": [overlay(image, labels, palette) for image, _, labels in seen],
        }
        page, file = sheet(columns, self.spec.classes, self.spec.colours), io.BytesIO()
        page.save(file, "JPEG", quality=88)
        return Summary.Image(height=page.height, width=page.width, colorspace=3, encoded_image_string=file.getvalue())
