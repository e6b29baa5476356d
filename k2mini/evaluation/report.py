"""What a run of multiple choice amounts to: accuracies with their uncertainty, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from k2mini.evaluation.geobench import Question


@dataclass(frozen=True)
class Result:
    """One scored question; an option that could not be scored (its text is empty) has log-probability None."""

    task: str
    index: int
    answer: str
    prediction: str | None
    logprobs: list[float | None]
    token_ids: list[list[int]]

    def line(self) -> str:
        """As one line of results.jsonl."""
        return json.dumps(asdict(self), ensure_ascii=False)


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(
    questions: Sequence[Question], results: Sequence[Result], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One summary a task, in order of appearance.

    Args:
        settings: how it was asked (scoring, template, answer_prefix, shots), repeated in every summary.

    Returns: dicts of report.json's `tasks`. `chance` is the accuracy of guessing evenly, `majority` that of always
    giving the commonest answer; `unanswerable` lists questions whose key is no option, or that have nothing to score:
    they count as wrong.
    """
    summaries = []
    for task in dict.fromkeys(question.task for question in questions):
        asked = [question for question in questions if question.task == task]
        given = [result for result in results if result.task == task]
        n = len(asked)
        correct = sum(result.prediction == result.answer for result in given)
        low, high = wilson_interval(correct, n)
        summaries.append(
            {
                "task": task,
                "n": n,
                "accuracy": correct / n,
                "low": low,
                "high": high,
                "chance": sum(1 / len(set(question.labels)) for question in asked) / n,
                "majority": Counter(question.answer for question in asked).most_common(1)[0][1] / n,
                **settings,
                "unanswerable": [
                    question.index
                    for question, result in zip(asked, given, strict=True)
                    if question.answer not in question.labels or result.prediction is None
                ],
            }
        )
    return summaries


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The summaries for people to read, with a line for each question set that holds unanswerable questions."""
    head = f"{'task':<12} {'n':>5}  {'accuracy':>8}  {'95 % interval':>15}  {'chance':>6}  {'majority':>8}"
    lines = [head]
    for row in summaries:
        interval = f"{100 * row['low']:.1f} – {100 * row['high']:.1f} %"
        lines.append(
            f"{row['task']:<12} {row['n']:>5}  {100 * row['accuracy']:>6.1f} %  {interval:>15}  "
            f"{100 * row['chance']:>4.1f} %  {100 * row['majority']:>6.1f} %"
        )
    for row in summaries:
        if row["unanswerable"]:
            where = ", ".join(map(str, row["unanswerable"]))
            lines.append(f"{row['task']}: counted as wrong, since no option can be right: question {where}")
    return "\n".join(lines)
