"""Loss curves as a picture (extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from k2mini.training.loop import read_metrics


def plot_losses(runs: Mapping[str, Path], out: Path) -> None:
    """Draw the training and validation losses of several runs, one after the other on the axis of steps.

    Args:
        runs: label -> metrics.jsonl.

    Raises ImportError where matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    start = 0
    for label, path in runs.items():
        entries = read_metrics(path)
        train = [(start + entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
        val = [(start + entry["step"], entry["val_loss"]) for entry in entries if "val_loss" in entry]
        (line,) = axes.plot(*zip(*train, strict=True), label=label, linewidth=1)
        if val:
            axes.plot(*zip(*val, strict=True), "o", color=line.get_color(), label=f"{label}, held out")
        start = train[-1][0]
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)
