"""The progress line on standard error."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, label: str, unit: str, initial: int = 0, *, shown: bool = True) -> Any:
    """A tqdm bar: live in a terminal, a line every ten seconds or so in a log file."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=f" {unit}",
        file=sys.stderr,
        mininterval=0.2 if live else 10,
        dynamic_ncols=live,
        disable=not shown,
        unit_scale=unit == "B",
    )
