"""Commands whose work the ranks that torchrun started divide among themselves."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from k2mini.errors import StoppedBySignalError, sentence

if TYPE_CHECKING:
    from k2mini.distributed import World

log = logging.getLogger("k2mini.commands")
# What gloo, NCCL and the store say to a rank that waits for one that has gone.
LOST = re.compile(r"gloo|NCCL|Store|[Cc]onnection (was )?(closed|reset|refused)|Broken pipe")


@contextmanager
def joined(options: argparse.Namespace) -> Iterator[World]:
    """Join the ranks that torchrun started, until the block ends.

    torchrun ends the others where one is lost: the first, or else the second, says then that what is done is kept.

    Raises ValueError where a rank was lost, or `--shard` has no ranks to spread the model over.
    """
    from k2mini.build import pick_device, set_threads
    from k2mini.config import ParallelSection
    from k2mini.distributed import ranks

    set_threads(options.threads)
    again = "start again" if options.out is None else f"what is done is kept in {options.out}, start again to go on"
    if options.shard:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise ValueError("--shard spreads the weights over ranks; torchrun starts them, and there is one")
        for name in ("--quantize-head", "--compile", "--speculate", "--draft-model"):
            if getattr(options, name[2:].replace("-", "_"), None):
                raise ValueError(f"--shard spreads the weights over ranks; it does not go with {name}")
    try:
        with ranks(pick_device(options.device), ParallelSection()) as world:
            first = world.broadcast(os.getpid())

            def stop(number: int, _frame: FrameType | None) -> None:
                with suppress(ProcessLookupError):
                    if not world.is_main:
                        os.kill(first, 0)  # it is there, and says it
                        sys.exit(128 + number)
                kept = "nothing is kept without --out"
                if options.out is not None:
                    kept = f"what is done is kept in {options.out}"
                raise StoppedBySignalError(number, kept)

            if world.rank == int(os.environ["LOCAL_RANK"]) < 2:
                signal.signal(signal.SIGTERM, stop)
            yield world
    except RuntimeError as error:
        if not LOST.search(str(error)) or sentence(error) is not None:  # a GPU that is full is no lost rank
            raise
        log.warning("ranks could not reach each other: %s", str(error).strip().splitlines()[0][:300])
        raise ValueError(f"another rank has ended; {again}") from error


def check_same(world: World, options: argparse.Namespace, files: Mapping[str, Any]) -> None:
    """Raise ValueError on all ranks, naming what differs, where they have other options or files."""
    from k2mini.training.run import agree

    given = {"--" + name.replace("_", "-"): str(value) for name, value in vars(options).items() if name != "run"}
    agree({**given, **files}, world)


def mesh_of(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """What `load_model` is told of the ranks that share the weights."""
    from k2mini.config import ParallelSection
    from k2mini.distributed import device_mesh

    return {"mesh": device_mesh(world, ParallelSection())} if options.shard else {}
