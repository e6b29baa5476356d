"""How far raters agree, and what figures of few questions are worth: alpha, the bootstrap, Holm's correction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

SAMPLES = 10_000  # of a bootstrap


def krippendorff_alpha(units: Sequence[Sequence[float]], metric: str = "ordinal") -> float | None:
    """Krippendorff's alpha: 1 for raters who always agree, 0 for such as agree by chance.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", D: one less than all paired values, times the
    distances between values within units, over those between any two values.

    Args:
        units: the values that raters gave to each unit, in any order; one with fewer than two does not count.
        metric: "ordinal" or "interval".

    Returns: None where alpha has no value: no unit has two ratings, or all values are the same.
    """
    counts = [Counter(unit) for unit in units if len(unit) > 1]
    values = sorted(set().union(*counts))
    if len(values) < 2:
        return None
    table = np.array([[count[value] for value in values] for count in counts], dtype=float)  # units × values
    weight = 1 / (table.sum(1) - 1)
    within = table.T @ (table * weight[:, None]) - np.diag((table * weight[:, None]).sum(0))
    total = table.sum(0)
    # Of an ordinal scale only the ratings that lie below a value count, with half of its own.
    place = np.array(values, dtype=float) if metric == "interval" else total.cumsum() - total / 2
    distance = (place[:, None] - place[None, :]) ** 2
    expected = float(total @ distance @ total)
    return 1 - (float(total.sum()) - 1) * float((within * distance).sum()) / expected


def _samples(values: Sequence[float]) -> Iterator[NDArray[np.float64]]:
    """`SAMPLES` samples as large as the values, drawn from them with replacement: a row each, some rows at a time."""
    given, draw = np.asarray(values, dtype=float), np.random.default_rng(0)
    size = max(1, 2**20 // len(given))
    for start in range(0, SAMPLES, size):
        yield given[draw.integers(0, len(given), (min(size, SAMPLES - start), len(given)))]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """A mean, and the ends of its 95 % interval: percentiles of the bootstrap (Efron 1979)."""
    low, high = np.quantile(np.concatenate([sample.mean(1) for sample in _samples(values)]), (0.025, 0.975))
    return float(np.mean(values)), float(low), float(high)


def paired_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of a mean difference of zero, by the paired bootstrap (Efron & Tibshirani 1993, 16.4).

    The share of samples of the centred differences whose mean, over its standard error, is as far from zero. It is
    never below what n differences that are not zero can prove if all have one sign: 2 / 2^n, as in a sign test.
    """
    given, far = np.asarray(differences, dtype=float), 0
    mean, spread = abs(given.mean()), given.std()
    with np.errstate(divide="ignore", invalid="ignore"):
        for sample in _samples(given - given.mean()) if spread > 1e-9 * mean else ():  # or all are the same
            far += int((abs(sample.mean(1)) / sample.std(1) >= mean / spread).sum())
    return min(1.0, max((1 + far) / (1 + SAMPLES), 2.0 ** (1 - np.count_nonzero(given))))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, so that one false alarm among them stays as rare (Holm 1979)."""
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = corrected[place] = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
    return corrected
