"""Loss curves as a picture (extra: plot)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from k2mini.errors import check_picture
from k2mini.files import new_file
from k2mini.training.loop import read_metrics


def short_names(runs: Iterable[str]) -> list[str]:
    """The paths of runs without the folder that they have in common."""
    paths = [Path(run).absolute() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(common)) for path in paths]


def plot_losses(runs: Mapping[str, Path], out: Path, *, chain: bool = False) -> None:
    """Draw the training and validation losses of several runs over the steps: a colour and a legend entry for each run.

    Args:
        runs: label, such as run.dir -> metrics.jsonl. Paths are drawn without the folder that they have in common.
        chain: the runs are stages: each begins at the step at which the one before it ended. Otherwise all begin at 0.

    Raises ValueError as `check_picture` does, and where a run has no metrics yet.
    """
    check_picture(out)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    start, held_out = 0, False
    for name, (label, path) in zip(short_names(runs), runs.items(), strict=True):
        entries = read_metrics(path) if path.is_file() else []
        train = [(start + entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
        val = [(start + entry["step"], entry["val_loss"]) for entry in entries if "val_loss" in entry]
        if not train:
            raise ValueError(f"{label} has no losses to draw ({path}); name the run.dir of a run that has begun")
        (line,) = axes.plot(*zip(*train, strict=True), label=name, linewidth=1)
        if val:
            held_out = True
            axes.plot(*zip(*val, strict=True), "o--", color=line.get_color(), markersize=4, linewidth=1)
        start = train[-1][0] if chain else 0
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_ylabel("loss (nats per supervised token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    title = "solid: training\ndashed, dots: held out" if held_out else None
    figure.legend(loc="outside right upper", frameon=False, title=title, alignment="left")  # off the curves
    with new_file(out) as beside:
        figure.savefig(beside, dpi=150, format=out.suffix[1:].lower())
