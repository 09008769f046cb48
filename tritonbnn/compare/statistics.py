"""What seeds decide of an order: pooled deviations, Student's t, and how many seeds it would take.

A difference of two means is decided where it is larger than the margin of a two-sided t test with
the deviation pooled over both rows. All tests of a page share one chance of an error, in equal
parts (Bonferroni), so that a page of many rows finds no order by luck.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import mean

LEVEL = 0.05
"""The chance that any order of a page is called decided where there is none."""

POWER = 0.8
"""The share of comparisons in which a difference of the detectable size is found."""

MOST_SEEDS = 1000
"""Beyond which nobody trains: a difference that needs more is called none."""


def t_probability(t: float, freedom: int) -> float:
    """P(abs(T) <= t) of Student's t, by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4.

    Args:
        t: at least 0.
        freedom: degrees of freedom, at least 1.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    if freedom == 1:
        return 2 * angle / math.pi
    is_odd, cosine = freedom % 2, math.cos(angle)
    term = total = cosine if is_odd else 1.0
    for k in range(2 + is_odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    half = math.sin(angle) * total
    return 2 * (angle + half) / math.pi if is_odd else half


def t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = ``probability``, by bisection.

    Args:
        probability: from 0.5 to below 1.
        freedom: degrees of freedom, at least 1.
    """
    inside = 2 * probability - 1
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < inside:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        if t_probability(middle, freedom) < inside:
            low = middle
        else:
            high = middle
    return high


def pooled(rows: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The deviation that all rows share, and its degrees of freedom.

    Rows may differ in their means and their numbers of seeds. Without a row of two seeds the
    deviation is NaN and there is no degree of freedom.
    """
    freedom = sum(len(row) - 1 for row in rows if row)
    if not freedom:
        return math.nan, 0
    squares = sum((value - mean(row)) ** 2 for row in rows if row for value in row)
    return math.sqrt(squares / freedom), freedom


def detectable(deviation: float, seeds: int, level: float = LEVEL) -> float:
    """The difference of two means that is found in the share :data:`POWER` of comparisons.

    (t at 1 - level / 2 + t at POWER) * deviation * sqrt(2 / seeds), as sample sizes are planned.

    Args:
        deviation: of a seed, in the unit of the result.
        seeds: of each of the two rows, at least 2.
        level: of the test.
    """
    freedom = 2 * (seeds - 1)
    quantiles = t_quantile(1 - level / 2, freedom) + t_quantile(POWER, freedom)
    return quantiles * deviation * math.sqrt(2 / seeds)


def seeds_for(difference: float, deviation: float, level: float = LEVEL) -> int | None:
    """How many seeds of each row would find a difference; None where :data:`MOST_SEEDS` would not.

    Args:
        difference: of two means.
        deviation: of a seed, in the same unit.
        level: of the test.
    """
    wanted = -abs(difference)
    counts = range(2, MOST_SEEDS + 1)
    place = bisect_left(counts, wanted, key=lambda seeds: -detectable(deviation, seeds, level))
    return counts[place] if place < len(counts) else None


@dataclass(frozen=True)
class Difference:
    """Of two rows, one of which is claimed to be above the other.

    Attributes:
        low: name of the row that should be lower.
        high: name of the other.
        value: mean of ``high`` minus mean of ``low``.
        margin: what the test asks of ``value``, or NaN where no row has two seeds.
        deviation: of a seed, pooled over both.
        overlap: whether a seed of one row reaches into the other.
        level: of the test.
    """

    low: str
    high: str
    value: float
    margin: float
    deviation: float
    overlap: bool
    level: float

    @property
    def seeds_needed(self) -> int | None:
        """See :func:`seeds_for`; None too where no spread was seen, or no difference."""
        if not self.deviation > 0 or not self.value:
            return None
        return seeds_for(self.value, self.deviation, self.level)

    @property
    def decided(self) -> int:
        """1: ``high`` is above ``low``. -1: it is below. 0: the seeds leave it open."""
        if not self.deviation > 0 or abs(self.value) <= self.margin:
            return 0
        return 1 if self.value > 0 else -1

    @property
    def words(self) -> str:
        """The verdict: A above B, in the means alone, or not decided and why."""
        above, below = (self.high, self.low) if self.value >= 0 else (self.low, self.high)
        if self.decided:
            return f"{above} above {below}"
        if math.isnan(self.deviation):
            return "not decided: one seed each shows no spread"
        if not self.deviation:
            return "not decided: all seeds of a row are alike, which shows no spread"
        if self.value == 0:
            return "not decided: the means are equal"
        if self.overlap:
            return f"{above} above {below} in the means, but the seeds overlap"
        return f"not decided: {above} above {below} in every seed, but these are too few"


def compare(
    low: tuple[str, Sequence[float]], high: tuple[str, Sequence[float]], level: float
) -> Difference:
    """The difference of two rows.

    Args:
        low: name and values of the row that should be lower; at least one value.
        high: of the other.
        level: of the test.
    """
    (low_name, a), (high_name, b) = low, high
    value = mean(b) - mean(a)
    deviation, freedom = pooled([a, b])
    margin = math.nan
    if freedom:
        scale = deviation * math.sqrt(1 / len(a) + 1 / len(b))
        margin = t_quantile(1 - level / 2, freedom) * scale
    overlap = max(min(a), min(b)) <= min(max(a), max(b))
    return Difference(low_name, high_name, value, margin, deviation, overlap, level)


@dataclass(frozen=True)
class Verdict:
    """Of an order of rows.

    Attributes:
        words: what the seeds say of it.
        steps: the differences of neighbours, the least first; empty where runs are missing.
    """

    words: str
    steps: tuple[Difference, ...] = ()


def verdict(rising: Sequence[str], values: Mapping[str, Sequence[float]], level: float) -> Verdict:
    """Whether rows stand in a claimed order.

    The order holds where every row is decided to be above the one before it. It does not hold where
    any row is decided to be below one that it should be above. Else the seeds leave it open.

    Args:
        rising: names of the rows, the least first.
        values: a number for each seed, by name.
        level: of each test.
    """
    if not all(values.get(name) for name in rising):
        return Verdict("not decided: runs are missing, or do not tell it")
    rows = [(name, values[name]) for name in rising]
    steps = tuple(compare(low, high, level) for low, high in pairwise(rows))
    pairs = [compare(low, high, level) for low, high in combinations(rows, 2)]
    if all(step.decided > 0 for step in steps):
        return Verdict("holds", steps)
    if any(pair.decided < 0 for pair in pairs):
        return Verdict("does not hold", steps)
    so = "so" if all(step.value > 0 for step in steps) else "not so"
    if any(not step.deviation > 0 for step in steps):
        return Verdict(f"not decided: {so} in the means, but a row shows no spread", steps)
    if any(step.overlap for step in steps):
        return Verdict(f"{so} in the means, but the seeds overlap", steps)
    return Verdict(f"not decided: {so} in the means, but the seeds are too few", steps)


def shared_level(orders: Sequence[Sequence[str]]) -> float:
    """The level of each test, where all pairs of all orders share :data:`LEVEL`."""
    return LEVEL / max(1, sum(math.comb(len(rising), 2) for rising in orders))
