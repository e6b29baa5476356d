"""The command `plan`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2mini.commands.training import either_config, with_demo_files
from k2mini.config import ModelSection, RunConfig
from k2mini.sizes import parse_size, readable

if TYPE_CHECKING:
    from k2mini.training.plan import Plan


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `plan`, but for the configuration."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--world-size", type=int, metavar="N", help="train on so many ranks, one a GPU (default: 1)")
    how.add_argument("--inference", action="store_true", help="answer on one GPU: how much context fits")
    card = parser.add_mutually_exclusive_group(required=True)
    card.add_argument("--gpu", metavar="GPU", help="such as a100-80g, rtx-4090 or l4, or its memory: 24GiB")
    card.add_argument("--gpu-memory", metavar="SIZE", help="of each GPU, such as 40GiB")
    parser.add_argument(
        "--utilisation", type=float, metavar="SHARE", help="of the card's peak that the arithmetic gets (default: 0.30)"
    )
    parser.add_argument(
        "--measured", type=Path, metavar="RUN", help="take the tokens a second that a run noted instead"
    )
    parser.add_argument("--price", type=float, metavar="P", help="of a GPU for an hour, for the cost of the run")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON and nothing else")
    parser.add_argument(
        "--fit", action="store_true", help="also find the largest micro-batch and, with --gpu, the fastest settings"
    )
    parser.add_argument("--check", action="store_true", help="exit with status 1 where the run does not fit")
    parser.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> None:
    """Print the memory, communication and length of a run, whether it fits, and what would."""
    from k2mini.gpu import CARDS, PEAKS
    from k2mini.training import fit, plan

    given = [key for key in ("price", "utilisation", "measured") if getattr(options, key) is not None]
    if options.inference and given:
        raise ValueError(f"--{given[0]} is of training's time; --inference says how many tokens fit")
    if options.world_size is None:  # no default, by which --inference could not tell that it was given
        options.world_size = 1
    name, ranks = str(options.gpu or options.gpu_memory), options.world_size
    card, size = CARDS.get(name.lower(), (None, None))
    wanted = f"--gpu is none of {', '.join(CARDS)}; else it" if options.gpu else "--gpu-memory"
    memory = parse_size(name, wanted) if size is None else int(size * 2**30)
    config, room = with_demo_files(either_config(options)), plan.BUDGET * memory
    if options.inference:
        return _plan_inference(options, config.model, room, f"{100 * plan.BUDGET:.0f} % of {name}")
    found = plan.plan_run(config, ranks)
    fits = found.peak <= room
    fields: dict[str, Any] = {**asdict(found), "fits": fits, "change": None, "micro_batch_size": None}
    tflops = PEAKS[card] if card else None
    timed = _pace(options, config, found, tflops, fields) if options.gpu or given else []
    if not options.json:
        print(plan.describe(found, config, ranks), flush=True)  # before searches, which may take a minute
    change = None if fits else fit.smallest_change(config, ranks, room)
    rows = fit.largest_micro_batch(config, ranks, room) if options.fit else None
    fields |= {"change": change, "micro_batch_size": rows}
    if options.fit and options.gpu:
        timed.append(_fastest(options, config, found, tflops, room, fields))
    share, peak = f"{100 * plan.BUDGET:.0f} % of {name}", readable(found.peak)
    none = "the settings below" if fields.get("fastest") else "none found"
    more = f"it does not fit: {peak} are more than {share}; the smallest change that fits: {change or none}"
    said = [f"it fits: {peak} are within {share}" if fits else more]
    if options.fit:
        said += [f"the largest micro-batch that fits: {'none' if rows is None else f'train.micro_batch_size={rows}'}"]
    print(json.dumps(fields) if options.json else "\n".join(said + timed))
    if options.check and not fits:
        raise SystemExit(1)


def _pace(
    options: argparse.Namespace,
    config: RunConfig,
    found: Plan,
    tflops: float | None,
    fields: dict[str, Any],
) -> list[str]:
    """Lines on the time and the cost of a run; `fields` gets the same."""
    from k2mini.training import pace

    ranks, lines, rate = options.world_size, [], None
    share = pace.SHARE if options.utilisation is None else options.utilisation
    if not (0 < share <= 1 and (options.price or 0) >= 0):
        raise ValueError(f"--utilisation ({share}) must be above 0 and at most 1, --price not negative")
    if options.measured is not None:
        rate = pace.measured(options.measured)
        source = f"measured in {options.measured}, taken for these ranks and GPUs"
    elif tflops is not None:
        rate = pace.tokens_per_second(config, found, ranks, tflops * 1e12, share)
        source = f"a guess: {100 * share:.0f} % of {tflops} TFLOP/s a GPU; --measured RUN replaces it"
    elif options.price is not None or options.utilisation is not None:
        raise ValueError("--price and --utilisation need a rate: a card by its name (--gpu), or --measured RUN")
    tokens = pace.run_tokens(config, found)
    days = tokens / rate / 86400 if tokens and rate else None
    cost = days * 24 * ranks * options.price if days is not None and options.price is not None else None
    if rate is not None:
        lines.append(f"speed           {rate:,.0f} tokens/s ({source})")
    if days is not None:
        money = f", {cost:,.2f} at {options.price} an hour" if cost is not None else ""
        lines.append(f"the run         {tokens:,} tokens, {days:.3g} days, {24 * ranks * days:,.1f} GPU hours{money}")
    elif rate is not None:
        lines.append(
            "the run         of unknown length: its data is not prepared; train.max_steps=N says how many steps"
        )
    fields |= {"tokens_per_second": rate, "run_tokens": tokens, "days": days, "cost": cost}
    return lines


def _fastest(
    options: argparse.Namespace,
    config: RunConfig,
    found: Plan,
    tflops: float | None,
    room: float,
    fields: dict[str, Any],
) -> str:
    """The line on the fastest settings that fit; `fields` gets them, too."""
    from k2mini.training import pace

    share = pace.SHARE if options.utilisation is None else options.utilisation
    peak = tflops * 1e12 if tflops else pace.PEAK
    fields["fastest"], most = pace.fastest(config, found, options.world_size, room, peak, share)
    guess = f" ({most:,.0f} tokens/s, a guess at {100 * share:.0f} %)" * bool(tflops and most)
    return f"the fastest     {fields['fastest'] or 'nothing that is tried fits'}{guess}"


def _plan_inference(options: argparse.Namespace, model: ModelSection, room: float, share: str) -> None:
    """Print what a model's weights leave for keys and values, in tokens."""
    from math import prod

    from k2mini.build import check_stored
    from k2mini.dtypes import DTYPES
    from k2mini.model_config import tensor_shapes
    from k2mini.nn.quant import quantized_tensors
    from k2mini.nn.slots import token_bytes
    from k2mini.training.plan import planned_base

    if options.fit:
        raise ValueError("--fit is of training's micro-batches; --inference says how many tokens fit")
    (config, stored), dtype = planned_base(model.path), DTYPES[model.dtype]
    how, shapes = model.quantize or stored, tensor_shapes(config)
    check_stored(Path(model.path), stored, how)
    kept = {name: (shape, dtype) for name, shape in shapes.items()} | quantized_tensors(shapes, how)
    weights = sum(prod(shape) * kind.itemsize for shape, kind in kept.values())
    each = token_bytes(config, dtype)
    tokens = max(0, int((room - weights) // each))
    fits = tokens > 0
    blocks = f" (blocks in {how})" if how else ""
    said = [
        f"weights         {readable(weights)}{blocks}, {model.dtype}",
        f"a token         {readable(each)} of keys and values",
        f"context         {tokens:,} tokens in {share}, of all slots of k2mini serve together",
    ]
    fields = {"weights": weights, "token": each, "tokens": tokens, "fits": fits}
    print(json.dumps(fields) if options.json else "\n".join(said))
    if options.check and not fits:
        raise SystemExit(1)
