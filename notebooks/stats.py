"""For all notebooks: how sure is a mean of a few instances? Writes nothing.

Intervals, differences of methods on the same instances, and the one way in which this folder prints them.
"""

import math
import random
from collections.abc import Sequence
from statistics import fmean


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share of n, by Wilson (1927): inside [0, 1]. For a mean of scores between 0 and
    1, which scatter less than right and wrong do, it is wider than need be."""
    z = 1.96
    center, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, (center - half) / (1 + z**2 / n)), (center + half) / (1 + z**2 / n)


def bootstrap(values: Sequence[float], n_draws: int = 10_000) -> tuple[float, float, float]:
    """Mean, and its 95% interval: what other instances might have given, drawn from these with replacement.
    Of fewer than ten values it is somewhat too narrow."""
    draw = random.Random(0).choices
    means = sorted(fmean(draw(values, k=len(values))) for _ in range(n_draws))
    return fmean(values), means[round(0.025 * (n_draws - 1))], means[round(0.975 * (n_draws - 1))]


def log_ratio(ours: Sequence[float], theirs: Sequence[float], least: float = 1e-5) -> list[float]:
    """log(ours / theirs), pair by pair. KLs below `least` are rounding errors, and count as that."""
    return [math.log(max(a, least) / max(b, least)) for a, b in zip(ours, theirs, strict=True)]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """By what are theirs multiplied, pair by pair? The geometric mean, and its 95% interval. What all of an
    instance's figures have in common drops out."""
    mean, low, high = map(math.exp, bootstrap(log_ratio(ours, theirs)))
    return mean, low, high


def with_interval(mean: float, low: float, high: float, spec: str = "", unit: str = "") -> str:
    """What `bootstrap` or `ratio` gives, as a table shows it: "2.71 (2.05–3.69)", or "59% (56–62)". spec: the
    numbers' format, by default two decimals, and none from 10 on."""
    mean, low, high = (f"{x:{spec or ('.0f' if x >= 10 else '.2f')}}" for x in (mean, low, high))
    return f"{mean}{unit} ({low}–{high})"


def tally(right: Sequence[float], interval: bool = True) -> str:
    """How many answers are right (1, else 0; a mean over seeds lies between), and the 95% interval of the
    share: "11 of 12 (65–99%)"."""
    low, high = wilson(fmean(right), len(right))
    return f"{round(sum(right), 1):g} of {len(right)}" + f" ({100 * low:.0f}–{high:.0%})" * interval


def print_table(rows: list[list[str]]):
    """The first column stands on the left, the others on the right; each is as wide as need be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print("   ".join((f"{first:{widths[0]}}", *cells)))
    print()
