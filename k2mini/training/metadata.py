"""Reading what torch.distributed.checkpoint wrote: its `.metadata`, a pickle, without running code planted in it."""

from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load

_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def _member(kind: Any, name: str) -> Any:
    """What `getattr` is let do: name a memory format, as early releases of Python 3.11 pickle members of an enum."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"it names {name} of {kind}")
    return _MEM_FORMAT_ENCODING[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Look up a name in the pickle: torch's dtypes and the few classes of metadata, and nothing else."""
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class SafeReader(FileSystemReader):
    """A FileSystemReader that unpickles only the classes that metadata consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata. Raises ValueError where the file names any other class, before anything of it is run."""
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # damaged pickles raise almost anything
            raise ValueError(f"{path} is not a checkpoint's metadata ({error}); nothing in it was run") from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path} is not a checkpoint's metadata")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warning that the process has no process group: a run alone has none on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class StoredModel:
    """A checkpoint's parameters as a `Source` of `weights/stream.py`, on the CPU, in one process.

    A parameter is read whole when it is first asked for. The last one read is kept, since its rows are asked for in
    several calls.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        self._reader, self._dtype = SafeReader(path), dtype
        entries = self._reader.read_metadata().state_dict_metadata
        self._entries: dict[str, Any] = {
            name[6:]: entry for name, entry in entries.items() if name.startswith("model.")
        }
        self._lock = threading.Lock()  # rows are asked for from several threads
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> list[str]:
        """The names of all parameters."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one parameter."""
        return tuple(self._entries[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which `tensor` and `rows` return a parameter: the constructor's, or as stored."""
        stored: torch.dtype = self._entries[name].properties.dtype
        return self._dtype or stored

    def tensor(self, name: str) -> Tensor:
        """One whole parameter."""
        tensor = torch.empty(self.shape(name), dtype=self._entries[name].properties.dtype)
        with quiet():
            load({f"model.{name}": tensor}, storage_reader=self._reader, no_dist=True)
        return tensor.to(self.dtype(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start, …, stop - 1 of one parameter."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = None
                self._last = name, self.tensor(name)
            return self._last[1][start:stop]
