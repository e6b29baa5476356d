"""Whether benchmarks were taken out of the text that a model was trained on, as the manifests of that text say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2mini.corpus.shards import FORMAT
from k2mini.files import read_json, sha256

SHARD = re.compile(r"documents-\d{5,}\.jsonl")  # as k2mini corpus names what it writes
TAKEN = {"drop": "documents that held its questions were dropped", "cut": "paragraphs that held its questions were cut"}


def decontamination(corpora: Sequence[Path], benchmarks: Sequence[Path]) -> list[dict[str, Any]]:
    """Of each benchmark's file, whether all corpora were made without its questions (`k2mini corpus --decontaminate`).

    Args:
        corpora: what `k2mini corpus` or `k2mini prepare` wrote, or its manifest alone.

    Returns: report.json's `decontamination`, a dict a file: `said` says it in words. A file is known by its SHA-256.

    Raises ValueError where there is no manifest.
    """
    parts, found = [part for path in corpora for part in _parts(path)], []
    for file in dict.fromkeys(benchmarks):  # tasks may share one
        digest, right, wrong = sha256(file), [], []
        for where, how, taken in parts:
            if digest in taken:
                right.append(f"{where}: {how}")
            else:
                wrong.append(where + (", where another file of that name was" if file.name in taken.values() else ""))
        said = "was NOT taken out of the training text: " if wrong else "was taken out of the training text: "
        entry = {"file": file.name, "sha256": digest, "taken_out": not wrong}
        found.append({**entry, "said": f"{file.name} {said}{'; '.join(wrong or right)}"})
    return found


def _parts(path: Path) -> list[tuple[str, str, dict[str, str]]]:
    """Of each corpus that text was made of: which it is, what was done, the files taken out (SHA-256 -> name)."""
    file = next((path / name for name in ("corpus.json", "manifest.json") if (path / name).is_file()), path)
    if not file.is_file():
        raise ValueError(f"--corpus {path} has neither corpus.json nor manifest.json, which corpus and prepare write")
    manifest = read_json(file)
    try:
        prepared, corpora = "splits" in manifest, [manifest]
        if manifest["format"] != FORMAT:
            raise LookupError
        if prepared:
            corpora = manifest.get("corpora", [])
        parts = [
            (
                f"{path} (corpus {corpus['fingerprint'][:12]})",
                TAKEN[corpus["contaminated"]],
                {each["sha256"]: each["file"] for each in corpus["decontaminate"]},
            )
            for corpus in corpora
        ]
        files = [Path(source["file"]) for source in manifest["sources"]] if prepared else []
        folders = {file.parent for file in files}
        if len(folders) > len(corpora) or not all(SHARD.fullmatch(file.name) for file in files):
            parts.append((f"{path} holds text that k2mini corpus did not make", "", {}))
    except (LookupError, TypeError):
        raise ValueError(f"--corpus: {file} is no manifest of k2mini corpus or prepare") from None
    return parts
