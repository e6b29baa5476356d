"""Deltas: what a licence lets one publish instead of the tuned weights. Made, applied and checked, tensor by tensor.

Two formats:

`bits`, which `make_delta` writes: the bits of every number, taken as an integer, and subtracted with wrap-around, after
casting the base to the tuned model's dtype. Adding it back gives the tuned weights exactly, with -0.0 and the payloads
of NaNs, which no floating-point difference does. Rows that the base does not have (a vocabulary that grew) are kept as
they are.

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2mini.dtypes import DTYPES, INTEGERS, NAMES
from k2mini.errors import some
from k2mini.files import check_output, new_directory
from k2mini.model_config import ModelConfig, tensor_shapes
from k2mini.weights.model_directory import CheckpointReader, ModelDirectory, check_tensors
from k2mini.weights.model_files import delta_manifest, find_tokenizer, save_model, write_manifest, write_side_files
from k2mini.weights.stream import SHARD_BYTES, Tensors, hash_tensors, total_bytes, write_weights
from k2mini.weights.verify import verify

log = logging.getLogger(__name__)

FORMATS = ("bits", "add")
# What grows with the vocabulary; no other tensor of a delta may be of another shape than the base's.
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


def make_delta(
    base: Path, tuned: Path, out: Path, *, kind: str = "bits", force: bool = False, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write the difference tuned - base as a directory, with the hashes of the tuned weights.

    Returns: how many elements applying it will not give back exactly; with `bits`, 0.

    Raises ValueError where the two are not of one shape (the tuned one may have more tokens) or `out` can't be written.
    """
    if kind not in FORMATS:
        raise ValueError(f"a delta's format is one of {', '.join(FORMATS)}, not {kind!r}")
    check_output(out, force=force, inputs=(base, tuned))
    before, after = _open_base(base), ModelDirectory(tuned)
    _check_shapes(before, after)
    _check_tensors(before.reader, after.reader, grow=True)
    source = (_BitsDifference if kind == "bits" else _Float16Difference)(before.reader, after.reader)
    tokenizer, wanted = find_tokenizer(tuned, base), {"force": force, "inputs": (base, tuned)}
    with new_directory(out, **wanted, size=total_bytes(source)) as beside, ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(hash_tensors, after.reader) if kind == "bits" else None
        written = write_weights(source, beside, shard_bytes)
        write_side_files(beside, after.config, tokenizer, after.reader if kind == "bits" else source)
        note: dict[str, Any] = {"delta": kind, "base": before.fingerprint()}
        if hashes is not None:
            note["tuned"] = {
                name: {"dtype": NAMES[after.reader.dtype(name)], "sha256": digest}
                for name, digest in hashes.result().items()
            }
        written.note = note
        write_manifest(beside, "delta", written)
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

    Raises ValueError where the two do not belong together, one is damaged or `out` can't be written; nothing is then.
    """
    check_output(out, force=force, inputs=(base, delta))
    before, difference = _open_base(base), ModelDirectory(delta)
    manifest = delta_manifest(difference, FORMATS)
    config = _tuned_config(before, difference)
    _check_tensors(before.reader, difference.reader, grow=resize_vocab)
    if manifest is None:
        log.info("%s has no manifest: taken for a sum in float16, as FastChat and K2 published them", delta)
        _check_not_swapped(before.reader, difference.reader)
    elif manifest["base"] != before.fingerprint():
        raise ValueError(f"{base} is not the base that {delta} was made against; its weights differ")
    tuned: Mapping[str, Any] = {}
    source: _Combined = _Float16Sum(before.reader, difference.reader)
    if manifest is not None and manifest["delta"] == "bits":
        tuned = manifest["tuned"]
        source = _BitsSum(before.reader, difference.reader, tuned)
    elif manifest is not None:
        verify(delta)  # of a sum's result there are no hashes
    _check_dtypes(source, difference.reader)

    def check(name: str, digest: str) -> None:
        if tuned and tuned[name]["sha256"] != digest:
            published = (manifest or {})["tensors"][name]["sha256"]
            intact = hash_tensors(Tensors({name: difference.reader.tensor(name)}))[name] == published
            damaged = base if intact else delta
            raise ValueError(f"{name} does not come out as the tuned weights: {damaged} is damaged there")

    save_model(
        source,
        config,
        out,
        tokenizer=find_tokenizer(delta, base),
        shard_bytes=shard_bytes,
        force=force,
        inputs=(base, delta),
        write=partial(write_weights, check=check),
    )


def _open_base(path: Path) -> ModelDirectory:
    base = ModelDirectory(path)
    if (base.manifest or {}).get("kind") == "delta":
        raise ValueError(f"{path} is a delta, not a base; are the two swapped?")
    check_tensors(base.reader, tensor_shapes(base.config), path)
    for name in base.reader.names():
        base.reader.dtype(name)  # refuses what is no floating-point type before anything is written
    return base


def _tuned_config(base: ModelDirectory, delta: ModelDirectory) -> ModelConfig:
    """The tuned model's shape. Where a delta was published without a config.json, only its vocabulary is its own."""
    if not (delta.path / "config.json").is_file():
        return replace(base.config, vocab_size=delta.reader.shape(BY_TOKEN[0])[0])
    _check_shapes(base, delta)
    return delta.config


