"""models/README.md is what the code says now."""

import re

import pytest
import torch

from models import BACKBONES, MODELS, list_models
from models.__main__ import HERE, page, reads, row
from models.weights import infer_config
from tests.test_weights import RECORDED, recorded_state
from tests.test_weights_torchvision import PUBLISHED, SEGMENTATION


def written() -> dict[tuple[str, str], str]:
    """The lines of the page's tables by model and backbone."""
    rows, model = {}, None
    for line in (HERE / "README.md").read_text(encoding="utf-8").splitlines():
        model = line.removeprefix("## ") if line.startswith("## ") else model
        found = re.match(r"\| (\w+) \| \d+ \|", line)
        if found and model in MODELS:
            rows[model, found[1]] = line
    return rows


def covering() -> list[tuple[str, str]]:
    """Pairs among which every model and every backbone is; the others are made of the same parts."""
    pairs, seen = [], set()
    for pair in reversed(list_models()):  # models with backbones of their own first
        if not set(pair) <= seen and not any(size in pair[1] for size in ("101", "b3", "b4", "b5")):  # deep ones take long
            pairs.append(pair)
            seen |= set(pair)
    return pairs


def test_page_is_current():
    rows = written()
    assert list(rows) == list_models() and (HERE / "README.md").read_text(encoding="utf-8") == page(rows), "run: python -m models"


@pytest.mark.parametrize("pair", covering(), ids="-".join)
def test_figures_are_current(pair):
    assert written()[pair] == row(*pair), "run: python -m models"


def test_the_sample_has_every_model_and_backbone():
    deep = {name for name in BACKBONES if "101" in name} | {"mit_b3", "mit_b4", "mit_b5"}
    assert {name for pair in covering() for name in pair} == set(MODELS) | set(BACKBONES) - deep


@pytest.mark.slow
def test_all_figures_are_current():
    assert written() == {pair: row(*pair) for pair in list_models()}, "run: python -m models"


def test_checkpoints_that_it_promises():
    """Of every recorded and every torchvision network, the tensors are recognised as the row that says so; nothing else of torchvision's."""
    for name in RECORDED:
        config = infer_config(recorded_state(name))
        codebase = {"afdcd": "Af-DCD", "cirkdv2": "CIRKDv2", "aicsd": "AICSD"}[name.split("/")[0]]
        assert any(codebase in said for said in reads(config["model"], config["backbone"])), name
    for name, (model, backbone, *_) in PUBLISHED.items():
        with torch.device("meta"):
            net = getattr(SEGMENTATION, name)(weights=None, weights_backbone=None, num_classes=21)
        config = infer_config(net.state_dict())
        assert (config["model"], config["backbone"]) == (model, backbone)
    assert {pair for pair in list_models() if "torchvision" in reads(*pair)} == {(model, backbone) for model, backbone, *_ in PUBLISHED.values()}
