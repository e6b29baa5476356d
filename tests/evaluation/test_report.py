import pytest

from k2mini.evaluation.benchmarks import Question
from k2mini.evaluation.report import Result, summarise, table, wilson_interval


def test_wilson_interval_is_the_published_one():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    for correct, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)
    for n in range(1, 60):  # none right, or all: an end is the proportion itself, which error bars are measured from
        assert (wilson_interval(0, n)[0], wilson_interval(n, n)[1]) == (0, 1)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_every_question_counts():
    letters = ("A", "B", "C", "D")
    questions = [
        Question("t", 0, "", letters, letters, "A"),
        Question("t", 1, "", letters, letters, "B"),
        Question("t", 2, "", letters[:2], letters[:2], "D"),  # a key that is no option
        Question("t", 3, "", letters, ("", "", "", ""), "B"),  # nothing to score
    ]
    predictions = ["A", "C", "A", None]
    results = [Result("t", i, q.answer, p, [], []) for i, (q, p) in enumerate(zip(questions, predictions, strict=True))]
    (summary,) = summarise(questions, results, {"scoring": "text"})
    assert (summary["n"], summary["accuracy"], summary["scoring"]) == (4, 0.25, "text")
    assert summary["chance"] == (0.25 * 3 + 0.5) / 4
    assert summary["majority"] == 0.5
    assert summary["unanswerable"] == [2, 3]
    assert "question 2, 3" in table([summary])
