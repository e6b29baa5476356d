"""Hugging Face model directories: reading their tensors by name.

Nothing is read before it is asked for: tensors are views of memory-mapped files, in safetensors or in PyTorch's
`.bin`, so a 13 GB checkpoint opens at once and its pages can be evicted.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from k2mini.dtypes import SAFETENSORS, SAFETENSORS_FLOATS
from k2mini.files import read_json, recover
from k2mini.model_config import INT8
from k2mini.weights.stream import Source

log = logging.getLogger(__name__)

# The rotary frequencies that checkpoints of 2023 carry; they follow from config.json.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def model_directory(path: str | Path) -> Path:
    """`path`, checked to be a directory; where a killed process was replacing it, that is put right first.

    Raises ValueError: it is not; for what looks like a hub id, with the command that downloads it.
    """
    directory = Path(path)
    if not directory.exists():
        recover(directory)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{path} is a file; a model is a directory with config.json and weights")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        name = str(path).split("/")[1]
        raise ValueError(
            f"there is no directory {path}; if it is a model on the Hugging Face hub, download it first "
            f"(pip install huggingface_hub): hf download {path} --local-dir {name}"
        )
    raise ValueError(f"there is no directory {path}")


class CheckpointReader:
    """The tensors of one model directory, by name, whatever files they are in.

    Reads `model.safetensors`, sharded safetensors with their index, `pytorch_model.bin`, or sharded `.bin`.

    Raises ValueError, naming the file, where a file is missing, truncated, not what its name says or holds code.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.is_int8 = is_int8(directory)  # the blocks' matrices, as k2mini quantises
        self.files: dict[str, Path] = {}  # tensor name -> its file
        self._safetensors: dict[Path, Any] = {}
        self._bins: dict[Path, dict[str, Tensor]] = {}
        for path, expected in _weight_files(directory).items():
            names = self._open(path)
            missing = sorted(set(expected) - set(names)) if expected is not None else []
            if missing:
                raise ValueError(f"{path} does not hold {some(missing)}, which the index says it does")
            for name in names:
                if IGNORED.search(name):
                    continue
                if name in self.files:
                    raise ValueError(f"{name} stands in both {self.files[name]} and {path}")
                self.files[name] = path

    def _open(self, path: Path) -> list[str]:
        if not path.is_file():
            raise ValueError(f"{path} is missing; the checkpoint is not complete")
        if path.suffix == ".safetensors":
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is truncated or damaged ({error}); copy or download it again") from None
            self._safetensors[path] = handle
            return list(handle.keys())
        content = read_bin(path)
        self._bins[path] = content
        return list(content)

    def names(self) -> list[str]:
        """All tensors' names, sorted."""
        return sorted(self.files)

    def tensor(self, name: str) -> Tensor:
        """One tensor, memory-mapped (a private mapping: writing to it does not reach the file)."""
        path = self.files[name]
        if path in self._safetensors:
            return self._safetensors[path].get_tensor(name)
        return self._bins[path][name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start, …, stop - 1 of one tensor, and nothing else of it."""
        path = self.files[name]
        if path in self._safetensors:
            rows: Tensor = self._safetensors[path].get_slice(name)[start:stop]
            return rows
        return self._bins[path][name][start:stop]

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape, from the header."""
        path = self.files[name]
        if path in self._safetensors:
            return tuple(self._safetensors[path].get_slice(name).get_shape())
        return tuple(self._bins[path][name].shape)

    def stored_dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype, from the header; the words of a delta are integers. Raises ValueError for other types."""
        path = self.files[name]
        if path in self._safetensors:
            code = self._safetensors[path].get_slice(name).get_dtype()
            dtype = SAFETENSORS.get(code)
        else:
            dtype = code = self._bins[path][name].dtype
        if dtype is None:
            raise ValueError(f"{path}: {name} is stored as {code}; k2mini reads {', '.join(SAFETENSORS_FLOATS)}")
        return dtype

    def dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype, from the header. Raises ValueError where it is no floating-point type of LLaMA's."""
        dtype = self.stored_dtype(name)
        if dtype not in SAFETENSORS_FLOATS.values():
            raise ValueError(
                f"{self.files[name]}: {name} is stored as {dtype}; k2mini reads {', '.join(SAFETENSORS_FLOATS)}"
            )
        return dtype


def read_bin(path: Path) -> dict[str, Tensor]:
    """A state dict that `torch.save` wrote, memory-mapped. Raises ValueError where it is none, or holds code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors; code in it is never run, so it was not loaded") from None
    except (RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is truncated, damaged or in PyTorch's format of before 1.6 ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is not a state dict (a mapping of names to tensors)")
    return content


def _weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The files to read, with the tensors that the index expects in each (None: no index)."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (directory / index).is_file():
            return _indexed(directory / index)
        if (directory / single).is_file():
            return {directory / single: None}
    raise ValueError(
        f"{directory} has no weights: no model.safetensors or pytorch_model.bin, alone or with an index "
        "(.index.json) of shards"
    )


def _indexed(index: Path) -> dict[Path, list[str] | None]:
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    expected: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: {name} is mapped to {file!r}, which is not a file name in its own directory")
        expected.setdefault(index.parent / file, []).append(name)
    return dict(sorted(expected.items()))


def some(names: list[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def check_tensors(source: Source, expected: Mapping[str, tuple[int, ...]], directory: Path) -> None:
    """Raise ValueError unless the directory's tensors are the expected ones; it names what is missing, extra or bent.

    A model with tied embeddings may carry an `lm_head.weight`, provided it equals the embedding bit for bit.
    """
    found = set(source.names())
    missing = sorted(set(expected) - found)
    extra = sorted(found - set(expected))
    if "lm_head.weight" in extra:
        embedding = "model.embed_tokens.weight"
        if embedding in found and _equal(source, "lm_head.weight", embedding):
            extra.remove("lm_head.weight")
        else:
            raise ValueError(
                f"{directory}: config.json ties lm_head to the embedding, yet lm_head.weight is stored and "
                "differs; set tie_word_embeddings to false if the stored one is meant"
            )
    if missing:
        hint = "; is tie_word_embeddings meant to be true?" if missing == ["lm_head.weight"] else ""
        raise ValueError(f"{directory} lacks {some(missing)}{hint}")
    if extra:
        raise ValueError(f"{directory} holds {some(extra)}, which a LLaMA of its config.json does not have")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise ValueError(f"{directory}: {name} is {source.shape(name)}, config.json makes it {shape}")


def _equal(source: Source, one: str, other: str) -> bool:
    rows = source.shape(one)[0]
    return source.shape(one) == source.shape(other) and torch.equal(
        source.rows(one, 0, rows), source.rows(other, 0, rows)
    )


def is_int8(directory: Path) -> bool:
    """Whether config.json says that the blocks' matrices are stored in k2mini's int8."""
    path = directory / "config.json"
    return path.is_file() and read_json(path).get("quantization_config") == INT8


def report_special_tokens(directory: Path, bos_id: int, eos_id: int) -> None:
    """Log where config.json disagrees with the tokenizer on BOS or EOS (LLaMA-1's in the wild say 0 and 1).

    The tokenizer is right: its ids are what the model was trained with.
    """
    raw = read_json(directory / "config.json")
    for key, right in (("bos_token_id", bos_id), ("eos_token_id", eos_id)):
        said = raw.get(key)
        if said is not None and said != right and not (isinstance(said, list) and right in said):
            log.warning(
                "%s says %s %s, tokenizer.model says %s; using the tokenizer's",
                directory / "config.json",
                key,
                said,
                right,
            )
