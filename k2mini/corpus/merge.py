"""The second half of `k2mini corpus`: groups, those of all parts, become shards that have no document twice.

Of all documents at a time, two numbers each are held; signatures lie in a file that is mapped.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from k2mini.corpus.near import PERMUTATIONS, near_duplicates
from k2mini.corpus.shards import FORMAT, MANIFEST, REJECTED
from k2mini.errors import some
from k2mini.files import new_directory, progress_bar, read_json, sha256

NOTE, PART = "part.json", "k2mini corpus part 1"  # what makes a folder of groups a part, and its format
SHARD_BYTES = 2**28  # at most; a longer document has a shard of its own
BEGINNING = 500  # characters that are kept of what is rejected
CHUNK = 4096  # records held at a time
READING, ERROR, CONTAMINATION, CUT = "reading", "error", "contamination", "contamination, cut"
EXACT, NEAR = "exact duplicates", "near duplicates"
# Of a document that is kept so far: a hash of its text, where its line begins, its length, its signature.
RECORD = np.dtype([("digest", "V16"), ("start", "<u8"), ("words", "<u4"), ("signature", "<u4", (PERMUTATIONS,))])


def printable(text: str) -> str:
    """A text for JSON: what is not UTF-8 in it, such as bytes of a file's name, is written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def json_line(record: dict[str, Any]) -> bytes:
    """A line of JSONL. Raises UnicodeEncodeError where a text in it has half of a surrogate pair."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def rejected(source: str, name: str, reason: str, text: str = "", of: str = "") -> bytes:
    """A line of `rejected.jsonl`: which filter rejected what, why, of which document it is a copy, how it begins."""
    record = {"source": source, "filter": name, "reason": reason, **({"of": of} if of else {})}
    record["beginning"] = text[:BEGINNING]  # not `text`: nobody shall train on it unawares
    return json_line({key: printable(value) for key, value in record.items()})


def is_complete(group: Path) -> bool:
    """Whether a group of files has been read: its note is there, and the other two files are as it says."""
    try:
        hashes: list[str] = read_json(group.with_suffix(".json"))["sha256"]
        return hashes == [sha256(group.with_suffix(suffix)) for suffix in (".jsonl", ".records")]
    except (OSError, ValueError, LookupError, TypeError):
        return False


class _Documents:
    """All documents of the groups, and which of them are copies.

    Attributes:
        words: of each document, its length.
        kept: of each document, the place of the copy that is kept, the longest; its own where it is that.
    """

    def __init__(self, groups: list[Path], threshold: float, folder: Path) -> None:
        numbers = [read_json(group.with_suffix(".json"))["documents"] for group in groups]
        self._groups, self._firsts = groups, np.cumsum([0, *numbers])
        self.words = self.kept = np.empty(self._firsts[-1], np.int64)
        with (file := folder / "signatures").open("wb") as out:
            for group, first, after in zip(groups, self._firsts, self._firsts[1:], strict=False):
                for start in range(first, after, CHUNK):
                    chunk = _records(group, start - first, min(CHUNK, after - start))
                    self.words[start : start + len(chunk)] = chunk["words"]
                    out.write(chunk["signature"].tobytes())
        if len(self.words):
            signatures = np.memmap(file, "<u4", "r").reshape(-1, PERMUTATIONS)
            self.kept = near_duplicates(signatures, self.words, threshold)
        file.unlink()

    def _find(self, place: int) -> tuple[Path, np.void]:
        number = int(np.searchsorted(self._firsts, place, side="right")) - 1
        return self._groups[number], _records(self._groups[number], place - int(self._firsts[number]), 1)[0]

    def rejection(self, place: int, record: dict[str, Any]) -> tuple[str, bytes] | None:
        """What rejects a document that is a copy, and its line of `rejected.jsonl`. None for one that is kept."""
        if (kept := int(self.kept[place])) == place:
            return None
        (_, own), (group, other) = self._find(place), self._find(kept)
        with group.with_suffix(".jsonl").open("rb") as file:
            file.seek(int(other["start"]))
            of = json.loads(file.readline())["source"]
        if own["digest"] == other["digest"]:
            name, reason = EXACT, "the text is the same"
        else:
            alike = float(np.mean(own["signature"] == other["signature"]))
            name, reason = NEAR, f"about {alike:.0%} of the word 5-grams are the same"
        return name, rejected(record["source"], name, reason, record["text"], of)


def _records(group: Path, start: int, count: int) -> np.ndarray:
    return np.fromfile(group.with_suffix(".records"), RECORD, count, offset=start * RECORD.itemsize)


def merge(parts: Sequence[Path], out: Path, *, force: bool = False) -> dict[str, Any]:
    """Make the corpus `out` of all parts of one input. Returns the manifest.

    Raises ValueError where a part is missing, damaged, there twice, or of other settings or inputs, where no document
    is left, or as `new_directory` does.
    """
    with new_directory(out, force=force, inputs=parts) as beside:
        notes = _agreeing(parts)
        settings, number = notes[0]["settings"], notes[0]["part"][1]
        placed: dict[int, Path] = {}  # part K of N has the K-th group and each N-th after it
        for part, note in zip(parts, notes, strict=True):
            placed |= {k * number + note["part"][0]: part / name for k, name in enumerate(note["groups"])}
        groups = [placed[place] for place in sorted(placed)]
        if damaged := [f"{group}.jsonl" for group in groups if not is_complete(group)]:
            raise ValueError(f"{damaged[0]} or its .records is damaged; make the part again")
        documents = _Documents(groups, settings["near_duplicates"], beside)
        manifest = {"format": FORMAT, **settings, **_write(groups, documents, settings, beside)}
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _agreeing(parts: Sequence[Path]) -> list[dict[str, Any]]:
    """The notes of the parts. Raises ValueError where they are not all parts of one corpus, each once."""
    notes: list[dict[str, Any]] = []
    for part in parts:
        note: Any = read_json(part / NOTE) if (part / NOTE).is_file() else None
        known = isinstance(note, dict) and {"part", "inputs", "settings", "groups"} <= note.keys()
        if not known or note.get("format") != PART:
            raise ValueError(f"{part} is no part of a corpus; `k2mini corpus IN --part K/N --out DIR` makes one")
        if notes and note["inputs"] != (first := notes[0])["inputs"]:
            unlike = [key for key, value in note["settings"].items() if first["settings"].get(key) != value]
            raise ValueError(f"{part} was made with other {some(unlike) or 'inputs'} than {parts[0]}; make it again")
        if notes and note["part"][1] != (number := notes[0]["part"][1]):
            raise ValueError(f"{part} is one of {note['part'][1]} parts, {parts[0]} is one of {number}")
        if note["part"] in (before := [other["part"] for other in notes]):
            raise ValueError(f"{parts[before.index(note['part'])]} and {part} are the same part, {note['part'][0]}")
        notes.append(note)
    number = notes[0]["part"][1]
    if missing := sorted({*range(1, number + 1)} - {note["part"][0] for note in notes}):
        raise ValueError(f"of {number} parts {some([*map(str, missing)])} is missing; merge takes all of them")
    return notes


def _write(groups: list[Path], documents: _Documents, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the shards and `rejected.jsonl`. Returns what the manifest says of them."""
    inputs, dropped, changed, licences, years, lengths = (Counter[str]() for _ in range(6))
    shards: list[dict[str, Any]] = []
    place = words = 0
    with (folder / REJECTED).open("wb") as out, progress_bar(len(groups), "writing", "groups") as progress:
        for group in groups:
            note = read_json(group.with_suffix(".json"))
            inputs.update({key: note[key] for key in ("files", "bytes")})
            dropped.update(note["dropped"])
            changed.update(note["changed"])
            for line in group.with_suffix(".jsonl").open("rb"):
                if line.startswith(b'{"source"'):  # a document's line begins with its text
                    out.write(line)
                    continue
                record = json.loads(line)
                if (rejection := documents.rejection(place, record)) is not None:
                    dropped[rejection[0]] += 1
                    out.write(rejection[1])
                else:
                    _append(folder, shards, line)
                    licences[record["licence"]] += 1
                    years[str(record["year"] or "")] += 1
                    lengths[str(1 << int(documents.words[place]).bit_length())] += 1
                    words += int(documents.words[place])
                place += 1
            progress.update()
    kept = sum(shard["documents"] for shard in shards)
    steps = _steps(kept, settings, dropped, changed)
    if not kept:
        said = [f"{name} dropped {number:,}" for name, _, number, _ in steps if number] or ["the files have none"]
        with (folder / REJECTED).open("rb") as file:
            said += [f"the first, {r['source']}, since: {r['reason']}" for r in map(json.loads, islice(file, 1))]
        raise ValueError(f"no document is left: {some(said, 20)}")
    for shard in shards:
        shard["sha256"] = sha256(folder / shard["name"])
    hashes = "".join(shard["sha256"] for shard in shards)
    return {
        "inputs": inputs,
        "counts": [dict(zip(("filter", "in", "dropped", "changed"), step, strict=True)) for step in steps],
        "documents": kept,
        "words": words,
        "licences": dict(sorted(licences.items())),
        "years": dict(sorted(years.items())),
        "lengths": dict(sorted(lengths.items(), key=lambda each: int(each[0]))),  # below so many words: documents
        "shards": shards,
        "fingerprint": hashlib.sha256(hashes.encode()).hexdigest(),
    }


