"""How fast a run is and which settings make it fastest: a guess before its first step.

A token needs 6 FLOP of each parameter that trains and 4 of each that is frozen, and 2 more where blocks are recomputed;
at a share of the card's peak that is the time of the arithmetic. Each micro-batch adds what is done once for it: a
quantised base is dequantised in each pass, offloaded weights are sent over PCIe; each step adds AdamW on the host,
where that is offloaded. Not counted: attention, waiting for other ranks, validation, saving.
"""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from k2mini.config import RunConfig
from k2mini.training.fit import changed, largest_micro_batch, micro_batch_sizes, override, row_length
from k2mini.training.loop import FILE, read_metrics
from k2mini.training.plan import Plan, planned_base

SHARE = 0.30  # of a card's peak: what full training of a 7B model got on an H100 (tools/results/bench_gpu_h100.txt)
PEAK = 150e12  # FLOP/s of a card of which only the memory is known: it orders settings, and is not printed
PCIE = 20e9  # bytes a second between host and card: PCIe 4.0 x 16, less a third
HOST = 50e9  # bytes a second of the host's memory; AdamW moves 28 a parameter
DEQUANTISED = {"int8": 11 / 1e12, "nf4": 24 / 1e12}  # seconds a parameter: its bytes read and written, at 1 TB/s
SIZES = {"int8": 1.0, "nf4": 0.52}  # bytes a parameter
FIRST = 3  # steps of a measured run that are left out: warming up, compiling


def tokens_per_second(config: RunConfig, found: Plan, world_size: int, peak: float, share: float = SHARE) -> float:
    """Of all ranks together, by the model above.

    Args:
        found: the plan of this configuration, or of another one with the same parameters.
        peak: FLOP/s of a card.
        share: how much of it the arithmetic gets.
    """
    train, parallel, bits = config.train, config.parallel, config.model.quantize
    frozen, every = found.parameters - found.trained, train.activation_checkpointing
    again = 1 / every if every else 0.0
    flops = 6 * found.trained + 4 * frozen + 2 * again * found.parameters  # a token
    micro_batch, step = flops * train.micro_batch_size * row_length(config) / (peak * share), 0.0  # seconds
    if bits is not None:
        micro_batch += (2 + again) * frozen * DEQUANTISED[bits]
    if parallel.offload is not None:
        kept = SIZES.get(bits or "", 2.0 if config.model.dtype == "bfloat16" else 4.0) * frozen + 4 * found.trained
        sent = kept * (1 + parallel.reshard_after_forward) + 4 * found.trained  # the latter are gradients
        micro_batch += sent / world_size / PCIE
        step = 28 * found.trained / world_size / HOST
    micro_batches = math.ceil(train.global_batch_size / world_size / train.micro_batch_size)
    return found.step_tokens / (micro_batches * micro_batch + step)


def fastest(
    config: RunConfig, found: Plan, world_size: int, room: float, peak: float, share: float
) -> tuple[str | None, float]:
    """The settings that fit into `room` bytes a rank with the most tokens a second, as overrides; and the latter.

    Tried are micro-batch, recomputation, how LoRA's base is kept, ZeRO-2 or ZeRO-3, and offload. The dtype stays. None,
    where nothing fits. What a try can't be planned with, such as sizes that NF4 does not take, is passed over.
    """
    stored, sizes = planned_base(config.model.path)[1], micro_batch_sizes(config, world_size)
    kept = (stored,) if stored or config.lora is None else (None, "int8", "nf4")
    reshard = (True, False) if world_size > 1 and config.lora is None else (config.parallel.reshard_after_forward,)
    keys = ("quantize", "activation_checkpointing", "reshard_after_forward", "offload")
    tries: list[dict[str, Any]] = [
        dict(zip(keys, each, strict=True)) for each in product(kept, (0, 1), reshard, (None, "cpu"))
    ]

    def rate(settings: dict[str, Any], rows: int) -> float:
        tried = changed(config, settings | {"micro_batch_size": rows})
        return tokens_per_second(tried, found, world_size, peak, share)

    best, most = dict[str, Any](), 0.0
    for settings in sorted(tries, key=lambda settings: -rate(settings, sizes[-1])):
        if rate(settings, sizes[-1]) <= most:
            break  # neither this nor any after it can be faster
        least, rows = next(rows for rows in sizes if rate(settings, rows) > most), None  # fewer are no faster
        with suppress(ValueError):
            rows = largest_micro_batch(changed(config, settings), world_size, room, least)
        if rows is not None and (now := rate(settings, rows)) > most:
            best, most = settings | {"micro_batch_size": rows}, now
    return " ".join(override(config, key, value) for key, value in best.items()) or None, most


def measured(run: Path) -> float:
    """Tokens a second of a run as its metrics have them: the median of its steps but for the first ones.

    Raises ValueError where there are too few.
    """
    rates = [entry["tokens_per_second"] for entry in read_metrics(run / FILE) if "tokens_per_second" in entry]
    if len(rates) <= FIRST:
        raise ValueError(
            f"{run / FILE} has {len(rates)} steps; --measured needs more than {FIRST}, which it leaves out"
        )
    return float(median(rates[FIRST:]))


def run_tokens(config: RunConfig, found: Plan) -> int | None:
    """Tokens of the whole run, of instructions at most; None: so many epochs of data that are not counted yet."""
    if config.train.max_steps is not None:
        return config.train.max_steps * found.step_tokens
    if found.epoch_tokens is None or config.train.epochs is None:
        return None
    return int(config.train.epochs * found.epoch_tokens)
