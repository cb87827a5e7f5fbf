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
