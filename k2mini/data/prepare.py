"""`k2mini prepare`: documents in files become a prepared corpus (see corpus.py), in two passes.

The first pass tokenises each input file into a part of its own, in parallel (see parts.py). The second walks over the
parts in the order of the input, drops repeated documents and writes the shards, so the bytes do not depend on the
number of workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from k2mini.config import RunConfig
from k2mini.corpus.shards import corpora_of
from k2mini.data.corpus import FORMAT, MANIFEST, is_prepared
from k2mini.data.documents import list_files
from k2mini.data.parts import RECORD, Settings, encode_all, keep_parts, part_of, printable
from k2mini.data.tokenizer import Tokenizer
from k2mini.files import new_directory, output, progress_bar, read_json

log = logging.getLogger(__name__)

SHARD_TOKENS = 2**28  # at most, 512 MiB of uint16; a longer document has a shard of its own


def prepare(
    inputs: Sequence[Path],
    tokenizer: Path,
    out: Path,
    *,
    eos: bool = True,
    val_percent: float = 0.0,
    on_error: str = "raise",
    workers: int = 1,
    force: bool = False,
) -> dict[str, Any]:
    """Tokenise documents into the directory `out`, going on from where a killed run was. Returns the manifest.

    Args:
        inputs: files or folders (see documents.py), or corpora that `k2mini corpus` wrote.
        tokenizer: a tokenizer.model or tokenizer.json.
        eos: EOS after each document. BOS, where there is one, stands before it in any case, K2's scheme.
        val_percent: about so many documents in a hundred go into the split `val`. A document's split follows from its
            text alone, so it does not change when the corpus grows.
        on_error: at a line that is not a document: 'raise', or 'skip' it and count it.
        force: replace what stands at `out`.

    Raises ValueError where an input is missing or malformed, nothing is left, or `output` refuses `out`.
    """
    if not 0 <= val_percent < 100:
        raise ValueError(f"--val-percent must be at least 0 and below 100, not {val_percent}")
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, not {workers}")
    passed_over: Counter[str] = Counter()
    files = list_files(inputs, passed_over)
    if passed_over:
        counts = ", ".join(f"{number:,} of {suffix}" for suffix, number in sorted(passed_over.items()))
        log.info("passed over, since documents in folders are .jsonl, .txt, .md or .gz of these: %s", counts)
    opened = Tokenizer(tokenizer)
    if opened.bos_id is None and not eos:
        log.warning("%s has no BOS: without EOS, nothing will stand between two documents", tokenizer)
    settings = Settings(opened.fingerprint(), opened.vocab_size, eos, float(val_percent), on_error)
    folder = _parts_folder(out)
    if not force:
        remove_parts(out)
    with output(out, force=force, inputs=[*files, tokenizer]):
        parts = {file: part_of(folder, file, settings) for file in files}
        try:
            corpora = corpora_of(files)
            encode_all(parts, keep_parts(folder, set(parts.values())), tokenizer, settings, workers)
            manifest = _write(parts, settings, out, corpora, force=force)
            shutil.rmtree(folder)
        finally:
            with suppress(OSError):  # after an error it holds the parts that are complete, if there are any
                folder.rmdir()
    return manifest


def document_files(path: Path, config: RunConfig) -> list[Path]:
    """The files of documents at `path`, but for those that the run itself writes, where `run.dir` is in it."""
    files, run_dir = list_files([path]), Path(config.run.dir).resolve()
    if path.resolve() not in (run_dir, *run_dir.parents):
        return files
    return [file for file in files if run_dir not in file.resolve().parents]


def _parts_folder(out: Path) -> Path:
    return out.absolute().with_name(f".{out.absolute().name}.parts")


def remove_parts(out: Path) -> bool:
    """Whether `out` is a prepared corpus; what its process left, which was killed then, is removed."""
    if not is_prepared(out):
        return False
    with output(out, force=True):
        if (folder := _parts_folder(out)).exists():
            shutil.rmtree(folder)
            log.warning("removed %s, which a process left that was killed when %s was complete", folder, out)
    return True


class _Split:
    """Writes the shards of one split, document by document."""

    def __init__(self, name: str, folder: Path, dtype: str) -> None:
        self.name, self.folder, self.dtype = name, folder, dtype
        self.shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._starts: list[int] = []
        self._length = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, to the open shard if it fits there and else to a new one."""
        if self._file is not None and self._length + len(tokens) > SHARD_TOKENS:
            self.close()
        if self._file is None:
            self._file = (self.folder / f"{self.name}-{len(self.shards):05}.tokens").open("wb")
            self._starts, self._length, self._digest = [], 0, hashlib.sha256()
        content = tokens.tobytes()
        self._file.write(content)
        self._digest.update(content)
        self._starts.append(self._length)
        self._length += len(tokens)

    def close(self) -> None:
        """Complete the open shard, if there is one."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        name = f"{self.name}-{len(self.shards):05}"
        starts = np.array(self._starts, dtype="uint64").tobytes()
        (self.folder / f"{name}.starts").write_bytes(starts)
        self.shards.append(
            {
                "name": name,
                "tokens": self._length,
                "documents": len(self._starts),
                "sha256": {"tokens": self._digest.hexdigest(), "starts": hashlib.sha256(starts).hexdigest()},
            }
        )

    def summary(self) -> dict[str, Any]:
        """The split's entry in the manifest."""
        totals = {key: sum(shard[key] for shard in self.shards) for key in ("tokens", "documents")}
        return {**totals, "shards": self.shards}


