"""The checkpoint file: one dictionary of tensors and plain values, checksummed, replaced atomically, loaded without running code.

A file is what `torch.save` writes, followed by a trailer with its SHA-256 (`torch.load` reads such a file as it is): torch checks
no checksum itself, and 298 of 300 single-bit flips load silently with wrong weights (torch 2.15).
"""

import errno
import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path

import torch

FORMAT = "segkd/1"
MAGIC = b"segkd-sha256:"
TRAILER = len(MAGIC) + 64
VALUES, DEPTH = 1 << 21, 100  # plain values and characters of a file, and how deep they are nested; ours have up to 200,000, and 6
GROWTH = 10  # a file of weights holds at least a tenth of their bytes: torch.save packs nothing, and packing saves little


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line with file, reason and remedy."""


def save(path: Path, content: dict, keep_previous: bool = False) -> None:
    """Write a checkpoint: temporary file, flush to disk, rename. Whenever the process is killed, `path` is a whole file.

    Args:
        keep_previous: what was at `path` stays beside it, under `previous(path)`.

    Raises:
        CheckpointError: the disk is full or not writable; `path` is as it was and no temporary file is left.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    data = buffer.getbuffer()
    temporary, link = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "link.tmp"))
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.write(MAGIC + hashlib.sha256(data).hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)  # `path` itself never goes away, not even for a moment
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                shutil.copyfile(path, link)  # a file system without hard links
            os.replace(link, previous(path))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        for leftover in (temporary, link):
            leftover.unlink(missing_ok=True)
        kept = "; the previous checkpoint is intact" if path.exists() else ""
        raise CheckpointError(f"cannot write {path}: {error.strerror}{kept}; free space or choose another --save-dir") from error


def previous(path: Path) -> Path:
    """last.pth -> last.previous.pth"""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> None:
    """Compare a file with its checksum.

    Raises:
        CheckpointError: no such file, no checksum at its end (cut off, or not one of ours), or another content.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; check the path")
    digest, left = hashlib.sha256(), path.stat().st_size - TRAILER
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
        trailer = file.read()
    if trailer[: len(MAGIC)] != MAGIC or len(trailer) != TRAILER:
        raise CheckpointError(f"{path}: no checksum at its end; the file was cut off or is not a checkpoint of this project")
    if trailer[len(MAGIC) :] != digest.hexdigest().encode():
        raise CheckpointError(f"{path}: damaged, its content does not match its checksum; use another copy or an earlier checkpoint")


def intact(path: Path) -> bool:
    """Whether there is a file that matches its checksum."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def check_unpacked(path: Path) -> None:
    """Refuse an archive that would fill the memory, before anything in it is unpacked: torch (2.14) unpacks first, and then compares.

    Files that are no archives, as torch wrote them before 1.6, pass.

    Raises:
        CheckpointError: the archive is damaged, or unpacks to more than GROWTH times its size.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # what torch knows an archive by
            return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # noqa: BLE001 - damaged archives raise anything from BadZipFile to UnicodeDecodeError
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}); it is damaged, fetch it again or use another copy") from error
    check_growth(path, unpacked, "unpacks to")


def check_growth(path: Path, size: int, what: str) -> None:
    """Refuse `size` bytes out of a file that is many times smaller; `what` for the message: "unpacks to"."""
    own = path.stat().st_size
    if size > GROWTH * own:
        raise CheckpointError(f"{path}: {what} {size:,} bytes, the file has {own:,}; weights do not shrink so far, it is not what it seems")


def check_values(path: Path, content) -> None:
    """Refuse what is small in a file and without end to whoever goes through it or shows it: 45 lists, each of twice the one before, are
    35 million million entries. Tuples as keys are torch's to survive: it computes their hashes while it loads.

    Raises:
        CheckpointError: more than VALUES of them, counted with their characters, or more than DEPTH inside one another.
    """
    left, waiting = VALUES, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, (str, bytes, bytearray, list, tuple, set)):
            left -= len(value)
        elif isinstance(value, dict):
            left -= 2 * len(value)
        elif isinstance(value, int):
            left -= value.bit_length() // 8
        if left < 0 or depth > DEPTH:
            much = f"more than {VALUES:,} values and characters beside its tensors" if left < 0 else f"values nested more than {DEPTH} times"
            raise CheckpointError(f"{path}: holds {much}; use another copy, or take out its weights with python -m scripts.convert_checkpoint")
        if isinstance(value, dict):
            value = [*value, *value.values()]
        if isinstance(value, (list, tuple, set)):
            waiting += ((inner, depth + 1) for inner in value)


def load(path: Path) -> dict:
    """A verified checkpoint, on the CPU.

    Raises:
        CheckpointError: see `verify`, `check_unpacked` and `check_values`; or the file holds something other than tensors and plain values.
    """
    verify(path)
    check_unpacked(path)
    try:
        # the literal argument: the environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD overrides a default, not this
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"holds more than tensors and plain values ({type(error).__name__})"
        raise CheckpointError(f"{path}: {reason}; it was not written by this project") from error
    check_values(path, content)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: format {found!r}, this version reads {FORMAT!r}")
    return content


def load_last(path: Path, warn) -> dict | None:
    """The newest readable one of `path` and the one before it, None when there is neither file.

    `warn` is called with one line when `path` is damaged.

    Raises:
        CheckpointError: files are there and none is readable.
    """
    candidates = [p for p in (path, previous(path)) if p.exists()]
    for candidate in candidates:
        try:
            return load(candidate)
        except CheckpointError as error:
            failure = error
            if candidate != candidates[-1]:
                warn(f"{error}; going on from {candidates[1].name}")
    if candidates:
        raise failure
    return None


def stamp(path: Path) -> tuple | None:
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def fingerprint_tensors(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names and values: how a run names a teacher that is in no file."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 of a file: how a run names its teacher."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
