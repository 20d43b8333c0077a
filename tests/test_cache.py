"""Decoded pictures that are kept: the same bytes as without, never out of date, never damaged in silence, one copy per node."""

import dataclasses
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from dataset import Augment, Cache, DataError, EndlessSampler, EvalSampler, build_dataset, build_loader, cache, get_spec
from dataset import loader as loading
from dataset.layout import FilePair, Folders
from dataset.reading import LabelMap
from tests.workers import on_ranks, train
from utils import distributed
from utils.options import train_options
from utils.session import decoded_cache

linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="--cache ram needs Linux")
context = multiprocessing.get_context("fork")  # children that have everything imported
CROP = Augment((24, 32))


def save(number: int, folder: Path, seed: int = 0) -> None:
    """Picture and label `number` of the training split, each in a size of its own."""
    rng = np.random.default_rng([seed, number])
    height, width = 20 + 7 * number, 50 - 5 * number
    ending = ("png", "jpg")[number % 2]
    for path, array in ((f"train/{number}.{ending}", rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
                        (f"trainannot/{number}.png", rng.integers(0, 12, (height, width), dtype=np.uint8))):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / path)


@pytest.fixture
def data(tmp_path):
    for number in range(5):
        save(number, tmp_path / "data")
    return tmp_path / "data"


@dataclasses.dataclass
class Told:
    """A dataset whose pictures are kept, and what was said about it."""

    dataset: object
    lines: list[str]

    @property
    def built(self) -> bool:
        return any("decoding" in line for line in self.lines)


def keep(data, kind="disk", spec="camvid", augment=None, **options) -> Told:
    told = Told(build_dataset(spec, data, "train", augment=augment), [])
    told.dataset.keep(Cache(kind, tell=told.lines.append, **options))
    return told


def file_of(data) -> Path:
    return data / cache.FOLDER / "camvid-train.cache"


def assert_decoded(told: Told, data, spec="camvid") -> None:
    """Every kept picture is what its files hold now."""
    fresh = build_dataset(spec, data, "train")
    assert [item.name for item in told.dataset.items] == [item.name for item in fresh.items]
    for index, item in enumerate(fresh.items):
        image, target = item.read()
        kept = told.dataset.read(index)
        np.testing.assert_array_equal(kept[0], image)
        np.testing.assert_array_equal(kept[1], target)
        assert told.dataset.items[index].size() == item.size() == target.shape and told.dataset.items[index].files() == item.files()


def batches(dataset, workers):
    """Five training batches, as tensors and names."""
    loader = build_loader(dataset, EndlessSampler(len(dataset), 4, seed=3), workers=workers)
    return [(batch.image, batch.target, batch.names) for batch in islice(loader, 5)]


# -------------------------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("kind", ["disk", pytest.param("ram", marks=linux)])
def test_batches_are_the_same_bit_for_bit(data, kind):
    plain = batches(build_dataset("camvid", data, "train", augment=CROP), 0)
    kept = keep(data, kind, augment=CROP).dataset
    for workers in (0, 2):
        for (image, target, names), (other_image, other_target, other_names) in zip(plain, batches(kept, workers), strict=True):
            assert torch.equal(image, other_image) and torch.equal(target, other_target) and names == other_names
            assert other_image.is_contiguous(memory_format=torch.channels_last)


@linux
def test_drawn_pictures_are_kept_in_memory(monkeypatch):
    plain = build_dataset("shapes", None, "val")
    kept = build_dataset("shapes", None, "val")
    kept.keep(Cache("ram", workers=2, tell=lambda line: None))  # 64 pictures: more than one chunk for the decoding processes
    expected = [plain.read(index) for index in range(64)]
    monkeypatch.setattr("dataset.shapes.draw_scene", None)  # nothing is drawn again
    for (image, target), batch in zip(expected, build_loader(kept, EvalSampler(64)), strict=True):
        np.testing.assert_array_equal(batch.image[0].permute(1, 2, 0), image)
        np.testing.assert_array_equal(batch.target[0], target)


def test_nothing_is_decoded_twice(data, monkeypatch):
    assert keep(data).built
    monkeypatch.setattr(FilePair, "read", None)
    again = keep(data)
    assert not again.built and again.lines == [f"camvid-train: 5 decoded pictures in {file_of(data)}"]
    monkeypatch.undo()
    assert_decoded(again, data)
    assert not again.dataset.read(0)[0].flags.writeable  # nobody can change what all share


