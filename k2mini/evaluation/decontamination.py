"""Whether benchmarks were taken out of the text that a model was trained on, as the manifests of that text say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2mini.corpus.shards import FORMAT
from k2mini.files import read_json, sha256

TAKEN = {"drop": "documents that held its questions were dropped", "cut": "paragraphs that held them were cut"}


def decontamination(corpora: Sequence[Path], benchmarks: Sequence[Path]) -> list[dict[str, Any]]:
    """Of each benchmark's file, whether all corpora were made without its questions (`k2mini corpus --decontaminate`).

    Args:
        corpora: what `k2mini corpus` or `k2mini prepare` wrote, or its manifest alone.

    Returns: report.json's `decontamination`, a dict a file: `said` says it in words. A file is known by its SHA-256.

    Raises ValueError where a folder has no manifest.
    """
    made = [(path, *_made_of(path)) for path in corpora]
    found = []
    for file in benchmarks:
        digest, why = sha256(file), []
        for path, parts, rest in made:
            for part in parts:
                known = {each["sha256"]: each["file"] for each in part["decontaminate"]}
                of = f"{path} (corpus {part['fingerprint'][:12]})"
                if digest in known:
                    why.append((True, f"{of}: {TAKEN[part['contaminated']]}"))
                else:
                    other = ", another file of that name was" if file.name in known.values() else ""
                    why.append((False, f"{of}: it was not taken out{other}"))
            if rest:
                why.append((False, f"{path}: holds documents that k2mini corpus did not clean"))
        is_out = all(right for right, _ in why)
        said = "; ".join(text for right, text in why if right == is_out)
        said = f"{file.name} {'was' if is_out else 'was NOT'} taken out of the training text. {said}"
        found.append({"file": file.name, "sha256": digest, "taken_out": is_out, "said": said})
    return found


def _made_of(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The corpora of `k2mini corpus` that text was made of, and whether it holds other text as well."""
    file = next((path / name for name in ("corpus.json", "manifest.json") if (path / name).is_file()), path)
    if not file.is_file():
        raise ValueError(f"--corpus {path} has neither corpus.json nor manifest.json, which corpus and prepare write")
    manifest = read_json(file)
    try:
        if manifest["format"] != FORMAT:
            raise LookupError
        if "splits" not in manifest:
            parts, rest = [manifest], False
        else:
            parts = manifest.get("corpora", [])
            rest = len({Path(source["file"]).parent for source in manifest["sources"]}) > len(parts)
        for part in parts:
            {each["sha256"]: each["file"] for each in part["decontaminate"]}, part["fingerprint"][:12]
            TAKEN[part["contaminated"]]
    except (LookupError, TypeError):
        raise ValueError(f"--corpus: {file} is no manifest of k2mini corpus or prepare") from None
    return parts, rest
