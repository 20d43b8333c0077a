"""Decoded pictures kept for the next epoch and the next run: `--cache ram|disk`. What is trained on stays the same, bit for bit.

The pictures of a split are one file, memory-mapped by all ranks and loader workers of a node, which thus holds them once:

    pictures   image (H, W, 3) uint8 RGB, then train ids (H, W) uint8, of one after the other
    index      offset, height, width and CRC-32 of every picture
    trailer    SHA-256 of what they were decoded from, SHA-256 of the index and that, and a mark of the format

`ram`: the file has no name and vanishes with the last process that uses it. `disk`: it is renamed to its name when complete, and built
anew when a picture or label of the split has another path, size or time of change, when label values mean something else, when Pillow
has another version, or when the file is cut off or its index damaged. A process checks a picture's CRC-32 when it first reads it: 1 ms
for 2048x1024 pixels, beside 40 ms to decode them.
"""

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL

from dataset.layout import Item
from dataset.parallel import in_processes
from dataset.reading import DataError
from dataset.verified import picture_key

FOLDER = ".segkd-cache"  # in the data's folder
KINDS = ("none", "ram", "disk")
_ENTRY = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("crc", "<u4")])
_MARK = b"segkd cache 0001"
_DIGEST = 32  # bytes of a SHA-256
_BYTES = 4  # per pixel: three of the image, one of the label


class Unusable(Exception):
    """A cache file that has to be built anew; the message says why."""


