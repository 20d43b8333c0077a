"""Statistics of a comparison: tables of Student's t, hand-made differences, and how often the verdicts are wrong."""

import math

import numpy as np
import pytest

from scripts.evidence import holm, paired, t_quantile, t_tail, verdict


@pytest.mark.parametrize(  # two-sided 95 % quantiles of any table of Student's t
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (120, 1.97993)]
)
def test_quantiles_are_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, rel=1e-5)


def test_tail_in_closed_form():
    for t in (0.0, 0.3, 1.0, 5.0, 100.0):
        assert t_tail(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-9)  # Cauchy
        assert t_tail(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-9)


def test_paired_difference_by_hand():
    found = paired({0: 3.0, 1: 5.0, 2: 4.0, 7: 90.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: -50.0})  # differences 2, 3, 1
    assert (found.mean, found.seeds) == (2.0, 3)
    reach = 4.30265 * 1 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(2 - reach, rel=1e-5), pytest.approx(2 + reach, rel=1e-5))
    assert found.p == pytest.approx(t_tail(2 * math.sqrt(3), 2))
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert math.isnan(paired({0: 1.0}, {0: 2.0}).p)


def test_equal_scores_decide_nothing():
    same = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same.p == 1.0 and "undecided" in verdict("a", "b", same, same.p)
    assert paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p == 0.0  # the same gain with every seed


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan})["a"] == pytest.approx(0.03)
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted["c"] == pytest.approx(0.06) and adjusted["b"] == pytest.approx(0.06)  # never below a smaller p's


def test_verdicts():
    gain = paired({0: 3.0, 1: 3.1, 2: 2.9}, dict.fromkeys(range(3), 1.0))
    assert verdict("cwd", "none", gain, gain.p).startswith("cwd > none: +2.00 [+1.75, +2.25], n=3, p=")
    assert "undecided" in verdict("cwd", "none", gain, 0.2)
    assert verdict("bad", "none", paired({0: -1.0, 1: -1.1}, {0: 1.0, 1: 1.0}), 0.01).startswith("bad < none: -2.05")
    assert "one seed" in verdict("a", "b", paired({0: 2.0}, {0: 1.0}), math.nan)


def test_false_verdicts_are_as_rare_as_promised():
    """Five arms that differ from the baseline by noise alone: in at most 5 % of all comparisons may any verdict be wrong. Without
    Holm's adjustment there are about three times as many."""
    random, wrong, unadjusted, rounds = np.random.default_rng(0), 0, 0, 400
    for _ in range(rounds):
        scores = random.normal(60, 1, (6, 3))
        baseline = dict(enumerate(scores[0]))
        differences = {str(arm): paired(dict(enumerate(scores[arm])), baseline) for arm in range(1, 6)}
        adjusted = holm({name: difference.p for name, difference in differences.items()})
        wrong += any(" vs " not in verdict(name, "none", differences[name], adjusted[name]) for name in adjusted)
        unadjusted += any(difference.p < 0.05 for difference in differences.values())
    assert wrong <= 0.05 * rounds + 3 * math.sqrt(0.05 * 0.95 * rounds)
    assert unadjusted > 2 * wrong


def test_a_planted_worse_arm_is_found():
    random, found = np.random.default_rng(1), 0
    for _ in range(100):
        noise = random.normal(0, 0.5, (2, 3))
        difference = paired(dict(enumerate(50 + noise[0])), dict(enumerate(60 + noise[1])))
        found += verdict("worse", "none", difference, difference.p).startswith("worse < none")
    assert found >= 95
