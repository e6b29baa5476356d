"""x W^T of few rows with W in NF4, as one Triton kernel: two codes of a byte are looked up as they are multiplied.

Like int8's it is checked in Triton's interpreter; on a GPU `k2mini doctor` compares it with float64.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k2mini.nn.int8_kernel import WIDTH


@torch.library.custom_op("k2mini::nf4_rows", mutates_args=())
def nf4_rows(x: Tensor, weight: Tensor, absmax: Tensor, scale: Tensor) -> Tensor:
    """x (…, in), and what `nf4.quantize` gives of W (out, in) -> (…, out) in x's dtype, summed in float32."""
    rows = x.reshape(-1, x.shape[-1])
    block_rows = max(16, 1 << (len(rows) - 1).bit_length())
    out, filled = x.new_empty(block_rows, len(weight)), F.pad(rows, (0, 0, 0, block_rows - len(rows)))
    programs = (-(-len(weight) // WIDTH),)
    _kernel()[programs](filled, weight, absmax, scale, out, len(weight), x.shape[-1], BM=block_rows)
    return out[: len(rows)].view(*x.shape[:-1], len(weight))


@nf4_rows.register_fake
def _(x: Tensor, weight: Tensor, _absmax: Tensor, _scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@functools.cache
def _kernel() -> Any:
    import triton  # comes with PyTorch for CUDA
    import triton.language as tl

    def product(x, weight, absmax, scale, out, N, K, BM: tl.constexpr):  # type: ignore[no-untyped-def]
        BN: tl.constexpr = 32  # WIDTH
        HALF: tl.constexpr = 32  # bytes of a block of 64 codes, whose first ones are in the high bits
        m, n = tl.arange(0, BM)[:, None], tl.program_id(0) * BN + tl.arange(0, BN)
        k, mean = tl.arange(0, HALF), tl.load(scale + 272)
        total = tl.zeros((BM, BN), tl.float32)
        for block in range(K // 64):
            even = x + m * K + block * 64 + 2 * k[None, :]
            codes = tl.load(weight + n[None, :] * (K // 2) + block * HALF + k[:, None], mask=n[None, :] < N, other=0)
            high, low = tl.load(scale + (codes >> 4).to(tl.int32)), tl.load(scale + (codes & 15).to(tl.int32))
            left, right = tl.load(even), tl.load(even + 1)  # (BM, HALF)
            both = tl.dot(left, high.to(left.dtype), input_precision="ieee")
            both += tl.dot(right, low.to(left.dtype), input_precision="ieee")
            place = n * (K // 64) + block
            nested = tl.load(scale + 16 + tl.load(absmax + place, mask=n < N, other=0).to(tl.int32))
            step = tl.load(scale + 273 + place // 256, mask=n < N, other=0.0)
            total += both * (nested * step + mean)[None, :]
        tl.store(out + m * N + n[None, :], total.to(out.dtype.element_ty), mask=n[None, :] < N)

    product.__globals__["tl"] = tl  # where Triton looks up a kernel's names
    return triton.jit(product)