class Store:
    """The decoded pictures of a cache file, read-only.

    `origin` is what they must have been decoded from (`_origin`), `count` how many there must be. Raises Unusable for any other file and
    for one that is damaged outside its pictures, OSError where there is none.
    """

    def __init__(self, path: str | Path, origin: bytes, count: int):
        self.path, self.origin = path, origin
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            end = size - count * _ENTRY.itemsize - 2 * _DIGEST - len(_MARK)  # of the pictures
            file.seek(max(0, size - 2 * _DIGEST - len(_MARK)))
            trailer = file.read()
            if trailer[2 * _DIGEST:] != _MARK:
                raise Unusable("is cut off, damaged or of another version")
            if trailer[:_DIGEST] != origin or end <= 0:
                raise Unusable("was decoded from other files")
            file.seek(end)
            index = file.read(count * _ENTRY.itemsize)
            self.index = np.frombuffer(index, _ENTRY)
            pixels = (self.index["height"].astype(np.int64) * self.index["width"]).sum()
            if hashlib.sha256(index + origin).digest() != trailer[_DIGEST: 2 * _DIGEST] or _BYTES * pixels != end:
                raise Unusable("is damaged")
            self.bytes = np.frombuffer(mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ), np.uint8)
        self.checked = np.zeros(count, bool)  # of this process: forked workers go on from a copy

    def __reduce__(self):
        return Store, (self.path, self.origin, len(self.index))  # the mapping is opened again, not copied

    def read(self, number: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 RGB and train ids (H, W) uint8 of a picture; DataError, with its name, where they are damaged."""
        offset, height, width, crc = self.index[number].tolist()
        block = self.bytes[offset: offset + _BYTES * height * width]
        if not self.checked[number]:
            if zlib.crc32(block) != crc:
                raise DataError(f"{self.path}: picture {name} is damaged in this cache; delete the file and start again, it is then rebuilt")
            self.checked[number] = True
        return block[: 3 * height * width].reshape(height, width, 3), block[3 * height * width:].reshape(height, width)


@dataclass(frozen=True, slots=True)
class Kept:
    """A picture whose decoded form is in a store."""

    name: str
    item: Item
    store: Store
    number: int

    def files(self) -> tuple[str, ...]:
        """The files that it was decoded from."""
        return self.item.files()

    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.item.size()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 RGB and train ids (H, W) uint8, both read-only."""
        return self.store.read(self.number, self.name)


@dataclass(frozen=True)
class Cache:
    """Where decoded pictures are kept (one of KINDS) and who builds it.

    `folder` is that of `disk`, None: FOLDER in the data's folder; `workers` processes decode. Where there are several ranks, each calls
    `items` and the first of each node builds: `gather` gives every rank's text to all of them in rank order, `leader` is the rank that
    builds for this one. `tell` takes lines for the log.
    """

    kind: str = "none"
    folder: str | Path | None = None
    workers: int = 0
    rank: int = 0
    leader: int = 0
    gather: Callable[[str], list[str]] = lambda text: [text]
    tell: Callable[[str], None] = print

    def items(self, items: list[Item], name: str, root: str | Path | None) -> list[Item]:
        """The items of the split called `name`, decoded; the cache is built where there is none yet.

        Raises DataError, on all ranks, for a picture that cannot be read, no space, or a folder that cannot be written.
        """
        if self.kind == "none":
            return items
        store = self._in_memory(items, name) if self.kind == "ram" else self._on_disk(items, name, root)
        return [Kept(item.name, item, store, number) for number, item in enumerate(items)]

    def _lead(self, build: Callable[[], str]) -> str:
        """What `build()` returns on the node's leader, on all its ranks; its DataError is raised on the ranks of all nodes."""
        result = failure = ""
        if self.rank == self.leader:
            try:
                result = build()
            except DataError as error:
                failure = str(error)
        for told in self.gather(failure):
            if told:
                raise DataError(told)
        return self.gather(result)[self.leader]

    def _in_memory(self, items: list[Item], name: str) -> Store:
        if not hasattr(os, "memfd_create"):
            raise DataError("--cache ram: this system has no anonymous files, Linux has; use --cache disk")
        file = os.memfd_create(name) if self.rank == self.leader else None
        origin = bytes(_DIGEST)  # nothing else can be in it

        def build() -> str:
            path = f"/proc/{os.getpid()}/fd/{file}"
            _build(path, items, origin, name, "memory", _free_memory(), self)
            return path

        try:
            store = Store(self._lead(build), origin, len(items))
            self.gather("")  # everybody has mapped it
        finally:
            if file is not None:
                os.close(file)
        return store

    def _on_disk(self, items: list[Item], name: str, root: str | Path | None) -> Store:
        if not all(item.files() for item in items):
            raise DataError(f"--cache disk: {name} is drawn, no file would tell when the cache is out of date; use --cache ram")
        path = Path(self.folder or Path(root, FOLDER)).absolute() / f"{name}.cache"

        def build() -> str:
            origin = _origin(items, root)
            if (reason := _unusable(path, origin, len(items))) is not None:
                with _locked(path, self.tell):
                    if (reason := _unusable(path, origin, len(items))) is not None:  # nobody built it in the meantime
                        self.tell(f"{path}: {reason}")
                        _replace(path, partial(_build, items=items, origin=origin, name=name, cache=self))
            self.tell(f"{name}: {len(items)} decoded pictures in {path}")
            return origin.hex()

        origin = bytes.fromhex(self._lead(build))
        try:
            return Store(path, origin, len(items))
        except (Unusable, FileNotFoundError):
            raise DataError(f"{path}: another run is replacing it with pictures of another --data; give each its own --cache-dir") from None


def _origin(items: list[Item], root: str | Path | None) -> bytes:
    """SHA-256 of what the decoded pictures depend on: order, paths below `root`, sizes and times of the files, meaning of the label
    values, and the decoder's version."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for item in items:
        key = picture_key(item, root)
        if key is None:
            absent = next((path for path in item.files() if not os.path.isfile(path)), item.name)
            raise DataError(f"{absent}: file is missing; restore it from the data set's archive")
        digest.update(json.dumps(key).encode())
    return digest.digest()


def _unusable(path: Path, origin: bytes, count: int) -> str | None:
    """Why a cache file has to be built anew; None where it need not be."""
    try:
        Store(path, origin, count)
    except FileNotFoundError:
        return "is not there yet"
    except Unusable as reason:
        return str(reason)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); delete it, or choose another folder with --cache-dir") from None
    return None


@contextmanager
def _locked(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from building the same file. The kernel lets go of a record lock when its process ends, however it ends, and
    forked processes do not inherit it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(f"{path}.lock", "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"{path.parent}: decoded pictures cannot be kept there ({error.strerror}); choose another folder with --cache-dir") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise DataError(f"{path.parent}: files cannot be locked there ({error.strerror}); choose a folder on another file system "
                                "with --cache-dir") from None
            tell(f"{path}: another process is building it; waiting")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, build: Callable) -> None:
    """Build a file under another name and rename it when it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        for old in (path, temporary):  # useless or left by a kill; what still maps it keeps it
            old.unlink(missing_ok=True)
        temporary.touch()
        build(str(temporary), where=str(path.parent), free=shutil.disk_usage(path.parent).free)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(_not_written(path, error)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _not_written(path: str | Path, error: OSError) -> str:
    return f"{path}: cannot be written ({error.strerror}); free space, choose another folder with --cache-dir, or drop --cache"


def _build(path: str, items: list[Item], origin: bytes, name: str, where: str, free: int, cache: Cache) -> None:
    """Decode all items into an empty file. DataError where they need more than `free` bytes or one cannot be read."""
    index = np.zeros(len(items), _ENTRY)
    index["height"], index["width"] = np.array([item.size() for item in items]).T
    ends = (_BYTES * index["height"].astype(np.int64) * index["width"]).cumsum()
    index["offset"][1:] = ends[:-1]
    needed, room = (f"{size / 2**20:,.0f} MiB" for size in (ends[-1], free))
    if ends[-1] + index.nbytes > free:
        raise DataError(f"--cache {cache.kind}: the {len(items)} decoded pictures of {name} take {needed}, {room} are free in {where}; "
                        + ("use --cache disk, or none" if cache.kind == "ram" else "free space, or choose another folder with --cache-dir"))
    cache.tell(f"{name}: decoding {len(items)} pictures, {needed} of {room} free in {where}")
    jobs = list(zip(items, index["offset"].tolist(), strict=True))
    with closing(in_processes(partial(_write, path), jobs, cache.workers, f"cache {name}")) as results:
        for number, result in enumerate(results):
            if isinstance(result, str):
                raise DataError(result)
            size, index["crc"][number] = result
            if size != (index["height"][number], index["width"][number]):
                raise DataError(f"{items[number].files()[0]}: picture has changed while it was read; start again when its files are complete")
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(index.tobytes() + origin + hashlib.sha256(index.tobytes() + origin).digest() + _MARK)
        file.flush()
        os.fsync(file.fileno())


def _write(path: str, job: tuple[Item, int]) -> tuple[tuple[int, int], int] | str:
    """Decode a picture into its place in the file: ((height, width), CRC-32), or what is wrong with it."""
    item, offset = job
    try:
        image, target = (np.ascontiguousarray(array) for array in item.read())
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(image)
            file.write(target)
    except DataError as error:
        return str(error)
    except OSError as error:
        return _not_written(path, error)
    return target.shape, zlib.crc32(target, zlib.crc32(image))


def _free_memory() -> int:
    """Bytes that programs can still take, page cache included: what the machine has and what this process's control groups allow."""
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    return min([available, *_free_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _free_in_groups(own: Path, mounted: Path) -> Iterator[int]:
    """Bytes left below the memory limit of each control group, version 1 or 2, that this process is in (a container, a batch job, a
    slice); the limits of all groups above one hold, too. Nothing where there are none."""
    for line in own.read_text(encoding="utf-8").splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, cached = mounted, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            top, limit, usage = mounted / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file", "total_active_file"
        else:
            continue
        parts = Path(path).parts[1:]
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            try:
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # another namespace's group, or "max"
                continue
            yield max(0, left + sum(int(counts.get(name, 0)) for name in cached))  # the usage counts files' pages, which make room
