"""The checkpoint file: every damage is refused, no kill or full disk loses it, no file can run code."""

import ast
import errno
import hashlib
import os
import pickle
import random
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from models.weights import read_state
from tests.paths import REPOSITORY
from tests.workers import on_ranks, start
from utils import checkpoint
from utils.checkpoint import CheckpointError


def content(number: int, size: int = 2000) -> dict:
    generator = torch.Generator().manual_seed(number)
    return {"step": number, "student": {"weight": torch.randn(size, generator=generator)}, "config": {"model": {}, "lr": 0.1, "none": None}}


def is_whole(found: dict) -> bool:
    """Whether every value is the one that was saved at its step."""
    expected = content(found["step"], len(found["student"]["weight"]))
    return torch.equal(found["student"]["weight"], expected["student"]["weight"]) and found["config"] == expected["config"]


def test_round_trip_and_previous(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save(path, content(1), keep_previous=True)
    assert not checkpoint.previous(path).exists()
    checkpoint.save(path, content(2), keep_previous=True)
    assert is_whole(checkpoint.load(path)) and checkpoint.load(path)["step"] == 2
    assert checkpoint.load(checkpoint.previous(path))["step"] == 1
    checkpoint.save(path, content(3), keep_previous=True)
    assert [checkpoint.load(p)["step"] for p in (path, checkpoint.previous(path))] == [3, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.previous.pth", "last.pth"]
    assert torch.equal(torch.load(path, weights_only=True)["student"]["weight"], content(3)["student"]["weight"]), "plain torch reads it"
    assert checkpoint.load_last(tmp_path / "none.pth", pytest.fail) is None


def damages(data: bytes, random_: random.Random):
    """(what, damaged data): 200 truncations, 300 flipped bits, 200 zeroed blocks."""
    lengths = {0, 1, len(data) // 2, len(data) - checkpoint.TRAILER, len(data) - 1}
    while len(lengths) < 200:
        lengths.add(random_.randrange(len(data)))
    for length in sorted(lengths):
        yield f"cut to {length}", data[:length]
    for bit in random_.sample(range(8 * len(data)), 300):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)
    blocks = 0
    while blocks < 200:
        first, length = random_.randrange(len(data)), random_.choice([1, 16, 512, 4096])
        if any(data[first : first + length]):
            blocks += 1
            zeroed = bytearray(data)
            zeroed[first : first + length] = bytes(len(data[first : first + length]))
            yield f"{length} zeros at {first}", bytes(zeroed)


def test_700_damaged_files_are_refused_and_the_previous_one_is_used(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save(path, content(1), keep_previous=True)
    checkpoint.save(path, content(2), keep_previous=True)
    data, count = path.read_bytes(), 0
    for what, damaged in damages(data, random.Random(0)):
        path.unlink()
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as refused:
            checkpoint.load(path)
        assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value), what
        warnings = []
        found = checkpoint.load_last(path, warnings.append)
        assert found["step"] == 1 and is_whole(found), what
        assert len(warnings) == 1 and str(path) in warnings[0] and "going on from last.previous.pth" in warnings[0], what
        count += 1
    assert count == 700
    checkpoint.previous(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match="last.previous.pth: no checksum"):
        checkpoint.load_last(path, warnings.append)


def test_what_torch_alone_would_load(tmp_path):
    """The negative control of the flipped bits: without the checksum most load, with wrong weights."""
    path, random_, silent = tmp_path / "flipped.pth", random.Random(1), 0
    checkpoint.save(path, content(1))
    data = path.read_bytes()
    for bit in random_.sample(range(8 * len(data)), 100):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            torch.load(path, weights_only=True)
            silent += 1
        except Exception:
            pass
    assert silent > 50


def test_foreign_formats_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    for other, message in ((["a", "list"], "format 'list', this version reads 'segkd/1'"), ({"format": "segkd/9"}, "format 'segkd/9'")):
        torch.save(other, path)
        path.write_bytes(with_checksum(path.read_bytes()))
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path)


def with_checksum(data: bytes) -> bytes:
    return data + checkpoint.MAGIC + hashlib.sha256(data).hexdigest().encode()


# --------------------------------------------------------------------------------------------------------- kills and full disks


def save_for_ever(folder: Path) -> None:
    for number in range(10**9):
        checkpoint.save(folder / "last.pth", content(number, 200_000), keep_previous=True)
        print(number, flush=True)


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_while_saving_leaves_a_whole_file(kills, tmp_path):
    draw, midway = random.Random(kills), 0
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = start(partial(save_for_ever, folder), tmp_path / "console.txt")
        process.until("\n")
        time.sleep(draw.uniform(0, 0.02))
        process.stop(signal.SIGKILL)
        assert process.wait() == [-signal.SIGKILL]
        told = int(process.text.split()[-1])
        found = checkpoint.load(folder / "last.pth")
        assert found["step"] >= told and is_whole(found), "a save that was reported is there"
        if checkpoint.previous(folder / "last.pth").exists():
            assert is_whole(checkpoint.load(checkpoint.previous(folder / "last.pth")))
        midway += any(folder.glob(".*.tmp"))
    assert midway >= kills // 10, "too few kills hit a save midway to prove anything"


def save_with_limit(folder: Path, limit: int) -> str:
    """The message of a save while files of this process may not grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoint.save(folder / "last.pth", content(2, 100_000), keep_previous=True)
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("limit", [0, 1000, 300_000])
def test_full_disk(limit, tmp_path):
    """The temporary file hits a size limit at its first byte, at its beginning and near its end (the file has 400 kB)."""
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "last.pth"
    checkpoint.save(path, content(1))
    (message,) = on_ranks(partial(save_with_limit, folder, limit), 1, tmp_path / "console.txt")
    assert message == f"cannot write {path}: File too large; the previous checkpoint is intact; free space or choose another --save-dir"
    assert [p.name for p in folder.iterdir()] == ["last.pth"] and checkpoint.load(path)["step"] == 1


@pytest.mark.parametrize("function", ["fsync", "replace", "link"])
def test_no_space_at_any_point(function, tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    checkpoint.save(path, content(1))

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointError, match="last.pth: No space left on device; the previous checkpoint is intact"):
        checkpoint.save(path, content(2), keep_previous=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"] and checkpoint.load(path)["step"] == 1
    with pytest.raises(CheckpointError, match="gone/last.pth: No such file or directory; free space"):
        checkpoint.save(tmp_path / "gone" / "last.pth", content(1))


# ------------------------------------------------------------------------------------------------------------- no code is run


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(marker: Path) -> dict:
    """12 contents that create the marker when they are unpickled without care; each as (content, zip file or old format)."""
    touch, python = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": (Call(os.system, touch), True),
        "os.system, old format": (Call(os.system, touch), False),
        "getoutput": (Call(subprocess.getoutput, touch), True),
        "subprocess": (Call(subprocess.check_call, ["touch", str(marker)]), True),
        "eval": (Call(eval, python), True),
        "exec": (Call(exec, python), True),
        "open": (Call(open, str(marker), "w"), True),
        "pathlib": (Call(Path.touch, marker), False),
        "hidden among weights": ({**content(1), "format": checkpoint.FORMAT, "config": [{"deep": Call(exec, python)}]}, True),
        "as a key": ({Call(os.system, touch): 1}, False),
        "a list of calls": (Call(list, Call(map, os.system, [touch])), True),
        "nested pickle": (Call(pickle.loads, pickle.dumps(Call(exec, python))), True),
    }


def write_payload(path: Path, payload, zipped: bool) -> None:
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(with_checksum(path.read_bytes()))  # an attacker can compute a checksum


def load_payloads(folder: Path, careful: bool) -> dict[str, list]:
    """{name: [what each loader did, whether the marker was created]}, with the variable set that undoes torch's own care."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    marker, found = folder / "marker", {}
    for name, (payload, zipped) in payloads(marker).items():
        path, told = folder / "payload.pth", []
        write_payload(path, payload, zipped)
        for load in (checkpoint.load, read_state) if careful else (torch.load,):
            try:
                load(path)
                told.append("loaded")
            except ValueError as error:
                told.append(str(error))
            except Exception as error:
                told.append(type(error).__name__)
        found[name] = [told, marker.exists()]
        marker.unlink(missing_ok=True)
    return found


def test_12_malicious_files_are_refused(tmp_path):
    (found,) = on_ranks(partial(load_payloads, tmp_path, True), 1, tmp_path / "console.txt")
    assert len(found) == 12
    for name, (told, created) in found.items():
        assert not created, name
        for message in told:
            assert message.startswith(f"{tmp_path / 'payload.pth'}: ") and "more than tensors and plain values" in message, (name, message)


def test_they_are_malicious(tmp_path):
    """The negative control: torch.load without a literal weights_only runs every one of them."""
    (found,) = on_ranks(partial(load_payloads, tmp_path, False), 1, tmp_path / "console.txt")
    harmless = [name for name, (_, created) in found.items() if not created]
    assert not harmless


LOADERS = {"torch.load", "torch.hub.load_state_dict_from_url", "load_state_dict_from_url"}
RUNS_CODE = {"eval", "exec", "compile", "os.system", "os.popen", "runpy.run_path", "torch.hub.load", "yaml.load", "np.load", "numpy.load"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch.distributed.checkpoint"}


def unsafe_lines(source: str) -> list[str]:
    """What in a program could run the content of a file or a string."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: import {name}" for name in names if name in MODULES]
            if isinstance(node, ast.ImportFrom) and {f"{node.module}.{alias.name}" for alias in node.names} & (LOADERS | RUNS_CODE | MODULES):
                found.append(f"{node.lineno}: import under a bare name")
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            if name in RUNS_CODE:
                found.append(f"{node.lineno}: {name}")
            for argument, wanted in (("weights_only", name in LOADERS), ("shell", False)):
                value = keywords.get(argument)
                literal = isinstance(value, ast.Constant) and value.value is wanted
                if (wanted or value is not None) and not literal and not (argument == "weights_only" and not wanted):
                    found.append(f"{node.lineno}: {name}({argument}={value and ast.unparse(value)})")
    return found


def test_nothing_in_the_project_runs_code_from_data():
    programs = [p for p in REPOSITORY.rglob("*.py") if not {"tests", ".venv", "runs"} & set(p.relative_to(REPOSITORY).parts)]
    assert len(programs) > 40
    found = {str(p.relative_to(REPOSITORY)): lines for p in programs if (lines := unsafe_lines(p.read_text(encoding="utf-8")))}
    (line,) = found.pop("scripts/convert_checkpoint.py")  # its unpickler builds inert objects alone (tests/test_convert_checkpoint.py)
    assert line.endswith(": import pickle") and not found


@pytest.mark.parametrize("line", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=careful)", "import pickle", "eval('1')",
    "exec(text)", "os.system('ls')", "subprocess.run('ls', shell=True)", "subprocess.run('ls', shell=flag)", "from torch import load",
    "torch.hub.load_state_dict_from_url(url)", "import torch.distributed.checkpoint", "from os import system",
])  # fmt: skip
def test_the_static_check_sees(line):
    assert unsafe_lines(line)


def test_the_static_check_lets_pass():
    assert not unsafe_lines("model.eval()\ntorch.load(p, weights_only=True)\nsubprocess.run(['ls'], shell=False)\nre.compile('a')")
