"""Checkpoints: what trains and AdamW's state, sharded (torch.distributed.checkpoint); all else as JSON beside them.

A checkpoint is a folder `step_N`. It is written beside and renamed once every byte is on disk, so a folder of that
name is complete; `state.json` has the SHA-256 of each of its files.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from k2mini.distributed import World
from k2mini.files import read_json, sha256, sync_path
from k2mini.training.metadata import SafeReader

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = "state.json"
FORMAT = "k2mini checkpoint 1"


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World
) -> Path:
    """Write `folder/step_N`: trained parameters, AdamW's moments and `state` (plain JSON). It appears whole or not.

    All ranks call it. Raises OSError on all of them where the disk refuses; earlier checkpoints are untouched then.
    """
    path = folder / f"step_{step:07}"
    beside = folder / f".{path.name}.tmp"
    if world.is_main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    world.barrier()
    tensors: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.detach()
            tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
    error: BaseException | None = None
    try:
        with _quiet():
            save(tensors, storage_writer=FileSystemWriter(beside), no_dist=not dist.is_initialized())
    except CheckpointException as failure:
        error = next(iter(failure.failures.values()))[0]
    except OSError as failure:
        error = failure
    try:
        hashes = {} if error else {file.name: sha256(file) for file in sorted(beside.glob(f"__{world.rank}_*"))}
        parts = world.all_gather(error or hashes)
        error = next((part for part in parts if isinstance(part, BaseException)), None)
        if error is None and world.is_main:
            try:
                _finish(beside, path, {**state, "step": step}, parts)
            except OSError as failure:
                error = failure
        error = world.broadcast(error)
    finally:
        if world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
    if error is not None:
        raise OSError(f"{path} could not be saved ({error}); the checkpoints before it are untouched") from None
    return path


def _finish(beside: Path, path: Path, state: dict[str, Any], hashes: list[dict[str, str]]) -> None:
    """What rank 0 does once all ranks have written their tensors."""
    files = {name: digest for part in hashes for name, digest in part.items()}
    files[".metadata"] = sha256(beside / ".metadata")
    content = {"format": FORMAT, **state, "files": dict(sorted(files.items()))}
    (beside / STATE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in beside.iterdir():
        sync_path(file)
    sync_path(beside)
    beside.rename(path)
    sync_path(path.parent)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Put a checkpoint's values into the model and the optimiser, whatever number of ranks wrote it.

    All ranks call it. Raises ValueError on all of them where it is not a checkpoint, is damaged, or belongs to another
    model.
    """
    state = read_state(path)
    check_files(path, state, world)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reader = SafeReader(path)
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    stored = {name: tuple(entry.size) for name, entry in entries.items()}
    expected = {f"{kind}.{name}": tuple(p.shape) for name, p in trained.items() for kind in ("model", *MOMENTS)}
    if stored != expected:
        odd = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
        raise ValueError(f"{path} belongs to another model or other trained parameters ({odd[0]})")
    tensors: dict[str, Any] = {}
    for name, parameter in trained.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state["step"]), device=parameter.device),
            **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
        }
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
    try:
        with _quiet():
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as failure:
        raise ValueError(f"{path} is damaged ({failure}); resume from another checkpoint") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """A process that is alone is what we mean; torch warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state. Raises ValueError where `path` is not a checkpoint."""
    if not (path / STATE).is_file():
        raise ValueError(f"{path} is not a checkpoint (it has no {STATE})")
    state = read_json(path / STATE)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path / STATE} is not of the format {FORMAT!r}")
    return state


def check_files(path: Path, state: dict[str, Any], world: World) -> None:
    """Compare every file with its hash, each rank a part of them.

    Raises ValueError on all ranks, naming a file that is missing, changed or that nobody wrote.
    """
    problems = []
    for name, digest in list(state["files"].items())[world.rank :: world.size]:
        file = path / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif sha256(file) != digest:
            problems.append(f"{file} is not what was saved (its SHA-256 differs)")
    found = [problem for part in world.all_gather(problems) for problem in part]
    if found:
        raise ValueError(f"{found[0]}; resume from another checkpoint (checkpoint.resume)")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d+", path.name))


def best_checkpoint(folder: Path) -> Path | None:
    """The one of the lowest validation loss (the later of equals), or None where none has any."""
    losses = [(read_state(path).get("val_loss"), path) for path in checkpoints(folder)]
    known = [(loss, path) for loss, path in losses if loss is not None]
    return min(reversed(known), key=lambda entry: entry[0])[1] if known else None


def prune(folder: Path, keep_last: int, *, keep_best: bool) -> None:
    """Remove all but the newest checkpoints and, where asked, the best; and what a killed save left unnamed."""
    kept = set(checkpoints(folder)[-keep_last:])
    if keep_best and (best := best_checkpoint(folder)) is not None:
        kept.add(best)
    for path in checkpoints(folder):
        if path not in kept:
            # Renamed first: a checkpoint that is half removed must not look complete.
            gone = path.rename(path.with_name(f".{path.name}.old"))
            shutil.rmtree(gone)
    for leftover in (*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")):
        shutil.rmtree(leftover, ignore_errors=True)


class StoredModel:
    """A checkpoint's parameters as a source, each read whole when first asked for. For one process, on the CPU."""

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        self._reader, self._dtype = SafeReader(path), dtype
        entries = self._reader.read_metadata().state_dict_metadata
        self._entries: dict[str, Any] = {
            name[6:]: entry for name, entry in entries.items() if name.startswith("model.")
        }
        self._lock = threading.Lock()  # rows are asked for from several threads
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> list[str]:
        """All parameters."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """One parameter's."""
        return tuple(self._entries[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """The one asked for, or as stored."""
        stored: torch.dtype = self._entries[name].properties.dtype
        return self._dtype or stored

    def tensor(self, name: str) -> Tensor:
        """One parameter, whole."""
        tensor = torch.empty(self.shape(name), dtype=self._entries[name].properties.dtype)
        with _quiet():
            load({f"model.{name}": tensor}, storage_reader=self._reader, no_dist=True)
        return tensor.to(self.dtype(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Of the parameter last read, or of one that is read now."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = None
                self._last = name, self.tensor(name)
            return self._last[1][start:stop]
