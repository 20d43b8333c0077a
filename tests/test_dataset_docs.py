"""dataset/README.md is what the code says now, and the folders that it names are those that are read."""

import re

import pytest

from dataset.__main__ import HERE, on_disk, page, section
from dataset.specs import SPECS
from tests.trees import TREES, build


def test_page_is_current():
    assert (HERE / "README.md").read_text(encoding="utf-8") == page(), "run: python -m dataset"


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.source and not spec.completion])
def test_every_split_says_where_it_lies(name):
    spec = SPECS[name]
    text = section(spec)
    assert spec.source in text and all(f"- {split}: {on_disk(layout)}\n" in text for split, layout in spec.splits.items())
    assert all(("no public labels" in on_disk(layout)) == (not layout.labelled) for layout in spec.splits.values())


@pytest.mark.parametrize("tree", [tree for tree in TREES if not tree.startswith("folder")])
def test_the_patterns_of_the_page_find_the_files(tree, tmp_path):
    """In a tree of the release's layout, which was written without looking at the table: every picture, and every label by one pattern."""
    name, targets = build(tree, tmp_path)
    words = on_disk(SPECS[name].splits["test" if name == "camvid" else "val"])
    before, _, behind = words.partition(" with ")
    counts = []
    for patterns in (re.findall(r"`([^`]+)`", part) for part in (before, behind)):
        lists = [pattern for pattern in patterns if pattern.endswith(".txt")]
        assert not lists or any((tmp_path / path).is_file() for path in lists)
        counts.append(sum(len(list(tmp_path.glob(pattern.replace("{id}", "*")))) for pattern in patterns if pattern not in lists))
    assert counts == [len(targets)] * 2
