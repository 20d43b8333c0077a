"""Files of weights that fill the memory, ask for the impossible or hold no numbers; and the negative control of tests/test_checkpoint.py's
kills: a checkpoint that is written over the one before."""

import copy
import io
import random
import resource
import signal
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from models import build_model
from models.weights import load_into, model_from_checkpoint, read_state
from scripts.convert_checkpoint import convert
from tests.test_checkpoint import content, with_checksum
from tests.workers import on_ranks, save_model, start
from utils import checkpoint


def overwrite_for_ever(folder: Path) -> None:
    """As most codebases save: torch.save over the only file."""
    state = content(0, 2_000_000)
    for number in range(10**9):
        torch.save(state, folder / "last.pth")
        print(number, flush=True)


def test_a_kill_while_writing_in_place_loses_the_only_file(tmp_path):
    """Of 20 kills at random moments most leave a file that torch cannot read."""
    draw, unreadable = random.Random(0), 0
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = start(partial(overwrite_for_ever, folder), tmp_path / "console.txt")
        process.until("\n")
        time.sleep(draw.uniform(0, 0.02))
        process.stop(signal.SIGKILL)
        process.wait()
        try:
            torch.load(folder / "last.pth", weights_only=True)
        except Exception:  # noqa: BLE001 - torch raises almost anything on half a file
            unreadable += 1
    assert unreadable >= 3


# ---------------------------------------------------------------------------------------------------- more than there is