def test_without_a_cache_nothing_changes(data):
    dataset = build_dataset("camvid", data, "train")
    items = dataset.items
    dataset.keep(Cache())
    assert dataset.items is items and not (data / cache.FOLDER).exists()


# -------------------------------------------------------------------------------------------------------------- never out of date


def rewrite_picture(data, monkeypatch):
    path = data / "train/2.png"
    before = path.stat()
    array = np.array(Image.open(path))
    Image.fromarray(array[::-1]).save(path, compress_level=0)
    Image.fromarray(array).save(path, compress_level=0)
    Image.fromarray(array[::-1]).save(path, compress_level=0)  # uncompressed: another content of the same length
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def rewrite_label(data, monkeypatch):
    path = data / "trainannot/1.png"
    Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)


def add_picture(data, monkeypatch):
    save(5, data)


def remove_picture(data, monkeypatch):
    (data / "train/0.png").unlink()
    (data / "trainannot/0.png").unlink()


def rename_picture(data, monkeypatch):
    os.rename(data / "train/3.jpg", data / "train/9.jpg")
    os.rename(data / "trainannot/3.png", data / "trainannot/9.png")


def other_decoder(data, monkeypatch):
    monkeypatch.setattr(PIL, "__version__", "0.0")


@pytest.mark.parametrize("change", [rewrite_picture, rewrite_label, add_picture, remove_picture, rename_picture, other_decoder])
def test_a_change_of_the_files_rebuilds_it(data, monkeypatch, change):
    keep(data)
    change(data, monkeypatch)
    again = keep(data)
    assert again.built and any("was decoded from other files" in line for line in again.lines)
    assert_decoded(again, data)
    assert not keep(data).built


def test_another_meaning_of_the_label_values_rebuilds_it(data):
    camvid = get_spec("camvid")
    keep(data)
    swapped = LabelMap({0: 1, 1: 0, **{k: k for k in range(2, 11)}, 11: 255})
    spec = dataclasses.replace(camvid, splits={"train": Folders("train", "trainannot", {".png": swapped})})
    again = keep(data, spec=spec)
    assert again.built
    assert_decoded(again, data, spec)
    assert not np.array_equal(again.dataset.read(0)[1], build_dataset("camvid", data, "train").read(0)[1])


def test_moving_the_data_keeps_it(data):
    keep(data)
    moved = data.rename(data.with_name("moved"))
    again = keep(moved)
    assert not again.built
    assert_decoded(again, moved)


def test_a_run_keeps_the_pictures_it_began_with(data):
    """Another run's rebuild replaces the file's name, not what a run has mapped already."""
    first = keep(data)
    expected = [build_dataset("camvid", data, "train").read(index)[0] for index in range(5)]
    for number in range(5):
        save(number, data, seed=1)
    assert keep(data).built
    for index, image in enumerate(expected):
        np.testing.assert_array_equal(first.dataset.read(index)[0], image)


def test_a_file_that_another_run_takes_away_is_told_in_one_line(data):
    def take_away(line):
        if "decoded pictures in" in line:  # the last words before it is opened
            file_of(data).unlink()

    with pytest.raises(DataError, match=f"{file_of(data)}: another run is replacing it.*--cache-dir"):
        build_dataset("camvid", data, "train").keep(Cache("disk", tell=take_away))


# -------------------------------------------------------------------------------------------------------------- never damaged in silence


