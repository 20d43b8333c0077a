"""BatchNorms folded into the teacher's convolutions, its weights in half precision, and compiled networks."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from losses.task import TaskLoss
from models import SegOutput, build_model
from models.fold import FoldedNorm, fold_batchnorm
from tests import reference
from tests.paths import REPOSITORY
from utils.distill import Distiller, Teacher, check_compile


def trained(model: nn.Module) -> nn.Module:
    """With statistics and weights of BatchNorm that are not those it starts from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 0.1, generator=generator)
    return model.eval()


def norms_of(model) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def picture(side=72):
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


# some normalise in front of a convolution, or behind a sum: those stay
LEFT = {("deeplabv3", "resnet18"): 0, ("pspnet", "resnet50_vanilla"): 0, ("deeplabv3", "mobilenetv2"): 0, ("ddrnet", "ddrnet23_slim"): 13}


@pytest.mark.parametrize("name", LEFT)
def test_every_output_stays(name):
    """Also the stages before their ReLU, and the weights of the folded norms, which OFD asks for."""
    model = trained(build_model(*name, 5))
    before, count = model(picture(), model.channels), norms_of(model)
    folded, number = fold_batchnorm(model, tuple(model.channels))
    after = folded(picture(), model.channels)
    assert norms_of(folded) == LEFT[name] == count - number and norms_of(model) == count, "the model itself is left as it is"
    for field in model.channels:
        expected, found = getattr(before, field), getattr(after, field)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), field
    assert torch.equal(before.logits.argmax(1), after.logits.argmax(1))
    assert model.norms.keys() == folded.norms.keys()
    for field, pair in model.norms.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, folded.norms[field], strict=True))
    assert not any(parameter.requires_grad for parameter in folded.parameters())


class Net(nn.Module):
    """Two convolutions and a BatchNorm, joined by `rule`."""

    config = {"in_channels": 3}

    def __init__(self, rule):
        super().__init__()
        self.first, self.second, self.norm, self.rule = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), rule

    def forward(self, image, needs=("logits",)):
        return SegOutput(logits=self.rule(self, self.first(image / 255)))


RULES = {
    "in a row": (1, lambda net, x: net.second(net.norm(x))),
    "the output is used twice": (0, lambda net, x: net.norm(x) + net.second(x)),
    "the convolution runs twice": (0, lambda net, x: net.norm(net.second(net.second(x)))),
    "the norm runs twice": (0, lambda net, x: net.norm(x) + net.norm(net.second(x))),
    "an activation in between": (0, lambda net, x: net.norm(x.relu())),
    "a norm in front": (1, lambda net, x: net.second(net.norm(x).relu())),
}


@pytest.mark.parametrize("case", RULES)
def test_what_cannot_be_folded_is_left(case):
    number, rule = RULES[case]
    net = trained(Net(rule))
    folded, found = fold_batchnorm(net, ("logits",))
    assert found == number and sum(isinstance(m, FoldedNorm) for m in folded.modules()) == number
    image = picture(16).float()
    torch.testing.assert_close(folded(image).logits, net(image).logits, rtol=1e-5, atol=1e-5)


def test_a_subclass_of_a_convolution_is_left():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    net = Net(RULES["in a row"][1])
    net.first = Standardised(3, 4, 3)
    assert fold_batchnorm(trained(net), ("logits",))[1] == 0


def test_half_precision_tells_its_agreement_once(caplog):
    model = trained(build_model("deeplabv3", "mobilenetv3_small", 5))
    exact = Teacher(fold_batchnorm(model, ("logits", "c4"))[0], ("logits", "c4"))
    half = Teacher(fold_batchnorm(model, ("logits", "c4"))[0], ("logits", "c4"), dtype=torch.bfloat16)
    assert {m.weight.dtype for m in half.model.modules() if isinstance(m, nn.Conv2d)} == {torch.bfloat16}
    batch = SimpleNamespace(image=picture(96))
    with caplog.at_level(logging.INFO, "segkd"), torch.autocast("cpu", dtype=torch.bfloat16):
        found = [half(batch) for _ in range(2)][1]
    share = (found.logits.argmax(1) == exact(batch).logits.argmax(1)).double().mean().item()
    lines = [line for line in caplog.messages if "float32" in line]
    assert lines == [f"teacher in bfloat16: {100 * share:.2f} % of the positions of the first batch have the class of float32"]
    assert share > 0.8 and half.exact is None
    torch.testing.assert_close(found.c4.float(), exact(batch).c4, rtol=0.1, atol=0.1 * exact(batch).c4.abs().max().item())


def test_compile_refuses_what_a_machine_lacks():
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="--compile reduce-overhead: records CUDA graphs, which cpu has not"):
        check_compile("reduce-overhead", cpu, 1)
    with pytest.raises(ValueError, match="do not outlive the next micro-batch.*drop --accumulate 2"):
        check_compile("max-autotune", torch.device("cuda"), 2)
    check_compile("off", cpu, 1)


@pytest.mark.slow
def test_no_compiler_is_one_line(tmp_path):
    code = "import torch; from utils.distill import check_compile; check_compile('default', torch.device('cpu'), 1)"
    environment = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ValueError: --compile default: torch.compile does not work here (") and last.endswith("(g++), or pass --compile off")


@pytest.mark.slow
def test_compiled_networks_compute_the_same():
    """Loss and gradients of a student, outputs of a teacher with stages before their ReLU; the names of the state stay.

    In float64: in float32 rounding moves gradients of the first layer by a few thousandths.
    """
    torch.manual_seed(0)
    image, target = picture(64), torch.randint(0, 5, (2, 64, 64), dtype=torch.uint8)
    student, teacher = (build_model("deeplabv3", "resnet18_vanilla", 5, aux=False).double() for _ in range(2))
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch, results = reference.batch_of(target), []
    batch.image = image
    state = {name: value.clone() for name, value in student.state_dict().items()}
    for mode in ("off", "default"):
        student.load_state_dict(state)
        distiller = Distiller(student, TaskLoss(0.0), {}, mode).train()
        assert distiller.state_dict().keys() == {f"student.{name}" for name in state}
        total, _ = distiller(batch)
        results.append([total, *torch.autograd.grad(total, [student.head.classifier.weight, student.backbone.conv1.weight])])
        output = Teacher(trained(teacher), ("logits", "p3", "p1"), compile=mode)(batch)
        results[-1] += [output.logits, output.p3, output.p1]
    for plain, compiled in zip(*results, strict=True):
        assert plain.dtype == torch.float64 and (plain - compiled).abs().max() <= 1e-9 * plain.abs().max()
