"""Take the weights out of a checkpoint that holds more than tensors and plain values, without running what it holds.

    python -m scripts.convert_checkpoint old_teacher.pth teacher.pth

Many published files hold numpy numbers, settings or whole pickled networks, which `torch.load` reads only by running code that the
file chooses. This reader rebuilds tensors, dictionaries and plain values, puts an empty object in the place of everything else, and
says what it left out. Of a whole network (`torch.save(model)`) it takes the parameters and buffers under their names. It writes
{"state_dict": ...}, which the training and evaluation scripts read. Works offline, reads the files of every torch since 0.4.

Why it is safe: a pickle can only call what `find_class` hands out, and this one hands out the small classes below, data types and
nothing else; none of them calls anything, takes attributes from the file or can be changed by it. This is the only file of the
project that imports pickle.
"""

import argparse
import io
import math
import os
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from models.weights import printable, read_state
from utils import checkpoint

STORAGES = {  # as torch calls them: data type
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
MAGIC = 0x1950A86A20F9469CFC6C  # what files begin with that are no zip archives


class Inert:
    """What a pickle may build: takes any arguments, and ignores the state that the pickle would give it."""

    __slots__ = ()

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class Unknown(Inert):
    """In the place of any object that is not known; keeps the state, as a network's holds its tensors."""

    __slots__ = ("state",)

    def __setstate__(self, state):
        self.state = state

    def append(self, value):
        pass

    extend = add = append

    def __setitem__(self, key, value):
        pass


class Table(dict):
    """Dictionaries of all kinds."""

    __slots__ = ()

    def __init__(self, *args):
        # python 2 wrote an OrderedDict as its list of pairs; a defaultdict comes with the function of its defaults
        super().__init__(args[0] if args and isinstance(args[0], list) else ())

    def __setstate__(self, state):
        pass


class Storage(Inert):
    """The numbers of one or several tensors: data type, key of the bytes, and the part of them, counted in numbers."""

    __slots__ = ("dtype", "key", "begin", "end")


class Strided(Inert):
    """A tensor: its storage and the place in it."""

    __slots__ = ("storage", "offset", "size", "stride")

    def __new__(cls, storage, offset, size, stride, *rest):
        self = super().__new__(cls)
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride
        return self


class Parameter(Inert):
    """A parameter is its tensor."""

    __slots__ = ()

    def __new__(cls, tensor, *rest):
        return tensor


class WithAttributes(Inert):
    """A tensor that carries attributes is the tensor alone."""

    __slots__ = ()

    def __new__(cls, function, kind, args, state):
        return Strided(*args) if function is Strided else Parameter(*args)


KNOWN = {
    **{("torch", name): dtype for name, dtype in STORAGES.items()}, ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch._utils", "_rebuild_tensor"): Strided, ("torch._utils", "_rebuild_tensor_v2"): Strided,
    ("torch._utils", "_rebuild_parameter"): Parameter, ("torch._utils", "_rebuild_parameter_with_state"): Parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): WithAttributes,
    ("collections", "OrderedDict"): Table, ("collections", "defaultdict"): Table, ("builtins", "set"): set, ("__builtin__", "set"): set,
}  # fmt: skip

MODULES = 10_000


class Reader(pickle.Unpickler):
    """Unpickles from an open file; `unknown` collects the names of what was not rebuilt, `dtypes` {storage's key: data type}."""

    def __init__(self, file):
        super().__init__(file, encoding="latin1")  # python 2 wrote text as bytes
        self.unknown, self.dtypes = set(), {}

    def find_class(self, module, name):
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        self.unknown.add(f"{module}.{name}")
        return Unknown

    def persistent_load(self, reference):
        if reference[0] != "storage":  # ("module", class, source, ...): the source of a network's class
            return Unknown
        _, dtype, key, _, count, *view = reference
        self.dtypes[key] = dtype
        storage = Storage()
        storage.dtype, storage.key, storage.begin, storage.end = dtype, key, 0, count
        if view and view[0] is not None:  # files before torch 0.4.1 hold storages that are a part of another
            _, storage.begin, size = view[0]
            storage.end = storage.begin + size
        return storage


