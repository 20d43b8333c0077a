"""Two ranks compute what one does: gradients, logged terms, shared helpers. All of a group's checks share one launch."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dataset import Batch, EndlessSampler
from losses import METHODS, Setup, build_methods, resolve
from losses.task import TaskLoss
from models import build_model
from tests.workers import on_ranks
from utils import distributed
from utils.distill import Distiller, Teacher
from utils.engine import NonFiniteError, Record, Training, train_step
from utils.options import train_options

CLASSES, IMAGES, CROP = 5, 4, 32
CASES = {  # methods, accumulate, loss norm
    "task": ((), 1, "global"),
    "task, accumulated": ((), 2, "global"),
    "kd": (("kd",), 1, "global"),
    "afdcd": (("afdcd",), 1, "global"),
    "afdcd, accumulated": (("afdcd",), 2, "global"),
    "kd and afdcd": (("kd", "afdcd"), 1, "global"),
    "local": ((), 1, "local"),
}


class Recorder(torch.optim.SGD):
    """Keeps the gradients of the step instead of making it."""

    def step(self):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def networks() -> list[nn.Module]:
    """A student with an auxiliary head and a wider teacher, float64, BatchNorm in evaluation mode (each rank of a CPU group
    normalises by its own images; SyncBatchNorm needs GPUs), without dropout."""
    models = []
    for backbone, aux, seed in (("mobilenetv2", True, 0), ("resnet18", False, 1)):
        torch.manual_seed(seed)
        model = build_model("pspnet", backbone, CLASSES, head_width=8, aux=aux).double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        models.append(model.eval())
    return models


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """4 pictures; of the last two, which are the second rank's, 95 % of the labels are ignored."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (IMAGES, 3, CROP, CROP), generator=generator, dtype=torch.uint8)
    target = torch.randint(0, CLASSES, (IMAGES, CROP, CROP), generator=generator, dtype=torch.uint8)
    target[2:][torch.rand(target[2:].shape, generator=generator) < 0.95] = 255
    return image, target


def step_gradients(names, accumulate, loss_norm):
    """Gradients of one real training step of this rank's part of the pictures, and the terms as they are logged."""
    student, teacher = networks()
    setup = Setup(student.channels, teacher.channels, CLASSES, (CROP, CROP), IMAGES)
    given = {"kd": {}, "afdcd": {"kd_weight": 0.0} if "kd" in names else {}}
    methods = build_methods({name: resolve(METHODS[name], "shapes", given[name])[0] for name in names}, setup)
    distiller = Distiller(student, TaskLoss(0.4), methods).double()
    given = ["--save-dir", "unused", "--batch-size", str(IMAGES), "--max-iterations", "10", "--seed", "3", "--loss-norm", loss_norm]
    options = train_options(given, distil=False, description="")
    recorder = Recorder(distiller.parameters(), lr=0.1)
    training = Training(distiller, {"student": recorder}, options, torch.device("cpu"), step=4)
    image, target = pictures()
    sampler = EndlessSampler(IMAGES, IMAGES, rank=distributed.rank(), world=distributed.world(), accumulate=accumulate)
    micro = []
    for addresses, _ in zip(sampler, range(accumulate), strict=False):
        places = [position for _, position in addresses]
        micro.append(Batch(image[places], target[places], [f"picture {place}" for place in places]))
    record = Record(distiller.term_names, check_gradients=True)
    teach = Teacher(teacher, distiller.teacher_needs) if methods else None
    train_step(training, distributed.wrap(distiller, torch.device("cpu")), teach, micro, record)
    return recorder.gradients, record.means()


