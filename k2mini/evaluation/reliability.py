"""Reliability as a picture (extra: plot): how often answers are right, beside how sure the model is of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k2mini.files import new_file


def draw_reliability(summaries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a task, with a bar for each bin of `report.calibration` and its number of answers above it.

    A dot at its mean confidence lies on the dashed line where that is the accuracy. `check_picture` allows `path`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(summaries), 4), layout="constrained")
    panels = figure.subplots(1, len(summaries), squeeze=False, sharey=True)[0]
    for axes, row in zip(panels, summaries, strict=True):
        held, bins = row["calibration"], row["calibration"]["bins"]
        heights = [100 * each["accuracy"] for each in bins]
        bars = axes.bar([100 * each["low"] for each in bins], heights, 10, align="edge", alpha=0.5, label="accuracy")
        axes.bar_label(bars, [str(each["n"]) for each in bins], padding=2, fontsize=8)
        sure = [100 * each["confidence"] for each in bins]
        axes.plot(sure, heights, "o", markersize=4, label="mean confidence")
        axes.plot([0, 100], [0, 100], "--", color="black", linewidth=1, label="calibrated")
        ece = "no confidence" if held["ece"] is None else f"ECE {100 * held['ece']:.1f} %"
        axes.set_title(f"{row['task']}: {ece}", fontsize=10)
        axes.set_xlabel("confidence, %")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 105)
    panels[0].set_ylabel("accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    with new_file(path) as beside:
        figure.savefig(beside, dpi=150, format=path.suffix[1:].lower())
