"""What runs left in their folders, read for `k2mini report`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2mini.config import check_fields
from k2mini.files import read_json
from k2mini.training.loop import FILE, SAMPLES, read_metrics, summary
from k2mini.training.plot import short_names
from k2mini.training.run import CONFIG
from k2mini.training.samples import COUNTS


@dataclass(frozen=True)
class RunReport:
    """A run.

    Attributes:
        name: of its folder, without what it has in common with the others'.
        summary: what `loop.summary` says.
        config: the values of its configuration, by `section.key`.
        counts: of each file of instructions, what was read, used, cut and left out.
        metrics: the entries of metrics.jsonl.
        samples: those of samples.jsonl: step, prompt, answer.
    """

    name: str
    summary: str
    config: dict[str, Any]
    counts: dict[str, dict[str, int]]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a metric."""
        found = [(entry["step"], entry[key]) for entry in self.metrics if isinstance(entry.get(key), int | float)]
        return [(step, float(value)) for step, value in found if math.isfinite(value)]


def read_runs(folders: Sequence[Path]) -> list[RunReport]:
    """The runs in folders. Raises ValueError where there is none, or one that has done no step yet."""
    for folder in folders:
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder} has no {FILE}; name the run.dir of a run that has begun")
        if not read_metrics(folder / FILE):
            raise ValueError(f"{folder} has no metrics yet: the first step is not done")
    names = short_names(map(str, folders))
    return [_read(name, folder) for name, folder in zip(names, folders, strict=True)]


def _read(name: str, folder: Path) -> RunReport:
    config, counts = [read_json(path) if (path := folder / file).exists() else {} for file in (CONFIG, COUNTS)]
    samples = read_metrics(folder / SAMPLES) if (folder / SAMPLES).exists() else []
    for place, entry in enumerate(samples, start=1):
        check_fields(entry, {"prompt": str, "answer": str}, f"{folder / SAMPLES}, line {place}")
    for content, file in ((config, CONFIG), (counts, COUNTS)):
        check_fields(content, {}, str(folder / file))
    check_fields(counts, dict.fromkeys(counts, dict), str(folder / COUNTS))
    sections = {key: part if isinstance(part, dict) else {"": part} for key, part in config.items()}
    values = {f"{key}.{sub}".rstrip("."): value for key, part in sections.items() for sub, value in part.items()}
    return RunReport(name, summary(folder / FILE), values, counts, read_metrics(folder / FILE), samples)
