"""scripts/convert_checkpoint.py: the weights of old files, and nothing else of them."""

import argparse
import collections
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.weights import read_state
from scripts.convert_checkpoint import KNOWN, Inert, Reader, Table, convert, main
from tests.test_checkpoint import payloads


class Net(nn.Module):
    """A network of somebody else's, as `torch.save(model)` writes it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)
        self.register_buffer("mean", torch.rand(3), persistent=False)


def convert_to(folder: Path, content, entry=None, zipped=True):
    """(weights, report) of what was saved as `content`."""
    source, target = folder / "old.pth", folder / "new.pth"
    torch.save(content, source, _use_new_zipfile_serialization=zipped)
    report = convert(source, target, entry)
    return read_state(target)[0], report


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_beside_objects_that_torch_refuses(zipped, tmp_path):
    expected = Net().state_dict()
    options = argparse.Namespace(lr=0.1, path=Path("x"))
    # AICSD's {epoch, state_dict, best_pred} with what its python objects were
    content = {"epoch": 7, "state_dict": expected, "best_pred": np.float64(0.7), "args": options, "log": collections.defaultdict(list, a=[1])}
    found, report = convert_to(tmp_path, content, zipped=zipped)
    assert same(found, expected)
    assert "from 'state_dict'; left out: " in report and "argparse.Namespace" in report and "scalar" in report
    with pytest.raises(ValueError, match="take out its weights with python -m scripts.convert_checkpoint"):
        read_state(tmp_path / "old.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_network(zipped, tmp_path):
    net = nn.DataParallel(Net())
    net.module.head.weight.note = "a tensor with an attribute is saved in another way"
    found, report = convert_to(tmp_path, {"model": net}, zipped=zipped)
    assert same(found, net.module.state_dict()) and "mean" not in found  # nn.DataParallel's prefix goes, as in every file
    assert "test_convert_checkpoint.Net" in report


@pytest.mark.parametrize("zipped", [True, False])
def test_views_shared_storages_and_types(zipped, tmp_path):
    base = torch.arange(24.0).view(4, 6)
    state = {
        "whole": base, "part": base[1:3, 2:5], "turned": base.t(), "again": base, "scalar": torch.tensor(3), "empty": torch.empty(0, 4),
        "half": base.half(), "brain": base.bfloat16(), "truth": base > 5, "bytes": torch.arange(5, dtype=torch.uint8),
        "parameter": nn.Parameter(base + 1), "complex": torch.complex(base, base),
    }  # fmt: skip
    found, report = convert_to(tmp_path, state, zipped=zipped)
    assert same(found, {name: value.detach() for name, value in state.items()}) and "left out" not in report


def test_several_sets_of_weights(tmp_path):
    student, teacher = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match="holds more than one set of weights; choose with --entry: student, teacher"):
        convert_to(tmp_path, {"student": student, "teacher": teacher})
    found, _ = convert_to(tmp_path, {"student": student, "teacher": teacher}, entry="teacher")
    assert same(found, teacher)
    with pytest.raises(ValueError, match="new.pth: exists; give a name that is free"):
        convert_to(tmp_path, student)
    (tmp_path / "new.pth").unlink()
    with pytest.raises(ValueError, match="holds no weights under 'net'; choose with --entry: student, teacher"):
        convert_to(tmp_path, {"student": student, "teacher": teacher}, entry="net")
    with pytest.raises(ValueError, match="old.pth: holds no weights; give another file"):
        convert_to(tmp_path, {"epoch": 3})


# ------------------------------------------------------------------------------------------------------------------ hostile files


def test_no_payload_runs(tmp_path):
    """The twelve that run when torch.load is careless (tests/test_checkpoint.py has this control), beside weights."""
    marker, seen = tmp_path / "marker", 0
    for name, (payload, zipped) in payloads(marker).items():
        source, target = tmp_path / "payload.pth", tmp_path / f"{name}.pth".replace(" ", "_")
        for content in (payload, {"state_dict": {"w": torch.ones(2)}, "gift": payload}):
            torch.save(content, source, _use_new_zipfile_serialization=zipped)
            try:
                convert(source, target)
            except ValueError as error:
                assert str(error).startswith(f"{source}: ") and "\n" not in str(error)
            else:
                assert set(read_state(target)[0]) >= {"w"} or name == "hidden among weights"
            seen += 1
            assert not marker.exists(), name
            target.unlink(missing_ok=True)
    assert seen == 24


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


HOSTILE = {
    # each tries to get at, or to change, something beyond the classes that the reader hands out
    "attribute of a class": opcodes(b"ctorch._utils\n_rebuild_tensor_v2.__init__.__globals__\n"),
    "builtins": opcodes(b"cbuiltins\ngetattr\n", b"cbuiltins\nstr\n", b"X\x08\x00\x00\x00__class__", b"\x86R"),
    "import": opcodes(b"cbuiltins\n__import__\n", b"X\x02\x00\x00\x00os", b"\x85R"),
    "state of a class": opcodes(b"ccollections\nOrderedDict\n", b"}X\x06\x00\x00\x00valuesK\x01sb"),
    "slot state of a class": opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n", b"N}X\x07\x00\x00\x00__new__K\x01s\x86b"),
    "state of an unknown class": opcodes(b"cmy\nThing\n", b"N}X\x0c\x00\x00\x00__setstate__K\x01s\x86b"),
    "state of a data type": opcodes(b"ctorch\nFloatStorage\n", b"N}X\x08\x00\x00\x00itemsizeK\x01s\x86b"),
    "calls a data type": opcodes(b"ctorch\nFloatStorage\n", b")R"),
    "extension registry": opcodes(b"\x82\x01"),
    "a persistent class": opcodes(b"X\x06\x00\x00\x00modulecos\nsystem\n\x86Q", b"X\x02\x00\x00\x00ls\x85R"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_reader_hands_out_nothing_else(name, tmp_path):
    before = {cls: dict(vars(cls)) for cls in {*Inert.__subclasses__(), Inert, Table}}
    path = tmp_path / "hostile.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hostile/data.pkl", HOSTILE[name])
    with pytest.raises(ValueError, match="hostile.pth: (cannot be read|holds no weights)"):
        convert(path, tmp_path / "new.pth")
    assert {cls: dict(vars(cls)) for cls in before} == before
    assert torch.float32.itemsize == 4


def test_every_callable_of_the_reader_is_known_to_be_inert(tmp_path):
    for found in KNOWN.values():
        assert isinstance(found, torch.dtype) or found is set or issubclass(found, (Inert, Table))
    reader = Reader(open("/dev/null", "rb"))  # noqa: SIM115
    for module, name in [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("numpy", "load"), ("torch._utils", "_rebuild_qtensor")]:
        assert issubclass(reader.find_class(module, name), Inert)


@pytest.mark.parametrize(("size", "stride", "offset"), [
    ((100,), (1,), 0), ((2, 2), (1, 100), 0), ((1 << 40,), (0,), 0), ((1000,), (0,), 0), ((4,), (1,), 100), ((-1,), (1,), 0),
])  # fmt: skip
def test_a_tensor_beyond_its_storage(size, stride, offset, tmp_path):
    class Forged:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (torch.ones(4).untyped_storage(), offset, size, stride, False, collections.OrderedDict())

    path = tmp_path / "forged.pth"
    torch.save({"w": Forged()}, path)
    with pytest.raises(ValueError, match="forged.pth: (cannot be read|holds tensors of [0-9,]+ bytes, the file has)"):
        convert(path, tmp_path / "new.pth")
    assert not list(tmp_path.glob("*new*"))


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(zipped, tmp_path):
    source = tmp_path / "whole.pth"
    torch.save({"state_dict": {"w": torch.rand(50)}}, source, _use_new_zipfile_serialization=zipped)
    data, cut = source.read_bytes(), tmp_path / "cut.pth"
    for length in (0, 1, 20, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut.pth: cannot be read"):
            convert(cut, tmp_path / "new.pth")
    for path, message in [(tmp_path / "none.pth", "no such file"), (tmp_path, "a folder")]:
        with pytest.raises(ValueError, match=message):
            convert(path, tmp_path / "new.pth")


@pytest.mark.parametrize("kind", ["doubled", "circle"])
def test_networks_without_end(kind, tmp_path):
    """A few hundred bytes of modules that go on for ever, or as good as; a module that is there twice has both names."""
    network = nn.Sequential(nn.Linear(1, 1))
    if kind == "circle":
        network.add_module("again", network)
    for _ in range(0 if kind == "circle" else 45):
        network = nn.Sequential(network, network)
    torch.save(network, tmp_path / "endless.pth")
    with pytest.raises(ValueError, match="endless.pth: cannot be read .*holds a network of more than 10,000 modules"):
        convert(tmp_path / "endless.pth", tmp_path / "new.pth")
    shared = nn.Linear(1, 1)
    torch.save(nn.Sequential(shared, nn.Sequential(shared)), tmp_path / "shared.pth")
    convert(tmp_path / "shared.pth", tmp_path / "new.pth")
    assert [*torch.load(tmp_path / "new.pth", weights_only=True)["state_dict"]] == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]


def test_names_cannot_steer_a_terminal(tmp_path):
    """Of entries and of classes; `STACK_GLOBAL` takes any text."""
    name = b"\x1b[2J\nThing"
    torch.save({"w": torch.ones(1)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "class.pth", "w") as archive:
        for entry in plain.namelist():
            text = b"X" + len(name).to_bytes(4, "little") + name
            gift = text + text + b"\x930."  # a class, taken off the stack again
            archive.writestr(entry, plain.read(entry)[:-1] + gift if entry.endswith("data.pkl") else plain.read(entry))
    report = convert(tmp_path / "class.pth", tmp_path / "weights.pth")
    assert report.isprintable() and report.endswith(r"1 tensors; left out: '\x1b[2J\nThing.\x1b[2J\nThing'")
    with pytest.raises(ValueError, match="more than one set of weights") as error:
        convert_to(tmp_path, {name.decode(): {"w": torch.ones(1)}, "other": {"w": torch.ones(1)}})
    assert str(error.value).isprintable() and r"choose with --entry: '\x1b[2J\nThing', other" in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"none/new.pth: cannot be written \(.*; choose another folder") as error:
        convert(tmp_path / "old.pth", tmp_path / "none" / "new.pth")
    assert "\n" not in str(error.value)


def test_the_command(tmp_path, monkeypatch, capsys):
    torch.save({"state_dict": {"w": torch.ones(2)}, "when": np.float32(3)}, tmp_path / "old.pth")
    monkeypatch.setattr("sys.argv", ["convert_checkpoint", str(tmp_path / "old.pth"), str(tmp_path / "new.pth")])
    main()
    assert "new.pth: 1 tensors from 'state_dict'; left out: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.strip().endswith("new.pth: exists; give a name that is free")
