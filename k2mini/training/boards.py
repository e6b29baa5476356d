"""Where the metrics of a run go beside its own files: TensorBoard, and Weights & Biases (extras of these names)."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from k2mini.config import RunSection
from k2mini.distributed import ALONE, World
from k2mini.errors import need_extra
from k2mini.files import read_json, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Board:
    """`write` takes a step and its values by name; `close` lets those that are on their way arrive."""

    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def check_boards(run: RunSection, world: World = ALONE) -> None:
    """Raise ValueError on all ranks where one lacks an extra that `run` asks for, or Weights & Biases has no key and is
    not told to be offline: before data are read, which may take hours.
    """
    failed = None
    try:
        _check(run, is_main=world.is_main)
    except ValueError as error:
        failed = str(error)
    if found := [each for each in world.all_gather(failed) if each is not None]:
        raise ValueError(found[0])


def _check(run: RunSection, *, is_main: bool) -> None:
    for name in ("tensorboard", "wandb"):
        if getattr(run, name) and find_spec(name) is None:
            raise need_extra(name)
    if run.wandb and is_main:
        os.environ.setdefault("WANDB_SILENT", "true")  # as a setting of the run it comes too late for the login
        import wandb

        try:
            wandb.login(verify=False)
        except wandb.errors.Error as error:  # no key, or one that can be none
            raise ValueError(f"run.wandb: {error} WANDB_MODE=offline needs no account") from None


def open_boards(run: RunSection, step: int) -> list[Board]:
    """What `run.tensorboard` and `run.wandb` ask for, going on after `step`, in folders of these names in `run.dir`."""
    boards = [_tensorboard(Path(run.dir) / "tensorboard", step)] if run.tensorboard else []
    return boards + ([_wandb(Path(run.dir), step)] if run.wandb else [])


def _tensorboard(folder: Path, step: int) -> Board:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Board(write, writer.close)


def _wandb(run_dir: Path, step: int) -> Board:
    """A run that goes on under its id, or begins under a new one. What fails on the way to the service ends nothing."""
    import wandb

    known_by, config = run_dir / "wandb" / "id", run_dir / "config.yaml"  # which `run.py` writes, as JSON
    if step == 0 or not known_by.exists():
        known_by.parent.mkdir(exist_ok=True)
        write_text(known_by, secrets.token_hex(4))
    what: dict[str, Any] = {"name": run_dir.absolute().name, "config": read_json(config) if config.exists() else None}
    what |= {"project": os.environ.get("WANDB_PROJECT", "k2mini"), "id": known_by.read_text(), "resume": "allow"}
    what["settings"] = wandb.Settings(console="off", finish_timeout=60)
    run: Any
    try:
        run = wandb.init(dir=run_dir, **what)
    except wandb.errors.UsageError as error:
        raise ValueError(f"run.wandb: {error}") from None
    except wandb.errors.CommError as error:
        why = str(error).partition("\n")[0]
        log.warning("wandb can't be reached (%s); `wandb sync` sends later what %s/wandb gets", why, run_dir)
        wandb.teardown()  # or the id would still be in use
        run = wandb.init(dir=run_dir, **what, mode="offline")

    def write(step: int, values: Mapping[str, float]) -> None:
        nonlocal run
        try:
            if run is not None:
                run.log(dict(values), step=step)
        except Exception as error:  # whatever its service ends with
            run = None
            log.warning("wandb gets nothing from step %d on (%s); metrics.jsonl has it", step, error)

    def close() -> None:
        with suppress(Exception):
            run.finish()

    return Board(write, close)
