"""What a long command finds, kept as it comes: by one process in a file, by ranks beside it until all is there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from k2mini.distributed import ALONE, World
from k2mini.errors import short
from k2mini.files import parse_json, write_text

log = logging.getLogger(__name__)


class Journal:
    """Entries in a .jsonl, each added as it comes; a command that is started again goes on after them.

    Ranks keep theirs beside it, in NAME.rank0 and so on, until all are there; a start on any number of ranks goes on
    with those of another, on one process too. No file is removed that was not read as such entries, but by `force`.

    Args:
        path: None keeps them in memory only.
        read: a file's entries, by their keys. Raises ValueError naming the first line that is none.
        line: of a key and its entry.
        numbered: beside the file, the key and a tab stand before a line.
        force: begin anew, once there is an entry, where the file holds something else.
        world: its ranks all make one, and all have all entries, at the beginning and after `finish`.

    Attributes:
        entries: what there is so far, by keys.
        own: where this process adds; `kept`: the bytes there that are entries; what else it holds goes with the next.
    """

    def __init__(
        self,
        path: Path | None,
        read: Callable[[Path], dict[Any, Any]],
        line: Callable[[Any, Any], str],
        *,
        numbered: bool = False,
        force: bool = False,
        world: World = ALONE,
    ) -> None:
        self.path, self.own, self._line, self._numbered, self._world = path, path, line, numbered, world
        self.entries: dict[Any, Any] = {}
        self.kept = 0
        parts = rank_files(path) if path is not None and world.rank == 0 else []
        if path is not None and (parts or world.size > 1):
            self.own = path.with_name(f"{path.name}.rank{world.rank}")
        if path is not None and world.rank == 0:
            beside: dict[Any, Any] = {}
            try:
                self.entries = read(path) if os.path.lexists(path) else {}
                for part in parts:
                    beside |= read(part)
                beside = {key: entry for key, entry in beside.items() if key not in self.entries}
                self.kept = path.read_bytes().rfind(b"\n") + 1 if self.own == path and path.exists() else 0
            except ValueError:
                if not force:
                    raise
                self.entries, beside = {}, {}
            if parts and self.own is not None:  # all in one, and without a line that was cut
                write_text(self.own, "".join(self._written(*entry) for entry in beside.items()))
                self.kept = self.own.stat().st_size
                for part in parts:
                    if part != self.own:
                        part.unlink()
            self.entries |= beside
        if world.size > 1:
            self.entries = world.broadcast(self.entries)

    def add(self, key: Any, entry: Any) -> None:
        """An entry. Raises OSError where it can't be written."""
        self.entries[key] = entry
        if self.own is not None:
            with self.own.open("ab") as file:
                file.truncate(self.kept)
                self.kept += file.write(self._written(key, entry).encode())

    def finish(self, order: Iterable[Any]) -> dict[Any, Any]:
        """Let all ranks have all entries, and the file what ranks found, in this order. Raises OSError as `add` does.

        Returns: the entries.
        """
        if self._world.size > 1:
            for entries in self._world.all_gather(self.entries):
                self.entries |= entries
        if self.path is not None and self.own != self.path and self._world.rank == 0:
            write_text(self.path, "".join(self._line(key, self.entries[key]) + "\n" for key in order))
            for part in rank_files(self.path):
                part.unlink()
        return self.entries

    def _written(self, key: Any, entry: Any) -> str:
        """A line of `own`."""
        return (f"{key}\t" if self._numbered and self.own != self.path else "") + self._line(key, entry) + "\n"


def rank_files(path: Path) -> list[Path]:
    """What ranks have left beside a file."""
    named = re.compile(rf"{re.escape(path.name)}\.rank\d+")
    return sorted(other for other in path.parent.iterdir() if named.fullmatch(other.name))


def answer_journal(
    path: Path | None, asked: list[dict[str, Any]], made_by: str, *, force: bool, world: World = ALONE
) -> Journal:
    """The answers to a list of prompts, by their places: `asked`, with `answer`, `tokens` and `finish`.

    They are those of an undisturbed run, but for last bits where these depend on a row's company: on a GPU, compiled,
    in 16 bits.

    Args:
        asked: what each is an answer to: `prompt`, and `input` where there is one.
        made_by: a digest of what answers follow from besides: model and settings. A line's hash is of it and the line.

    Raises ValueError naming the first line that is not such an answer; a last one that a kill cut short is left out.
    """

    def line(_place: int, entry: dict[str, Any]) -> str:
        own = hashlib.sha256(json.dumps([made_by, entry]).encode()).hexdigest()
        return json.dumps({**entry, "sha256": own}, ensure_ascii=False)

    def read(file: Path) -> dict[int, dict[str, Any]]:
        found = {}
        for number, whole in enumerate(file.read_bytes().splitlines(keepends=True)):
            digits, _, rest = (b"%d" % number, b"", whole) if file == path else whole.partition(b"\t")
            place = int(digits) if digits.isdigit() else len(asked)
            if (entry := read_line(place, rest, f"{file}, line {number + 1}")) is not None:
                found[place] = entry
        return found

    def read_line(place: int, text: bytes, where: str) -> dict[str, Any] | None:
        """The entry of a line; none where it is the beginning of one."""
        wanted = asked[place] if place < len(asked) else {}
        begin = json.dumps({**wanted, "answer": ""}, ensure_ascii=False).encode()[:-2]
        if wanted and not text.endswith(b"\n") and text[: len(begin)] == begin[: len(text)]:
            return None
        with suppress(ValueError):
            entry = parse_json(text, where) if wanted and text.startswith(begin) else {}
            if entry.pop("sha256", None) and line(place, entry).encode() + b"\n" == text:
                return dict(entry)
        said = f"this model's answer, with these settings, to {short(wanted['prompt'])}" if wanted else "asked for"
        raise ValueError(f"{where} is not {said}; name another place, or replace it with --force")

    journal = Journal(path, read, line, numbered=True, force=force, world=world)
    if journal.entries and path is not None and world.rank == 0:
        log.info("%s has %d of %d answers already", path, len(journal.entries), len(asked))
    return journal
