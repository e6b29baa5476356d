"""`k2mini verify`: a directory against its manifest, file by file, and tensor by tensor where a file differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from k2mini.data.corpus import corpus_hashes, is_prepared
from k2mini.files import sha256
from k2mini.weights.model_directory import MANIFEST, read_manifest
from k2mini.weights.stream import raw
from k2mini.weights.torch_file import read_bin


def verify(directory: Path) -> tuple[int, list[str]]:
    """Check a directory against its manifest.

    Returns: how many files were checked, and the names of those that the manifest does not list.

    Raises ValueError where there is no manifest, and where files are missing or differ; the message names each of them,
    and the tensors in it that differ.
    """
    manifest = read_manifest(directory)
    if manifest is None and is_prepared(directory):
        return verify_files(directory, corpus_hashes(directory), MANIFEST)
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
            problems.append(f"{path} differs: {_difference(path, tensors)}")
    if problems:
        raise ValueError("; ".join(problems))
    known = {*manifest["files"], MANIFEST}
    return len(manifest["files"]), sorted(path.name for path in directory.iterdir() if path.name not in known)


def verify_files(directory: Path, hashes: Mapping[str, str], described_by: str) -> tuple[int, list[str]]:
    """As `verify`, of a corpus or a checkpoint, with the SHA-256 of each file, from the file `described_by`."""
    problems = []
    for path, digest in ((directory / name, digest) for name, digest in hashes.items()):
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif sha256(path) != digest:
            problems.append(f"{path} differs: its SHA-256 is not that of {described_by}")
    if problems:
        raise ValueError("; ".join(problems))
    return len(hashes), sorted(path.name for path in directory.iterdir() if path.name not in {*hashes, described_by})


def _difference(path: Path, tensors: dict[str, Any]) -> str:
    """Which tensors of a file differ from the manifest's, or what else does."""
    if not tensors:
        return "its SHA-256 is not the manifest's"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                odd = [name for name in tensors if not _same(file.get_tensor(name), tensors[name])]
        else:
            content = read_bin(path)
            odd = [name for name in tensors if not _same(content[name], tensors[name])]
    except (SafetensorError, ValueError, KeyError) as error:
        return f"its header is damaged ({error})"
    return ", ".join(odd) if odd else "outside the tensors' data"


def _same(tensor: Tensor, expected: Mapping[str, Any]) -> bool:
    found = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
    if found != (expected["dtype"], expected["shape"]):
        return False
    return hashlib.sha256(raw(tensor.contiguous())).hexdigest() == expected["sha256"]
