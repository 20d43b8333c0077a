"""results/parity.md, the comparison with the published code, has every recorded value."""

import json

from tests.paths import GOLDEN, REPOSITORY


def test_the_table_is_complete_and_within_its_bounds():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (REPOSITORY / "results" / "parity.md").read_text().splitlines()]
    rows = [row for row in rows if len(row) == 7]
    found = {tuple(row[:2]) for row in rows}
    losses = json.loads((GOLDEN / "losses.json").read_text())
    models = json.loads((GOLDEN / "models.json").read_text())["models"]
    assert {(entry, term) for entry, content in losses.items() for term in content["terms"]} <= found
    assert set(models) <= {entry for entry, _ in found}
    for entry, what, _, _, error, worst, _ in rows:
        if entry in losses or entry in models:
            assert float(error) <= (2e-4 if entry in losses else 1e-4), (entry, what)
            assert worst == "-" or float(worst) <= 1e-3, (entry, what)
