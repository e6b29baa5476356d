"""Agreement of raters and uncertainty of means, against tables worked by hand, the krippendorff package and loops."""

import math
import random
import statistics

import numpy as np
import pytest

from k2mini.evaluation.agreement import holm, interval, krippendorff_alpha, paired_p

# Krippendorff's own examples ("Computing Krippendorff's Alpha-Reliability", 2011, sections A and C); '.': no value.
TWO = ["0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0"]
FOUR = [
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
]


def units(rows):
    return [[float(value) for value in unit if value != "."] for unit in zip(*map(str.split, rows), strict=True)]


def test_alpha_of_tables_worked_by_hand():
    # 20 values, 14 zeros and 6 ones; four units differ, two pairs of values each way: 1 - 19 · 4 / (14 · 6).
    assert krippendorff_alpha(units(TWO)) == pytest.approx(1 - 19 * 4 / 84)
    assert krippendorff_alpha(units(FOUR)) == pytest.approx(0.815, abs=5e-4), "as published"
    # (1, 1), (1, 2), (3, 3): ones, twos, threes 3, 1, 2; ones lie at 1.5, twos at 3.5, threes at 5; within: one pair at
    # 2² = 4, between 3 · 4 + 6 · 12.25 + 2 · 2.25 = 90, alpha 1 - 5 · 4 / 90.
    assert krippendorff_alpha([[1, 1], [1, 2], [3, 3], [2]]) == pytest.approx(1 - 20 / 90)


def test_alpha_is_that_of_the_krippendorff_package():
    reference = pytest.importorskip("krippendorff")
    draw = np.random.default_rng(0)
    for raters in (2, 3, 6):
        values = draw.integers(1, 5, (raters, 30)) // draw.integers(1, 3, (1, 30)) + 1.0
        values[draw.random(values.shape) < 0.3] = math.nan
        given = [[value for value in unit if not math.isnan(value)] for unit in values.T]
        wanted = reference.alpha(values, level_of_measurement="ordinal")
        assert krippendorff_alpha(given) == pytest.approx(wanted, abs=1e-12)


def test_alpha_without_a_value():
    assert krippendorff_alpha([[1], [2], [3]]) is None
    assert krippendorff_alpha([[2, 2], [2, 2]]) is None
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([[1, 1], [2, 2]]) == 1


def test_intervals_and_p_values_are_those_of_a_loop():
    draw = random.Random(0)
    differences = [draw.gauss(0.3, 1) for _ in range(40)]
    mean, low, high = interval(differences)
    assert mean == pytest.approx(sum(differences) / 40)
    centred = [value - mean for value in differences]
    samples = [draw.choices(centred, k=40) for _ in range(2000)]
    away = sorted(abs(statistics.fmean(sample)) / statistics.pstdev(sample) for sample in samples)
    spread = statistics.pstdev(centred)
    assert (low, high) == pytest.approx((mean - away[1900] * spread, mean + away[1900] * spread), abs=0.03)
    far = sum(each >= abs(mean) / spread for each in away)
    assert paired_p(differences) == pytest.approx(far / 2000, abs=0.02)
    assert interval(differences) == (mean, low, high), "the same every time"
    assert paired_p([-value for value in differences]) == pytest.approx(paired_p(differences), abs=0.02)


def test_few_pairs_prove_nothing():
    assert paired_p([0.0] * 30) == 1
    assert paired_p([0.7]) == 1
    assert paired_p([0.7, 0.0, 0.6, 0.8]) >= 0.25
    assert paired_p([0.1] * 5) == 2 / 2**5
    assert paired_p([0.1, -0.1]) == 1
    assert paired_p([1.0, 1.1] * 50) < 1e-3


def test_false_alarms_are_as_rare_as_they_are_said_to_be():
    draw = random.Random(0)
    alarms = sum(paired_p([draw.gauss(0, 1) for _ in range(12)]) < 0.05 for _ in range(200))
    assert 2 <= alarms <= 20  # 10 are expected; outside of this once in a thousand times


def test_holm_by_hand():
    # Sorted: 0.01 · 4, 0.02 · 3, 0.03 · 2 -> not below 0.06 before it, 0.5.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_intervals_hold_what_they_say_and_say_what_the_test_says():
    """At few values: a 95 % interval holds the mean about so often, and zero lies in it unless p is below 0.05."""
    draw = random.Random(0)
    held = 0
    for _ in range(200):
        values = [draw.gauss(0, 1) for _ in range(8)]
        _, low, high = interval(values)
        held += low <= 0 <= high
        assert (low <= 0 <= high) == (paired_p(values) >= 0.05)
    assert held >= 181  # 190 are expected; below this twice in a thousand times


def test_too_little_shows_no_interval():
    for values in ([1.0], [0.4] * 40, [0.3, 0.4, 0.5, 0.6, 0.7], [0.0] * 29 + [1.0]):
        assert interval(values) == (pytest.approx(sum(values) / len(values)), None, None)
