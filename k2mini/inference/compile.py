"""Decoding with compiled blocks: one graph for all layers, in shapes that stay from token to token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from k2mini.nn.decode_ops import check_compiler, most_written_out
from k2mini.nn.llama import Block, Llama
from k2mini.nn.quant import DynamicLinear

# On a CPU, what several products read, such as the normalised input, is computed once, not for every row of a weight.
ON_CPU: dict[str, Any] = {"realize_reads_threshold": 1}
# On a GPU, int8 weights are then read inside of a row's product, with the norm before it and what follows.
ON_GPU: dict[str, Any] = {"coordinate_descent_tuning": True}
TOGETHER = 6  # blocks in one graph on a CPU, at most; calls of many take a tenth of the time of a small model


def compile_decoding(model: Llama) -> None:
    """Let single tokens over a fixed cache (`KVCache(fixed=True)`) run through compiled code, on CPU and GPU alike.

    Prompts do not: their lengths differ. The first token takes some seconds, and another few each time the cache grows
    for the first time.

    Raises ValueError where a module can't be compiled, or there is no compiler.
    """
    if any(isinstance(module, DynamicLinear) for module in model.modules()):
        raise ValueError("--compile does not go with w8a8, whose products are PyTorch's own; take --quantize int8")
    check_compiler(model.device)
    # Fixed caches double as they grow, and batches shrink: more shapes than dynamo's 8, past which it stops compiling.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    options = ON_CPU if model.device.type == "cpu" else ON_GPU
    model.model.decode_blocks = partial(_in_groups, torch.compile(_group, dynamic=False, options=options))
    model.decode_logits = torch.compile(_logits, dynamic=False, options=options)


def compiled_rows(model: Llama, rows: int) -> int:
    """As how many rows so many are decoded by compiled code: few numbers, since each is compiled; 0: by none.

    On a CPU, compiled code is faster where it writes products out.
    """
    doubled = 1 << (rows - 1).bit_length()
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    return doubled if doubled <= most_written_out(weight) else 0


def _in_groups(
    run: Callable[..., Tensor], blocks: nn.ModuleList, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Any
) -> Tensor:
    """All blocks, some at a time: one graph serves every group, since the weights are its inputs."""
    most = TOGETHER if x.device.type == "cpu" else 1
    size = next(size for size in range(most, 0, -1) if len(blocks) % size == 0)
    for begin in range(0, len(blocks), size):
        numbers = range(begin, begin + size)
        caches = [cache.layer(number) for number in numbers]
        x = run([blocks[number] for number in numbers], x, cos, sin, mask, caches)
    return x


def _group(blocks: Sequence[Block], x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, caches: Sequence[Any]) -> Tensor:
    for block, cache in zip(blocks, caches, strict=True):
        x = block(x, cos, sin, mask, cache)
    return x


def _logits(model: Llama, hidden: Tensor) -> Tensor:
    return model.logits(hidden)
