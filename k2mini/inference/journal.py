"""The answers to a list of prompts, kept as they come: by one process in their order, by ranks until all are there."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from k2mini.distributed import ALONE, World
from k2mini.errors import short
from k2mini.files import parse_json, write_text
from k2mini.inference.decoding import Completion

log = logging.getLogger(__name__)


class Journal:
    """Answers in a .jsonl, each added as it comes; a command that is started again goes on after them.

    They are those of an undisturbed run, but for last bits where these depend on a row's company: on a GPU, compiled,
    in 16 bits, in w8a8. Ranks keep theirs beside it in NAME.rank0 and so on, each line after the answer's place, until
    all are there; a start on any number of ranks goes on with those of another.

    Args:
        path: None keeps them in memory only.
        asked: what each is an answer to: `prompt`, and `input` where there is one.
        made_by: a digest of what answers follow from besides: model and settings. A line's hash is of it and the line.
        force: begin anew, once there is an answer, where the file holds something else.
        world: its ranks all make one, and all have all entries, at the beginning and after `finish`.

    Attributes:
        entries: the answers so far, by their places.
        kept: the bytes of the file that are theirs; what else it holds goes with the next answer.

    Raises ValueError naming the first line that is not such an answer; a last one that a kill cut short is left out.
    """

    def __init__(
        self, path: Path | None, asked: list[dict[str, Any]], made_by: str, *, force: bool, world: World = ALONE
    ) -> None:
        self.path, self.asked, self.made_by, self._world = path, asked, made_by, world
        self.entries: dict[int, dict[str, Any]] = {}
        self.kept = self._next = 0  # the file's bytes, and the first place that it does not have
        if path is not None and world.rank == 0:
            try:
                self._read_all(path)
            except ValueError:
                if not force:
                    raise
                self.entries, self.kept, self._next = {}, 0, 0
            if others := self._others(path):
                own = (f"{place}\t{self._line(self.entries[place]).decode()}" for place in sorted(self.entries))
                write_text(others[0], "".join(own))
                for other in others[1:]:
                    other.unlink()
            if self.entries:
                log.info("%s has %d of %d answers already", path, len(self.entries), len(asked))
        if world.size > 1:
            self.entries = world.broadcast(self.entries)

    def add(self, place: int, text: str, completion: Completion) -> None:
        """An answer. Raises OSError where it can't be written."""
        fields = {"answer": text, "tokens": completion.tokens, "finish": completion.finish}
        self.entries[place] = {**self.asked[place], **fields}
        if self.path is not None and self._world.size == 1:
            self._write(self.path)
        elif self.path is not None:
            with self.path.with_name(f"{self.path.name}.rank{self._world.rank}").open("ab") as file:
                file.write(b"%d\t" % place + self._line(self.entries[place]))

    def finish(self) -> None:
        """Let all ranks have all answers, and the file, in their order. Raises OSError as `add` does."""
        if self._world.size > 1:
            for entries in self._world.all_gather(self.entries):
                self.entries |= entries
        if self.path is not None and self._world.rank == 0:
            self._write(self.path)
            for other in self._others(self.path):
                other.unlink()

    def _write(self, path: Path) -> None:
        if self._next in self.entries:
            with path.open("ab") as file:
                file.truncate(self.kept)
                while self._next in self.entries:
                    self.kept += file.write(self._line(self.entries[self._next]))
                    self._next += 1

    def _others(self, path: Path) -> list[Path]:
        """What ranks have left beside the file."""
        named = re.compile(rf"{re.escape(path.name)}\.rank\d+")
        return [other for other in sorted(path.parent.iterdir()) if named.fullmatch(other.name)]

    def _read_all(self, path: Path) -> None:
        for place, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else ()):
            for entry in self._read(place, line, f"{path}, line {place + 1}"):
                self.entries[place], self._next = entry, place + 1
                self.kept += len(self._line(entry))
        for other in self._others(path):
            for number, line in enumerate(other.read_bytes().splitlines(keepends=True), start=1):
                digits, _, rest = line.partition(b"\t")
                place = int(digits) if digits.isdigit() else len(self.asked)
                for entry in self._read(place, rest, f"{other}, line {number}"):
                    self.entries[place] = entry

    def _line(self, entry: dict[str, Any]) -> bytes:
        own = hashlib.sha256(json.dumps([self.made_by, entry]).encode()).hexdigest()
        return json.dumps({**entry, "sha256": own}, ensure_ascii=False).encode() + b"\n"

    def _read(self, place: int, line: bytes, where: str) -> list[dict[str, Any]]:
        """The entry of a line; none where it is the beginning of one."""
        asked = self.asked[place] if place < len(self.asked) else {}
        begin = json.dumps({**asked, "answer": ""}, ensure_ascii=False).encode()[:-2]
        if asked and not line.endswith(b"\n") and line[: len(begin)] == begin[: len(line)]:
            return []
        with suppress(ValueError):
            entry = parse_json(line, where) if asked and line.startswith(begin) else {}
            if entry.pop("sha256", None) and self._line(entry) == line:
                return [entry]
        wanted = f"this model's answer, with these settings, to {short(asked['prompt'])}" if asked else "asked for"
        raise ValueError(f"{where} is not {wanted}; name another place, or replace it with --force")