def packed(path: Path, state: dict, size: int, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """What torch.save writes, packed, with `size` zeros for its first storage; and a right checksum."""
    plain, archive = io.BytesIO(), io.BytesIO()
    torch.save(state, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(archive, "w", method) as target:
        for member in source.infolist():
            if member.filename.endswith("data/0"):
                with target.open(member.filename, "w") as file:
                    for _ in range(size >> 20):
                        file.write(bytes(1 << 20))
            else:
                target.writestr(member.filename, source.read(member))
    path.write_bytes(with_checksum(archive.getvalue()))
    return path


def load_packed(path: Path) -> dict:
    """What each loader says of a file, and by how many MiB the process has grown."""
    told, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (checkpoint.load, read_state, lambda path: convert(path, path.with_name("new.pth"))):
        try:
            load(path)
            told.append("loaded")
        except ValueError as error:
            told.append(str(error))
    return {"told": told, "grown": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10}


def load_bare(path: Path) -> dict:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        torch.load(path, weights_only=True)
    except RuntimeError:  # its size is not that of the tensor: said after unpacking
        pass
    return {"grown": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10}


def test_an_archive_that_expands_is_refused_before(tmp_path):
    """250 MB of zeros in a file of 250 kB; and what torch (2.14) does with it."""
    path = packed(tmp_path / "bomb.pth", {"state_dict": {"w": torch.zeros(4)}}, 250_000_000)
    (found,) = on_ranks(partial(load_packed, path), 1, tmp_path / "console.txt")
    (bare,) = on_ranks(partial(load_bare, path), 1, tmp_path / "console.txt")
    for message in found["told"]:
        assert message.startswith(f"{path}: unpacks to 249,56") and f"bytes, the file has {path.stat().st_size:,}; weights do not" in message
    assert found["grown"] < 50 and bare["grown"] > 200 and not (tmp_path / "new.pth").exists()


def test_packed_weights_are_read(tmp_path):
    """A checkpoint that was unpacked and packed again is unusual, and no harm."""
    state, plain = {"w": torch.randn(1000)}, io.BytesIO()
    torch.save(state, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    assert torch.equal(read_state(tmp_path / "packed.pth")[0]["w"], state["w"])
    convert(tmp_path / "packed.pth", tmp_path / "new.pth")
    assert torch.equal(read_state(tmp_path / "new.pth")[0]["w"], state["w"])


def test_tensors_that_show_one_number_many_times(tmp_path):
    """No loader gives them memory: neither one tensor of a terabyte nor a thousand that share a storage."""
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 18)}, tmp_path / "wide.pth")
    shared = torch.zeros(50_000)
    torch.save({f"w{number}": shared for number in range(1000)}, tmp_path / "many.pth")
    for name, size in (("wide", 1 << 40), ("many", 200_000_000)):
        for load in (read_state, lambda path: convert(path, tmp_path / "new.pth")):
            with pytest.raises(ValueError, match=f"{name}.pth: holds tensors of {size:,} bytes, the file has"):
                load(tmp_path / f"{name}.pth")
    assert torch.load(tmp_path / "wide.pth", weights_only=True)["w"].numel() == 1 << 38, "torch alone takes it"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A checkpoint of a small network."""
    path = tmp_path_factory.mktemp("sound") / "model.pth"
    save_model(path)
    return path


def endless(kind: str):
    """A few hundred bytes that are without end to whoever goes through them."""
    if kind in ("circle", "wide circle"):
        value = []
        value += [value] * (1 if kind == "circle" else 100_000)
        return value
    if kind == "text":
        return ["x" * 5000] * 5000
    value = 1 if kind in ("lists", "deep") else "key"
    for _ in range(200 if kind == "deep" else 45):
        value = {"a": value, "b": value} if kind == "dicts" else [value, value] if kind == "lists" else [value]
    return value


@pytest.mark.parametrize("kind", ["lists", "dicts", "circle", "wide circle", "text", "deep"])
def test_values_without_end(kind, sound, tmp_path):
    """In the place of any entry, with the right checksum: one line, in little time and memory. torch alone takes them."""
    content = checkpoint.load(sound)
    for place in ["step", ("config", "model", "backbone")][kind != "lists" :]:
        broken = copy.deepcopy(content)
        *folders, last = (place,) if isinstance(place, str) else place
        inner = broken
        for folder in folders:
            inner = inner[folder]
        inner[last] = endless(kind)
        checkpoint.save(tmp_path / "endless.pth", broken)
        assert torch.load(tmp_path / "endless.pth", weights_only=True).keys() == content.keys()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for load in (model_from_checkpoint, checkpoint.load):
            much = "nested more than 100 times" if kind in ("circle", "deep") else "more than 2,097,152 values and characters"
            with pytest.raises(ValueError, match=f"endless.pth: holds .*{much}.*; use another copy") as error:
                load(tmp_path / "endless.pth")
            assert len(str(error.value)) < 400
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (1 << 20)  # KiB


def test_the_largest_of_our_checkpoints_is_far_from_that(tmp_path):
    """Names of tensors are characters, and a run with --ema holds them twice, with its momentum three times."""
    names = [*build_model("ocrnet", "hrnet_w18", 182).state_dict()]
    assert 4 * sum(map(len, names)) < checkpoint.VALUES / 4


# --------------------------------------------------------------------------------------------------- what cannot be meant


@pytest.mark.parametrize("change", [
    {"head_width": 10**9}, {"head_width": -4}, {"head_width": "wide"}, {"num_classes": 10**12}, {"num_classes": -1}, {"num_classes": None},
    {"normalization": ["imagenet"]}, {"backbone": {}}, {"aux": "yes"}, {"output_stride": 0}, {"in_channels": "3"}, {7: 8},
], ids=str)  # fmt: skip
def test_a_config_that_no_model_has(change, sound, tmp_path):
    """One line, without memory for what it asks for (10^9 channels are 32 GB)."""
    state = {key: value for key, value in checkpoint.load(sound).items() if key != "format"}
    state["config"]["model"] |= change
    checkpoint.save(tmp_path / "model.pth", state)
    with pytest.raises(ValueError, match="model.pth") as error:
        model_from_checkpoint(tmp_path / "model.pth")
    assert type(error.value) is ValueError and len(str(error.value).splitlines()[0]) < 400


KINDS = {
    "nan": lambda w: w.index_fill(0, torch.tensor([1]), float("nan")), "infinite": lambda w: w / 0, "too large": lambda w: w.double() * 1e300,
    "sparse": torch.Tensor.to_sparse, "complex": lambda w: w.to(torch.complex64), "integers": torch.Tensor.long, "truth": torch.Tensor.bool,
    "meta": lambda w: w.to("meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_tensors_that_are_no_weights(name, sound, tmp_path):
    """As a teacher and as initial weights; torch drops imaginary parts and rounds without a word, and NaN evaluates to class 0."""
    state, key = read_state(sound)[0], "backbone.features.0.0.weight"
    torch.save({**state, key: KINDS[name](state[key])}, tmp_path / "wrong.pth")
    model = build_model("pspnet", "mobilenetv2", 8, head_width=8)
    for load in (model_from_checkpoint, partial(load_into, model)):
        with pytest.raises(ValueError, match="wrong.pth") as error:
            load(tmp_path / "wrong.pth")
        found = str(error.value).splitlines()[0]
        if name in ("nan", "infinite", "too large"):
            assert f"1 of 338 tensors hold NaN or infinite values, the first is {key}; fetch the file again" in found
        else:
            assert f"1 tensors differ, the first is {key} (wrong type; model float32, file " in found


@pytest.mark.parametrize("kind", [torch.half, torch.bfloat16, torch.double])
def test_weights_of_another_precision_are_read(kind, sound, tmp_path):
    state = read_state(sound)[0]
    torch.save({key: value.to(kind) for key, value in state.items()}, tmp_path / "other.pth")  # the counts of batches, too
    found = model_from_checkpoint(tmp_path / "other.pth")[0].state_dict()
    assert all(torch.equal(found[key], value.to(kind).to(value.dtype)) for key, value in state.items())


def test_names_cannot_steer_a_terminal(sound, tmp_path):
    state = read_state(sound)[0]
    torch.save({**state, "\x1b[2J\nkey": torch.ones(1)}, tmp_path / "names.pth")
    with pytest.raises(ValueError, match=r"1 tensors differ, the first is '\\x1b\[2J\\nkey' \(unexpected") as error:
        model_from_checkpoint(tmp_path / "names.pth")
    assert all(line.isprintable() for line in str(error.value).splitlines()) and len(str(error.value).splitlines()) == 3
    torch.save({"\x1b[2J": 1}, tmp_path / "names.pth")
    with pytest.raises(ValueError, match="no weights but a dict") as error:
        read_state(tmp_path / "names.pth")
    assert str(error.value).isprintable()
