"""Faults of ranks: killed, stopped, hanging and diverging ones under torchrun; and for every method, two ranks equal one.

The slow ones start torchrun often: `bash scripts/test.sh --slow tests/test_faults_ranks.py` takes the better part of an hour on two free cores.
"""

import hashlib
import math
import os
import random
import re
import signal
import time
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from dataset import Batch, shapes
from losses import METHODS, Setup, build_methods, resolve
from losses.task import TaskLoss
from models import SegOutput
from tests.faults import Torchrun, alive
from tests.test_resume import differences, stop_in_validation, stopped_after
from tests.workers import RUN, TINY, TINY_STUDENT, distil, on_ranks, save_model, train
from utils import distributed, session
from utils.distill import Distiller, Teacher
from utils.engine import Training, train_step
from utils.optim import build_optimizers
from utils.options import train_options

CPU, CLASSES, IMAGES, CROP = torch.device("cpu"), 5, 4, 64

# ------------------------------------------------------------------------------------- every method, on one rank and on two


class Small(torch.nn.Module):
    """A network with every output that a method may read, whose steps take milliseconds."""

    def __init__(self, width: int, aux: bool, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        widths = (3, width // 2, width // 2, width, width)
        self.config = {"in_channels": 3}
        self.channels = {f"{kind}{n}": widths[n] for kind in "cp" for n in (1, 2, 3, 4)} | {"head": width, "logits": CLASSES}
        self.channels |= {"aux": CLASSES} if aux else {}
        self.stages = torch.nn.ModuleList(torch.nn.Conv2d(widths[n], widths[n + 1], 3, (4, 2, 1, 1)[n], 1) for n in range(4))
        self.neck, self.classifier = torch.nn.Conv2d(width, width, 1), torch.nn.Conv2d(width, CLASSES, 1)
        self.aux = torch.nn.Conv2d(width, CLASSES, 1) if aux else None

    @property
    def norms(self):
        return {f"p{n}": (torch.ones(self.channels[f"p{n}"]), torch.zeros(self.channels[f"p{n}"])) for n in (1, 2, 3, 4)}

    def forward(self, image, needs=("logits",)):
        x, fields = image.to(self.neck.weight.dtype) / 255, {}
        for number, stage in enumerate(self.stages, 1):
            fields[f"p{number}"] = stage(x)
            x = fields[f"c{number}"] = fields[f"p{number}"].relu()
        fields["head"] = self.neck(x).relu()
        fields["logits"] = self.classifier(fields["head"])
        if self.aux is not None:
            fields["aux"] = self.aux(fields["c3"])
        return SegOutput(**{name: fields[name] for name in needs})


def prepared(name: str, aux: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Training, Teacher]:
    """A training of one method with a narrow student and a wide teacher."""
    student, teacher = Small(16, aux, 0), Small(32, aux, 1)
    # what compares images has to see those of all ranks; the critic of skd normalises by its own rank's, as released
    given = {"gather": True, "adversarial_weight": 0.0, "critic_weight": 0.0}
    fields = METHODS[name].Options.__dataclass_fields__
    options, _ = resolve(METHODS[name], "shapes", {key: value for key, value in given.items() if key in fields})
    setup = Setup(student.channels, teacher.channels, CLASSES, (CROP, CROP), IMAGES, teacher_norms=teacher.norms)
    distiller = Distiller(student, TaskLoss(0.4 if aux else 0.0), build_methods({name: options}, setup)).to(dtype)
    for module in distiller.methods.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # on a CPU it normalises by the rank's own pictures
    given = ["--save-dir", "unused", "--batch-size", IMAGES, "--max-iterations", 40, "--lr", 1e-3, "--seed", 3]
    settings = train_options([str(word) for word in given], distil=False, description="")
    return Training(distiller, build_optimizers(distiller, settings), settings, CPU), Teacher(teacher.to(dtype), distiller.teacher_needs)


def batch_of(step: int) -> Batch:
    """This rank's part of the four pictures of a step."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (IMAGES, 3, CROP, CROP), generator=generator, dtype=torch.uint8)
    target = torch.randint(0, CLASSES, (IMAGES, CROP // 8, CROP // 8), generator=generator, dtype=torch.uint8)
    target = target.repeat_interleave(8, 1).repeat_interleave(8, 2)
    share = IMAGES // distributed.world()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    return Batch(image[mine], target[mine], [f"picture {number}" for number in range(IMAGES)[mine]])


def trained(name: str, aux: bool, steps: int) -> Training:
    training, teacher = prepared(name, aux, torch.float64)
    model = distributed.wrap(training.distiller, CPU)
    for step in range(steps):
        train_step(training, model, teacher, [batch_of(step)], training.record)
    return training


def digest(state: dict) -> tuple[str, dict]:
    """A hash of all bytes of a state, and per tensor of floats its product with fixed random numbers and its norm."""
    everything, sketch = hashlib.sha256(), {}
    for key, value in state.items():
        everything.update(value.contiguous().numpy().tobytes())
        if value.is_floating_point():
            direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            sketch[key] = [(value.double() * direction).sum().item(), value.double().norm().item()]
    return everything.hexdigest(), sketch


# statistics of a process's own pictures enter their loss, as published: class centroids, the norm of the batch, the correlation of
# pixels; ranks still stay equal to each other
PER_RANK = {"apd", "attnfd", "dist"}
CASES = [(name, aux, steps) for name in METHODS for aux, steps in ((False, 20), (True, 3))]


def train_every_method() -> dict:
    found = {}
    for name, aux, steps in CASES:
        try:
            training = trained(name, aux, steps)
            found[f"{name} {aux}"] = [*digest(training.distiller.state_dict()), training.record.means()]
        except Exception as error:  # told by the test of the method
            found[f"{name} {aux}"] = [f"{type(error).__name__}: {error}", {}, {}]
    return found


@pytest.fixture(scope="module")
def every_method(tmp_path_factory):
    """{number of ranks: [what each rank found]}"""
    folder = tmp_path_factory.mktemp("methods")
    return {world: on_ranks(train_every_method, world, folder / f"{world}.txt") for world in (1, 2)}


@pytest.mark.parametrize("name,aux,steps", CASES, ids=lambda value: str(value))
def test_two_ranks_train_as_one(name, aux, steps, every_method):
    """20 steps (with auxiliary heads 3): parameters, buffers, queues identical on both ranks, and within 1e-9 of one rank's."""
    (one,), two = ([result[f"{name} {aux}"] for result in every_method[world]] for world in (1, 2))
    assert one[1], one[0]
    assert two[0][0] == two[1][0], "the ranks differ"
    far = [key for key, (product, norm) in one[1].items() if abs(two[0][1][key][0] - product) > 1e-9 * max(1.0, norm)]
    if name in PER_RANK:
        assert far, f"{name} has become independent of the number of ranks: take it from PER_RANK"
        return
    assert not far
    for term, value in one[2].items():
        assert two[0][2][term] == pytest.approx(value, rel=1e-6), term


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_one_process(name):
    """20 steps on the CPU without torchrun: finite terms, a student that moves, a teacher that does not, a state that a file can hold."""
    torch.manual_seed(0)
    training, teacher = prepared(name)
    before = {key: value.clone() for key, value in training.distiller.student.state_dict().items()}
    frozen = hashlib.sha256(b"".join(value.numpy().tobytes() for value in teacher.model.state_dict().values())).digest()
    for step in range(20):
        train_step(training, training.distiller, teacher, [batch_of(step)], training.record)
        training.record.check()
    assert training.step == 20 and all(map(math.isfinite, training.record.means().values()))
    moved = [key for key, value in training.distiller.student.named_parameters() if not torch.equal(value, before[key])]
    assert len(moved) >= 10
    assert hashlib.sha256(b"".join(value.numpy().tobytes() for value in teacher.model.state_dict().values())).digest() == frozen
    again, _ = prepared(name)
    again.restore(training.snapshot())
    assert digest(again.distiller.state_dict()) == digest(training.distiller.state_dict())


def rows_of_two() -> dict:
    """Rows that were not logged before a stop, put back on every rank."""
    training, _ = prepared("kd")
    for step in range(3):
        training.record.add(step, torch.full((3,), 10.0 * step + distributed.rank()), torch.tensor(1.0), [])
    saved, mean = training.record.all_rows(), training.record.means()
    training.record.restore(saved, CPU)
    return {"saved": saved, "mean": mean, "again": training.record.means()}


def test_unlogged_rows_of_all_ranks_are_saved(tmp_path):
    first, second = on_ranks(rows_of_two, 2, tmp_path / "console.txt")
    assert torch.equal(first["saved"], second["saved"]) and first["saved"].shape == (2, 3, 4)
    assert first["saved"][1, 2].tolist() == [21.0, 21.0, 21.0, 1.0]
    assert first["mean"] == first["again"] == second["again"] and first["mean"]["loss"] == 10.5
    training, _ = prepared("kd")
    training.record.restore(first["saved"], CPU)  # on one rank: their mean
    assert training.record.means()["loss"] == 10.5


def wait_for_rank_0() -> dict:
    """Rank 0 works for 2 seconds while the other waits in the group of long waits, whose limit is then the real one, then 1 second."""
    distributed.PATIENCE, real = timedelta(seconds=1), distributed.PATIENCE
    told, impatient = [], distributed.patient_gather()
    distributed.PATIENCE = real
    for gather in (distributed.patient_gather(), impatient):
        if distributed.rank() == 0:
            time.sleep(2)
        try:
            told.append(" ".join(gather(f"rank {distributed.rank()}")))
        except RuntimeError as error:
            told.append("lost" if distributed.lost_peer(error) else str(error))
    return {"told": told, "limit": real.total_seconds()}


def test_ranks_wait_for_what_takes_one_of_them_long(tmp_path):
    """As the first of a node does that decodes pictures for --cache; and the negative control, a group that gives up before."""
    for found in on_ranks(wait_for_rank_0, 2, tmp_path / "console.txt"):
        assert found == {"told": ["rank 0 rank 1", "lost"], "limit": 2 * 24 * 3600}


def differ_between_ranks(folder: Path) -> list[str]:
    """What a training says on a rank that has another teacher, and on one that has other pictures."""
    os.chdir(folder)
    told, rank = [], distributed.rank()
    for teacher, name in ((f"teacher {rank}.pth", "train"), ("teacher 0.pth", "train"), ("teacher 0.pth", "val")):
        shapes.COUNTS.update(train=8, val=2, test=2)
        shapes.COUNTS[name] += rank if told else 0
        given = ["--method", "kd", "--teacher-checkpoint", teacher, *TINY_STUDENT, *RUN, "--max-iterations", "1", "--save-dir", "run"]
        try:
            session.train(train_options(given, distil=True, description=""), CPU)
            told.append("trained")
        except ValueError as error:
            told.append(str(error))
    return told


def test_ranks_with_other_files_do_not_start(tmp_path):
    """Nodes without a shared disk: another teacher under the same path, a picture more; all ranks say which has what."""
    for rank in (0, 1):
        save_model(tmp_path / f"teacher {rank}.pth", rank)
    first, second = on_ranks(partial(differ_between_ranks, tmp_path), 2, tmp_path / "console.txt")
    assert first == second and len(first) == 3
    assert re.fullmatch(r"ranks differ in the teacher \(rank 0: \w{16}, rank 1: \w{16}\); give all nodes the same file", first[0])
    for told, split, count in ((first[1], "train", 8), (first[2], "val", 2)):
        found = rf"ranks differ in the pictures of {split} \(rank 0: {count} \(\w{{8}}\), rank 1: {count + 1} \(\w{{8}}\)\); "
        assert re.fullmatch(found + "give all nodes the same data", told), told
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------- killed and restarted

STEPS = 8
LENGTH = ("--max-iterations", str(STEPS), "--val-interval", "4", "--save-interval", "2", "--save-dir", "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of a method on two ranks that was never stopped, made once."""
    @cache
    def make(method: str | None) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        started = launch(folder, method, world=2)
        assert started.wait() == [0, 0], started.text
        return folder

    return make


def launch(folder, method, *more, **options):
    arguments = [*LENGTH, "--workers", "0", *more]
    return distil(folder, "--method", method, *arguments, **options) if method else train(folder, *arguments, **options)


@pytest.fixture(scope="module")
def whole_torchrun(tmp_path_factory):
    """The same under torchrun, where the splits have their real size."""
    @cache
    def make(method: str | None) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        torchrun = under_torchrun(folder, method, "--workers", "0")
        assert torchrun.wait() == 0, torchrun.text
        return folder

    return make


def under_torchrun(folder: Path, method: str | None, *more: str, restarts: int = 0) -> Torchrun:
    save_model(folder / "teacher.pth", 1)
    script = ["train_kd.py", "--method", method, "--teacher-checkpoint", "teacher.pth", *TINY_STUDENT] if method else ["train_baseline.py", *TINY]
    return Torchrun(folder, *script, *RUN, *LENGTH, "--resume", *more, restarts=restarts)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_ranks_are_restarted_by_torchrun(workers, whole_torchrun, tmp_path):
    """10 runs, 15 kill -9 of a random rank at a random moment: torchrun starts both ranks again, and the end is that of no kill."""
    draw, kills, restarts = random.Random(int(workers)), 0, []
    for run in range(10):
        folder = tmp_path / str(run)
        folder.mkdir()
        start = time.monotonic()
        torchrun = under_torchrun(folder, "cirkd", "--workers", workers, restarts=3)
        torchrun.until("step 1/")
        first = time.monotonic() - start
        for number in range(1, 2 + run % 2):
            torchrun.wait_for_lines("\nstep ", torchrun.text.count("\nstep ") + draw.randrange(4))
            time.sleep(draw.uniform(0, 0.1))
            moment = time.monotonic()
            try:
                torchrun.kill_rank(draw.randrange(2))
            except (KeyError, ProcessLookupError):
                break  # it is done
            # a line of every start: killed before its first step, a run is started anew, and says nothing of going on
            torchrun.until("images per step on 2 ranks", 1 + number)
            kills += 1
            restarts.append(time.monotonic() - moment)
            assert restarts[-1] <= max(15, 2 * first), f"{restarts[-1]:.0f} s for a restart, {first:.0f} for the start"
        assert torchrun.wait() == 0, torchrun.text
        assert differences(whole_torchrun("cirkd"), folder) == [], run
    print(f"{kills} kills, median restart {sorted(restarts)[len(restarts) // 2]:.1f} s")
    assert kills >= 13


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_survives_a_kill(name, whole, tmp_path):
    """kill -9 of a random rank at a random step; the other one ends; started again, the end is bit for bit that of no kill."""
    draw = random.Random(name)
    killed = draw.randrange(2)
    first = launch(tmp_path, name, world=2)
    first.until(f"step {draw.randrange(1, STEPS)}/{STEPS}")
    first.stop(signal.SIGKILL, rank=killed)
    codes = first.wait()
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 2, first.text
    again = launch(tmp_path, name, "--resume", world=2, console="again.txt")
    assert again.wait() == [0, 0] and "going on from step" in again.text, again.text
    assert differences(whole(name), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_sigterm_to_torchrun(attempt, whole_torchrun, tmp_path):
    """torchrun passes it to every process that it started, the loader's workers included: saved within one step, resumed exactly."""
    step = 1 + attempt % (STEPS - 1)
    torchrun = under_torchrun(tmp_path, None, "--workers", "2")
    torchrun.until(f"step {step}/{STEPS}")
    torchrun.process.send_signal(signal.SIGTERM)
    torchrun.wait()
    assert "saved; go on with:" in torchrun.text and "torchrun --nproc-per-node=2" in torchrun.text, torchrun.text
    assert 0 <= stopped_after(tmp_path) - step <= 1
    again = under_torchrun(tmp_path, None, "--workers", "1")
    assert again.wait() == 0, again.text
    assert differences(whole_torchrun(None), tmp_path) == []


def workers_obey_sigterm():
    """The loader's processes as PyTorch starts them, which end on the SIGTERM that torchrun sends to all."""
    import dataset.loader

    def start(worker):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    dataset.loader._start_worker = start


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, workers_obey_sigterm])
def test_workers_that_obey_sigterm_cost_the_save(change, tmp_path):
    """The negative control of the above: SIGTERM to a process and its loader's workers, as torchrun (torch 2.15) sends it."""
    started = train(tmp_path, *LENGTH, "--max-iterations", "1000", "--workers", "2", change=change)
    started.until("step 3/1000")
    (main,) = started.processes
    workers = [int(word) for word in Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()]
    assert len(workers) >= 2
    for process in [*workers, main.pid]:
        os.kill(process, signal.SIGTERM)
    saved = started.wait() == [128 + signal.SIGTERM] and (tmp_path / "run" / "INTERRUPTED").exists()
    assert saved == (change is None), started.text


# ------------------------------------------------------------------------------------------------- SIGTERM at bad moments


@pytest.mark.slow
@pytest.mark.parametrize("index", range(5))
def test_sigterm_at_every_picture_of_a_validation(index, whole, tmp_path):
    change = partial(stop_in_validation, index)
    first = launch(tmp_path, None, world=2, change=change)
    first.until("step 4/")
    start = time.monotonic()
    assert first.wait(60) == [128 + signal.SIGTERM] * 2 and time.monotonic() - start < 30
    assert not list((tmp_path / "run").glob("*.tmp")) and not list((tmp_path / "run").glob(".*.tmp"))
    again = launch(tmp_path, None, "--resume", world=2, change=change, console="again.txt")
    assert again.wait() == [0, 0], again.text
    assert differences(whole(None), tmp_path) == []


def stop_in_a_save(function: str, call: int):
    """SIGTERM to this process at one call of a function of the operating system that a save makes."""
    import utils.checkpoint

    class System:
        calls = 0

        def __getattr__(self, name):
            if name == function:
                System.calls += 1
                if System.calls == call:
                    os.kill(os.getpid(), signal.SIGTERM)
            return getattr(os, name)

    utils.checkpoint.os = System()


@pytest.mark.slow
@pytest.mark.parametrize("function,call", [("fsync", 1), ("fsync", 4), ("replace", 2), ("replace", 4), ("link", 1)])
def test_sigterm_in_a_save(function, call, whole, tmp_path):
    """The save is finished, another one is made, and no partial file stays."""
    first = launch(tmp_path, None, world=2, change=partial(stop_in_a_save, function, call))
    start = time.monotonic()
    first.until("saved; go on with")
    assert first.wait(60) == [128 + signal.SIGTERM] * 2 and time.monotonic() - start < 60, first.text
    assert not list((tmp_path / "run").glob(".*.tmp"))
    again = launch(tmp_path, None, "--resume", world=2, console="again.txt")
    assert again.wait() == [0, 0], again.text
    assert differences(whole(None), tmp_path) == []


# --------------------------------------------------------------------------------------------------- hanging and diverging

LIMIT = ("--dist-timeout", "8", "--max-iterations", "1000", "--val-interval", "1000")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_rank_ends_the_other(rank, tmp_path):
    started = launch(tmp_path, None, *LIMIT, world=2)
    started.until("step 3/1000")
    started.stop(signal.SIGSTOP, rank=rank)
    start = time.monotonic()
    live = started.processes[1 - rank]
    try:
        live.join(60)
        # a rank other than 0 leaves the first word to rank 0 for 3 seconds
        assert live.exitcode == 2 and time.monotonic() - start < 8 + 3 + 3 * (rank == 0) + 2, started.text
    finally:
        started.stop(signal.SIGKILL, rank=rank)
    started.wait()
    assert re.search(r"error: another rank stopped or hangs; its own message says why \(.+\)$", started.text, re.M), started.text
    assert "Traceback" not in started.text


def diverge():
    """Rank 1 leaves out one of the collectives of step 4."""
    import utils.engine

    prepare, original = utils.engine.prepare, distributed.total

    def changed(micro, step, progress, options):
        skip = distributed.rank() == 1 and step == 3
        distributed.total = (lambda value: value) if skip else original
        prepare(micro, step, progress, options)
        distributed.total = original

    utils.engine.prepare = changed


@pytest.mark.slow
def test_diverging_ranks_end(tmp_path):
    started = launch(tmp_path, None, *LIMIT, world=2, change=diverge)
    started.until("step 3/1000")
    start = time.monotonic()
    codes = started.wait(60)
    assert all(codes) and time.monotonic() - start < 8 + 3 + 3 + 2, started.text


# ------------------------------------------------------------------------------------------------------------------- soak


def resident(process: int) -> int:
    """Bytes of a process in memory. Not its private ones: of a forked process they grow as pages that were shared are written to."""
    (line,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.M)
    return 1024 * int(line)


def use(process: int) -> tuple[int, int]:
    """(bytes in memory, open files) at the quietest of some moments: saves and validations take more for a while."""
    seen = []
    for _ in range(20):
        seen.append((resident(process), len(os.listdir(f"/proc/{process}/fd"))))
        time.sleep(0.1)
    return tuple(map(min, zip(*seen, strict=True)))


@pytest.mark.slow
def test_2000_steps_leave_memory_and_files_as_they_are(tmp_path):
    """Two ranks with class queues, saves, validations and a loader process each: memory grows by less than 5 % from step 500 on."""
    steps = 2000
    arguments = ["--max-iterations", steps, "--val-interval", "250", "--save-interval", "100", "--log-interval", "10", "--crop-size", "32"]
    started = distil(tmp_path, "--method", "cirkd", *arguments, "--workers", "1", "--save-dir", "run", world=2)
    seen = {}
    for step in (520, 1020, 1520, 1920):
        started.until(f"step {step}/{steps}", timeout=7200)
        seen[step] = [use(process.pid) for process in started.processes]
    assert started.wait(600) == [0, 0], started.text
    for rank in (0, 1):
        memory, files = zip(*(found[rank] for found in seen.values()), strict=True)
        print(f"rank {rank}: {[round(m / 2**20) for m in memory]} MiB, {files} files")
        assert max(memory[1:]) < 1.05 * memory[0], memory
        assert max(files[1:]) <= files[0], files
    assert not any(alive(process.pid) for process in started.processes)
