"""Scores of a run of `eval`, question by question: what `compare` compares, and `judge` and `rate` add to."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from k2mini.evaluation.report import Result, read_results, read_sealed, sealed
from k2mini.files import read_json, write_text

Key = tuple[str, int]  # a question's digest, and how many of the same stand before it in its task
AskedT = TypeVar("AskedT", "OpenAnswer", "Result", "OpenAnswer | Result")


@dataclass(frozen=True)
class OpenAnswer:
    """An open question with what the model wrote.

    Attributes:
        index: its place in the published file.
        scores: measure -> value: `rouge_l`, `token_f1`, `likelihood` (mean log-probability of a reference's token, in
            nats), and of tasks with one right answer `accuracy`, 0 or 1.
    """

    task: str
    index: int
    question: str
    reference: str
    answer: str
    scores: dict[str, float]

    @property
    def digest(self) -> str:
        """SHA-256 of question and reference, by which the same question is known in another run."""
        return hashlib.sha256(json.dumps([self.task, self.question, self.reference]).encode()).hexdigest()


@dataclass(frozen=True)
class Score:
    """What a judge or a person gave to one answer; `digest` and `copy` are the `Key` of the answer's question."""

    task: str
    index: int
    digest: str
    measure: str
    value: float
    copy: int = 0


def task_file(kind: str, task: str) -> str:
    """The name of a task's file in a run: `answers` as they come, `open`, the same with their scores."""
    return f"{kind}_{task.replace('/', '_')}.jsonl"


def write_answers(run: Path, task: str, answers: Iterable[OpenAnswer]) -> None:
    """Write a task's answers into a run, as `open_TASK.jsonl`."""
    lines = "".join(sealed(asdict(answer)) + "\n" for answer in answers)
    write_text(run / task_file("open", task), lines)


def read_answers(run: Path) -> dict[str, list[OpenAnswer]]:
    """Task -> its answers, of a run's open tasks. Raises ValueError as `read_sealed` does."""
    found: dict[str, list[OpenAnswer]] = {}
    for path in sorted(run.glob("open_*.jsonl")):
        for where, raw in read_sealed(path):
            answer = _fields(OpenAnswer, raw, where)
            found.setdefault(answer.task, []).append(answer)
    return found


def write_scores(run: Path, name: str, scores: Iterable[Score]) -> None:
    """Write what a judge or people gave into a run, as `scores_NAME.jsonl`."""
    write_text(run / f"scores_{name}.jsonl", "".join(sealed(asdict(score)) + "\n" for score in scores))


def write_judged(
    run: Path,
    about: Mapping[str, Any],
    compared: Mapping[str, list[dict[str, Any]]],
    answers: Mapping[Key, OpenAnswer],
    measures: Mapping[str, Mapping[Key, float]],
) -> None:
    """Add a judge's scores to those that it gave a run before, and keep who gave them, in judge_NAME.json.

    Args:
        about: `name` of the judge, `own`, the runs that are its own, and more.
        compared: see `read_compared`.

    Raises ValueError where what stands there is not as it was written.
    """
    path, every = run / f"scores_judge_{about['name']}.jsonl", dict[tuple[str, str, int], Score]()
    for score in _read_scores(path) if path.exists() else ():
        every[score.measure, score.digest, score.copy] = score
    for measure, values in measures.items():
        for key, value in values.items():
            every[measure, *key] = Score(answers[key].task, answers[key].index, key[0], measure, value, key[1])
    kept = {**about, "own": str(run) in about["own"]}
    kept["compared"] = {**read_compared(run, about["name"]), **compared}
    write_scores(run, f"judge_{about['name']}", every.values())
    write_text(run / f"judge_{about['name']}.json", json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def _read_scores(path: Path) -> Iterator[Score]:
    for where, raw in read_sealed(path):
        yield _fields(Score, raw, where)


def keyed(asked: Iterable[AskedT]) -> dict[tuple[str, Key], AskedT]:
    """Answers by task and `Key`: the nth copy of a question in one run is the nth in another, scored or not.

    A choice's digest is that of its question and options; of copies whose keys differ, each is a question of its own.
    """
    found: dict[tuple[str, Key], AskedT] = {}
    copies = Counter[tuple[str, str]]()
    for each in asked:
        same = each.task, f"{each.digest} {each.answer}" if isinstance(each, Result) else each.digest
        found[same[0], (same[1], copies[same])] = each
        copies[same] += 1
    return found


def read_asked(run: Path) -> dict[tuple[str, Key], OpenAnswer | Result]:
    """What was asked in a run and what the model made of it, `keyed`. Raises ValueError as `read_sealed` does."""
    path = run / "results.jsonl"
    asked: list[OpenAnswer | Result] = [*read_results(path)] if path.is_file() else []
    return keyed(asked + [answer for answers in read_answers(run).values() for answer in answers])


def read_scores(run: Path) -> dict[tuple[str, str], dict[Key, float]]:
    """(task, measure) -> the score of each of its questions; `accuracy` is 1 for a right answer and 0 for another.

    Raises ValueError where the directory holds no result of `eval`, or a line is not as it was written.
    """
    found: dict[tuple[str, str], dict[Key, float]] = {}
    for (task, key), asked in read_asked(run).items():
        values = {"accuracy": float(asked.is_right)} if isinstance(asked, Result) else asked.scores
        for measure, value in values.items():
            found.setdefault((task, measure), {})[key] = value
    for path in sorted(run.glob("scores_*.jsonl")):
        for score in _read_scores(path):
            found.setdefault((score.task, score.measure), {})[score.digest, score.copy] = score.value
    if not found:
        raise ValueError(f"{run} is no run of k2mini eval --out: it holds no result")
    return found


def read_compared(run: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """What the evaluator of a name preferred, from judge_NAME.json: hash of what was compared -> a summary a task.

    Raises ValueError where the file is not as `judge` wrote it.
    """
    path = run / f"judge_{name}.json"
    raw = read_json(path) if path.is_file() else {"compared": {}}
    if not isinstance(raw, dict) or not isinstance(raw.get("compared"), dict):
        raise ValueError(f"{path} is not as k2mini judge writes it; remove it, and judge anew")
    return dict(raw["compared"])


def read_orders(run: Path, measure: str) -> dict[str, dict[str, float]]:
    """Task -> position bias of a preference, as `judge` found it; nothing of another measure."""
    name, _, compared = measure.removeprefix("preference@").partition("#")
    return {row["task"]: row["orders"] for row in read_compared(run, name).get(compared, [])} if compared else {}


def orders_line(orders: Mapping[str, float]) -> str:
    """The position bias of a judge, for people to read."""
    said = {key: f"{100 * value:.1f} %" for key, value in orders.items()}
    whoever = f"for whichever came first {said['always_first']}, second {said['always_second']}"
    return f"the same verdict in both orders {said['consistent']}, {whoever}; unclear replies: {orders['unclear']}"


def _fields(kind: Any, raw: dict[str, Any], where: str) -> Any:
    if raw.keys() != {*kind.__dataclass_fields__}:
        raise ValueError(f"{where} has other fields than this k2mini writes; evaluate anew, with another --out")
    return kind(**raw)
