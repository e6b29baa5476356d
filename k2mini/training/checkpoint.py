"""Checkpoints: which there are, which are kept, resuming from one. `save.py` writes them.

A checkpoint is a folder `step_N`: the parameters that train and AdamW's moments, sharded
(torch.distributed.checkpoint), and `state.json` with everything else and the SHA-256 of each file. It is written under
another name and renamed once every byte is on disk, so a folder called `step_N` is complete.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from k2mini.config import CheckpointSection, check_fields
from k2mini.distributed import World
from k2mini.files import parse_json, read_text, sha256
from k2mini.training.metadata import SafeReader, quiet
from k2mini.weights.model_directory import manifest_text

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = "state.json"
FORMAT = "k2mini checkpoint 1"


def check_room(folder: Path, number: int, size: int, result: int) -> None:
    """Raise ValueError unless the disk has room for the result and so many checkpoints of `size` bytes in all."""
    needed = max(0, number - len(checkpoints(folder))) * size + result
    if needed > (free := shutil.disk_usage(folder if folder.exists() else folder.parent).free):
        raise ValueError(
            f"{folder} needs {needed:,} bytes (checkpoints at a time: {number}, and the result), {free:,} are free "
            "on its disk; free some, or set run.dir to another disk" + "; or lower checkpoint.keep_last" * (number > 1)
        )


def resume(
    folder: Path,
    section: CheckpointSection,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    world: World,
) -> tuple[int, int]:
    """Load the checkpoint that `checkpoint.resume` names, if any. Returns its step and the tokens seen until then.

    Raises ValueError as `find_checkpoint` does, and where it is damaged or of another model.
    """
    path = find_checkpoint(folder, section, identity, world)
    if path is None:
        return 0, 0
    state = read_state(path)
    if "base" in identity.keys() - state["identity"].keys() and world.is_main:
        log.warning("%s does not say what its base was made of, so that is not compared", path)
    load_checkpoint(path, model, optimizer, world)
    if world.is_main:
        log.info("resuming from %s", path)
    return state["step"], state["tokens"]


def find_checkpoint(folder: Path, section: CheckpointSection, identity: dict[str, Any], world: World) -> Path | None:
    """The checkpoint to go on from, which `checkpoint.resume` names; None: from the start.

    Args:
        folder: of the run's own checkpoints.
        identity: what the checkpoint must have been made with. One of an earlier release may lack `base`.

    Raises ValueError where it is not a checkpoint, or was made with another identity.
    """
    existing = world.broadcast(checkpoints(folder))
    if section.resume == "none" and existing:
        raise ValueError(f"checkpoint.resume is none, but {folder} holds a run; remove it or set another run.dir")
    if section.resume == "none" or (section.resume == "auto" and not existing):
        return None
    path = existing[-1] if section.resume == "auto" else Path(section.resume)
    was = read_state(path)["identity"]
    differing = changes({"base": identity.get("base"), **was}, identity)
    if differing and not section.ignore_changes:
        raise ValueError(
            f"{path} was made with {', '.join(differing)}; set run.dir to a new folder "
            "to start anew, restore what changed, or set checkpoint.ignore_changes to true"
        )
    return path


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs, with both values where they are short: 'another schedule.lr (0.001, now 0.01)'."""
    pairs = []
    for key in new:
        was, now = old.get(key), new[key]
        if isinstance(was, dict) and isinstance(now, dict):
            pairs += [(f"{key}.{name}", was.get(name), now.get(name)) for name in now | was]
        else:
            pairs.append((key, was, now))
    return [
        f"another {name} ({was}, now {now})" if len(f"{was}{now}") < 60 else f"another {name}"
        for name, was, now in pairs
        if was != now
    ]


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Put a checkpoint's values into the model and the optimiser, whatever number of ranks wrote it.

    All ranks call it. Raises ValueError on all of them where it is not a checkpoint, is damaged, or belongs to another
    model.
    """
    state = read_state(path)
    check_files(path, state["files"], world, "resume from another checkpoint (checkpoint.resume)")
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
        with quiet():
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as failure:
        error = next(iter(failure.failures.values()))[0]
        if isinstance(error, OSError):
            raise error from None
        raise ValueError(f"{path} is damaged ({error}); resume from another checkpoint") from None


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state. Raises ValueError where `path` is not a checkpoint, or its state can't be right."""
    where = path / STATE
    if not where.is_file():
        of_run = ", ".join(map(str, checkpoints(path / "checkpoints")))
        hint = f"; it is a run, whose checkpoints are {of_run}" if of_run else ""
        raise ValueError(f"{path} is not a checkpoint (it has no {STATE}){hint}")
    try:
        state = parse_json(text := read_text(where), str(where))
        check_fields(state, {"format": str, "step": int, "tokens": int, "identity": dict, "files": dict}, str(where))
        check_fields(state["files"], {".metadata": str, **dict.fromkeys(state["files"], str)}, f"{where}, files")
        if state.get("val_loss") is not None:
            check_fields(state, {"val_loss": float}, str(where))
        own = {key: value for key, value in state.items() if key != "sha256"}  # absent in an older k2mini's
        if own != state and text != manifest_text(own):
            raise ValueError(f"{where} is damaged: it does not match its own hash")
    except ValueError as error:
        raise ValueError(f"{error}; remove {path}, or name another checkpoint") from None
    if state["format"] != FORMAT or any(Path(name).name != name for name in state["files"]):
        raise ValueError(f"{where} is not of the format {FORMAT!r}")
    return state


def check_files(path: Path, hashes: dict[str, str], world: World, remedy: str) -> None:
    """Compare files of a directory with their hashes; each rank checks some of them.

    Raises ValueError on all ranks, naming a file that is missing or changed, and saying what to do.
    """
    problems = []
    for name, digest in list(hashes.items())[world.rank :: world.size]:
        file = path / name
        try:
            if sha256(file) != digest:
                problems.append(f"{file} is not what was saved (its SHA-256 differs)")
        except FileNotFoundError:
            problems.append(f"{file} is missing")
        except OSError as error:  # on one rank, perhaps
            problems.append(f"{file} can't be read ({error.strerror})")
    found = [problem for part in world.all_gather(problems) for problem in part]
    if found:
        raise ValueError(f"{found[0]}; {remedy}")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d+", path.name) and path.is_dir())


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the lowest validation loss (the later of equals); None where no checkpoint has one."""
    losses = [(read_state(path).get("val_loss"), path) for path in checkpoints(folder)]
    known = [(loss, path) for loss, path in losses if loss is not None]
    return min(reversed(known), key=lambda entry: entry[0])[1] if known else None


def best_loss(folder: Path) -> float:
    """The lowest validation loss of all checkpoints; infinity where no checkpoint has one."""
    path = best_checkpoint(folder)
    return math.inf if path is None else float(read_state(path)["val_loss"])


def prune(folder: Path, section: CheckpointSection, world: World) -> None:
    """Remove checkpoints but the newest `keep_last` and, with `keep_best`, the best; and what a killed save left."""
    if not world.is_main:
        return
    kept = set(checkpoints(folder)[-section.keep_last :])
    if section.keep_best and (best := best_checkpoint(folder)) is not None:
        kept.add(best)
    for path in checkpoints(folder):
        if path not in kept:
            # Renamed first: a checkpoint that is half removed must not look complete.
            gone = path.rename(path.with_name(f".{path.name}.old"))
            shutil.rmtree(gone)
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left of checkpoints that it was saving or removing, and say so."""
    for leftover in sorted((*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old"))):
        shutil.rmtree(leftover)
        log.warning("removed %s, which a killed process left", leftover)
