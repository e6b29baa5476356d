"""Runs of `eval` side by side, with a paired test on the questions that they share."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2mini.evaluation.report import accuracy, read_results
from k2mini.files import new_file, read_json
from k2mini.training.plot import short_names

log = logging.getLogger(__name__)


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

    Questions are paired by their text and key, wherever they stand; what some run does not have is left out.

    Returns: dicts of `task`, `n` (questions that all runs have) and `runs`: a list of `run`, `model`, `accuracy`,
    `low`, `high`, `left_out` (its questions that another run lacks) and, but of the first, `better` and `worse`
    (questions) and `p`.

    Raises ValueError where a directory is no run of `eval`, or the runs have no question in common.
    """
    if len(runs) < 2:
        raise ValueError("compare needs at least two runs")
    models = [_model(run) for run in runs]
    rights = [_rights(run) for run in runs]
    found = []
    for task in dict.fromkeys(key[0] for right in rights for key in right):
        keys = [key for key in rights[0] if key[0] == task and all(key in right for right in rights)]
        if not keys:
            log.warning("%s is left out: no question of it, with the same key, is in all runs", task)
            continue
        entries = []
        for run, model, right in zip(runs, models, rights, strict=True):
            left_out = sum(key[0] == task for key in right) - len(keys)
            entry = {"run": str(run), "model": model, **accuracy([right[key] for key in keys]), "left_out": left_out}
            if run is not runs[0]:
                better = sum(right[key] and not rights[0][key] for key in keys)
                worse = sum(rights[0][key] and not right[key] for key in keys)
                entry |= {"better": better, "worse": worse, "p": mcnemar(worse, better)}
            entries.append(entry)
        found.append({"task": task, "n": len(keys), "runs": entries})
    if not found:
        raise ValueError(
            f"{', '.join(map(str, runs))} have no question in common; were --benchmark, --limit and --tasks the same?"
        )
    return found


def _model(run: Path) -> str:
    path = run / "report.json"
    if not path.is_file():
        raise ValueError(f"{run} is no run of k2mini eval --out (it has no report.json)")
    report = read_json(path)
    if not isinstance(report, dict) or not isinstance(report.get("model"), str):
        raise ValueError(f"{path} is no report of k2mini eval: it has no text `model`")
    return str(report["model"])


def _rights(run: Path) -> dict[tuple[str, str, str, int], bool]:
    """(task, question's digest, key, how many of the same stand before it) -> whether the answer is right."""
    path, copies = run / "results.jsonl", Counter[tuple[str, str, str]]()
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    rights = {}
    for result in read_results(path):
        same = (result.task, result.digest, result.answer)
        rights[*same, copies[same]] = result.is_right
        copies[same] += 1
    return rights


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
            if entry["left_out"]:
                line += f" ({entry['left_out']} questions are left out: not all runs have them, with the same key)"
            lines.append(line)
    return "\n".join(lines)


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar chart with 95 % intervals and chance, in a file that `check_picture` allows."""
    from matplotlib.figure import Figure

    number = len(found[0]["runs"])
    figure = Figure(figsize=(max(5.0, 3.5 + len(found) * max(1.2, 0.5 * number)), 4), layout="constrained")
    axes = figure.add_subplot()
    first = Path(found[0]["runs"][0]["run"])
    rows = read_json(first / "report.json").get("tasks", [])
    chances = {row["task"]: 100 * row["chance"] for row in rows if "chance" in row}
    for place, name in enumerate(short_names(entry["run"] for entry in found[0]["runs"])):
        entries = [task["runs"][place] for task in found]
        heights = [100 * entry["accuracy"] for entry in entries]
        spread = [
            [100 * (entry["accuracy"] - entry["low"]) for entry in entries],
            [100 * (entry["high"] - entry["accuracy"]) for entry in entries],
        ]
        where = [task + (place - (number - 1) / 2) * 0.8 / number for task in range(len(found))]
        bars = axes.bar(where, heights, 0.8 / number, yerr=spread, capsize=3, label=name)
        axes.bar_label(bars, [f"{height:.0f}" for height in heights], padding=2, fontsize=9)
    left, right = ([task + side for task in range(len(found))] for side in (-0.45, 0.45))
    levels = [chances.get(task["task"], math.nan) for task in found]
    axes.hlines(levels, left, right, colors="black", linestyles="dashed", linewidth=1, label="chance")
    axes.set_xticks(range(len(found)), [task["task"] for task in found])
    axes.set_ylabel("accuracy, %")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", frameon=False)  # off the bars
    with new_file(path) as beside:
        figure.savefig(beside, dpi=150, bbox_inches="tight", format=path.suffix[1:].lower())
