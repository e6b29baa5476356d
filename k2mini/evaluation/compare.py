"""Runs of `eval` side by side, with a paired test on the questions that they share."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2mini.evaluation.agreement import holm, interval, paired_p
from k2mini.evaluation.report import accuracy
from k2mini.evaluation.scores import Key, orders_line, read_orders
from k2mini.files import new_file, read_json
from k2mini.training.plot import short_names

log = logging.getLogger(__name__)

Scores = dict[tuple[str, str], dict[Key, float]]  # as `read_scores` gives them
COUNTED = (
    "scores other than accuracy are means over different questions, each counted once (report.json counts copies, and "
    "its likelihood is one over all references' tokens); – where too few differ for a 95 % interval"
)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value that two models are equally good (McNemar 1947, with the binomial distribution).

    Args:
        only_first, only_second: questions that one got right and the other did not.
    """
    n, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired(of_runs: Sequence[dict[Key, float]], measure: str) -> dict[Key, list[float]]:
    """Each question that all runs have, with the value of each run.

    Copies of one question are no independent ones: they count once, with their mean; of `accuracy`, which is compared
    over all questions as `eval` counts them, each by itself.
    """
    firsts, copies = dict[str, Key](), defaultdict[Key, list[list[float]]](list)
    for key in of_runs[0]:
        if all(key in values for values in of_runs):
            same = key if measure == "accuracy" else firsts.setdefault(key[0], key)
            copies[same].append([values[key] for values in of_runs])
    return {key: [math.fsum(own) / len(own) for own in zip(*rows, strict=True)] for key, rows in copies.items()}


def compare(runs: Sequence[Path], scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """Each task's accuracies and other scores, and of every run but the first a paired test against the first.

    Questions are `paired` by their text and key, wherever they stand; what some run does not have is left out.

    Args:
        scores: `read_scores` of each run.

    Returns: dicts of `task`, `measure`, `n` (questions that all runs have) and `runs`: a list of `run`, `model`,
    `accuracy` (of another measure: `mean`), `low`, `high` (None where there is no `interval`), `left_out` (its
    questions that another run lacks) and, but of the first, `difference`, `difference_low`, `difference_high`, `better`
    and `worse` (questions), `p` (McNemar's; of another measure: the paired bootstrap's) and `p_holm`, corrected for all
    comparisons that are returned. Of a judge's preference also `orders`, its position bias.

    Raises ValueError where a directory is no run of `eval`, or the runs have no question in common.
    """
    if len(runs) < 2:
        raise ValueError("compare needs at least two runs")
    models = [_model(run) for run in runs]
    found: list[dict[str, Any]] = []
    for task, measure in dict.fromkeys(same for score in scores for same in score):
        of_runs = [score.get((task, measure), {}) for score in scores]
        values = paired(of_runs, measure)
        if not values:
            what = task if measure == "accuracy" else f"{task}, {measure},"
            log.warning("%s is left out: no question of it, with the same key, is in all runs", what)
            continue
        columns, entries = [*zip(*values.values(), strict=True)], []
        for place, (run, model, own) in enumerate(zip(runs, models, columns, strict=True)):
            had = len({key if measure == "accuracy" else key[0] for key in of_runs[place]})
            entry = {"run": str(run), "model": model, **_mean(own, measure), "left_out": had - len(own)}
            entries.append(entry | (_against(columns[0], own, measure) if place else {}))
        found.append({"task": task, "measure": measure, "n": len(values), "runs": entries})
    if not found:
        raise ValueError(
            f"{', '.join(map(str, runs))} have no question in common; were --benchmark, --limit and --tasks the same?"
        )
    tested = [entry for task in found for entry in task["runs"][1:]]
    for entry, p in zip(tested, holm([entry["p"] for entry in tested]), strict=True):
        entry["p_holm"] = p
    for row in found:
        if orders := read_orders(runs[0], row["measure"]).get(row["task"]):
            row["orders"] = orders
    return found


def _mean(values: Sequence[float], measure: str) -> dict[str, float | None]:
    if measure == "accuracy":
        return accuracy([value == 1 for value in values])
    return dict(zip(("mean", "low", "high"), interval(values), strict=True))


def _against(first: Sequence[float], own: Sequence[float], measure: str) -> dict[str, Any]:
    """What distinguishes a run from the first."""
    differences = [value - other for value, other in zip(own, first, strict=True)]
    better, worse = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    mean, low, high = interval(differences)
    p = mcnemar(worse, better) if measure == "accuracy" else paired_p(differences)
    counts = {"better": better, "worse": worse, "p": p}
    return {"difference": mean, "difference_low": low, "difference_high": high, **counts}


def _model(run: Path) -> str:
    path = run / "report.json"
    if not path.is_file():
        raise ValueError(f"{run} is no run of k2mini eval --out (it has no report.json)")
    report = read_json(path)
    if not isinstance(report, dict) or not isinstance(report.get("model"), str):
        raise ValueError(f"{path} is no report of k2mini eval: it has no text `model`")
    return str(report["model"])


def comparison_table(found: Sequence[dict[str, Any]]) -> str:
    """The comparison as text."""
    lines, number = [], sum(len(task["runs"]) - 1 for task in found)
    for task in found:
        of_measure = "" if task["measure"] == "accuracy" else f", {task['measure']}"
        lines.append(f"{task['task']}{of_measure} ({task['n']} questions)")
        lines += [f"  {orders_line(task['orders'])}"] if "orders" in task else []
        for entry in task["runs"]:
            line = f"  {shown(entry)}  {entry['run']}"
            if "p" in entry:
                line += f": {entry['better']} better, {entry['worse']} worse than the first, p = {entry['p']:.3g}"
                line += f" (corrected: {entry['p_holm']:.3g})" if number > 1 else ""
            if entry["left_out"]:
                line += f" ({entry['left_out']} questions are left out: not all runs have them, with the same key)"
            lines.append(line)
    lines += [COUNTED] * any(task["measure"] != "accuracy" for task in found)
    return "\n".join(lines + [f"p is corrected for all {number} comparisons by Holm's method"] * (number > 1))


def shown(entry: dict[str, Any]) -> str:
    """A run's value with its interval: accuracy in percent, another measure in its own unit."""
    if "accuracy" in entry:
        return f"{100 * entry['accuracy']:5.1f} %  ({100 * entry['low']:.1f} – {100 * entry['high']:.1f})"
    return f"{entry['mean']:7.3f}  ({ends(entry['low'], entry['high'])})"


def ends(low: float | None, high: float | None, form: str = ".3f") -> str:
    """An interval as text; – where there is none."""
    return "–" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar chart of accuracies with 95 % intervals and chance, in a file that `check_picture` allows.

    Raises ValueError where no task has an accuracy.
    """
    from matplotlib.figure import Figure

    found = [task for task in found if task["measure"] == "accuracy"]
    if not found:
        raise ValueError(f"{path}: the runs have no accuracy in common to draw; --html shows other scores")
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