def _check_shapes(base: ModelDirectory, other: ModelDirectory) -> None:
    """Raise ValueError unless both are the same network. Copies of LLaMA differ in context length and norm_eps."""
    free = {"vocab_size": 0, "max_seq_len": 0, "norm_eps": 0.0}
    a, b = asdict(base.config) | free, asdict(other.config) | free
    odd = [key for key in a if a[key] != b[key]]
    if odd:
        values = ", ".join(f"{key} is {a[key]} and {b[key]}" for key in odd)
        raise ValueError(f"{base.path} and {other.path} are models of different shapes: by their config.json, {values}")


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


def _check_dtypes(source: _Combined, delta: CheckpointReader) -> None:
    """Raise ValueError where a delta's tensor is not of the dtype that its format prescribes."""
    for name in source.names():
        if not isinstance(source, _BitsSum):
            delta.dtype(name)  # raises where it is no floating-point type
            continue
        stored, right = delta.stored_dtype(name), INTEGERS[source.dtype(name)]
        if stored != right:
            where = f"{delta.files[name]}: {name} is stored as {stored}"
            raise ValueError(f"{where}, not as the tuned bits, so it should be {right}; copy the delta again")


class _Combined(ABC):
    """A source of one tensor for each of `other`'s: its rows combined with the base's, where the base has them."""

    def __init__(self, base: CheckpointReader, other: CheckpointReader) -> None:
        self.base, self.other = base, other
        self.names, self.shape = other.names, other.shape
        self.lost = 0  # elements that will not come back exactly

    def dtype(self, name: str) -> torch.dtype:
        """That of the `add` format, unless a subclass says otherwise."""
        return torch.float16

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        end = max(start, min(stop, self.base.shape(name)[0]))
        other = self.other.rows(name, start, stop)
        known, new = other[: end - start], other[end - start :]
        combined = self.combine(self.base.rows(name, start, end), known, name)
        rows = torch.cat([combined, self.new(new)]) if len(new) else combined
        if rows.dtype == torch.float16 and not rows.isfinite().all():
            raise ValueError(f"{name}: values of the result are not finite in float16, in which format add computes")
        return rows

    @abstractmethod
    def combine(self, base: Tensor, other: Tensor, name: str) -> Tensor:
        """Rows of the result from those of both sides."""

    def new(self, other: Tensor) -> Tensor:
        """Rows of the result from those that only the other side has."""
        return other.to(torch.float16)


class _BitsDifference(_Combined):
    """tuned - base, in the integers as wide as the tuned dtype, with wrap-around; new rows are the tuned ones' bits."""

    def dtype(self, name: str) -> torch.dtype:
        return INTEGERS[self.other.dtype(name)]

    def combine(self, base: Tensor, other: Tensor, name: str) -> Tensor:
        integers = INTEGERS[other.dtype]
        return other.view(integers) - base.to(other.dtype).view(integers)

    def new(self, other: Tensor) -> Tensor:
        return other.view(INTEGERS[other.dtype])


class _BitsSum(_Combined):
    """base + delta, in the same integers, which are then taken as the bits of the tuned weights."""

    def __init__(self, base: CheckpointReader, other: CheckpointReader, tuned: Mapping[str, Any]) -> None:
        super().__init__(base, other)
        self._dtypes = {name: DTYPES[entry["dtype"]] for name, entry in tuned.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return super().rows(name, start, stop).view(self._dtypes[name])

    def combine(self, base: Tensor, other: Tensor, name: str) -> Tensor:
        dtype = self._dtypes[name]
        return base.to(dtype).view(INTEGERS[dtype]) + other

    def new(self, other: Tensor) -> Tensor:
        return other


class _Float16Difference(_Combined):
    """tuned - base in float16, as FastChat's make_delta.py; counts the elements that adding it will not give back."""

    def __init__(self, base: CheckpointReader, other: CheckpointReader) -> None:
        super().__init__(base, other)
        self._lock = threading.Lock()  # rows are asked for from several threads

    def combine(self, base: Tensor, other: Tensor, name: str) -> Tensor:
        base = base.to(torch.float16)
        delta = other.to(torch.float16) - base
        self._count(base + delta, other)
        return delta

    def new(self, other: Tensor) -> Tensor:
        self._count(other.to(torch.float16), other)
        return other.to(torch.float16)

    def _count(self, again: Tensor, tuned: Tensor) -> None:
        wide = torch.promote_types(tuned.dtype, torch.float32)
        lost = int((again.to(wide).view(INTEGERS[wide]) != tuned.to(wide).view(INTEGERS[wide])).sum())
        with self._lock:
            self.lost += lost


class _Float16Sum(_Combined):
    """base + delta in float16, as FastChat's apply_delta.py."""

    def combine(self, base: Tensor, other: Tensor, name: str) -> Tensor:
        return base.to(torch.float16) + other.to(torch.float16)
