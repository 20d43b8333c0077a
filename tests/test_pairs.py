"""Every method between real models, whatever the strides and widths of the two."""

import pytest
import torch

from losses import METHODS, Setup, resolve
from models import SegOutput, build_model
from tests import reference

CLASSES = 5
PAIRS = [  # student, teacher; the first three run always, the others with --slow
    (("segformer", "mit_b0"), ("deeplabv3", "mobilenetv2")),
    (("deeplabv3", "mobilenetv2"), ("segformer", "mit_b0")),
    (("upernet_lite", "mobilenetv3_small"), ("deeplabv3", "resnet18")),
    (("deeplabv3", "resnet18"), ("upernet_lite", "mobilenetv3_large")),
    (("pspnet", "mobilenetv3_large"), ("segformer", "mit_b2")),
    (("lraspp", "mobilenetv3_large_vanilla"), ("deeplabv3", "mobilenetv2")),
    (("deeplabv3", "mobilenetv2"), ("lraspp", "mobilenetv3_large_vanilla")),
    (("deeplabv3plus", "mobilenetv2"), ("fcn", "resnet18_vanilla")),
    (("fcn", "mobilenetv2"), ("deeplabv3plus", "resnet18_vanilla")),
    (("stdc", "stdc1"), ("deeplabv3", "mobilenetv2")),
    (("deeplabv3", "mobilenetv2"), ("stdc", "stdc1")),
    (("ddrnet", "ddrnet23_slim"), ("ocrnet", "hrnet_w18")),
    (("ocrnet", "hrnet_w18"), ("ddrnet", "ddrnet23_slim")),
    (("fcn", "hrnet_w18"), ("deeplabv3", "mobilenetv2")),
    (("deeplabv3", "mobilenetv2"), ("fcn", "hrnet_w18")),
    (("ocrnet", "mobilenetv2"), ("stdc", "stdc2")),
]
CASES = [pytest.param(*pair, marks=pytest.mark.slow if i > 2 else (), id="-".join(map("_".join, pair))) for i, pair in enumerate(PAIRS)]


def outputs(model, image, requires_grad):
    """Everything that the model computes, as leaves."""
    with torch.no_grad():
        computed = model(image, model.channels)
    return {name: getattr(computed, name).detach().requires_grad_(requires_grad) for name in computed.computed}


def failures(student, teacher) -> dict[str, str]:
    """{method: what went wrong}: each term is finite, and a finite gradient reaches the student and every parameter of the method."""
    size = max(64, 4 * student.config["output_stride"])  # Af-DCD wants 4x4 positions of c4
    image = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    target = torch.randint(0, CLASSES, (2, size // 16, size // 16), dtype=torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)
    target[:, :5] = 255
    batch = reference.batch_of(target)
    batch.image = image
    of_teacher = SegOutput(**outputs(teacher, image, False))
    setup = Setup(student.channels, teacher.channels, CLASSES, (size, size), 2, teacher_norms=teacher.norms)
    of_student = outputs(student, image, True)
    failed = {}
    for name, method in METHODS.items():
        try:
            loss = method(resolve(method, "shapes", {})[0], setup)
            terms = loss(SegOutput(**of_student), of_teacher, batch)
            assert terms.keys() == loss.weights.keys()
            assert all(value.isfinite() for value in terms.values()), terms
            for leaf in of_student.values():
                leaf.grad = None
            sum(loss.weights[term] * value for term, value in terms.items()).backward()
            gradients = [leaf.grad for leaf in of_student.values() if leaf.grad is not None]
            assert gradients and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients), "no gradient of the student"
            assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters()), "a parameter without gradient"
        except Exception as error:  # of all methods, not of the first alone
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


@pytest.mark.parametrize(("student", "teacher"), CASES)
def test_every_method_on_this_pair(student, teacher):
    torch.manual_seed(0)
    failed = failures(build_model(*student, CLASSES).train(), build_model(*teacher, CLASSES).eval())
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())