def _write(
    parts: dict[Path, Path], settings: Settings, out: Path, corpora: list[dict[str, Any]], *, force: bool
) -> dict[str, Any]:
    seen: set[bytes] = set()
    duplicates, skipped, sources = 0, 0, []
    with new_directory(out, force=force) as beside, progress_bar(len(parts), "writing", "files") as progress:
        train, val = (_Split(name, beside, settings.dtype) for name in ("train", "val"))
        for file, part in parts.items():
            note = read_json(part.with_suffix(".json"))
            records = np.fromfile(part.with_suffix(".records"), dtype=RECORD)
            tokens = _mapped(part.with_suffix(".tokens"), settings.dtype)
            place = 0
            for digest, length in zip(records["digest"].tolist(), records["tokens"].tolist(), strict=True):
                if digest in seen:
                    duplicates += 1
                else:
                    seen.add(digest)
                    split = val if _falls_into_val(digest, settings.val_percent) else train
                    split.add(tokens[place : place + length])
                place += length
            skipped += note["skipped"]
            for message in note["first"]:
                log.warning("skipped: %s", message)
            sources.append({"file": printable(str(file)), "documents": len(records), "skipped": note["skipped"]})
            progress.update()
        train.close()
        val.close()
        if not train.shards:
            raise ValueError(f"{', '.join(map(str, [*parts][:3]))}: there are 0 documents to train on")
        manifest = {
            "format": FORMAT,
            **asdict(settings),
            "dtype": settings.dtype,
            "duplicates": duplicates,
            "skipped": skipped,
            "splits": {split.name: split.summary() for split in (train, val) if split.shards},
            "sources": sources,
            **({"corpora": corpora} if corpora else {}),  # of k2mini corpus, for a run to carry on
        }
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _mapped(path: Path, dtype: str) -> np.ndarray:
    """A file of numbers, memory-mapped."""
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)  # an empty file can't be mapped
    return np.memmap(path, dtype=dtype, mode="r")


def _falls_into_val(digest: bytes, percent: float) -> bool:
    return int.from_bytes(digest[:8], "little") < percent / 100 * 2**64


def describe(manifest: dict[str, Any]) -> str:
    """A manifest as text for the terminal: a line for each split, and what was dropped."""
    lines = [
        f"{name}: {part['documents']:,} documents, {part['tokens']:,} tokens in {len(part['shards'])} shards"
        for name, part in manifest["splits"].items()
    ]
    lines.append(f"dropped: {manifest['duplicates']:,} repeated documents, {manifest['skipped']:,} malformed lines")
    return "\n".join(lines)
