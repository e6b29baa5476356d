"""What k2mini notes beside the weights it writes: proof of every file and tensor, and what belongs together.

`manifest.json` holds the SHA-256 of every file and of every tensor's raw bytes; its last field is the SHA-256 of all
that stands before it, so that a flipped byte of the manifest itself is found too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from k2mini.files import read_json, sha256
from k2mini.weights.model_directory import CheckpointReader, read_bin
from k2mini.weights.stream import Written, raw

MANIFEST = "manifest.json"
FORMAT = "k2mini manifest 1"


def model_fingerprint(reader: CheckpointReader) -> str:
    """A hash by which a model is known again, made in well under a second for 13 GB.

    It covers every tensor's name and shape, all vectors, and the first and the last row of every matrix, as float32: so
    any training changes it, and a copy in another layout, or in a wider dtype, does not.
    """
    digest = hashlib.sha256()
    for name in reader.names():
        shape = reader.shape(name)
        digest.update(f"{name}{shape}".encode())
        ends = [(0, shape[0])] if len(shape) == 1 else [(0, 1), (shape[0] - 1, shape[0])]
        for start, stop in ends:
            digest.update(reader.rows(name, start, stop).to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def write_manifest(directory: Path, kind: str, written: Written, note: Mapping[str, Any] | None = None) -> None:
    """Write `manifest.json` of all files in `directory`; those that `written` has no hash of are read.

    Args:
        kind: 'model', 'delta', 'adapter' or 'meta'.
        note: further fields, such as the fingerprint of what it was made against.
    """
    files = {
        path.name: written.files.get(path.name) or {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(directory.iterdir())
    }
    content = {"format": FORMAT, "kind": kind, **(note or {}), "files": files, "tensors": written.tensors}
    own = hashlib.sha256(_dump(content).encode()).hexdigest()
    (directory / MANIFEST).write_text(_dump({**content, "sha256": own}), encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, checked against its own hash, or None where the directory has none of k2mini's weights.

    Raises ValueError where it is damaged.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    rest = {key: value for key, value in content.items() if key != "sha256"}
    own = hashlib.sha256(_dump(rest).encode()).hexdigest()
    if path.read_bytes() != _dump({**rest, "sha256": own}).encode():
        raise ValueError(f"{path} is damaged: it does not match its own hash; copy the directory again")
    return content


def verify(directory: Path) -> tuple[int, list[str]]:
    """Check a directory against its manifest.

    Returns: how many files were checked, and the names of those that the manifest does not cover.

    Raises ValueError where there is no manifest, and with a line for each file that is missing or differs, naming the
    tensors in it that differ.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise ValueError(f"{directory} has no {MANIFEST} of k2mini's weights, so there is nothing to check it against")
    problems = []
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{path} is {path.stat().st_size:,} bytes, not {expected['bytes']:,}")
        elif sha256(path) != expected["sha256"]:
            tensors = {key: entry for key, entry in manifest["tensors"].items() if entry["file"] == name}
            problems.append(f"{path} differs: {_where(path, tensors)}")
    if problems:
        raise ValueError("; ".join(problems))
    known = {*manifest["files"], MANIFEST}
    return len(manifest["files"]), sorted(path.name for path in directory.iterdir() if path.name not in known)


def _where(path: Path, tensors: dict[str, Any]) -> str:
    """What in a file differs."""
    if not tensors:
        return "its SHA-256 is not the manifest's"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                odd = [name for name in tensors if not _same(file.get_tensor(name), tensors[name])]
        else:
            content = read_bin(path)
            odd = [name for name in tensors if not _same(content[name], tensors[name])]
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        return f"its header is damaged ({error})"
    return ", ".join(odd) if odd else "outside the tensors' data"


def _same(tensor: torch.Tensor, expected: Mapping[str, Any]) -> bool:
    found = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
    if found != (expected["dtype"], expected["shape"]):
        return False
    return hashlib.sha256(raw(tensor.contiguous())).hexdigest() == expected["sha256"]
