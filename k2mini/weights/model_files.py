"""Writing a Hugging Face directory that is complete by itself, with a manifest of the hashes of all it holds."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2mini.architectures import QUANTIZED
from k2mini.data.tokenizer import Tokenizer, open_tokenizer
from k2mini.dtypes import DTYPES, NAMES
from k2mini.errors import short
from k2mini.files import new_directory, sha256
from k2mini.model_config import ModelConfig, hf_config, read_fields
from k2mini.weights.model_directory import MANIFEST, MANIFEST_FORMAT, ModelDirectory, manifest_text, tokenizer_file
from k2mini.weights.stream import SHARD_BYTES, Source, Tensors, Written, total_bytes, write_weights

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"


def save_model(
    tensors: Source | Mapping[str, Tensor],
    config: ModelConfig,
    directory: Path,
    *,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    inputs: Sequence[Path] = (),
    write: Callable[[Source, Path, int], Written] = write_weights,
) -> None:
    """Write a Hugging Face directory that loads alone, here and in transformers; it appears whole or not at all.

    Args:
        tensors: Hugging Face names to tensors of one dtype, as `Llama.state_dict()` gives them, or a source of them.
            Where a source gives quantised matrices and their scales, config.json says so, and only k2mini reads them.
        tokenizer: written beside the weights; without it the directory has none.
        shard_bytes: a file's size at most.
        force: replace a directory that exists.
        inputs: the directories that are read, which the output must not touch.
        write: writes the weights into a directory, in files of a size at most: `write_weights` in safetensors,
            `torch_file.write_bin` in PyTorch's format.

    Raises ValueError where `directory` exists and is not to be replaced, or the disk is too small.
    """
    source: Source = Tensors(tensors) if isinstance(tensors, Mapping) else tensors
    with new_directory(directory, force=force, inputs=inputs, size=total_bytes(source)) as beside:
        written = write(source, beside, shard_bytes)
        write_side_files(beside, config, tokenizer, source)
        write_manifest(beside, "model", written)


def write_side_files(directory: Path, config: ModelConfig, tokenizer: Tokenizer | None, source: Source) -> None:
    """Write config.json and, where there is a tokenizer, its files and generation_config.json.

    Args:
        source: the weights; config.json names the dtype of their embedding, and says where matrices are quantised.
    """
    dtypes = {name: source.dtype(name) for name in source.names()}
    bos_id, eos_id = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
    fields = hf_config(config, NAMES[dtypes["model.embed_tokens.weight"]], bos_id, eos_id)
    for how, dtype in (("int8", torch.int8), ("nf4", torch.uint8)):
        if dtype in dtypes.values():
            fields["quantization_config"] = QUANTIZED[how]
    content: dict[str, Any] = {"config.json": fields}
    if tokenizer is not None:
        copied, theirs = copy_tokenizer(tokenizer, directory), tokenizer.path.with_name("tokenizer_config.json")
        if theirs.name not in copied:
            content[theirs.name] = tokenizer.hf_config()
            if (template := read_fields(theirs).get("chat_template")) is not None:
                content[theirs.name]["chat_template"] = template
        kept = read_fields(directory / GENERATION)
        ends = [*tokenizer.stop_ids] if len(tokenizer.stop_ids) > 1 else eos_id
        content[GENERATION] = {"bos_token_id": bos_id, **kept, "eos_token_id": ends}
    for name, fields in content.items():
        (directory / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(tokenizer: Tokenizer, directory: Path) -> list[str]:
    """Copy a tokenizer's file, and those beside it that belong to it as they stand. Returns the names of these."""
    names, of_json = ["chat_template.jinja"], ["tokenizer_config.json", "special_tokens_map.json", GENERATION]
    is_json = tokenizer.path.suffix == ".json"
    names += of_json if is_json else []
    shutil.copyfile(tokenizer.path, directory / ("tokenizer.json" if is_json else "tokenizer.model"))
    for name in (own := [name for name in names if os.path.lexists(tokenizer.path.with_name(name))]):
        shutil.copyfile(tokenizer.path.with_name(name), directory / name)
    return own


def write_manifest(directory: Path, kind: str, written: Written) -> None:
    """Write manifest.json of all files in `directory`; the file's last field is the SHA-256 of all before it.

    So a flipped bit is found wherever it is, in the manifest too.

    Args:
        kind: 'model', 'delta', 'adapter' or 'meta'.
        written: the hashes of tensors and files, and further fields; a file that it has no hash of is read.
    """
    files = {
        path.name: written.files.get(path.name) or {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(directory.iterdir())
    }
    content = {"format": MANIFEST_FORMAT, "kind": kind, **written.note, "files": files, "tensors": written.tensors}
    (directory / MANIFEST).write_text(manifest_text(content), encoding="utf-8")


def delta_manifest(delta: ModelDirectory, formats: Sequence[str]) -> dict[str, Any] | None:
    """A delta's manifest; None where it has no such file, as FastChat's and K2's, whose base can't be checked.

    Raises ValueError where the file is another program's, or lacks what says how to apply the delta, and to what.
    """
    path, manifest = delta.path / MANIFEST, delta.manifest
    if manifest is None:
        if path.exists():
            raise ValueError(
                f"{path} does not say the base, as k2mini's do; remove it if the delta is FastChat's or K2's"
            )
        return None
    if manifest["kind"] != "delta":
        raise ValueError(f"{delta.path} is not a delta: its manifest says that it is of kind {manifest['kind']!r}")
    kind, base, tuned = (manifest.get(key) for key in ("delta", "base", "tuned"))
    if kind not in formats or not isinstance(base, str):
        raise ValueError(f"{path}: delta is {short(kind)} and base {short(base)}; copy the delta again")
    for name in delta.reader.names() if kind == "bits" else ():
        entry = tuned.get(name) if isinstance(tuned, dict) else None
        known = isinstance(entry, dict) and str(entry.get("dtype")) in DTYPES and "sha256" in entry
        if not known or name not in manifest["tensors"]:
            raise ValueError(f"{path}: tuned.{name} is {short(entry)}; copy the delta again")
    return manifest


def find_tokenizer(*directories: Path) -> Tokenizer | None:
    """The tokenizer of the first directory that has one; where none has, a line of the log says so."""
    for directory in directories:
        if (path := tokenizer_file(directory)) is not None:
            return open_tokenizer(path)
    log.warning(
        "no tokenizer.model or tokenizer.json in %s, so the output will have none", " or ".join(map(str, directories))
    )
    return None
