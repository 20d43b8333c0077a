"""Console, log file and progress bar: a bar with the remaining time on a terminal, plain lines elsewhere."""

import logging
import sys
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from utils import distributed

logger = logging.getLogger("segkd")
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def harmless(text: str) -> str:
    """Without what steers a terminal: on Linux a file's name may hold anything."""
    return text.translate(CONTROLS)


class _Formatter(logging.Formatter):
    def format(self, record):
        return harmless(super().format(record))


class _Console(logging.Handler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record):
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # a closed pipe or terminal must not end a training
            pass


class _Early(logging.Handler):
    """Keeps what is said before there is a log file."""

    def __init__(self):
        super().__init__()
        self.records = deque(maxlen=1000)

    def emit(self, record):
        self.records.append(record)


class _LogFile(logging.FileHandler):
    """A log file that a full disk ends instead of the training."""

    def handleError(self, record):
        logger.removeHandler(self)
        logger.warning("%s: cannot be written (%s); going on without it", self.baseFilename, sys.exc_info()[1])


def setup(folder: Path | None = None) -> logging.Logger:
    """Log to the console, and with more detail to `folder`/log.txt when given, from the first line on that was logged since there was a file last;
    ranks other than 0 log warnings alone, to the console."""
    escape_names()
    early = next((handler for handler in logger.handlers if isinstance(handler, _Early)), _Early())
    for handler in [*logger.handlers]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    main = distributed.is_main()
    logger.setLevel(logging.DEBUG)
    console = _Console()
    console.setLevel(logging.INFO if main else logging.WARNING)
    prefix = "" if main else f"[rank {distributed.rank()}] "
    console.setFormatter(_Formatter(prefix + "%(message)s"))
    logger.addHandler(console)
    if main and folder is not None:
        file = _LogFile(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(_Formatter("%(asctime)s %(levelname).1s %(message)s"))
        logger.addHandler(file)
        for record in early.records:
            if file in logger.handlers:  # a full disk ends it
                file.handle(record)
    elif main:
        logger.addHandler(early)
    return logger


def escape_names() -> None:
    """Show names of files that are no text instead of ending with a traceback: on Linux a name is any bytes."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # not a text stream, redirected behind python's back, closed
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def progress_bar(total: int | None, initial: int = 0, unit: str = "step", description: str | None = None):
    """tqdm on rank 0 when standard error is a terminal, else a bar that shows nothing."""
    hidden = not (distributed.is_main() and sys.stderr.isatty())
    with tqdm(total=total, initial=initial, unit=unit, desc=description, disable=hidden, dynamic_ncols=True, leave=False) as bar:
        yield bar


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