def helpers() -> dict:
    """What the functions of utils/distributed.py return on this rank."""
    rank = distributed.rank()
    norm = nn.BatchNorm2d(2)
    norm.running_mean += rank + 1
    norm.running_var *= 3 * rank + 1
    distributed.average_buffers(nn.Sequential(nn.Conv2d(1, 1, 1), norm))
    rows = torch.full((2, 1), rank + 1.0, requires_grad=True)
    (distributed.gather_with_gradient(rows) ** 2).sum().backward()
    torch.manual_seed(rank)  # ranks that start with different weights get rank 0's
    wrapped = distributed.wrap(nn.Linear(2, 2), torch.device("cpu"))
    student, teacher = networks()
    setup = Setup(student.channels, teacher.channels, CLASSES, (CROP, CROP), IMAGES)
    distiller = Distiller(student, TaskLoss(0.4), build_methods({"afdcd": resolve(METHODS["afdcd"], "shapes", {})[0]}, setup)).double()
    Teacher(teacher, distiller.teacher_needs)
    exchanged = distributed.wrap(distiller, torch.device("cpu"))
    batch = Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4), ["a", "b"], step=7, offset=2 * rank, global_size=4)
    method = SimpleNamespace(name="afdcd", setup=SimpleNamespace(seed=5))
    return {
        "rank": (rank, distributed.world(), distributed.is_main()),
        "total": distributed.total(torch.tensor([rank + 1, 10])).tolist(),
        "minimum": distributed.minimum(torch.tensor([rank, -rank])).tolist(),
        "any": [distributed.any_rank(rank == 1), distributed.any_rank(rank == 0), distributed.any_rank(False)],
        "from_main": [distributed.from_main(value) for value in (rank + 0.1, rank + 3, rank == 0)],
        "gather": distributed.gather(torch.tensor([[rank], [rank + 10]])).flatten().tolist(),
        "text": distributed.gather_text(f"größe {rank}" if rank else ""),
        "long text": [len(text) for text in distributed.gather_text("x" * (3000 + rank))],
        "buffers": [norm.running_mean.tolist(), norm.running_var.tolist()],
        "row gradient": rows.grad.flatten().tolist(),
        # bytes of gradients, in DDP's buckets and in the networks
        "buckets": (sum(map(int, exchanged._get_ddp_logging_data()["bucket_sizes"].split(", "))) if distributed.world() > 1 else None,
                    [sum(p.nbytes for p in part.parameters()) for part in (student, distiller.methods, teacher)]),
        "weights": getattr(wrapped, "module", wrapped).weight.tolist(),
        "uniform": METHODS["afdcd"].uniform(method, batch, 3, 3).tolist(),
    }


def one_bad_term() -> str:
    """The error of a step in which the last rank alone has a NaN, and no gradient shows it (as under float16's scaler)."""
    record = Record(["task/ce"], check_gradients=False)
    for step in (4, 5):
        value = float("nan") if step == 5 and distributed.rank() == distributed.world() - 1 else 1.0
        record.add(step, torch.tensor([value, value]), torch.tensor(float("inf")), [f"picture {step}"])
    try:
        record.check()
    except NonFiniteError as error:
        return str(error)
    return "unseen"


def everything() -> dict:
    return {"bad": one_bad_term(), "helpers": helpers(), **{name: step_gradients(*case) for name, case in CASES.items()}}


@pytest.fixture(scope="module")
def one_rank():
    return everything()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_ranks(everything, 2, tmp_path_factory.mktemp("group") / "console.txt")


def largest_difference(ours, theirs) -> float:
    """Relative to the largest entry of all gradients."""
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / max(b.abs().max().item() for b in theirs)


@pytest.mark.parametrize("case", [name for name in CASES if name != "local"])
def test_gradients_of_two_ranks_are_those_of_one(case, one_rank, two_ranks):
    expected, terms = one_rank[case]
    assert any(gradient.abs().max() > 0 for gradient in expected)
    for gradients, logged in (result[case] for result in two_ranks):
        assert largest_difference(gradients, expected) < 1e-12
        assert logged == pytest.approx(terms, rel=1e-6)  # terms are logged in float32


@pytest.mark.parametrize("plain,accumulated", [("task", "task, accumulated"), ("afdcd", "afdcd, accumulated")])
def test_accumulated_gradients_are_those_of_the_large_batch(plain, accumulated, one_rank):
    assert largest_difference(one_rank[accumulated][0], one_rank[plain][0]) < 1e-12


def test_local_norm_differs(one_rank, two_ranks):
    """The negative control: a mean per rank weighs the few labelled pixels of the second rank as much as the many of the first."""
    assert largest_difference(two_ranks[0]["local"][0], one_rank["local"][0]) > 1e-2
    assert largest_difference(one_rank["local"][0], one_rank["task"][0]) < 1e-12, "on one rank without accumulation both norms are one"


