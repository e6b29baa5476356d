"""Writing a Hugging Face directory that is complete by itself, with the proof of what it holds."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from k2mini.data.tokenizer import Tokenizer
from k2mini.dtypes import NAMES
from k2mini.files import check_new, check_space, new_directory
from k2mini.model_config import INT8, ModelConfig, hf_config
from k2mini.weights.manifest import write_manifest
from k2mini.weights.stream import SHARD_BYTES, Check, Source, Tensors, Written, total_bytes, write_weights

log = logging.getLogger(__name__)


def save_model(
    tensors: Source | Mapping[str, Tensor],
    config: ModelConfig,
    directory: Path,
    *,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    inputs: Sequence[Path] = (),
    check: Check | None = None,
    note: Mapping[str, Any] | None = None,
    write: Any = write_weights,
    int8: bool = False,
) -> None:
    """Write a Hugging Face directory that loads alone, here and in transformers; it appears whole or not at all.

    Args:
        tensors: Hugging Face names to tensors of one dtype, as `Llama.state_dict()` gives them, or a source of them.
        tokenizer: written beside the weights; without it the directory has none.
        shard_bytes: a file's size at most.
        force: replace a directory that exists.
        inputs: the directories that are read, which the output must not touch.
        check: called with each tensor's name and hash once it is written.
        note: further fields of manifest.json.
        int8: the blocks' matrices are in int8, and config.json is to say so.
        write: in which format; `write_weights` for safetensors, `torch_file.write_bin` for PyTorch's.

    Raises ValueError where `directory` exists and is not to be replaced, or the disk is too small.
    """
    source: Source = Tensors(tensors) if isinstance(tensors, Mapping) else tensors
    check_new(directory, force=force, inputs=inputs)
    check_space(directory, total_bytes(source))
    dtype = NAMES[source.dtype("model.embed_tokens.weight")]
    with new_directory(directory, force=force) as beside:
        written: Written = write(source, beside, shard_bytes, check)
        write_side_files(beside, config, tokenizer, dtype, int8=int8)
        write_manifest(beside, "model", written, note)


def write_side_files(
    directory: Path, config: ModelConfig, tokenizer: Tokenizer | None, dtype: str, *, int8: bool = False
) -> None:
    """config.json and, where there is a tokenizer, its files and generation_config.json."""
    bos_id, eos_id = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
    content: dict[str, Any] = {"config.json": hf_config(config, dtype, bos_id, eos_id)}
    if int8:
        content["config.json"]["quantization_config"] = INT8
    if tokenizer is not None:
        shutil.copyfile(tokenizer.path, directory / "tokenizer.model")
        content["tokenizer_config.json"] = tokenizer.hf_config()
        content["generation_config.json"] = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    for name, fields in content.items():
        (directory / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def find_tokenizer(*directories: Path) -> Tokenizer | None:
    """The tokenizer of the first directory that has one; where none has, a line says so."""
    for directory in directories:
        if (directory / "tokenizer.model").is_file():
            return Tokenizer(directory / "tokenizer.model")
    log.warning("no tokenizer.model in %s, so the output will have none", " or ".join(map(str, directories)))
    return None
