"""Directories of weights: what each of their files says, and their tensors by name, mapped and not read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from functools import cached_property
from itertools import filterfalse
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from k2mini import architectures, hub
from k2mini.data.tokenizer import Tokenizer, choose_tokenizer
from k2mini.dtypes import SAFETENSORS, SAFETENSORS_FLOATS
from k2mini.errors import short, some
from k2mini.files import parse_json, read_json, read_text, recover, sha256
from k2mini.model_config import ModelConfig, parse_config, read_config_json
from k2mini.weights.stream import Source
from k2mini.weights.torch_file import read_bin

log = logging.getLogger(__name__)

KINDS = ("model", "delta", "adapter", "meta")
MANIFEST, MANIFEST_FORMAT = "manifest.json", "k2mini manifest 1"
ENTRIES: dict[str, dict[str, type]] = {"files": {"bytes": int, "sha256": str}, "tensors": {"file": str, "sha256": str}}
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")  # checkpoints of 2023 carry what follows from config.json
# Vocabularies are padded (Qwen2.5's by 399) and get a few tokens added; more rows are another model's.
MAX_SPARE_ROWS = 512


class ModelDirectory:
    """A directory of weights. Each of its files is opened once, the first time that something of it is asked for.

    Every attribute but `path` raises ValueError, naming the file, where the file is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = model_directory(path)

    @cached_property
    def _raw_config(self) -> dict[str, Any]:
        return read_config_json(self.path)

    @cached_property
    def config(self) -> ModelConfig:
        """The model's shape, from config.json."""
        return parse_config(self._raw_config, self.path)

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """What `read_manifest` finds: None where k2mini did not write the directory."""
        return read_manifest(self.path)

    @property
    def quantized(self) -> str | None:
        """As what config.json says that the blocks' matrices are stored, 'int8' or 'nf4' (a delta may have none)."""
        said = (self.path / "config.json").is_file() and self._raw_config.get("quantization_config")
        return architectures.quantization(said) if said else None

    @cached_property
    def reader(self) -> CheckpointReader:
        """The tensors, by name."""
        return CheckpointReader(self.path)

    def require_model(self) -> None:
        """Raise ValueError where the directory is a delta that k2mini made: its tensors are those of no model."""
        if (self.manifest or {}).get("kind") == "delta":
            raise ValueError(f"{self.path} is a delta, not a model; k2mini delta apply puts it on its base")

    def require_tokenizer_file(self) -> Path:
        """Its path, as `tokenizer_file` finds it. Raises ValueError where there is none, or the manifest differs."""
        if (path := tokenizer_file(self.path)) is None or not path.exists():
            raise ValueError(f"{self.path} has no tokenizer.model; copy the one the model was trained with (or .json)")
        noted = (self.manifest or {"files": {}})["files"].get(path.name)
        if noted is not None and noted["sha256"] != sha256(path):
            raise ValueError(f"{path} is not the one that {MANIFEST} has the hash of; copy the directory again")
        return path

    def tokenizer_hash(self) -> str:
        """The tokenizer's fingerprint; of tokenizer.model, which need not be opened for it, the file's hash."""
        path = self.require_tokenizer_file()
        return self._tokenizer.fingerprint() if path.suffix == ".json" else sha256(path)

    def check_vocab_size(self, tokens: int) -> None:
        """Raise ValueError unless the embedding has a row for each of the tokenizer's `tokens`, and few more."""
        rows = self.config.vocab_size
        if not tokens <= rows <= tokens + MAX_SPARE_ROWS:
            sizes = f"{tokenizer_file(self.path)} has {tokens:,} tokens, the embedding has {rows:,} rows"
            raise ValueError(f"{sizes}; this tokenizer belongs to another model")

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None where there is no file of one; else as `require_tokenizer`."""
        return self._tokenizer if tokenizer_file(self.path) is not None else None

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError where there is none, or it does not fit the model."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        # Where config.json disagrees on BOS or EOS (LLaMA-1's in the wild say 0 and 1), the tokenizer is right.
        config, tokenizer = self._raw_config, Tokenizer(self.require_tokenizer_file())
        tokenizer.add_stop_ids(config)
        self.check_vocab_size(tokenizer.vocab_size)
        for key, right in (("bos_token_id", (tokenizer.bos_id, None)), ("eos_token_id", (*tokenizer.stop_ids, None))):
            said, where = config.get(key), (self.path / "config.json", tokenizer.path.name)
            if right[0] is not None and said not in right and not (isinstance(said, list) and right[0] in said):
                log.warning("%s says %s %s, %s says %s; using the tokenizer's", where[0], key, said, where[1], right[0])
        return tokenizer

    def fingerprint(self, source: Source | None = None) -> str:
        """A hash by which the model, or that of a source, is known again, made in well under a second for 13 GB.

        It covers names, shapes, all vectors, and each matrix's first and last row, as float32: training changes it, an
        edit of other rows does not; a copy in another layout, or in a wider dtype, has the same.
        """
        digest, reader = hashlib.sha256(), source or self.reader
        for name in sorted(reader.names()):
            shape = reader.shape(name)
            digest.update(f"{name}{shape}".encode())
            for start, stop in [(0, 1), (shape[0] - 1, shape[0])] if len(shape) > 1 else [(0, size) for size in shape]:
                digest.update(reader.rows(name, start, stop).to(torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()


def model_directory(path: str | Path, *, weights: bool = True) -> Path:
    """`path`, if a directory, else that of a hub's id (see `hub.fetch`). Raises ValueError where it is neither."""
    # One that a killed process was replacing is put right first.
    if not (directory := Path(path)).exists():
        recover(directory)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{path} is a file; a model is a directory with config.json and weights")
    if hub.MODEL.fullmatch(str(path)):
        return hub.fetch(str(path), weights=weights)
    raise ValueError(f"there is no directory {path}")