def test_the_mask_is_random_and_counts():
    """Negative control of the Af-DCD cases: with every rank at offset 0, ranks would draw the mask of the first pictures."""
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), ["a", "b"], step=7, global_size=4)
    method = SimpleNamespace(name="afdcd", setup=SimpleNamespace(seed=5))
    first, second = (METHODS["afdcd"].uniform(method, dataclasses.replace(batch, offset=offset), 3, 3) for offset in (0, 2))
    assert not torch.equal(first, second)


def test_all_ranks_know_of_the_bad_term_of_one(one_rank, two_ranks):
    for result, rank in ((one_rank, 0), (two_ranks[0], 1), (two_ranks[1], 1)):
        assert result["bad"].startswith(f"step 6: not finite: rank {rank}: total, task/ce on picture 5; last.pth holds earlier, finite weights")


def test_helpers_on_two_ranks(one_rank, two_ranks):
    first, second = (result["helpers"] for result in two_ranks)
    assert first.pop("rank") == (0, 2, True) and second.pop("rank") == (1, 2, False)
    uniform = first.pop("uniform") + second.pop("uniform")
    # each rank has the whole loss, the sum of squares, so its rows get their gradient 2x from both; DDP's mean then halves it
    assert first.pop("row gradient") == [4.0, 4.0] and second.pop("row gradient") == [8.0, 8.0]
    assert first == second
    assert first["total"] == [3, 20] and first["minimum"] == [0, -1]
    assert first["any"] == [True, True, False]
    assert first["from_main"] == [0.1, 3, True] and [type(value) for value in first["from_main"]] == [float, int, bool]
    assert first["gather"] == [0, 10, 1, 11]
    assert first["text"] == ["", "größe 1"] and first["long text"] == [2000, 2000]
    assert first["buffers"] == [[1.5, 1.5], [2.5, 2.5]]
    assert first["weights"] == one_rank["helpers"]["weights"]
    buckets, (student, methods, teacher) = first["buckets"]
    assert buckets == student + methods and min(student, methods, teacher) > 0
    whole = Batch(torch.zeros(4, 3, 4, 4), torch.zeros(4, 4, 4), list("abcd"), step=7, global_size=4)
    method = SimpleNamespace(name="afdcd", setup=SimpleNamespace(seed=5))
    assert uniform == METHODS["afdcd"].uniform(method, whole, 3, 3).tolist()


def test_helpers_are_the_identity_on_one_rank(one_rank):
    found = one_rank["helpers"]
    assert found["rank"] == (0, 1, True)
    assert found["total"] == [1, 10] and found["minimum"] == [0, 0] and found["gather"] == [0, 10]
    assert found["any"] == [False, True, False] and found["from_main"] == [0.1, 3, True] and found["text"] == [""]
    assert found["row gradient"] == [2.0, 2.0] and found["buffers"] == [[1.0, 1.0], [1.0, 1.0]]
    layer = nn.Linear(1, 1)
    assert distributed.wrap(layer, torch.device("cpu")) is layer


def test_init_refuses_a_missing_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: no GPU is visible"):
        distributed.init("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="local rank 2 has no GPU: 2 visible"):
        distributed.init("auto")


@pytest.mark.parametrize(("variables", "message"), [
    ({"RANK": "0", "WORLD_SIZE": "1"}, "the environment has RANK and WORLD_SIZE, and no MASTER_ADDR and no MASTER_PORT; start with torchrun"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "the environment has RANK and WORLD_SIZE, and no MASTER_PORT; "),
    ({"LOCAL_RANK": "a"}, "the environment has LOCAL_RANK='a', which is no number; "),
    ({"WORLD_SIZE": "-1"}, "the environment has WORLD_SIZE='-1', which is no number; "),
])  # fmt: skip
def test_variables_that_something_else_has_left(variables, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        distributed.init("cpu", timeout=5)
    assert str(error.value).startswith(message) and "unset RANK, WORLD_SIZE and LOCAL_RANK" in str(error.value)
    for name in variables:
        monkeypatch.delenv(name)
    assert distributed.init("cpu") == torch.device("cpu") and distributed.world() == 1