def read(path: Path) -> tuple[object, dict[str, bytes], set[str]]:
    """(content, {storage's key: its bytes}, what was left out) of a file that `torch.save` wrote."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entry = next(name for name in archive.namelist() if name.count("/") <= 1 and name.endswith("data.pkl"))
            prefix = entry.removesuffix("data.pkl") + "data/"
            reader = Reader(io.BytesIO(archive.read(entry)))
            content = reader.load()
            return content, {key: archive.read(prefix + key) for key in reader.dtypes}, reader.unknown
    # before torch 1.6: magic number, version, machine, content, keys of the storages, and every storage behind its length
    with open(path, "rb") as file:
        if Reader(file).load() != MAGIC:
            raise ValueError("it does not begin as one")
        for _ in ("version", "machine"):
            Reader(file).load()
        reader = Reader(file)
        content, storages = reader.load(), {}
        for key in Reader(file).load():
            length = int.from_bytes(file.read(8), "little")
            storages[key] = file.read(length * reader.dtypes[key].itemsize)
    return content, storages, reader.unknown


def weights_in(value) -> dict[str, Strided]:
    """{name: tensor} of a state dict or of a pickled network; {} where the value is neither.

    Raises:
        ValueError: a network of more than MODULES, as one that holds itself, or 45 of which each holds the one before twice.
    """
    if isinstance(value, dict):
        whole = all(isinstance(key, str) and isinstance(tensor, Strided) for key, tensor in value.items())
        return dict(value) if whole else {}
    found, waiting, left = {}, [("", value)], MODULES
    while waiting:
        prefix, module = waiting.pop()
        state = getattr(module, "state", None)
        if not isinstance(module, Unknown) or not isinstance(state, dict) or not isinstance(state.get("_modules"), dict):
            continue
        left -= 1
        if left < 0:
            raise ValueError(f"holds a network of more than {MODULES:,} modules")
        for kind in ("_parameters", "_buffers"):
            tensors = state.get(kind) or {}
            unsaved = state.get("_non_persistent_buffers_set") or ()
            found |= {prefix + name: tensor for name, tensor in tensors.items() if isinstance(tensor, Strided) and name not in unsaved}
        waiting += [(f"{prefix}{name}.", child) for name, child in reversed(list(state["_modules"].items()))]
    return found


def rebuild(tensor: Strided, storages: dict[str, bytes]) -> Tensor:
    """The tensor; refuses one that reaches beyond its storage, or claims more numbers than there are."""
    storage = tensor.storage
    size = storage.dtype.itemsize
    data = storages[storage.key][storage.begin * size : storage.end * size]
    numbers = torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
    count = 1
    for side in tensor.size:
        count *= side
    if count > len(numbers):
        raise ValueError("a tensor is larger than its storage")
    return numbers.as_strided(tuple(tensor.size), tuple(tensor.stride), tensor.offset).clone()


def choose(found: dict[str, dict], entry: str | None) -> str | None:
    """The key of the weights to take; None where the choice is the user's."""
    if entry is not None:
        return entry
    if len(found) == 1:
        return next(iter(found))
    return next((name for name in ("", "state_dict") if name in found), None)


def first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [""])[0])


def convert(source: Path, target: Path, entry: str | None = None) -> str:
    """Write the weights in `source` to `target`; returns a report.

    Args:
        entry: the key of one of several state dicts or networks in the file; None for the file itself, the only one, or "state_dict".

    Raises:
        ValueError: one line; no such file, damaged, no weights, several, or the target exists; it unpacks to many times its size.
    """
    if not source.is_file():
        raise ValueError(f"{source}: {'a folder' if source.is_dir() else 'no such file'}; give the path of a checkpoint file")
    if target.exists():
        raise ValueError(f"{target}: exists; give a name that is free")
    checkpoint.check_unpacked(source)
    try:
        content, storages, unknown = read(source)
        found = {"": weights_in(content)}
        if isinstance(content, dict):
            found |= {name: weights_in(value) for name, value in content.items() if isinstance(name, str)}
        found = {name: weights for name, weights in found.items() if weights}
        chosen = choose(found, entry)
        weights = found.get(chosen, {})
        size = sum(abs(math.prod(tensor.size)) * tensor.storage.dtype.itemsize for tensor in weights.values())
        checkpoint.check_growth(source, size, "holds tensors of")  # each is copied, and they may share their numbers
        state = {name: rebuild(tensor, storages) for name, tensor in weights.items()}
    except checkpoint.CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile file raises almost anything
        raise ValueError(
            f"{source}: cannot be read ({type(error).__name__}: {first_line(error)}); it is damaged, or not written by torch.save; fetch it again"
        ) from error
    if not state:
        wanted = f"no weights under {entry!r}" if entry else "more than one set of weights" if found else "no weights"
        remedy = f"choose with --entry: {', '.join(map(printable, found))}" if found else "give another file"
        raise ValueError(f"{source}: holds {wanted}; {remedy}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        torch.save({"state_dict": state}, temporary)
        read_state(temporary)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # the second is what torch raises where there is no folder, or no space
        raise ValueError(f"{target}: cannot be written ({first_line(error)}); choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)
    left_out = f"; left out: {', '.join(sorted(map(printable, unknown)))}" if unknown else ""
    return f"{target}: {len(state)} tensors" + (f" from {chosen!r}" if chosen else "") + left_out


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="IN", help="the checkpoint")
    parser.add_argument("target", type=Path, metavar="OUT", help="a new file for its weights")
    parser.add_argument("--entry", metavar="NAME", help="which weights, where the file holds several, such as student or model")
    options = parser.parse_args()
    try:
        print(convert(options.source, options.target, options.entry))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
