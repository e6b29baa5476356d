"""Deltas: what a licence lets one publish instead of the tuned weights. Made, applied and proved, tensor by tensor.

Two formats:

`bits`, which `make_delta` writes: the difference of the raw words, as integers that wrap, after casting the base to the
tuned model's dtype. Adding it back gives the tuned weights exactly, with -0.0 and the payloads of NaNs, which no
floating-point difference does. Rows that the base does not have (a vocabulary that grew) are kept as they are.

`add`, FastChat's and K2's (github:lm-sys/FastChat, fastchat/model/apply_delta.py): tuned - base in float16, both sides
cast to it first. Not exact. What they published is a model directory without a manifest.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2mini.dtypes import DTYPES, INTEGERS, NAMES
from k2mini.files import check_new, check_space, new_directory
from k2mini.model_config import ModelConfig, read_model_config
from k2mini.weights.manifest import model_fingerprint, read_manifest, write_manifest
from k2mini.weights.model_directory import CheckpointReader, some
from k2mini.weights.model_files import find_tokenizer, save_model, write_side_files
from k2mini.weights.stream import SHARD_BYTES, hash_tensors, total_bytes, write_weights

log = logging.getLogger(__name__)

FORMATS = ("bits", "add")
# What grows with the vocabulary; nothing else of a delta may be of another shape than the base's.
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


def make_delta(
    base: Path,
    tuned: Path,
    out: Path,
    *,
    kind: str = "bits",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the difference tuned - base as a directory, with the hashes of the tuned weights.

    Returns: how many elements applying it will not give back exactly; with `bits`, 0.

    Raises ValueError where the two are not models of one shape (the tuned one may have more tokens), where `out` can't
    be written, or the disk is too small; nothing is written then.
    """
    if kind not in FORMATS:
        raise ValueError(f"a delta's format is one of {', '.join(FORMATS)}, not {kind!r}")
    before, after = _open_base(base), CheckpointReader(tuned)
    config = read_model_config(tuned)
    _check_shapes(base, read_model_config(base), tuned, config)
    _check_tensors(before, after, grow=True)
    source = _Difference(before, after) if kind == "bits" else _Subtraction(before, after)
    check_new(out, force=force, inputs=(base, tuned))
    check_space(out, total_bytes(source))
    tokenizer = find_tokenizer(tuned, base)
    with new_directory(out, force=force) as beside, ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(hash_tensors, after) if kind == "bits" else None
        written = write_weights(source, beside, shard_bytes)
        write_side_files(beside, config, tokenizer, "float16" if kind == "add" else _short(after))
        note: dict[str, Any] = {"delta": kind, "base": model_fingerprint(before)}
        if hashes is not None:
            note["tuned"] = {
                name: {"dtype": NAMES[after.dtype(name)], "sha256": digest} for name, digest in hashes.result().items()
            }
        write_manifest(beside, "delta", written, note)
    return source.lost