def test_a_truncated_file_is_rebuilt(data):
    keep(data)
    whole = file_of(data).read_bytes()
    for length in [0, 1, 79, 80, *range(100, len(whole), len(whole) // 12), len(whole) - 1]:
        file_of(data).write_bytes(whole[:length])
        again = keep(data)
        assert again.built, length
        assert file_of(data).read_bytes() == whole
    file_of(data).write_bytes(whole + b"\0")
    assert keep(data).built


def test_no_flipped_bit_is_read_in_silence(data):
    """Outside the pictures it is built again; inside, the picture is refused by name. Every byte of index and trailer, 100 of pictures."""
    keep(data)
    whole = file_of(data).read_bytes()
    end = sum(4 * height * width for height, width in (item.size() for item in build_dataset("camvid", data, "train").items))
    rng = np.random.default_rng(0)
    origin, rebuilt, refused = cache._origin(build_dataset("camvid", data, "train").items, data), 0, 0
    for at in [*rng.integers(0, end, 100), *range(end, len(whole))]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        file_of(data).write_bytes(flipped)
        try:
            store = cache.Store(file_of(data), origin, 5)
        except cache.Unusable:
            rebuilt += 1
            continue
        owner = next(number for number in range(4, -1, -1) if store.index["offset"][number] <= at)
        with pytest.raises(DataError, match=f"{file_of(data)}: picture name{owner} is damaged in this cache; delete"):
            store.read(owner, f"name{owner}")
        refused += 1
    assert (rebuilt, refused) == (len(whole) - end, 100)
    assert keep(data).built  # the last flip, as a run finds it


def test_a_damaged_picture_stops_a_loader_with_one_line(data):
    keep(data)
    content = bytearray(file_of(data).read_bytes())
    content[10] ^= 1
    file_of(data).write_bytes(content)
    damaged = keep(data, augment=CROP)
    assert not damaged.built
    with pytest.raises(DataError, match="picture 0 is damaged in this cache") as caught:
        batches(damaged.dataset, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind, workers", [("disk", 0), pytest.param("ram", 0, marks=linux), ("disk", 2)])
def test_an_unreadable_picture_is_refused_when_it_is_built(data, kind, workers):
    if workers:
        for number in range(20):  # several chunks, so that processes decode
            shutil.copy(data / "train/0.png", data / f"train/x{number}.png")
            shutil.copy(data / "trainannot/0.png", data / f"trainannot/x{number}.png")
    path = data / "train/2.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=f"{path}: picture is damaged") as caught:
        keep(data, kind, workers=workers)
    assert "\n" not in str(caught.value)
    assert not [found for found in data.glob(f"{cache.FOLDER}/*") if found.suffix != ".lock"]
    label = data / "trainannot/2.png"
    save(2, data)
    Image.fromarray(np.full_like(np.array(Image.open(label)), 77)).save(label)
    with pytest.raises(DataError, match=f"{label}: label value 77 found"):
        keep(data, kind, workers=workers)


# -------------------------------------------------------------------------------------------------------------- space and folders


def test_what_does_not_fit_is_refused_with_numbers(data, monkeypatch):
    needed = sum(4 * height * width for height, width in (item.size() for item in build_dataset("camvid", data, "train").items))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))  # no room for the index
    with pytest.raises(DataError, match=r"the 5 decoded pictures of camvid-train take 0 MiB, 0 MiB are free in .*--cache-dir"):
        keep(data)
    assert not file_of(data).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed + 4096))
    assert keep(data).built


@linux
def test_what_does_not_fit_into_memory_is_refused(data, monkeypatch):
    assert 2**20 < cache._free_memory() < 2**50
    monkeypatch.setattr(cache, "_free_memory", lambda: 1000)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DataError, match="--cache ram: the 5 decoded pictures .* free in memory; use --cache disk, or none"):
        keep(data, "ram")
    assert len(os.listdir("/proc/self/fd")) == before


def test_limits_of_control_groups_count(tmp_path):
    """A container or a job has less memory than its machine: the least that it and the groups above it leave, files' pages not counted."""
    own, mounted = tmp_path / "cgroup", tmp_path / "mounted"

    def group(folder, names, values, stat):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, values, strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))

    def free():
        return sorted(cache._free_in_groups(own, mounted))

    assert free() == []
    own.write_text("0::/job/step\n")
    assert free() == []
    second = "memory.max", "memory.current"
    group(mounted / "job", second, (1000, 700), {"anon": 600, "inactive_file": 60, "active_file": 40, "shmem": 5})
    assert free() == [400]
    group(mounted / "job/step", second, ("max", 200), {})
    group(mounted / "other", second, (10, 0), {})
    assert free() == [400]
    group(mounted / "job/step", second, (300, 500), {})
    assert free() == [0, 400]
    own.write_text("0::/\n")  # in a namespace of its own the group is the root
    group(mounted, second, (2000, 1), {})
    assert free() == [1999]
    own.write_text("9:name=systemd:/docker/x\n3:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/docker/x\n")
    shutil.rmtree(mounted)
    first = "memory.limit_in_bytes", "memory.usage_in_bytes"
    group(mounted / "memory", first, (5000, 1500), {"inactive_file": 1, "total_inactive_file": 300, "total_active_file": 200})
    assert free() == [4000], "inside the container that group is where version 1 is mounted"
    group(mounted / "memory/docker/x", first, (2**63 - 4096, 0), {})
    assert free() == [4000, 2**63 - 4096]


