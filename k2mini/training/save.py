"""Saving checkpoints: the values are copied, training goes on, and a thread writes the copy."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save

from k2mini.config import CheckpointSection
from k2mini.distributed import PATIENCE, World, local_part
from k2mini.files import sha256, sync_path
from k2mini.training.checkpoint import FORMAT, MOMENTS, STATE, prune
from k2mini.training.metadata import quiet
from k2mini.weights.model_directory import manifest_text

log = logging.getLogger(__name__)


@dataclass
class Saver:
    """Saves a run's checkpoints, one at a time, each in a thread while training goes on. All ranks have one.

    Without `checkpoint.async_save` the values are not copied, and training waits for the thread.
    """

    folder: Path
    section: CheckpointSection
    world: World
    _open: ExitStack = field(default_factory=ExitStack)  # what is made for the first save
    _last: Future[None] | None = None

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, wait: bool
    ) -> Path:
        """Save `folder/step_N`: the parameters that train, AdamW's moments and `state` (plain JSON). Then prune.

        All ranks call it. The values saved are those of the moment of the call.

        Args:
            wait: until the checkpoint is complete, not only for the copy.

        Raises OSError as `wait` does, of this save or of the one before it, which is waited for; ValueError without
        memory for the copy.
        """
        if self._last is None:
            self._begin()
        self.wait()
        path = self.folder / f"step_{step:07}"
        tensors: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tensors[f"model.{name}"] = parameter.detach()
                tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
        if self.section.async_save:
            try:
                tensors = self._stager.stage(tensors)
            except RuntimeError as error:
                remedy = "checkpoint.async_save=false needs no copy"
                raise ValueError(f"{path} could not be copied to the host's memory ({error}); {remedy}") from None
        self._last = self._pool.submit(_save, path, tensors, {**state, "step": step}, self.section, self._own)
        if wait or not self.section.async_save:
            self.wait()
        return path

    def wait(self) -> None:
        """Wait for the last save. Raises OSError on all ranks where the disk has refused: there is no `step_N` then."""
        if self._last is not None:
            self._last.result()

    @property
    def failed(self) -> bool:
        """Whether the last save has ended with an error. The next one raises it."""
        return self._last is not None and self._last.done() and self._last.exception() is not None

    def _begin(self) -> None:
        self._open.enter_context(quiet())  # here, since it is not safe in a thread
        self._pool = self._open.enter_context(ThreadPoolExecutor(1, "checkpoint"))
        # Pinned on a GPU, not shared; each copy is waited for, on its own device. Memory is kept for the next save.
        self._stager: Any = DefaultStager(StagingOptions(self.world.device.type == "cuda", False, False, False))
        self._open.callback(self._stager.close)
        # Training has its own collectives meanwhile.
        group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.world.size > 1 else None
        self._own = replace(self.world, patient=group)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Wait for the save under way, which goes on whatever has happened; say its error where that is another one."""
        if self._last is not None and not self._last.done():
            log.warning("waiting for the checkpoint that is being written")
        if self._last is not None and (failure := self._last.exception()) not in (None, error):
            log.error("%s", failure)
        self._open.close()


def _save(path: Path, tensors: dict[str, Any], state: dict[str, Any], section: CheckpointSection, world: World) -> None:
    """Write what all ranks have into a folder beside `path`, which is renamed once it is complete; then prune."""
    beside = path.with_name(f".{path.name}.tmp")
    if world.is_main:
        shutil.rmtree(beside, ignore_errors=True)
    world.barrier()
    error: BaseException | None = None
    try:
        # The copies are on the CPU: nothing is to be copied ahead, on whatever GPU is a thread's current one.
        writer = FileSystemWriter(beside, per_thread_copy_ahead=0)
        save(tensors, storage_writer=writer, process_group=world.patient, no_dist=world.size == 1)
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
                _finish(beside, path, state, parts)
            except OSError as failure:
                error = failure
        error = world.broadcast(error)
    finally:
        if world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
    if error is not None:
        raise OSError(f"{path} could not be saved ({error}); the checkpoints before it are untouched") from None
    prune(path.parent, section, world)


def _finish(beside: Path, path: Path, state: dict[str, Any], hashes: list[dict[str, str]]) -> None:
    """Add `state.json` to the tensors that all ranks have written, sync, and rename. Rank 0 calls it."""
    files = {name: digest for part in hashes for name, digest in part.items()}
    files[".metadata"] = sha256(beside / ".metadata")
    content = {"format": FORMAT, **state, "files": dict(sorted(files.items()))}
    (beside / STATE).write_text(manifest_text(content), encoding="utf-8")
    for file in beside.iterdir():
        sync_path(file)
    sync_path(beside)
    beside.rename(path)
    sync_path(path.parent)


def check_finite(model: nn.Module, step: int, world: World) -> None:
    """Raise ValueError on all ranks, naming a parameter, where one that trains is not finite after `step`."""
    parts = {name: local_part(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    # The largest magnitude is NaN where a value is, and needs no memory.
    largest = {n: torch.linalg.vector_norm(part, torch.inf) for n, part in parts.items() if part.numel()}
    finite = torch.stack(list(largest.values())).isfinite().tolist() if largest else []
    bad = [name for name, good in zip(largest, finite, strict=True) if not good]
    if found := [name for part in world.all_gather(bad[:1]) for name in part]:
        raise ValueError(
            f"step {step} has made {found[0]} infinite or NaN, so nothing is saved of it; go on from the checkpoint "
            "before it with a lower train.lr, or in a wider model.dtype"
        )
