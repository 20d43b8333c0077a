"""The manifest of a data set: size and SHA-256 of every file and the pixels per class, to tell whether two copies are the same."""

import errno
import json
import os
from pathlib import Path

import numpy as np

from dataset.parallel import in_processes
from dataset.reading import DataError
from dataset.specs import Spec
from utils.checkpoint import fingerprint
from utils.files import replace_file

FORMAT = "segkd-manifest/1"


def _digest(path: str) -> tuple[int, str] | str:
    """(bytes, SHA-256) of a file, or its problem."""
    try:
        return os.path.getsize(path), fingerprint(Path(path))
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror}); restore it"


def _files(spec: Spec, root: str, split: str) -> tuple[dict[str, str], list[str]]:
    """({path below `root`: path} of a split's files, problems of its layout)."""
    items, problems = spec.find(root, split)
    return {Path(os.path.relpath(path, root)).as_posix(): path for item in items for path in item.files()}, problems


def write_manifest(path: Path, spec: Spec, root: str, pixels: dict[str, np.ndarray], workers: int) -> int:
    """Write the manifest of the splits in `pixels` ({split: pixels per train id (256,)}); returns the number of files in it.

    Raises DataError where a file or the manifest cannot be read or written.
    """
    splits, total = {}, 0
    for split, counts in pixels.items():
        files, _ = _files(spec, root, split)
        digests = list(in_processes(_digest, list(files.values()), workers, f"SHA-256, {split}", "file"))
        problem = next((digest for digest in digests if isinstance(digest, str)), None)
        if problem is not None:
            raise DataError(problem)
        splits[split] = {"pixels": counts[: spec.num_classes].tolist(), "ignored": int(counts[255]),
                         "files": dict(zip(files, digests, strict=True))}
        total += len(files)
    content = {"format": FORMAT, "dataset": spec.name, "classes": list(spec.classes), "splits": splits}
    try:
        replace_file(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise _not_written(path, error) from None
    return total


def check_place(path: Path) -> None:
    """DataError where no manifest can be written: to be asked before the hours that the files may take."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: manifest cannot be written ({error.strerror}); give another file")


def read_manifest(path: Path, spec: Spec) -> dict:
    """A manifest of this data set; DataError where it cannot be read, is no manifest or of another data set."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry for split in content["splits"].values() for entry in split["files"].values()]
        sound = content["format"] == FORMAT and all(isinstance(size, int) and isinstance(digest, str) for size, digest in entries)
        sound = sound and isinstance(content["dataset"], str) and all(isinstance(name, str) for name in content["classes"])
    except OSError as error:
        raise DataError(f"{path}: manifest cannot be read ({error.strerror}); write one with --manifest") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise DataError(f"{path}: no manifest of this version ({FORMAT}); write one with --manifest")
    if content["dataset"] != spec.name:
        raise DataError(f"{path}: manifest of {content['dataset']}, not of {spec.name}; give the one of {spec.name}")
    if not content["splits"]:
        raise DataError(f"{path}: manifest of no split, there is nothing to compare; write one with --manifest")
    return content


def compare(manifest: dict, spec: Spec, root: str, splits: list[str], workers: int) -> tuple[int, list[str]]:
    """(number of files read, one line for every difference) between a manifest and the files below `root`."""
    problems, total = [], 0
    if manifest["classes"] != list(spec.classes):
        problems.append(f"classes: {', '.join(spec.classes)}; the manifest has {', '.join(manifest['classes'])}")
    for split in splits:
        if split not in manifest["splits"]:
            raise DataError(f"the manifest has no split {split!r}; possible: {', '.join(manifest['splits'])}")
        wanted = manifest["splits"][split]["files"]
        files, found = _files(spec, root, split)
        problems += found
        for name in sorted(wanted.keys() - files.keys()):
            here = os.path.exists(os.path.join(root, name))
            problems.append(f"{os.path.join(root, name)}: {f'does not belong to {split} any more' if here else 'is missing'}; restore it")
        for name in sorted(files.keys() - wanted.keys()):
            problems.append(f"{files[name]}: is not in the manifest; remove it, or write another manifest")
        common = [name for name in files if name in wanted]
        total += len(common)
        digests = in_processes(_digest, [files[name] for name in common], workers, f"SHA-256, {split}", "file")
        for name, digest in zip(common, digests, strict=True):
            size, text = wanted[name]
            if isinstance(digest, str):
                problems.append(digest)
            elif digest[0] != size:
                problems.append(f"{files[name]}: has {digest[0]} bytes, {size} in the manifest; restore the file")
            elif digest[1] != text:
                problems.append(f"{files[name]}: has another content than in the manifest; restore the file")
    return total, problems
