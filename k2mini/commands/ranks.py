"""Commands whose work the ranks that torchrun started divide among themselves."""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from k2mini.errors import StoppedBySignalError

if TYPE_CHECKING:
    from k2mini.distributed import World

# What gloo, NCCL and the store say to a rank that waits for one that has gone.
LOST = re.compile(r"gloo|NCCL|Store|[Cc]onnection (was )?(closed|reset|refused)|Broken pipe")


@contextmanager
def joined(options: argparse.Namespace) -> Iterator[World]:
    """Join the ranks that torchrun started, until the block ends.

    torchrun ends the others where one is lost: the first says then that what is done is kept.

    Raises ValueError where a rank was lost, or `--shard` has no ranks to spread the model over.
    """
    from k2mini.build import pick_device, set_threads
    from k2mini.config import ParallelSection
    from k2mini.distributed import ranks

    set_threads(options.threads)
    again = "start again" if options.out is None else f"what is done is kept in {options.out}, start again to go on"

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StoppedBySignalError(number, f"what is done is kept in {options.out}")

    if options.shard:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise ValueError("--shard spreads the weights over ranks; torchrun starts them, and there is one")
        for name in ("--quantize-head", "--compile"):
            if getattr(options, name[2:].replace("-", "_")):
                raise ValueError(f"--shard spreads the weights over ranks; it does not go with {name}")
    try:
        with ranks(pick_device(options.device), ParallelSection()) as world:
            if options.out is not None and world.is_main:
                signal.signal(signal.SIGTERM, stop)
            yield world
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise ValueError(f"another rank has ended; {again}") from error


def agree(world: World, options: argparse.Namespace, files: Mapping[str, Any]) -> None:
    """Raise ValueError on all ranks, naming what differs, where they have other options or files."""
    given = {"--" + name.replace("_", "-"): str(value) for name, value in vars(options).items() if name != "run"}
    world.agree({**given, **files})


def mesh_of(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """What `load_model` is told of the ranks that share the weights."""
    from k2mini.config import ParallelSection
    from k2mini.distributed import device_mesh

    return {"mesh": device_mesh(world, ParallelSection())} if options.shard else {}
