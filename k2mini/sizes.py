"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def readable(size: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def parse_size(text: str, option: str) -> int:
    """'40GiB' -> bytes. Raises ValueError, naming the option, where it is not a number with one of the units."""
    for unit, factor in UNITS:
        if text.lower().endswith(unit.lower()):
            try:
                size = float(text[: -len(unit)])
            except ValueError:
                break
            if size > 0:
                return int(size * factor)
    raise ValueError(f"{option} must be a size such as 40GiB, not {text!r}")