def _append(folder: Path, shards: list[dict[str, Any]], line: bytes) -> None:
    """Write a document to the last shard if it fits there, and else to a new one."""
    if not shards or shards[-1]["bytes"] + len(line) > SHARD_BYTES:
        shards.append({"name": f"documents-{len(shards):05}.jsonl", "documents": 0, "bytes": 0})
    with (folder / shards[-1]["name"]).open("ab") as file:
        file.write(line)
    shards[-1]["documents"] += 1
    shards[-1]["bytes"] += len(line)


def _steps(
    kept: int, settings: dict[str, Any], dropped: Counter[str], changed: Counter[str]
) -> list[tuple[str, int, int, int]]:
    """(filter, documents that came in, dropped, changed) in the order in which filters are run."""
    changed[f"{CONTAMINATION}: changed"] = dropped.pop(CUT, 0)
    names = [READING, ERROR, *settings["filters"], CONTAMINATION, EXACT, NEAR, *dropped]
    unseen = {ERROR} - dropped.keys() | ({CONTAMINATION} if not settings["decontaminate"] else set())
    coming, steps = kept + dropped.total(), []
    for name in [name for name in dict.fromkeys(names) if name not in unseen]:
        steps.append((name, coming, dropped[name], changed[f"{name}: changed"]))
        coming -= dropped[name]
    return steps
