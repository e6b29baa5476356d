"""metrics.jsonl: one object a line, each line whole, no step twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from k2mini.files import write_text


class Metrics:
    """The metrics file of a run, opened to go on after `step`.

    Lines of later steps, and a line that a killed process left unfinished, are dropped; the steps will come again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = [entry for entry in read_metrics(path) if entry["step"] <= step] if path.exists() else []
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, **values: Any) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
