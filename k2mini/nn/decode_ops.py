"""Products and attention of few rows, written so that torch.compile makes them stream the weights on a CPU.

Reading the weights bounds the speed of decoding. For few rows, libraries read at half of the memory's bandwidth; a
compiled multiply-and-add comes close to all of it, also over int8 weights, which it converts as it reads them.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from k2mini.cpu import MULTIPLIES_INT8

MOST_ROWS = 8  # of more, a library's products are faster
MOST_INT8 = 4  # where a CPU multiplies int8: of more, the library's are as fast, and compiled in a third of the time
SUMS = 16  # sums that one loop may add up at once: AVX2 has as many registers
LONGEST_SUM = 4096  # terms: the compiler makes longer sums compensated, which is slow


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile would find no compiler: of C++ for a CPU, of C for what launches kernels."""
    if device.type != "cpu":
        headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not any(map(shutil.which, [os.environ.get("CC", "cc"), "gcc", "clang"])) or not headers.is_file():
            raise ValueError(
                f"compiling for a GPU needs gcc or clang (or the environment's CC) and {headers}, which Python's "
                "development package has (python3-dev); install it, or do without --compile (train.compile=false)"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # torch._inductor takes seconds to import

    try:
        get_cpp_compiler()
    except RuntimeError:
        raise ValueError(
            "compiling needs a C++ compiler (g++, or the one that the environment's CXX names), and there is none; "
            "install one, or do without --compile (train.compile=false)"
        ) from None


def writes_out(x: Tensor, weight: Tensor) -> bool:
    """Whether compiled code uses `written_out`: where x has few rows, is on a CPU and needs no gradient."""
    most = MOST_INT8 if MULTIPLIES_INT8 and weight.dtype == torch.int8 else MOST_ROWS
    few = 0 < x.numel() <= most * x.shape[-1]
    return x.device.type == "cpu" and not torch.is_grad_enabled() and few


def written_out(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of few rows, in float32 or finer. (…, in) and (out, in) -> (rows, out).

    The sums over one weight become one loop, which reads the weight once. It adds up several of its rows at once, since
    an addition waits for the one before it in the same sum.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    rows, weight = x.to(precise).reshape(-1, x.shape[-1]), weight.to(precise)
    groups = min(4, SUMS // len(rows))
    even = len(weight) // groups * groups
    parts = [*weight[:even].chunk(groups), *([weight[even:]] if even < len(weight) else [])]
    return torch.cat([_dot(row, part) for row in rows for part in parts]).view(len(rows), -1)


def _dot(row: Tensor, weight: Tensor) -> Tensor:
    """(in,) and (out, in) -> (out,)."""
    products, length = row * weight, len(row)
    pieces = next((n for n in range(1, length // 16) if length % (16 * n) == 0 and length // n <= LONGEST_SUM), 1)
    if pieces == 1:
        return products.sum(dim=-1)
    return products.view(len(weight), pieces, -1).sum(dim=-1).sum(dim=-1)


def attends_once(q: Tensor, k: Tensor) -> bool:
    """Whether compiled code uses `attend_once`: q (B, H, T, E) is one query a row, on a CPU, without a gradient."""
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


@torch.library.custom_op("k2mini::onednn_product", mutates_args=())
def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in oneDNN, float32. (…, in) and (out, in) -> (…, out).

    The compiler sees one operation it does not look into. It would want the weight packed and constant otherwise.
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@onednn_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
