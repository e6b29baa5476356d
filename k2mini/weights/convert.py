"""A model from one layout to another: Hugging Face's (safetensors, .bin), Meta's, and to GGUF."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from k2mini.data.tokenizer import Tokenizer
from k2mini.model_config import ModelConfig, read_model_config, tensor_shapes
from k2mini.nn.quant import int8_matrices, quantize_rows, scale_name
from k2mini.weights.gguf_file import write_gguf
from k2mini.weights.meta import OUTPUT, MetaReader, write_meta
from k2mini.weights.model_directory import CheckpointReader, check_tensors, is_int8
from k2mini.weights.model_files import find_tokenizer, save_model
from k2mini.weights.stream import SHARD_BYTES, Cast, Source, write_weights
from k2mini.weights.torch_file import write_bin

log = logging.getLogger(__name__)

FORMATS = ("hf", "bin", "meta", "gguf")


def open_model(directory: Path) -> tuple[Source, ModelConfig]:
    """A model's tensors, under Hugging Face's names, and its shape, from any layout that k2mini reads.

    Raises ValueError, naming the file, where it is none, or not complete.
    """
    if any(directory.glob("consolidated.*.pth")) and not (directory / "config.json").is_file():
        reader = MetaReader(directory)
        return reader, reader.config
    stored = CheckpointReader(directory)
    return stored, read_model_config(directory)


def convert(
    directory: Path,
    kind: str,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    quantize: str | None = None,
    force: bool = False,
) -> None:
    """Write `directory` to `out` as one of `FORMATS`, a few megabytes at a time.

    Args:
        dtype: None: as stored; for GGUF, float16 where 16 bits are stored and float32 else.
        quantize: 'int8' stores the blocks' matrices so (nn/quant.py); as 'hf' only, and only k2mini reads it.

    Raises ValueError where a tensor is missing, extra or of another shape, a value does not fit the dtype, the format
    can't say what the model is, or `out` can't be written; nothing is written then.
    """
    if is_int8(directory):
        raise ValueError(f"{directory} is quantised; convert the full-precision model")
    source, config = open_model(directory)
    check_tensors(source, tensor_shapes(config), directory)
    tokenizer = _tokenizer(directory)
    source = _Without(source) if config.tie_embeddings else source
    stored = source.dtype("model.embed_tokens.weight")
    if kind == "gguf":
        default = torch.float16 if stored.itemsize == 2 else torch.float32
        write_gguf(source, config, out, tokenizer, dtype or default, force=force)
        return
    if dtype is not None:
        source = Cast(source, dtype)
    if quantize is not None:
        if kind != "hf" or quantize != "int8":
            raise ValueError("quantised weights are stored as int8, and with --to hf only")
        source = _Quantized(source)
    if kind == "meta":
        write_meta(source, config, out, tokenizer, force=force, inputs=(directory,))
        return
    save_model(
        source,
        config,
        out,
        tokenizer=tokenizer,
        shard_bytes=shard_bytes,
        force=force,
        inputs=(directory,),
        write=write_weights if kind == "hf" else write_bin,
        int8=quantize is not None,
    )


def _tokenizer(directory: Path) -> Tokenizer | None:
    """The directory's own or, as Meta distributes it, the one beside its models."""
    if (directory / "params.json").is_file() and not (directory / "tokenizer.model").is_file():
        return find_tokenizer(directory, directory.parent)
    return find_tokenizer(directory)


class _Quantized:
    """A source with its blocks' matrices in int8, and their scales."""

    def __init__(self, source: Source) -> None:
        self._source = source
        matrices = int8_matrices({name: source.shape(name) for name in source.names()})
        self._scales = {scale_name(name): name for name in matrices}
        self._matrices = set(matrices)

    def names(self) -> list[str]:
        """The source's, and the scales."""
        return [*self._source.names(), *self._scales]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a scale, the rows of its matrix."""
        return self._source.shape(self._scales[name])[:1] if name in self._scales else self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """int8, float32 of a scale, or the source's."""
        if name in self._matrices:
            return torch.int8
        return torch.float32 if name in self._scales else self._source.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Quantised row by row, so any rows can be asked for."""
        if name in self._scales:
            return quantize_rows(self._source.rows(self._scales[name], start, stop))[1]
        rows = self._source.rows(name, start, stop)
        return quantize_rows(rows)[0] if name in self._matrices else rows


class _Without:
    """A source without the output matrix that some checkpoints of tied models repeat."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.shape, self.dtype, self.rows = source.shape, source.dtype, source.rows

    def names(self) -> list[str]:
        """All others."""
        return [name for name in self._source.names() if name != OUTPUT]
