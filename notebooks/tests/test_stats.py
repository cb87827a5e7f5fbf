"""stats.py: statistics against cases by hand."""

import math

import pytest

import stats


def test_wilson_by_hand():
    assert stats.wilson(1.0, 12) == pytest.approx((0.7575, 1.0), abs=1e-4)  # 1 / (1 + z^2 / n): at least 76%
    assert stats.wilson(0.5, 4) == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert stats.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_bootstrap_by_hand():
    assert stats.bootstrap([3.0] * 5) == (3, 3, 3)
    # two values: a quarter of all draws are both 0, a quarter both 1
    assert stats.bootstrap([0.0, 1.0]) == (0.5, 0, 1)
    # twelve: the number of ones is binomial, 2.5% of it are at most 3, 97.5% at most 9
    mean, low, high = stats.bootstrap([0.0, 1.0] * 6)
    assert (mean, low, high) == pytest.approx((0.5, 3 / 12, 9 / 12))
    # many: the normal interval
    values = [math.sin(i) for i in range(400)]
    spread = math.sqrt(sum((x - sum(values) / 400) ** 2 for x in values)) / 400
    mean, low, high = stats.bootstrap(values, n_draws=4000)
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.05)


def test_log_ratio_by_hand():
    assert stats.log_ratio([0.2, 0.1], [0.1, 0.2]) == pytest.approx([math.log(2), -math.log(2)])
    assert stats.log_ratio([1e-9], [-1e-9]) == [0]  # both are rounding errors
    with pytest.raises(ValueError):
        stats.log_ratio([0.1], [0.1, 0.2])


def test_one_way_to_write_an_interval(capsys):
    assert stats.with_interval(*stats.ratio([2, 20, 200], [1, 10, 100])) == "2.00 (2.00–2.00)"
    assert stats.with_interval(*stats.ratio([1, 4], [2, 2])) == "1.00 (0.50–2.00)"  # half and double
    assert stats.with_interval(6.472, 3.7, 11.1) == "6.47 (3.70–11)"
    assert stats.with_interval(59.4, 56.1, 61.8, ".0f", "%") == "59% (56–62)"
    assert stats.tally([1.0] * 12) == "12 of 12 (76–100%)" and stats.tally([0, 1, 1, 1]) == "3 of 4 (30–95%)"
    stats.print_table([["a", "bb"], ["ccc", "d"]])
    assert capsys.readouterr().out == "a     bb\nccc    d\n\n"
