"""Writing tensors to safetensors files a few megabytes at a time, wherever the tensors come from.

A source gives rows of its tensors when it is asked for them. Threads read and compute the next few pieces while earlier
ones are hashed and written, so a 13 GB model passes through well under a gigabyte of memory, at about the disk's pace.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from k2mini.dtypes import NAMES, SAFETENSORS_CODES
from k2mini.files import progress_bar

CHUNK_BYTES = 2 << 20  # of a piece; small, since the C library keeps freed blocks of a few megabytes for itself
AHEAD = 4  # pieces that are computed while one is written
SHARD_BYTES = 5 * 10**9  # the size of a file at most, unless told otherwise
SHOWN = 10**9  # bytes to write from which on there is a progress bar


class Source(Protocol):
    """Tensors by name, none of which has to be in memory. `rows` is called from several threads."""

    def names(self) -> list[str]:
        """In the order in which they are written."""

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype, without reading it."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start, …, stop - 1 along the first dimension."""


class Tensors:
    """Tensors in memory, by name, as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        """All names, in the mapping's order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor of that name."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor of that name."""
        return self._tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start, …, stop - 1, on the CPU and without gradient."""
        return self._tensors[name][start:stop].detach().cpu()


class Cast:
    """A source whose tensors are cast to another dtype as they are read."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        self.names, self.shape = source.names, source.shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that was asked for, whatever the tensor."""
        return self._dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start, …, stop - 1, cast. Raises ValueError, naming the tensor, where a value becomes infinite."""
        stored = self._source.rows(name, start, stop)
        cast = stored.to(self._dtype)
        lost = int(stored.isfinite().sum() - cast.isfinite().sum()) if cast.dtype != stored.dtype else 0
        if lost:
            short = NAMES[self._dtype]
            raise ValueError(f"{name}: {lost} values are too large for {short}; use bfloat16 or float32")
        return cast


def pieces(source: Source, names: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, start, stop) so that all rows of all tensors are covered, in order.

    A piece is of at most `CHUNK_BYTES`, or of one row where a row is larger.
    """
    for name in names:
        shape = source.shape(name)
        row = num_bytes(shape[1:], source.dtype(name))
        step = max(1, CHUNK_BYTES // max(1, row))
        for start in range(0, shape[0], step):
            yield name, start, min(start + step, shape[0])


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The size of a tensor in bytes."""
    return torch.Size(shape).numel() * dtype.itemsize


def total_bytes(source: Source) -> int:
    """The size of all tensors of a source in bytes."""
    return sum(num_bytes(source.shape(name), source.dtype(name)) for name in source.names())


Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(function, items)` in order, with `AHEAD` results under way in two threads."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def read(source: Source, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, rows) for all pieces of all tensors, in order; the rows are contiguous and in memory."""

    def load(piece: tuple[str, int, int]) -> tuple[str, Tensor]:
        rows = source.rows(*piece).contiguous()
        # The pages of a mapped file are read when they are touched: by this thread, not later by the one that writes.
        mapped = rows.untyped_storage().nbytes() > rows.nbytes
        return piece[0], rows.clone() if mapped else rows

    return ahead(load, pieces(source, names))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, as they are in memory and in files (little-endian)."""
    array: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(array)


class Digest:
    """A SHA-256 whose updates a thread computes, in order, while the caller goes on."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self._hash = pool, hashlib.sha256()
        self._waiting: deque[Future[None]] = deque()

    def update(self, content: bytes | memoryview) -> None:
        """Hash some more bytes, which must not change before `hexdigest` has returned."""
        self._waiting.append(self._pool.submit(self._hash.update, content))
        if len(self._waiting) > AHEAD:
            self._waiting.popleft().result()

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._hash.hexdigest()


@dataclass
class Written:
    """The hashes and sizes of what was written into a directory.

    Attributes:
        files: name -> {"bytes", "sha256"}.
        tensors: name -> {"file", "dtype", "shape", "sha256"}; the last is that of the tensor's raw bytes.
        note: further fields for the manifest, such as the fingerprint of the base.
    """

    files: dict[str, dict[str, int | str]] = field(default_factory=dict)
    tensors: dict[str, dict[str, object]] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)

    def add_tensor(self, name: str, file: str, dtype: torch.dtype, shape: tuple[int, ...], digest: str) -> None:
        """Note where one tensor was written, and its hash."""
        short = NAMES[dtype]
        self.tensors[name] = {"file": file, "dtype": short, "shape": list(shape), "sha256": digest}


Progress = Callable[[int], object]  # called with the number of bytes that were written since the last call
Check = Callable[[str, str], None]  # called with each tensor's name and SHA-256; what it raises ends the writing


def hash_tensors(source: Source) -> dict[str, str]:
    """The SHA-256 of every tensor's raw bytes."""
    digests = {name: hashlib.sha256() for name in source.names()}
    for name, rows in read(source, digests):
        digests[name].update(raw(rows))
    return {name: digest.hexdigest() for name, digest in digests.items()}


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


def write_weights(
    source: Source, directory: Path, shard_bytes: int = SHARD_BYTES, check: Check | None = None
) -> Written:
    """Write `model.safetensors`, or shards of at most `shard_bytes` and an index, with the hub's file names."""
    return write_sharded(source, directory, ("model", ".safetensors"), write_safetensors, shard_bytes, check)


def write_sharded(
    source: Source,
    directory: Path,
    name: tuple[str, str],
    write: Callable[[Source, list[str], Path, Written, Check | None, Progress], None],
    shard_bytes: int,
    check: Check | None,
) -> Written:
    """Write one file, or shards of at most `shard_bytes` and an index.

    Args:
        name: stem and suffix of the one file; shards are `STEM-00001-of-00002SUFFIX`.
        write: writes the tensors named to a path.
    """
    stem, suffix = name
    sizes = {tensor: num_bytes(source.shape(tensor), source.dtype(tensor)) for tensor in source.names()}
    shards, written, weight_map = plan_shards(sizes, shard_bytes), Written(), {}
    total = sum(sizes.values())
    with progress_bar(total, "writing", "B", shown=total > SHOWN) as progress:
        for number, names in enumerate(shards, start=1):
            part = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
            file = f"{stem}{part}{suffix}"
            write(source, names, directory / file, written, check, progress.update)
            weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = directory / f"{stem}{suffix}.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written


def write_safetensors(
    source: Source,
    names: list[str],
    path: Path,
    written: Written,
    check: Check | None = None,
    progress: Progress = lambda size: None,
) -> None:
    """Write one file (the format: 8 bytes of header length, a JSON header, then the tensors' bytes, back to back)."""
    # The widest types first, so that every tensor is aligned to its own width.
    names = sorted(names, key=lambda name: -source.dtype(name).itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        shape, dtype = source.shape(name), source.dtype(name)
        end = position + num_bytes(shape, dtype)
        header[name] = {"dtype": SAFETENSORS_CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash") as pool:
        whole = Digest(pool)

        def put(content: bytes | memoryview) -> None:
            whole.update(content)
            file.write(content)

        put(len(text).to_bytes(8, "little") + text)
        for name, parts in groupby(read(source, names), key=itemgetter(0)):
            own = Digest(pool)
            for _, rows in parts:
                content = raw(rows)
                own.update(content)
                put(content)
                progress(content.nbytes)
            written.add_tensor(name, path.name, source.dtype(name), source.shape(name), own.hexdigest())
            if check is not None:
                check(name, own.hexdigest())
        size = file.tell()
    written.files[path.name] = {"bytes": size, "sha256": whole.hexdigest()}