def apply_delta(
    base: Path,
    delta: Path,
    out: Path,
    *,
    resize_vocab: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write base + delta as a model; that of a `bits` delta is checked against the tuned weights' hashes.

    A directory without a manifest is taken for one of FastChat's or K2's sums.

    Args:
        resize_vocab: accept a delta of more tokens than the base has; the new rows are the delta's.

    Raises ValueError where the two do not belong together or one is damaged, where `out` can't be written, or the disk
    is too small; nothing is written then.
    """
    before, difference = _open_base(base), CheckpointReader(delta)
    manifest = read_manifest(delta)
    if manifest is not None and manifest["kind"] != "delta":
        raise ValueError(f"{delta} is no delta: its manifest says {manifest['kind']}")
    config = _config(base, delta)
    _check_tensors(before, difference, grow=resize_vocab)
    if manifest is None:
        log.info("%s has no manifest: taken for a sum in float16, as FastChat and K2 published them", delta)
        _check_not_swapped(before, difference)
    elif manifest["base"] != model_fingerprint(before):
        raise ValueError(f"{base} is not the base that {delta} was made against; its weights differ")
    kind = "add" if manifest is None else manifest["delta"]
    tuned: Mapping[str, Any] = manifest["tuned"] if manifest is not None and kind == "bits" else {}
    source = _Restored(before, difference, tuned) if kind == "bits" else _Addition(before, difference)
    for name in source.names():
        stored = difference.stored_dtype(name)
        if stored != (INTEGERS[source.dtype(name)] if kind == "bits" else difference.dtype(name)):
            raise ValueError(
                f"{difference.files[name]}: {name} is stored as {stored}, which its manifest does not mean"
            )

    def check(name: str, digest: str) -> None:
        if tuned and tuned[name]["sha256"] != digest:
            whose = _culprit(difference, manifest or {}, name)
            raise ValueError(f"{name} does not come out as the tuned weights: {whose or base} is damaged there")

    save_model(
        source,
        config,
        out,
        tokenizer=find_tokenizer(delta, base),
        shard_bytes=shard_bytes,
        force=force,
        inputs=(base, delta),
        check=check,
    )


def _open_base(base: Path) -> CheckpointReader:
    manifest = read_manifest(base)
    if manifest is not None and manifest["kind"] == "delta":
        raise ValueError(f"{base} is a delta, not a base; are the two swapped?")
    reader = CheckpointReader(base)
    for name in reader.names():
        reader.dtype(name)  # refuses what is no floating-point type before anything is written
    return reader


def _config(base: Path, delta: Path) -> ModelConfig:
    """The tuned model's shape; deltas are published without a config.json, too."""
    ours = read_model_config(base)
    if not (delta / "config.json").is_file():
        return replace(ours, vocab_size=_tokens(CheckpointReader(delta)))
    theirs = read_model_config(delta)
    _check_shapes(base, ours, delta, theirs)
    return theirs


def _check_shapes(base: Path, ours: ModelConfig, other: Path, theirs: ModelConfig) -> None:
    """Raise ValueError unless both are the same network. Copies of LLaMA differ in context length and norm_eps."""
    free = {"vocab_size": 0, "max_seq_len": 0, "norm_eps": 0.0}
    a, b = asdict(ours) | free, asdict(theirs) | free
    odd = [key for key in a if a[key] != b[key]]
    if odd:
        values = ", ".join(f"{key} is {a[key]} and {b[key]}" for key in odd)
        raise ValueError(f"{base} and {other} are models of different shapes: by their config.json, {values}")


def _tokens(reader: CheckpointReader) -> int:
    return reader.shape(BY_TOKEN[0])[0]


def _short(reader: CheckpointReader) -> str:
    return NAMES[reader.dtype(BY_TOKEN[0])]


def _check_tensors(base: CheckpointReader, other: CheckpointReader, *, grow: bool) -> None:
    """Raise ValueError unless both have the same tensors of the same shapes; `grow`: `other` may have more tokens."""
    odd = sorted(set(base.names()) ^ set(other.names()))
    if odd:
        raise ValueError(f"{base.directory} and {other.directory} do not have the same tensors: {some(odd)}")
    for name in base.names():
        ours, theirs = base.shape(name), other.shape(name)
        if ours == theirs:
            continue
        if name in BY_TOKEN and ours[1:] == theirs[1:]:
            if grow and ours[0] < theirs[0]:
                continue
            sizes = f"{name} has {ours[0]:,} rows in {base.directory} and {theirs[0]:,} in {other.directory}"
            if ours[0] < theirs[0]:
                raise ValueError(f"{sizes}: tokens were added; --resize-vocab takes the new rows from the delta")
            raise ValueError(f"{sizes}: the base has more tokens, so it is not the one that was tuned")
        raise ValueError(f"{name} is {ours} in {base.directory} and {theirs} in {other.directory}")


def _check_not_swapped(base: CheckpointReader, delta: CheckpointReader) -> None:
    """Raise ValueError where the base's norms are next to nothing beside the delta's: those of a model are near one."""
    norms = [name for name in base.names() if len(base.shape(name)) == 1]
    ours, theirs = (sum(r.tensor(name).float().abs().mean().item() for name in norms) for r in (base, delta))
    if ours * 10 < theirs:
        raise ValueError(
            f"the norms of {base.directory} are near zero, as a delta's are, and those of {delta.directory} are not; "
            "are --base and --delta swapped?"
        )


def _culprit(delta: CheckpointReader, manifest: Mapping[str, Any], name: str) -> Path | None:
    """The delta's directory, if it is the delta's tensor that is not what was published."""
    found = hash_tensors(_One(delta, name))[name]
    return delta.directory if found != manifest["tensors"][name]["sha256"] else None


class _Pair(ABC):
    """A source of the second reader's tensors, each row combined with the first's where that has it."""

    def __init__(self, base: CheckpointReader, other: CheckpointReader) -> None:
        self.base, self.other = base, other
        self.names, self.shape = other.names, other.shape
        self.lost = 0  # elements that will not come back exactly

    def dtype(self, name: str) -> torch.dtype:
        """Float16, unless a subclass says otherwise."""
        return torch.float16

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the result; where the base has none, they are made of the other's alone."""
        end = max(start, min(stop, self.base.shape(name)[0]))
        other = self.other.rows(name, start, stop)
        known, new = other[: end - start], other[end - start :]
        combined = self.combine(self.base.rows(name, start, end), known, name)
        return torch.cat([combined, self.new(new)]) if len(new) else combined

    @abstractmethod
    def combine(self, base: Tensor, other: Tensor, name: str) -> Tensor:
        """Rows of the result from those of both sides."""

    def new(self, other: Tensor) -> Tensor:
        """Rows of the result from those that only the other side has."""
        return other.to(torch.float16)


class _Difference(_Pair):
    """tuned - base, in words."""

    def dtype(self, name: str) -> torch.dtype:
        """The words of the tuned dtype."""
        return INTEGERS[self.other.dtype(name)]

    def combine(self, base: Tensor, other: Tensor, name: str) -> Tensor:
        """Integers, which wrap."""
        words = INTEGERS[other.dtype]
        return other.view(words) - base.to(other.dtype).view(words)

    def new(self, other: Tensor) -> Tensor:
        """As they are."""
        return other.view(INTEGERS[other.dtype])


class _Restored(_Pair):
    """base + delta, in words: the tuned weights."""

    def __init__(self, base: CheckpointReader, other: CheckpointReader, tuned: Mapping[str, Any]) -> None:
        super().__init__(base, other)
        self._dtypes = {name: DTYPES[entry["dtype"]] for name, entry in tuned.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The tuned dtype."""
        return self._dtypes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The words, seen as the tuned dtype."""
        return super().rows(name, start, stop).view(self._dtypes[name])

    def combine(self, base: Tensor, other: Tensor, name: str) -> Tensor:
        """Integers, which wrap."""
        dtype = self._dtypes[name]
        return base.to(dtype).view(INTEGERS[dtype]) + other

    def new(self, other: Tensor) -> Tensor:
        """As they are."""
        return other


class _Addition(_Pair):
    """base + delta, in float16."""

    def combine(self, base: Tensor, other: Tensor, name: str) -> Tensor:
        """As FastChat's apply_delta.py did."""
        return base.to(torch.float16) + other.to(torch.float16)


class _Subtraction(_Pair):
    """tuned - base, in float16; counts what adding it to the base will not give back."""

    def __init__(self, base: CheckpointReader, other: CheckpointReader) -> None:
        super().__init__(base, other)
        self._lock = threading.Lock()  # rows are asked for from several threads

    def combine(self, base: Tensor, other: Tensor, name: str) -> Tensor:
        """As FastChat's make_delta.py did."""
        base = base.to(torch.float16)
        delta = other.to(torch.float16) - base
        self._count(base + delta, other)
        return delta

    def new(self, other: Tensor) -> Tensor:
        """In float16."""
        self._count(other.to(torch.float16), other)
        return other.to(torch.float16)

    def _count(self, again: Tensor, tuned: Tensor) -> None:
        wide = torch.promote_types(tuned.dtype, torch.float32)
        lost = int((again.to(wide).view(INTEGERS[wide]) != tuned.to(wide).view(INTEGERS[wide])).sum())
        with self._lock:
            self.lost += lost


class _One:
    """One tensor of a reader, as a source."""

    def __init__(self, reader: CheckpointReader, name: str) -> None:
        self._name = name
        self.shape, self.rows, self.dtype = reader.shape, reader.rows, reader.stored_dtype

    def names(self) -> list[str]:
        """The one."""
        return [self._name]