def test_shares_that_are_held_out_have_caches_of_their_own(data):
    for share in (0.2, 0.4, 0.2):
        spec = get_spec("camvid").hold_out(share)
        for split in (spec.train_split, spec.select_split):
            build_dataset(spec, data, split).keep(Cache("disk", tell=lambda line: None))
    names = {path.name for path in (data / cache.FOLDER).glob("*.cache")}
    assert names == {f"camvid-{split}-{share}.cache" for split in ("train-kept", "train-held-out") for share in (0.2, 0.4)}


def keep_with_small_files(data) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
    with pytest.raises(DataError, match=r"camvid-train.cache.*: cannot be written \(File too large\); free space, choose .*--cache-dir") as caught:
        keep(data)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_in_one_line(data):
    """Files of the child may have 10000 bytes, fewer than the pictures need."""
    child = context.Process(target=keep_with_small_files, args=(data,))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert [path.suffix for path in (data / cache.FOLDER).iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/file.*cannot be .*--cache-dir"):
        keep(data, folder=tmp_path / "file")
    elsewhere = tmp_path / "new" / "folder"
    assert keep(data, folder=elsewhere).built and (elsewhere / "camvid-train.cache").exists() and not (data / cache.FOLDER).exists()


def test_drawn_pictures_are_not_kept_on_disk():
    with pytest.raises(DataError, match="--cache disk: shapes-train is drawn.*use --cache ram"):
        build_dataset("shapes", None, "train").keep(Cache("disk"))


def test_flags(capsys):
    def options(*flags):
        return train_options(["--save-dir", "run", *flags], distil=False, description="")

    assert options().cache == "none" and options("--cache", "ram").cache == "ram"
    with pytest.raises(SystemExit):
        options("--cache", "ram", "--cache-dir", "d")
    assert "--cache-dir d: belongs to --cache disk, --cache is ram" in capsys.readouterr().err
    found = decoded_cache(options("--cache", "disk", "--cache-dir", "d", "--workers", "0"))
    assert (found.kind, found.folder, found.workers, found.leader) == ("disk", "d", 0, 0)


# -------------------------------------------------------------------------------------------------------------- several processes


def keep_and_die(data) -> None:
    read, count = FilePair.read, []

    def dying(item):
        count.append(item)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(item)

    FilePair.read = dying
    keep(data)


def test_a_killed_build_leaves_nothing_in_the_way(data):
    child = context.Process(target=keep_and_die, args=(data,))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert {path.name for path in (data / cache.FOLDER).iterdir()} == {"camvid-train.cache.tmp", "camvid-train.cache.lock"}
    again = keep(data)
    assert again.built
    assert_decoded(again, data)
    assert {path.name for path in (data / cache.FOLDER).iterdir()} == {"camvid-train.cache", "camvid-train.cache.lock"}


def keep_slowly(data, start, queue) -> None:
    read = FilePair.read
    FilePair.read = lambda item: (time.sleep(0.1), read(item))[1]
    start.wait(60)
    told = keep(data)
    FilePair.read = read
    assert_decoded(told, data)
    queue.put(told.built)


def test_of_several_runs_one_builds(data):
    """They start together, and decoding takes long enough for all of them to find no file."""
    start, queue = context.Barrier(3), context.SimpleQueue()
    processes = [context.Process(target=keep_slowly, args=(data, start, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(queue.get() for _ in range(3)) == [False, False, True]


def kept_on_rank():
    """Of this rank: whether it built, the inode of the memory it maps, the sum of all it reads; on rank 1 the failure of rank 0."""
    lines = []
    ranks = {"rank": distributed.rank(), "leader": distributed.leader(), "gather": distributed.gather_text, "tell": lines.append}
    dataset = build_dataset("shapes", None, "val")
    dataset.keep(Cache("ram", **ranks))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:shapes-val" in line]
    total = sum(int(image.sum()) + int(target.sum()) for image, target in map(dataset.read, range(len(dataset))))
    descriptors = sum("memfd:" in os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    if distributed.rank() == 0:
        cache._free_memory = lambda: 0
    try:
        build_dataset("shapes", None, "test").keep(Cache("ram", **ranks))
        failure = ""
    except DataError as error:
        failure = str(error)
    return [sum("decoding" in line for line in lines), [int(fields[4]) for fields in maps], total, descriptors, failure]


def kept_in_a_file(data):
    """Whether this rank built the file; what it reads is what the pictures hold."""
    told = keep(data, rank=distributed.rank(), leader=distributed.leader(), gather=distributed.gather_text)
    assert_decoded(told, data)
    return told.built


def test_the_ranks_of_a_node_share_one_file(data, tmp_path):
    for built in (True, False):  # the second start finds the file
        assert on_ranks(partial(kept_in_a_file, data), 2, tmp_path / "console.txt") == [built, False]
    assert [path.name for path in (data / cache.FOLDER).iterdir() if path.suffix == ".cache"] == [file_of(data).name]


@linux
def test_the_ranks_of_a_node_share_one_copy(tmp_path):
    (built, maps, total, descriptors, failure), other = on_ranks(kept_on_rank, 2, tmp_path / "console.txt")
    assert (built, other[0]) == (1, 0), "one rank decodes"
    assert len(maps) == 1 and maps == other[1], "the same file in memory"
    assert total == other[2] == sum(int(a.sum()) for pair in map(build_dataset("shapes", None, "val").read, range(64)) for a in pair)
    assert descriptors == other[3] == 1, "the mapping's own, so that the memory goes with the last process"
    assert failure == other[4] and "free in memory" in failure


@linux
def test_a_training_does_not_depend_on_the_cache(tmp_path):
    """Losses and scores of two ranks with --cache ram are those of two ranks without."""
    rows = []
    for kind in ("none", "ram"):
        started = train(tmp_path, "--save-dir", kind, "--cache", kind, "--max-iterations", "2", world=2, console=f"{kind}.txt")
        assert started.wait() == [0, 0], started.text
        assert ("decoding 512 pictures" in started.text) == (kind == "ram")
        rows.append([re.sub(r'"(seconds|images_per_second)": [^,}]*', "", line) for line in (tmp_path / kind / "metrics.jsonl").open()])
    assert rows[0] == rows[1] and len(rows[0]) >= 3


# ------------------------------------------------------------------------------------------------------------------- the loader


@pytest.mark.parametrize("device,workers", [("cpu", 0), ("cuda", 2)])
def test_workers_stay_and_batches_for_a_gpu_are_pinned(device, workers):
    loader = build_loader(build_dataset("shapes", None, "val"), EvalSampler(64), workers=workers, device=device)
    assert (loader.persistent_workers, loader.pin_memory) == (workers > 0, device == "cuda")


def load_for_ever(connection, late: bool) -> None:
    multiprocessing.set_start_method("forkserver", force=True)
    if late:
        start = loading._start_worker

        def start_late(main, worker):
            while worker == 1 and os.getppid() == main:
                time.sleep(0.01)
            start(main, worker)

        loading._start_worker = start_late
    loader = build_loader(build_dataset("shapes", None, "train", augment=CROP), EndlessSampler(512, 4), workers=2)
    for number, _ in enumerate(loader):
        if number == 0:
            connection.send([process.pid for process in multiprocessing.active_children()])


def parent_of(pid: int) -> int | None:
    """The parent of a living process."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except FileNotFoundError:
        return None
    return None if state == "Z" else int(parent)


@pytest.mark.skipif(sys.platform != "linux", reason="the start method of Linux")
@pytest.mark.parametrize("late", [False, True])
def test_workers_are_forked_and_end_with_a_killed_training(late):
    """Under the fork server, the default of Python 3.14, they would be its children and never see the training go.

    The second worker is `late` where the training is killed before it is ready: PyTorch's own watch would begin with the new parent.
    """
    ours, theirs = context.Pipe(duplex=False)
    training = context.Process(target=load_for_ever, args=(theirs, late))
    training.start()
    theirs.close()
    workers = ours.recv()
    assert [parent_of(pid) for pid in workers] == [training.pid, training.pid]
    training.kill()
    training.join()
    limit = time.monotonic() + 60  # they look every 5 seconds
    while any(map(parent_of, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    left = [pid for pid in workers if parent_of(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)  # it would hold the terminal of the tests
    assert not left
