"""A model from one layout to another: Hugging Face's (safetensors, .bin), Meta's, and to GGUF."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from k2mini.architectures import QUANTIZED
from k2mini.data.tokenizer import Tokenizer
from k2mini.files import check_output
from k2mini.model_config import ModelConfig, tensor_shapes
from k2mini.nn import nf4
from k2mini.nn.quant import int8_matrices, part_shapes, quantize_rows
from k2mini.weights.gguf_file import write_gguf
from k2mini.weights.meta import OUTPUT, MetaReader, write_meta
from k2mini.weights.model_directory import ModelDirectory, check_tensors
from k2mini.weights.model_files import find_tokenizer, save_model
from k2mini.weights.stream import SHARD_BYTES, Cast, Source, Written, write_weights
from k2mini.weights.torch_file import write_bin

log = logging.getLogger(__name__)

FORMATS = ("hf", "bin", "meta", "gguf")


def open_layout(directory: ModelDirectory) -> tuple[Source, ModelConfig]:
    """A model's tensors, under Hugging Face's names, and its shape, from any layout that k2mini reads.

    Raises ValueError, naming the file, where the directory holds no model, or a part of one.
    """
    if any(directory.path.glob("consolidated.*.pth")) and not (directory.path / "config.json").is_file():
        meta = MetaReader(directory)
        return meta, meta.config
    return directory.reader, directory.config


def convert(
    path: Path,
    kind: str,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    quantize: str | None = None,
    force: bool = False,
) -> None:
    """Write the model at `path` to `out` in one of `FORMATS`, a few megabytes at a time.

    Args:
        dtype: of the tensors written. None: as stored; for GGUF, float16 where 16 bits are stored and float32 else.
        quantize: store the blocks' matrices in 'int8' or 'nf4' (nn/quant.py). With 'hf' only; k2mini alone reads it.

    Raises ValueError where a tensor is missing, extra or of another shape, a value does not fit the dtype, the format
    has no field for a feature of the model, or `out` can't be written; nothing is written then.
    """
    if quantize is not None and (kind != "hf" or quantize not in QUANTIZED):
        raise ValueError(
            f"--quantize {quantize} --to {kind} is not possible: weights are stored in int8 or nf4, with --to hf"
        )
    directory = ModelDirectory(path)
    directory.require_model()
    if directory.quantized is not None:
        raise ValueError(f"{path} is quantised; convert the full-precision model that it was made of")
    tokenizer = _tokenizer(path)
    inputs = (path, tokenizer.path) if tokenizer is not None else (path,)
    check_output(out, file=kind == "gguf", force=force, inputs=inputs)
    source, config = open_layout(directory)
    check_tensors(source, tensor_shapes(config), path)
    full = None if quantize is None else directory.fingerprint(source)
    source = _WithoutHead(source) if config.tie_embeddings else source
    stored = source.dtype("model.embed_tokens.weight")
    if kind == "gguf":
        default = torch.float16 if stored.itemsize == 2 else torch.float32
        write_gguf(source, config, out, tokenizer, dtype or default, force=force, inputs=inputs)
        return
    if dtype is not None:
        source = Cast(source, dtype)
    if quantize is not None:
        source = _Quantized(source, quantize)
    if kind == "meta":
        if tokenizer is not None and tokenizer.path.suffix == ".json":
            log.warning("Meta's code reads tokenizer.model; %s, which is copied, is for k2mini alone", tokenizer.path)
        write_meta(source, config, out, tokenizer, force=force, inputs=inputs)
        return

    save_model(
        source,
        config,
        out,
        tokenizer=tokenizer,
        shard_bytes=shard_bytes,
        force=force,
        inputs=inputs,
        write=partial(_write, kind, full),
    )


def _write(kind: str, full: str | None, source: Source, beside: Path, shard_bytes: int) -> Written:
    """Write the weights and, of quantised ones, note the fingerprints: theirs, and that of the model they came from."""
    written = (write_weights if kind == "hf" else write_bin)(source, beside, shard_bytes)
    if full is None:
        return written
    return replace(written, note={"quantized_from": full, "fingerprint": ModelDirectory(beside).fingerprint()})


def _tokenizer(directory: Path) -> Tokenizer | None:
    """The directory's own tokenizer; of Meta's layout also that of the folder above, where its download has it."""
    above = [directory.parent] if (directory / "params.json").is_file() else []
    return find_tokenizer(directory, *above)


class _Quantized:
    """A source with its blocks' matrices in int8, whose scales follow all weights, or in NF4, each with its scales.

    int8 quantises row by row; NF4 takes a whole matrix, and the last one asked for is kept.
    """

    def __init__(self, source: Source, how: str) -> None:
        self._source, self._how, self._lock, self._last = source, how, Lock(), ("", dict[str, Tensor]())
        shapes = {name: source.shape(name) for name in source.names()}
        self._beside = {name: part_shapes(how, name, shapes[name]) for name in int8_matrices(shapes)}
        self._parts = {part: (name, *kept) for name, parts in self._beside.items() for part, kept in parts.items()}

    def names(self) -> list[str]:
        names = [part for name in self._source.names() for part in self._beside.get(name, [name])]
        return names if self._how == "nf4" else sorted(names, key=lambda name: name.endswith(".scale"))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parts[name][1] if name in self._parts else self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._parts[name][2] if name in self._parts else self._source.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._parts:
            return self._source.rows(name, start, stop)
        matrix = self._parts[name][0]
        if self._how == "int8":
            return quantize_rows(self._source.rows(matrix, start, stop), matrix)[name != matrix]
        with self._lock:
            if self._last[0] != matrix:
                values = nf4.quantize(self._source.rows(matrix, 0, self._source.shape(matrix)[0]), matrix)
                self._last = matrix, dict(zip(self._beside[matrix], values, strict=True))
            return self._last[1][name][start:stop]


class _WithoutHead:
    """A source without lm_head.weight, which some checkpoints of tied models store although it is the embedding."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.shape, self.dtype, self.rows = source.shape, source.dtype, source.rows

    def names(self) -> list[str]:
        return [name for name in self._source.names() if name != OUTPUT]
