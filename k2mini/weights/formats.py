"""Hugging Face model directories: reading their tensors by name, and writing them whole.

Nothing is read before it is asked for: tensors are views of memory-mapped files, in safetensors or in PyTorch's
`.bin`, so a 13 GB checkpoint opens at once and its pages can be evicted.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from k2mini.config import ModelConfig
from k2mini.files import new_directory, read_json
from k2mini.text.tokenizer import Tokenizer
from k2mini.weights.hf_config import hf_config

# The rotary frequencies that checkpoints of 2023 carry; they follow from config.json.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SHARD_BYTES = 5 * 10**9


def model_directory(path: str | Path) -> Path:
    """`path`, checked to be a directory.

    Raises ValueError: it is not; for what looks like a hub id, with the command that downloads it.
    """
    directory = Path(path)
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
        self.files: dict[str, Path] = {}  # tensor name -> its file
        self._safetensors: dict[Path, Any] = {}
        self._bins: dict[Path, dict[str, Tensor]] = {}
        for path, expected in _weight_files(directory).items():
            names = self._open(path)
            missing = sorted(set(expected) - set(names)) if expected is not None else []
            if missing:
                raise ValueError(f"{path} does not hold {_some(missing)}, which the index says it does")
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

    def dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype, from the header. Raises ValueError where it is no floating-point type of LLaMA's."""
        path = self.files[name]
        if path in self._safetensors:
            code = self._safetensors[path].get_slice(name).get_dtype()
            if code not in DTYPES:
                raise ValueError(f"{path}: {name} is stored as {code}; k2mini reads {', '.join(DTYPES)}")
            return DTYPES[code]
        dtype = self._bins[path][name].dtype
        if dtype not in DTYPES.values():
            raise ValueError(f"{path}: {name} is stored as {dtype}; k2mini reads {', '.join(DTYPES)}")
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


def _some(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def check_tensors(reader: CheckpointReader, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the directory's tensors are the expected ones; it names what is missing, extra or bent.

    A model with tied embeddings may carry an `lm_head.weight`, provided it equals the embedding bit for bit.
    """
    found = set(reader.names())
    missing = sorted(set(expected) - found)
    extra = sorted(found - set(expected))
    if "lm_head.weight" in extra:
        embedding = "model.embed_tokens.weight"
        if embedding in found and torch.equal(reader.tensor("lm_head.weight"), reader.tensor(embedding)):
            extra.remove("lm_head.weight")
        else:
            raise ValueError(
                f"{reader.directory}: config.json ties lm_head to the embedding, yet lm_head.weight is stored and "
                "differs; set tie_word_embeddings to false if the stored one is meant"
            )
    if missing:
        hint = "; is tie_word_embeddings meant to be true?" if missing == ["lm_head.weight"] else ""
        raise ValueError(f"{reader.directory} lacks {_some(missing)}{hint}")
    if extra:
        raise ValueError(f"{reader.directory} holds {_some(extra)}, which a LLaMA of its config.json does not have")
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise ValueError(f"{reader.files[name]}: {name} is {reader.shape(name)}, config.json makes it {shape}")


def plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Split tensors, in order, into shards of at most `shard_bytes` (a larger tensor gets a shard of its own)."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_weights(tensors: Mapping[str, Tensor], directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` and an index, with the hub's file names."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    shards = plan_shards(sizes, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        content = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_model(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    directory: Path,
    *,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory that loads alone, here and in transformers; it appears whole or not at all.

    Args:
        tensors: Hugging Face names to tensors of one dtype, as `Llama.state_dict()` gives them.
        tokenizer: written beside the weights; without it the directory has none.

    Raises ValueError where `directory` exists and is not empty.
    """
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    bos_id, eos_id = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
    with new_directory(directory) as beside:
        write_weights(tensors, beside, shard_bytes)
        written = {"config.json": hf_config(config, dtype, bos_id, eos_id)}
        if tokenizer is not None:
            shutil.copyfile(tokenizer.path, beside / "tokenizer.model")
            written["tokenizer_config.json"] = tokenizer.hf_config()
            written["generation_config.json"] = {"bos_token_id": bos_id, "eos_token_id": eos_id}
        for name, content in written.items():
            (beside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
