"""losses/README.md is what the code says now."""

import json

from losses import METHODS
from losses.__main__ import HERE, page


def test_page_is_current():
    costs = json.loads((HERE / "costs.json").read_text(encoding="utf-8"))
    assert (HERE / "README.md").read_text(encoding="utf-8") == page(costs), "run: python -m losses"
    assert costs["relative"].keys() == METHODS.keys(), "run: python -m losses --measure"
