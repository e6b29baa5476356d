"""PyTorch's own files (`.bin`, `.pth`): mapped when read, and written a few megabytes at a time.

`torch.save` itself needs all tensors in memory. Its format since PyTorch 1.6 is a zip archive, uncompressed:
`data.pkl`, a pickle that rebuilds tensors out of storages, which it names by number, and one entry `data/N` for each
storage (torch/serialization.py, `_save` and `persistent_id`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import pickle
import zipfile
from collections import OrderedDict
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from k2mini.dtypes import STORAGES
from k2mini.weights.stream import SHARD_BYTES, Check, Progress, Source, Written, num_bytes, raw, read, write_sharded

ROOT = "archive"
ALIGNMENT = 64  # of each storage in the file, so that it can be mapped


def read_bin(path: Path) -> dict[str, Tensor]:
    """A state dict that `torch.save` wrote, memory-mapped.

    Raises ValueError where it is none, holds code or is damaged; errors of the system (files, memory) as they are.
    """
    if path.is_fifo():
        raise ValueError(f"{path} is a pipe, not a file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with zipfile.ZipFile(path) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors; code in it is never run, so it was not loaded") from None
    except Exception as error:  # what a damaged pickle makes its reader do can't be foreseen
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: sought before the start
            error.filename = str(path)
            raise
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is truncated, damaged or in PyTorch's format of before 1.6 ({reason})") from None
    if not isinstance(content, dict) or not all(_is_plain(*entry) for entry in content.items()):
        raise ValueError(f"{path} is not a state dict (a mapping of names to tensors)")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} is compressed, which PyTorch's files never are; load it and torch.save it again")
    if not _fits(content, entries):
        raise ValueError(f"{path} is damaged: its tensors are not what its entries hold; copy or download it again")
    return content


def _is_plain(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def _fits(content: dict[str, Tensor], entries: list[zipfile.ZipInfo]) -> bool:
    """Whether each storage is one whole entry, and no two share a name or bytes.

    PyTorch maps as many bytes as the pickle says, from where the entry begins, whatever the entry is.
    """
    for entry, following in pairwise(entries):
        if entry.header_offset + 30 + len(entry.orig_filename) + entry.file_size > following.header_offset:
            return False
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, content.values())}
    mapped = [size for _, size in sorted(storages.items()) if size]
    stored = [entry.file_size for entry in entries if "/data/" in entry.filename and entry.file_size]
    return mapped == stored and len({entry.filename for entry in entries}) == len(entries)


def write_bin(source: Source, directory: Path, shard_bytes: int = SHARD_BYTES, check: Check | None = None) -> Written:
    """Write `pytorch_model.bin`, or shards of at most `shard_bytes` and an index, with the hub's file names."""
    return write_sharded(source, directory, ("pytorch_model", ".bin"), write_torch, shard_bytes, check)


def write_torch(
    source: Source,
    names: list[str],
    path: Path,
    written: Written,
    check: Check | None = None,
    progress: Progress = lambda size: None,
) -> None:
    """Write one file that `torch.load` reads as a state dict, with `weights_only` and `mmap` or without."""
    numbers = {name: number for number, name in enumerate(names)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), _pickled(source, names))
        archive.writestr(_entry("byteorder"), b"little")
        for name, parts in groupby(read(source, names), key=itemgetter(0)):
            entry = _entry(f"data/{numbers[name]}")
            entry.file_size = num_bytes(source.shape(name), source.dtype(name))
            _align(entry, archive)
            own = hashlib.sha256()
            with archive.open(entry, "w") as file:
                for _, rows in parts:
                    content = raw(rows)
                    own.update(content)
                    file.write(content)
                    progress(content.nbytes)
            written.add_tensor(name, path.name, source.dtype(name), source.shape(name), own.hexdigest())
            if check is not None:
                check(name, own.hexdigest())
        archive.writestr(_entry("version"), b"3\n")


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{ROOT}/{name}")  # dated 1980, so that equal tensors give equal files


def _align(entry: zipfile.ZipInfo, archive: zipfile.ZipFile) -> None:
    """Pad the entry's header, so that its data begins at a multiple of `ALIGNMENT`."""
    assert archive.fp is not None
    # zipfile itself adds 20 bytes for the 64-bit sizes of an entry of more than 2 GiB or so.
    header = 30 + len(entry.filename.encode()) + (20 if entry.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0)
    padding = -(archive.fp.tell() + header + 4) % ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding


class _Storage:
    """A storage as the pickle names it: by its type, its number and its size."""

    def __init__(self, dtype: torch.dtype, number: int, size: int) -> None:
        self.id = ("storage", STORAGES[dtype], str(number), "cpu", size)


class _Tensor:
    """A contiguous tensor as the pickle rebuilds it: from a storage, a shape and strides."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        strides = torch.empty(shape, device="meta").stride()
        self.arguments: tuple[Any, ...] = (storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    """Writes what `torch.load` expects of storages and tensors, and anything else as usual."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        return (_rebuild_tensor_v2, obj.arguments) if isinstance(obj, _Tensor) else NotImplemented


def _pickled(source: Source, names: list[str]) -> bytes:
    state = OrderedDict()
    for number, name in enumerate(names):
        shape = source.shape(name)
        state[name] = _Tensor(_Storage(source.dtype(name), number, torch.Size(shape).numel()), shape)
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(state)
    return buffer.getvalue()
