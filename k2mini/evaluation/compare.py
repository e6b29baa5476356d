"""Runs of `eval` side by side, with a paired test on the questions that they share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2mini.errors import need_extra
from k2mini.files import read_json


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value that two models are equally good (McNemar 1947, with the binomial distribution).

    Args:
        only_first, only_second: questions that one got right and the other did not.
    """
    n, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    return min(1.0, 2 * tail)


def compare(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Each task's accuracies, and of every run but the first a paired test against the first.

    Returns: dicts of `task`, `n` and `runs`: a list of `run`, `model`, `accuracy`, `low`, `high` and, but of the first,
    `better` and `worse` (questions) and `p`.

    Raises ValueError where a directory is no run of `eval`, or the runs have no task of the same questions in common.
    """
    if len(runs) < 2:
        raise ValueError("compare needs at least two runs")
    reports = [_report(run) for run in runs]
    rights = [_rights(run) for run in runs]
    tasks = [row["task"] for row in reports[0]["tasks"]]
    found = []
    for task in tasks:
        rows = [next((row for row in report["tasks"] if row["task"] == task), None) for report in reports]
        keys = {key for key in rights[0] if key[0] == task}
        if any(row is None for row in rows) or any({k for k in right if k[0] == task} != keys for right in rights):
            continue
        entries = []
        for run, report, row, right in zip(runs, reports, rows, rights, strict=True):
            assert row is not None
            entry = {"run": str(run), "model": report["model"], **{k: row[k] for k in ("accuracy", "low", "high")}}
            if run is not runs[0]:
                better = sum(right[key] and not rights[0][key] for key in keys)
                worse = sum(rights[0][key] and not right[key] for key in keys)
                entry |= {"better": better, "worse": worse, "p": mcnemar(worse, better)}
            entries.append(entry)
        found.append({"task": task, "n": len(keys), "runs": entries})
    if not found:
        raise ValueError("the runs have no task of the same questions in common; were --limit and --tasks the same?")
    return found


def _report(run: Path) -> dict[str, Any]:
    path = run / "report.json"
    report = read_json(path) if path.is_file() else None
    if not isinstance(report, dict) or "tasks" not in report:
        raise ValueError(f"{run} is no run of k2mini eval --out (it has no report.json)")
    return report


def _rights(run: Path) -> dict[tuple[str, int], bool]:
    path = run / "results.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(line["task"], line["index"]): line["prediction"] == line["answer"] for line in lines}


def comparison_table(found: Sequence[dict[str, Any]]) -> str:
    """The comparison as text."""
    lines = []
    for task in found:
        lines.append(f"{task['task']} ({task['n']} questions)")
        for entry in task["runs"]:
            line = f"  {100 * entry['accuracy']:5.1f} %  ({100 * entry['low']:.1f} – {100 * entry['high']:.1f})  "
            line += entry["run"]
            if "p" in entry:
                line += f": {entry['better']} better, {entry['worse']} worse than the first, p = {entry['p']:.3g}"
            lines.append(line)
    return "\n".join(lines)


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar chart with 95 % intervals. Raises ValueError where the extra is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise need_extra("plot") from None
    figure = Figure(figsize=(max(5.0, 1.5 + 1.8 * len(found)), 4), layout="constrained")
    axes = figure.add_subplot()
    number = len(found[0]["runs"])
    for place in range(number):
        entries = [task["runs"][place] for task in found]
        heights = [100 * entry["accuracy"] for entry in entries]
        spread = [
            [100 * (entry["accuracy"] - entry["low"]) for entry in entries],
            [100 * (entry["high"] - entry["accuracy"]) for entry in entries],
        ]
        where = [task + (place - (number - 1) / 2) * 0.8 / number for task in range(len(found))]
        axes.bar(where, heights, 0.8 / number, yerr=spread, capsize=3, label=entries[0]["run"])
    axes.set_xticks(range(len(found)), [task["task"] for task in found])
    axes.set_ylabel("accuracy, %")
    figure.legend(loc="outside upper left", frameon=False)  # above the bars: runs have long paths
    figure.savefig(path, dpi=150, bbox_inches="tight")