def tokenizer_file(directory: Path) -> Path | None:
    """tokenizer.model or tokenizer.json; where both are there, as `choose_tokenizer` says; None: neither is."""
    found = [path for name in ("tokenizer.model", "tokenizer.json") if os.path.lexists(path := directory / name)]
    return choose_tokenizer(*found) if len(found) == 2 else next(iter(found), None)


def manifest_text(content: Mapping[str, Any]) -> str:
    """manifest.json of these fields, with their own SHA-256 as the last one (see `write_manifest`)."""
    own = hashlib.sha256((json.dumps(content, indent=1) + "\n").encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1) + "\n"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The content of manifest.json, or None where the directory has none that k2mini wrote for weights.

    Raises ValueError where it does not match its own hash, or is not what `write_manifest` writes.
    """
    if not os.path.lexists(path := directory / MANIFEST):
        return None
    content = parse_json(text := read_text(path), str(path))
    if not isinstance(content, dict) or not {"sha256", *ENTRIES} <= content.keys():
        return None
    if text != manifest_text({k: v for k, v in content.items() if k != "sha256"}):
        raise ValueError(f"{path} is damaged: it does not match its own hash; copy the directory again")
    odd = [key for key, known in (("format", [MANIFEST_FORMAT]), ("kind", KINDS)) if content.get(key) not in known]
    for key, kinds in ENTRIES.items():
        for name, entry in content[key].items() if isinstance(content[key], dict) else [("", None)]:
            typed = isinstance(entry, dict) and all(isinstance(entry.get(field), kind) for field, kind in kinds.items())
            odd += [f"{key}.{name}"] * (not typed or (key == "files" and Path(name).name != name))
    if odd:
        raise ValueError(f"{path}: {some(odd)} is not as this version of k2mini writes it; copy the directory again")
    return content


class CheckpointReader:
    """The tensors of one model directory, by name, in safetensors or `.bin`, in one file or in shards with an index.

    Raises ValueError, naming the file, where a file is missing, truncated, not what its name says or holds code.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, Path] = {}  # tensor name -> its file
        self._safetensors: dict[Path, Any] = {}
        self._bins: dict[Path, dict[str, Tensor]] = {}
        for path, expected in _weight_files(directory).items():
            names = self._open(path)
            if missing := sorted(set(expected or []) - set(names)):
                raise ValueError(f"{path} does not hold {some(missing)}, which the index says it does")
            for name in filterfalse(IGNORED.search, names):
                if name in self.files:
                    raise ValueError(f"{name} stands in both {self.files[name]} and {path}")
                self.files[name] = path

    def _open(self, path: Path) -> list[str]:
        if not path.is_file():
            raise ValueError(f"{path} is {'no file' if path.exists() else 'missing; the checkpoint is not complete'}")
        if path.suffix == ".safetensors":
            try:
                self._safetensors[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or damaged ({error}); copy or download it again") from None
            except OSError as error:
                raise OSError(f"{path}: {error}") from None
            return list(self._safetensors[path].keys())
        return list(self._bins.setdefault(path, read_bin(path)))

    def _stored(self, name: str) -> Any:
        """A tensor of a mapped `.bin`, or safetensors' slice, which stands for a tensor that is not read yet."""
        path = self.files[name]
        return self._safetensors[path].get_slice(name) if path in self._safetensors else self._bins[path][name]

    def names(self) -> list[str]:
        """All tensors' names, sorted."""
        return sorted(self.files)

    def tensor(self, name: str) -> Tensor:
        """One tensor, memory-mapped (a private mapping: writing to it does not reach the file)."""
        path = self.files[name]
        return self._safetensors[path].get_tensor(name) if path in self._safetensors else self._bins[path][name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start, …, stop - 1 of one tensor, and nothing else of it."""
        return self._stored(name)[start:stop]

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape, from the header."""
        stored = self._stored(name)
        return tuple(stored.shape if isinstance(stored, Tensor) else stored.get_shape())

    def stored_dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype, from the header; a `bits` delta's are integers. Raises ValueError for any other type."""
        stored = self._stored(name)
        if isinstance(stored, Tensor) or stored.get_dtype() in SAFETENSORS:
            return stored.dtype if isinstance(stored, Tensor) else SAFETENSORS[stored.get_dtype()]
        raise self._unreadable(name, stored.get_dtype())

    def dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype, from the header. Raises ValueError where it is no floating-point type of LLaMA's."""
        if (dtype := self.stored_dtype(name)) not in SAFETENSORS_FLOATS.values():
            raise self._unreadable(name, f"{dtype}, as in a delta or in quantised weights")
        return dtype

    def _unreadable(self, name: str, stored: str) -> ValueError:
        return ValueError(f"{self.files[name]}: {name} is stored as {stored}, not {', '.join(SAFETENSORS_FLOATS)}")


def _weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The files to read, with the tensors that the index expects in each (None: no index)."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / f"{single}.index.json").is_file():
            return _indexed(directory / f"{single}.index.json")
        if (directory / single).is_file():
            return {directory / single: None}
    names = "no model.safetensors or pytorch_model.bin, alone or with an index (.index.json) of shards"
    raise ValueError(f"{directory} has no weights: {names}")


def _indexed(index: Path) -> dict[Path, list[str] | None]:
    weight_map = raw.get("weight_map") if isinstance(raw := read_json(index), dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    expected: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: {name} is mapped to {short(file)}, not a file name in its own directory")
        expected.setdefault(index.parent / file, []).append(name)
    return dict(sorted(expected.items()))


def check_tensors(source: Source, expected: Mapping[str, tuple[int, ...]], directory: Path) -> None:
    """Raise ValueError, naming a tensor that is missing, not expected or of another shape, unless all are as expected.

    A model with tied embeddings may carry an `lm_head.weight`, provided it equals the embedding bit for bit.
    """
    found = set(source.names())
    missing, extra = sorted(set(expected) - found), sorted(found - set(expected))
    if "lm_head.weight" in extra:
        pair = ("lm_head.weight", "model.embed_tokens.weight")
        whole = (source.rows(name, 0, source.shape(name)[0]) for name in pair)
        if pair[1] not in found or source.shape(pair[0]) != source.shape(pair[1]) or not torch.equal(*whole):
            said = "config.json ties lm_head to the embedding, yet lm_head.weight is stored and differs"
            raise ValueError(f"{directory}: {said}; set tie_word_embeddings to false if the stored one is meant")
        extra.remove("lm_head.weight")
    if missing:
        hint = "; is tie_word_embeddings meant to be true?" if missing == ["lm_head.weight"] else ""
        raise ValueError(f"{directory} lacks {some(missing)}{hint}")
    if extra:
        raise ValueError(f"{directory} holds {some(extra)}, which a model of its config.json does not have")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise ValueError(f"{directory}: {name} is {source.shape(name)}, config.json makes it {shape}")
