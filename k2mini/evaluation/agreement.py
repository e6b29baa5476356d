"""How far raters agree, and what figures of few questions are worth: alpha, the bootstrap, Holm's correction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

SAMPLES = 10_000  # of a bootstrap
FEWEST = 6  # values that have an interval


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's alpha of an ordinal scale: 1 for raters who always agree, 0 for such as agree by chance.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", D: one less than all paired values, times the
    distances between values within units, over those between any two values.

    Args:
        units: the values that raters gave to each unit, in any order; one with fewer than two does not count.

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
    place = total.cumsum() - total / 2  # of a value only the ratings that lie below it count, with half of its own
    distance = (place[:, None] - place[None, :]) ** 2
    expected = float(total @ distance @ total)
    return 1 - (float(total.sum()) - 1) * float((within * distance).sum()) / expected


def _samples(values: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """`SAMPLES` samples as large as the values, drawn from them with replacement: a row each, some rows at a time."""
    draw, size = np.random.default_rng(0), max(1, 2**20 // len(values))
    for start in range(0, SAMPLES, size):
        yield values[draw.integers(0, len(values), (min(size, SAMPLES - start), len(values)))]


def _studentised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each sample's mean lies from that of the values, in standard deviations of the sample."""
    with np.errstate(divide="ignore", invalid="ignore"):
        far = [abs(sample.mean(1)) / sample.std(1) for sample in _samples(values - values.mean())]
    return np.nan_to_num(np.concatenate(far), posinf=np.inf)


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """A mean, and the ends of its 95 % interval, by the symmetric bootstrap-t (Hall 1988, J. R. Stat. Soc. B 50).

    Its samples are those of `paired_p`: zero lies outside where that is below 0.05.

    Returns: no ends (None) where the values show none: fewer than `FEWEST`, with which no sign test comes below 0.05;
    all the same; or so few that differ that more than 5 % of the samples hold one value alone.
    """
    given = np.asarray(values, dtype=float)
    mean, spread = float(given.mean()), float(given.std())
    if len(given) < FEWEST or spread <= 1e-9 * abs(mean):
        return mean, None, None
    reach = float(np.quantile(_studentised(given), 0.95, method="inverted_cdf"))
    return (mean, mean - reach * spread, mean + reach * spread) if reach < 1e6 else (mean, None, None)


def paired_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of a mean difference of zero, by the paired bootstrap (Efron & Tibshirani 1993, 16.4).

    The share of samples of the centred differences whose mean, over its standard error, is as far from zero. It is
    never below what n differences that are not zero can prove if all have one sign: 2 / 2^n, as in a sign test.
    """
    given, far = np.asarray(differences, dtype=float), 0
    mean, spread = abs(given.mean()), given.std()
    if spread > 1e-9 * mean:  # or all are the same
        far = int((_studentised(given) >= mean / spread).sum())
    return min(1.0, max((1 + far) / (1 + SAMPLES), 2.0 ** (1 - np.count_nonzero(given))))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, so that one false alarm among them stays as rare (Holm 1979)."""
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = corrected[place] = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
    return corrected
