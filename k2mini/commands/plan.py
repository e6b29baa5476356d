"""The command `plan`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from k2mini.commands.training import either_config, with_demo_files
from k2mini.config import ModelSection
from k2mini.sizes import parse_size, readable


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `plan`, but for the configuration."""
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--world-size", type=int, metavar="N", help="train on so many ranks, one a GPU")
    how.add_argument("--inference", action="store_true", help="answer on one GPU: how much context fits")
    parser.add_argument("--gpu-memory", required=True, metavar="SIZE", help="of each GPU, such as 40GiB")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON and nothing else")
    parser.add_argument("--fit", action="store_true", help="also find the largest train.micro_batch_size that fits")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where the run does not fit")
    parser.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> None:
    """Print the memory, communication and length of a run, whether it fits, and what would."""
    from k2mini.training import fit, plan

    memory, ranks = parse_size(options.gpu_memory, "--gpu-memory"), options.world_size
    config, room = with_demo_files(either_config(options)), plan.BUDGET * memory
    if options.inference:
        return _plan_inference(options, config.model, room, f"{100 * plan.BUDGET:.0f} %")
    found = plan.plan_run(config, ranks)
    fits = found.peak <= room
    change = None if fits else fit.smallest_change(config, ranks, room)
    rows = fit.largest_micro_batch(config, ranks, room) if options.fit else None
    share, size = f"{100 * plan.BUDGET:.0f} % of {options.gpu_memory}", readable(found.peak)
    said = [plan.describe(found, config, ranks), f"it fits: {size} are within {share}"]
    if not fits:
        said[1] = (
            f"it does not fit: {size} are more than {share}; the smallest change that fits: {change or 'none found'}"
        )
    if options.fit:
        said += [f"the largest micro-batch that fits: {'none' if rows is None else f'train.micro_batch_size={rows}'}"]
    fields = {**asdict(found), "fits": fits, "change": change, "micro_batch_size": rows}
    print(json.dumps(fields) if options.json else "\n".join(said))
    if options.check and not fits:
        raise SystemExit(1)


def _plan_inference(options: argparse.Namespace, model: ModelSection, room: float, share: str) -> None:
    """Print what a model's weights leave for keys and values, in tokens."""
    from math import prod

    from k2mini.dtypes import DTYPES
    from k2mini.model_config import tensor_shapes
    from k2mini.nn.quant import quantized_tensors
    from k2mini.nn.slots import token_bytes
    from k2mini.training.plan import planned_shape

    if options.fit:
        raise ValueError("--fit is of training's micro-batches; --inference says how many tokens fit")
    config, dtype = planned_shape(model.path), DTYPES[model.dtype]
    shapes = tensor_shapes(config)
    kept = {name: (shape, dtype) for name, shape in shapes.items()} | quantized_tensors(shapes, model.quantize)
    weights = sum(prod(shape) * kind.itemsize for shape, kind in kept.values())
    each = token_bytes(config, dtype)
    tokens = max(0, int((room - weights) // each))
    fits = tokens > 0
    blocks = f" (blocks in {model.quantize})" if model.quantize else ""
    said = [
        f"weights         {readable(weights)}{blocks}, {model.dtype}",
        f"a token         {readable(each)} of keys and values",
        f"context         {tokens:,} tokens in {share} of {options.gpu_memory}, of all slots of k2mini serve together",
    ]
    fields = {"weights": weights, "token": each, "tokens": tokens, "fits": fits}
    print(json.dumps(fields) if options.json else "\n".join(said))
    if options.check and not fits:
        raise SystemExit(1)
