"""metrics.jsonl: one object a line, each line whole, no step twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from k2mini.errors import need_extra
from k2mini.files import write_text

FILE = "metrics.jsonl"


class Metrics:
    """The metrics of a run, to go on after `step`.

    Lines of later steps, and a line that a killed process left unfinished, are dropped; the steps will come again.

    Args:
        tensorboard: write them as event files too, in `run_dir/tensorboard`.

    Raises ValueError where the extra `tensorboard` is wanted and missing.
    """

    def __init__(self, run_dir: Path, step: int, *, tensorboard: bool = False) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / FILE
        kept = [entry for entry in read_metrics(self._path) if entry["step"] <= step] if self._path.exists() else []
        write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._board = _board(run_dir / "tensorboard", step) if tensorboard else None

    def write(self, step: int, **values: float) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise need_extra("tensorboard") from None
    return SummaryWriter(str(folder), purge_step=step + 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
