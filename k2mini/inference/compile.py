"""Decoding with compiled blocks: one graph for all layers, in shapes that stay from token to token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k2mini.nn.decode_ops import check_compiler, most_written_out
from k2mini.nn.llama import Block, Llama
from k2mini.nn.quant import DynamicLinear

# On a CPU, what several products read, such as the normalised input, is computed once, not for every row of a weight.
ON_CPU: dict[str, Any] = {"realize_reads_threshold": 1}
# On a GPU, int8 weights are then read inside of a row's product, with the norm before it and what follows.
ON_GPU: dict[str, Any] = {"coordinate_descent_tuning": True}


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
    # One graph serves all blocks, since their weights are its inputs.
    options = ON_CPU if model.device.type == "cpu" else ON_GPU
    model.model.decode_block = torch.compile(_block, dynamic=False, options=options)
    model.decode_logits = torch.compile(_logits, dynamic=False, options=options)


def compiled_rows(model: Llama, rows: int) -> int:
    """As how many rows so many are decoded by compiled code: few numbers, since each is compiled; 0: by none.

    On a CPU, compiled code is faster where it writes products out.
    """
    doubled = 1 << (rows - 1).bit_length()
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    return doubled if doubled <= most_written_out(weight) else 0


def _block(block: Block, *arguments: Any) -> Tensor:
    out: Tensor = block(*arguments)
    return out


def _logits(model: Llama, hidden: Tensor) -> Tensor:
    return model.logits(hidden)
