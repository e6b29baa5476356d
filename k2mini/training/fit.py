"""What would make a run fit the memory of its devices: the cheapest change, the largest micro-batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from k2mini.build import is_sharded
from k2mini.config import PretrainConfig, RunConfig
from k2mini.sizes import readable
from k2mini.training.plan import plan_run, planned_base


def smallest_change(config: RunConfig, world_size: int, room: float) -> str | None:
    """The cheapest of a few changes that make a run fit into `room` bytes a rank, and its peak; None: none does."""
    for overrides, ranks in _changes(config, world_size):
        try:
            found = plan_run(changed(config, overrides), ranks, exact=False)
        except ValueError:
            continue
        if found.peak <= room:
            named = [override(config, *item) for item in overrides.items()]
            named += [f"--world-size {ranks}"] * (ranks != world_size)
            return f"{' '.join(named)} ({readable(found.peak)})"
    return None


def largest_micro_batch(config: RunConfig, world_size: int, room: float, least: int = 1) -> int | None:
    """The largest `train.micro_batch_size` that fits into `room` bytes a rank; None: none of at least `least` does."""
    sizes = [rows for rows in micro_batch_sizes(config, world_size) if rows >= least]

    def too_large(rows: int) -> bool:
        return plan_run(changed(config, {"micro_batch_size": rows}), world_size, exact=False).peak > room

    if not sizes or too_large(sizes[0]):  # settings with which nothing fits are found by one plan
        return None
    return sizes[bisect_left(sizes, True, lo=1, key=too_large) - 1]


def micro_batch_sizes(config: RunConfig, world_size: int) -> list[int]:
    """The sizes that a micro-batch may have: a rank's share is a multiple of them."""
    share = config.train.global_batch_size // world_size
    return [rows for rows in range(1, share + 1) if share % rows == 0]


def what_takes_less(config: RunConfig, world_size: int) -> str:
    """For whoever has run out of memory: settings with which the run takes less."""
    named = [override(config, key, values[0]) for key, values in _cheaper(config, world_size).items()]
    first = f"{', '.join(named)} {'take' if len(named) > 1 else 'takes'} less, the cheapest first; " if named else ""
    return f"{first}k2mini plan says what a run takes"


def _cheaper(config: RunConfig, world_size: int) -> dict[str, list[Any]]:
    """Keys not set yet and the values to try, those first that cost the least time and exactness: none before int8."""
    train, parallel, lora = config.train, config.parallel, config.lora
    fewer = [rows for rows in micro_batch_sizes(config, world_size)[::-1] if rows < train.micro_batch_size]
    shared = is_sharded(config.model, parallel, lora, world_size)
    tried: dict[str, tuple[bool, list[Any]]] = {
        "micro_batch_size": (bool(fewer), fewer),
        "activation_checkpointing": (train.activation_checkpointing != 1, [1]),
        "quantize": (lora is not None and config.model.quantize is None, ["int8", "nf4"]),
        "reshard_after_forward": (shared and not parallel.reshard_after_forward, [True]),
        "replicate": (world_size > 1 and (parallel.replicate or (1 if lora is None else world_size)) > 1, [1]),
        "dtype": (config.model.dtype != "bfloat16", ["bfloat16"]),
    }
    return {key: values for key, (use, values) in tried.items() if use}


def _changes(config: RunConfig, world_size: int) -> Iterator[tuple[dict[str, Any], int]]:
    """(overrides, ranks) to try, the cheapest first: each alone, each with those before it, then more ranks, too.

    Offload, the slowest, is tried alone and with all others, before more ranks.
    """
    cheaper, together = _cheaper(config, world_size), dict[str, Any]()
    if config.model.quantize == "int8" and planned_base(config.model.path)[1] is None:
        cheaper["quantize"] = ["nf4"]
    offload = [{"offload": "cpu"}] * (config.parallel.offload is None)
    yield from (({key: value}, world_size) for key, values in cheaper.items() for value in values)
    yield from ((each, world_size) for each in offload)
    for key, values in cheaper.items():
        together[key] = values[-1]
        yield dict(together), world_size
    yield from ((together | each, world_size) for each in offload)
    for factor in (2, 4, 8, 16):
        yield {}, world_size * factor
        yield together, world_size * factor


def changed(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """The configuration with other values of some keys; no two of its sections have one in common."""
    for key, value in overrides.items():
        name = _section(config, key)
        config = replace(config, **{name: replace(getattr(config, name), **{key: value})})
    return config


def row_length(config: RunConfig) -> int:
    """The tokens of a row."""
    return config.data.seq_len if isinstance(config, PretrainConfig) else config.data.max_seq_len


def _section(config: RunConfig, key: str) -> str:
    return next(name for name in ("train", "parallel", "model") if hasattr(getattr(config, name), key))


def override(config: RunConfig, key: str, value: Any) -> str:
    """A setting as the command line takes it."""
    return f"{_section(config, key)}.{key}={'null' if value is None else str(value).lower()}"
