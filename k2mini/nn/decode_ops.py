"""What decoding on a CPU is compiled from: products and attention of few rows, in words that become fast loops.

Where a library streams a weight at half of the memory's bandwidth for few rows, the compiler's multiply-and-add comes
close to all of it, also over int8, which is widened on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_CACHE = 1 << 15  # bytes of a core's first cache, through which a weight streams beside the rows
SUMS = 16  # what a loop may add up at once: AVX2's registers
LONGEST_SUM = 4096  # numbers: the compiler turns longer sums into slow, compensated ones


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where torch.compile will find no C++ compiler, which code for a CPU goes through."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # torch._inductor takes seconds to import

    try:
        get_cpp_compiler()
    except RuntimeError:
        raise ValueError(
            "compiling needs a C++ compiler (g++, or the one that the environment's CXX names), and there is none; "
            "install one, or do not compile"
        ) from None


def writes_out(x: Tensor, weight: Tensor) -> bool:
    """Whether compiled code takes `written_out`: x has few rows, is on a CPU and needs no gradient."""
    most = 8 if weight.dtype == torch.int8 else 4  # a library would want int8 widened first, all of it
    few = 0 < x.numel() <= most * x.shape[-1]
    return x.device.type == "cpu" and not torch.is_grad_enabled() and few


def written_out(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of few rows, in float32 or finer. (…, in) and (out, in) -> (rows, out).

    Sums over the same weight become one loop, which reads it once. The more of the first cache the rows take, the more
    rows of the weight share what is read of them.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    rows, weight = x.to(precise).reshape(-1, x.shape[-1]), weight.to(precise)
    taken = rows.numel() * rows.element_size() / FIRST_CACHE
    groups = min(1 if taken <= 1 / 4 else 2 if taken <= 1 / 2 else 4, SUMS // len(rows))
    if len(weight) % groups:
        groups = 1
    sums = [[_dot(row, part) for part in weight.chunk(groups)] for row in rows]
    return torch.stack([torch.cat(parts) if groups > 1 else parts[0] for parts in sums])


def _dot(row: Tensor, weight: Tensor) -> Tensor:
    """(in,) and (out, in) -> (out,)."""
    products, length = row * weight, len(row)
    pieces = next((n for n in range(1, length // 16) if length % (16 * n) == 0 and length // n <= LONGEST_SUM), 1)
    if pieces == 1:
        return products.sum(dim=-1)
    return products.view(len(weight), pieces, -1).sum(dim=-1).sum(dim=-1)


def attends_once(q: Tensor, k: Tensor) -> bool:
    """Whether compiled code takes `attend_once`: q (B, H, T, E) is one query a row, on a CPU, without a gradient."""
    one = q.shape[2] == 1 and k.shape[2] <= LONGEST_SUM
    return q.device.type == "cpu" and not torch.is_grad_enabled() and one


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query a row. q (B, H, 1, E); k, v (B, K, S, E); mask (B or 1, 1, 1, S) -> (B, H, 1, E)."""
    precise = torch.promote_types(q.dtype, torch.float32)
    batch_size, num_heads, _, head_dim = q.shape
    groups = q.view(batch_size, k.shape[1], -1, 1, head_dim).to(precise)  # (B, K, H/K, 1, E)
    scores = (groups * k.to(precise).unsqueeze(2)).sum(dim=-1) / head_dim**0.5  # (B, K, H/K, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1).unsqueeze(-1)  # (B, K, H/K, S, 1)
    out = (weights * v.to(precise).unsqueeze(2)).sum(dim=-2)  # (B, K, H/K, E)
    return out.view(batch_size, num_heads, 1, head_dim).to(q.dtype)
