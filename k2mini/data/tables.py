"""CSV and TSV: a header row, then a record a row, whose fields are the columns."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from k2mini.data.documents import MOST, OnError, data_path, read_user_text
from k2mini.errors import short

SUFFIXES = (".csv", ".tsv")


def read_table(path: Path, on_error: OnError, *, header: bool = True) -> list[tuple[str, dict[str, str]]]:
    """(place, record) of each row, where the place is the row's first line: 'line 2', …

    Args:
        header: the first row has the columns' names; if not, they are '0', '1', …
        on_error: called with one sentence for each row with more or fewer cells than the header; it may raise.

    Raises ValueError naming the file where it is missing, not UTF-8 or not CSV, or has no row or a column twice.
    """
    if not data_path(path).is_file():
        raise ValueError(f"there is no data file {path}")
    csv.field_size_limit(MOST)  # 128 KiB otherwise
    text, delimiter = io.StringIO(read_user_text(path), newline=""), "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    columns: list[str] = []
    found, line, below = [], 1, 0
    try:
        for row in rows:
            place, line, below = f"line {line}", rows.line_num + 1, below + bool(columns and row)
            if not columns and not header:
                columns, below = [str(place) for place in range(len(row))], 1
            if not columns:
                columns = [name.strip() for name in row]
            elif row and len(row) != len(columns):
                on_error(f"{path}, {place} has {len(row)} cells, the header has {len(columns)}: {short(columns)}")
            elif row:
                found.append((place, dict(zip(columns, row, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {line} is not valid CSV: {error}") from None
    if len(set(columns)) < len(columns) or not below:
        has = f"its columns are {short(columns)}"
        raise ValueError(f"{path} must have a header of columns, each once, and rows below; {has}")
    return found
