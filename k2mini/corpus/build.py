"""`k2mini corpus`: files are read in groups (group.py), by several processes (workers.py), and merged (merge.py).

Groups stay on disk when a process is killed, so that the next one goes on from those that are complete. Part K of N has
the K-th group and each N-th after it; so bytes depend neither on the number of workers nor on that of parts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2mini.corpus.contamination import Benchmarks
from k2mini.corpus.group import Group, Settings
from k2mini.corpus.merge import NOTE, PART, is_complete, merge
from k2mini.corpus.readers import list_files, name_of
from k2mini.corpus.shards import MANIFEST, REJECTED, is_corpus
from k2mini.corpus.workers import read_groups
from k2mini.errors import need_extra
from k2mini.files import output, sync_path

log = logging.getLogger(__name__)

GROUP_BYTES = 2**26  # of a group's files; a larger file is a group of its own


def build(
    inputs: Sequence[Path],
    out: Path,
    settings: Settings,
    *,
    part: tuple[int, int] | None = None,
    workers: int = 1,
    force: bool = False,
) -> dict[str, Any]:
    """Make the corpus `out`, or the K-th of N parts of it, going on from where a killed run was. Returns the manifest.

    Raises ValueError where an input is missing, nothing is left, or `output` refuses `out`.
    """
    try:
        import lxml  # noqa: F401  # before each worker says so

        described = settings.described()
    except ImportError:
        raise need_extra("corpus") from None
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, not {workers}")
    passed_over: Counter[str] = Counter()
    files = list_files(inputs, passed_over)
    if passed_over:
        log.info("passed over: %s", ", ".join(f"{n:,} of {kind}" for kind, n in sorted(passed_over.items())))
    if old := [file for file in files if file.name == REJECTED and is_corpus(file.parent)]:
        raise ValueError(f"{old[0].parent} is a corpus already; to clean it again, name its documents-*.jsonl")
    benchmarks = Benchmarks(settings.decontaminate) if settings.decontaminate else None
    folder = out.absolute().with_name(f".{out.absolute().name}.parts")
    if not force and is_corpus(out) and folder.exists():
        made = (out / MANIFEST).stat().st_mtime_ns
        if all(file.stat().st_mtime_ns <= made for file in folder.iterdir()):
            shutil.rmtree(folder)  # of a process that was killed when all was complete; what is newer replaces `out`
    with output(out, force=force, inputs=[*inputs, *settings.decontaminate]):
        k, n = part or (1, 1)
        every, digest = _groups(files, folder, json.dumps(described, sort_keys=True))
        groups = every[k - 1 :: n]
        left = _left(groups, folder)
        if settings.grobid:
            _ask_grobid(left, settings.grobid, out)
        read_groups(left, workers, settings, benchmarks)
        note = {"format": PART, "part": [k, n], "inputs": digest, "settings": described}
        note["groups"] = [group.part.name for group in groups]
        (folder / NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")
        if part is None:
            note = merge([folder], out, force=force)
            shutil.rmtree(folder)
            return note
        for file in (*folder.iterdir(), folder):
            sync_path(file)
        if out.exists():
            shutil.rmtree(out)  # what replaces it is complete, and a start after a kill goes on from there
        folder.rename(out)
    return note


def _groups(files: list[Path], folder: Path, settings: str) -> tuple[list[Group], str]:
    """The files in groups, which follow from their list and sizes alone, and a hash of what all parts must agree on.

    A group's name follows from the settings and from its files' places, sizes and times.
    """
    most = min(256, max(8, len(files) // 512))
    groups, every, size = list[Group](), hashlib.sha256(settings.encode()), GROUP_BYTES
    for file in files:
        status = file.stat()
        if size >= GROUP_BYTES or len(groups[-1].files) == most:
            groups.append(Group([], folder))
            size, key = 0, hashlib.sha256(settings.encode())
        named = os.fsencode(file) + f"\n{status.st_size}\n".encode()
        every.update(named)
        key.update(named + f"{status.st_mtime_ns}\n".encode())
        groups[-1].files.append(file)
        groups[-1].part = folder / key.hexdigest()[:24]
        size += status.st_size
    return groups, every.hexdigest()


def _left(groups: list[Group], folder: Path) -> list[Group]:
    """The groups that are still to be read. Of what an earlier start left, all but complete groups is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {group.part for group in groups if is_complete(group.part)}
    stale = [file for file in folder.iterdir() if file.with_suffix("") not in kept]
    for file in stale:
        file.unlink()
    if kept:
        log.info("going on with what an earlier start left in %s", folder)
    if stale:
        log.warning("removed %d files in %s: half-written, or of other settings or inputs", len(stale), folder)
    return [group for group in groups if group.part not in kept]


def _ask_grobid(groups: list[Group], url: str, out: Path) -> None:
    """Have a GROBID make TEI of the groups' PDFs, in a folder beside `out` that stays, for making it takes long."""
    from k2mini.corpus.grobid import process

    folder, wrong = out.absolute().with_name(f"{out.absolute().name}.tei"), dict[str, str]()
    pdfs = {group.part: [file for file in group.files if file.suffix.lower() == ".pdf"] for group in groups}
    if zipped := sum(file.name.lower().endswith(".pdf.gz") for group in groups for file in group.files):
        log.warning("%d .pdf.gz are read without GROBID; unpack them to have it read them", zipped)
    made = process([file for files in pdfs.values() for file in files], url, folder, on_error=wrong.__setitem__)
    log.info("GROBID's TEI is in %s, where a later start finds it", folder)
    for group in groups:
        group.instead = {file: made[file] for file in pdfs[group.part] if file in made}
        group.skip = {file: {0: wrong[name_of(file)]} for file in pdfs[group.part] if file not in made}
