"""LAD: the recoding of labels, the teacher's two paths, and students without a fourth channel."""

import numpy as np
import pytest
import torch

from dataset import get_spec
from losses.lad import consistency, label_plane, teaching_codes, teaching_image, training_image
from losses.task import TaskLoss
from models import NORMALIZATIONS, build_model
from models.weights import load_backbone, load_into
from tests import reference
from utils.distill import LabelAssisted, Teacher
from utils.metrics import evaluate
from utils.options import train_options
from utils.session import build_student

CLASSES = 5


def batch(**fields):
    target = torch.randint(0, CLASSES, (2, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    target[:, :8] = 255
    made = reference.batch_of(target, **fields)
    made.image = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return made


def test_label_plane_against_a_loop():
    random = np.random.RandomState(0)
    target = random.randint(0, CLASSES, (2, 6, 7))
    target[0, 0] = 255
    codes, noise = random.randn(2, CLASSES + 1), random.randn(2, 6, 7)
    expected = np.empty((2, 1, 6, 7))
    for b in range(2):
        for y in range(6):
            for x in range(7):
                k = CLASSES if target[b, y, x] == 255 else target[b, y, x]
                expected[b, 0, y, x] = (codes[b, k] + noise[b, y, x]) * 100
    ours = label_plane(torch.from_numpy(target.astype(np.uint8)), torch.from_numpy(codes), torch.from_numpy(noise))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_teaching_codes_are_the_published_ones_for_voc():
    torch.testing.assert_close(teaching_codes(21), (torch.arange(22) - 11) / 10)
    assert teaching_codes(150).min().item() == pytest.approx(-1.1) and teaching_codes(150).max().item() == pytest.approx(1.0)


def test_planes_are_random_where_they_should_be():
    one, two = (training_image(batch(), CLASSES, 0, path)[:, 3] for path in (1, 2))
    assert not torch.equal(one, two)
    assert torch.equal(one, training_image(batch(), CLASSES, 0, 1)[:, 3])
    assert not torch.equal(one, training_image(batch(step=4), CLASSES, 0, 1)[:, 3])
    # one class of one picture has one code, with noise of 100 * 0.03; when teaching 100 * 0.02 around (k - 11) / 10's range
    pixels = one[0][batch().target[0] == 2]
    assert pixels.std().item() == pytest.approx(3.0, rel=0.15)
    taught = teaching_image(batch(), CLASSES, 0)[:, 3]
    for k in range(CLASSES):
        pixels = taught[batch().target == k]
        assert pixels.mean().item() == pytest.approx(100 * (-1.1 + 2.1 * k / CLASSES), abs=0.5)
        assert pixels.std().item() == pytest.approx(2.0, rel=0.15)


def test_training_reads_labels_and_both_paths_agree():
    torch.manual_seed(0)
    student = build_model("pspnet", "mobilenetv2", CLASSES, in_channels=4)
    training = LabelAssisted(student, TaskLoss(0.0), seed=0)
    total, terms = training(batch(progress=0.0), None)
    assert list(terms) == training.term_names == ["task/ce", "lad/consistency"]
    assert total.item() == pytest.approx(terms["task/ce"].item() + 5 * terms["lad/consistency"].item(), rel=1e-6)
    total.backward()
    assert student.backbone.features[0][0].weight.grad[:, 3].abs().max() > 0
    z = torch.randn(1, CLASSES, 8, 8)
    assert consistency(z, z).item() == pytest.approx(0, abs=1e-6)
    assert consistency(z, z + torch.randn(1, CLASSES, 8, 8)).item() > 0.01


def test_teacher_sees_labels_and_plain_models_do_not():
    torch.manual_seed(0)
    assisted, plain = (Teacher(build_model("pspnet", "mobilenetv2", CLASSES, in_channels=n), ("logits",)) for n in (4, 3))
    here, other = batch(), batch()
    other.target = other.target.flip(1)
    assert not torch.equal(assisted(here).logits, assisted(other).logits)
    assert torch.equal(plain(here).logits, plain(other).logits)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_plane_is_as_strong_beside_the_colours_as_published(normalization):
    """Published networks get colours less their mean and 100 times the codes; where colours are divided, so is the plane."""
    model = build_model("pspnet", "mobilenetv2", CLASSES, normalization=normalization, in_channels=4)
    image = teaching_image(batch(), CLASSES, seed=0)
    normal, spread = model.normalize(image).double(), image.double().std((0, 2, 3))
    ratio = normal[:, 3].std() / normal[:, :3].std((0, 2, 3)).mean()
    assert ratio.item() == pytest.approx((spread[3] / spread[:3].mean()).item(), rel=0.01)


def test_dropouts():
    """0.01 in a label-assisted teacher, the published ones in others, --dropout in all."""

    def rates(*given):
        options = train_options(["--dataset", "shapes", "--save-dir", "unused", "--backbone", "mobilenetv2", *given], distil=False, description="")
        return {module.p for module in build_student(options).modules() if isinstance(module, torch.nn.Dropout)}

    assert rates() == {0.1, 0.5} and rates("--label-assisted") == {0.01}
    assert rates("--dropout", "0.2") == rates("--label-assisted", "--student-dropout", "0.2") == {0.2} and rates("--dropout", "0") == {0.0}
    assert rates("--model", "lraspp", "--label-assisted") == set()
    with pytest.raises(ValueError, match="--student-dropout 0.2: lraspp has no dropout layer; drop the flag"):
        rates("--model", "lraspp", "--dropout", "0.2")


def test_a_fourth_plane_is_left_out_exactly(tmp_path):
    torch.manual_seed(0)
    four = build_model("pspnet", "resnet18", CLASSES, in_channels=4).eval()
    torch.save(four.state_dict(), tmp_path / "four.pth")
    three = build_model("pspnet", "resnet18", CLASSES).eval()
    load_into(three, tmp_path / "four.pth")
    image = batch().image
    torch.testing.assert_close(three(image).logits, four(image).logits, rtol=1e-5, atol=1e-5)


def test_stem_takes_colour_planes_from_a_backbone_file(tmp_path):
    torch.manual_seed(0)
    source = build_model("pspnet", "resnet18", CLASSES).backbone
    torch.save(source.state_dict(), tmp_path / "backbone.pth")
    four = build_model("pspnet", "resnet18", CLASSES, in_channels=4)
    load_backbone(four, tmp_path / "backbone.pth")
    weight = four.backbone.conv1.weight
    assert torch.equal(weight[:, :3], source.conv1.weight)
    assert weight[:, 3].std().item() == pytest.approx(0.1, rel=0.15)


def test_evaluation_of_a_teacher_uses_labels():
    """A model whose fourth channel alone decides scores 100 when labels are fed, whatever the picture."""

    class Reader(torch.nn.Module):
        num_classes, config = 8, {"in_channels": 4}

        def forward(self, image):
            codes = 100 * teaching_codes(8)[:8]
            logits = -(image[:, 3:] - codes.view(1, -1, 1, 1)).abs()
            return reference.outputs({"logits": logits})

    target = torch.randint(0, 8, (1, 16, 16), dtype=torch.uint8)
    scores = evaluate(Reader(), [reference.batch_of(target)], 1, get_spec("shapes"), torch.device("cpu"))
    assert scores.miou == 100.0
