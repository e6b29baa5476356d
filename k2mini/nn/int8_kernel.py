"""x W^T of few rows with W in int8, as one Triton kernel: the weight is read once, as int8, and scaled at the end.

PyTorch's own products take no int8 weight beside 16-bit rows on a GPU, and torch.compile fuses the conversion into a
product of one row alone; of 2 to 64 rows it writes the whole weight in 16 bits first.
"""

from __future__ import annotations

import functools
import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from k2mini.nn.decode_ops import check_compiler

log = logging.getLogger(__name__)

ROWS = 64  # at most: of more, dequantising costs little beside the product
WIDTH = 32  # rows of the weight that one program multiplies


def takes_kernel(x: Tensor, *, fuses: bool = True) -> bool:
    """Whether `int8_rows` is for x (…, in): few rows on a GPU, without a gradient, in 16 or 32 bits.

    fuses: torch.compile makes one kernel of converting the weight and a product of one row.
    """
    if x.device.type != "cuda" or not 0 < x.numel() <= ROWS * x.shape[-1] or torch.is_grad_enabled():
        return False
    if x.dtype == torch.float64:
        return False
    if torch.compiler.is_dynamo_compiling():  # there is a compiler, then; of one row all is fused
        return x.numel() > x.shape[-1] or not fuses
    return _can_compile()


@functools.cache
def _can_compile() -> bool:
    try:
        if find_spec("triton") is None:
            raise ValueError("triton is not installed")
        check_compiler(torch.device("cuda"))
    except ValueError as error:
        log.warning("quantised weights are converted before each product, which is slow: %s", error)
        return False
    return True


@torch.library.custom_op("k2mini::int8_rows", mutates_args=())
def int8_rows(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (…, in), weight (out, in) int8, scale (out,) -> (…, out) in x's dtype, summed in float32."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty(len(rows), len(weight))
    block_rows = max(16, 1 << (len(rows) - 1).bit_length())  # what the processor's matrix units take
    programs = (-(-len(weight) // WIDTH),)
    stages = 5 if block_rows == 16 else 3  # reads ahead; measured on an H200
    _kernel()[programs](rows, weight, scale, out, len(rows), *weight.shape, BM=block_rows, num_stages=stages)
    return out.view(*x.shape[:-1], len(weight))


@int8_rows.register_fake
def _(x: Tensor, weight: Tensor, _scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@functools.cache
def _kernel() -> Any:
    import triton  # comes with PyTorch for CUDA
    import triton.language as tl

    def product(x, weight, scale, out, M, N, K, BM: tl.constexpr):  # type: ignore[no-untyped-def]
        BN: tl.constexpr = 32  # WIDTH
        BK: tl.constexpr = 128  # how much of the weight's rows is read at a time
        m, n = tl.arange(0, BM)[:, None], tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
        total = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            left = tl.load(x + m * K + k[None, :], mask=(m < M) & (k[None, :] < K), other=0.0)  # (BM, BK)
            right = tl.load(weight + n * K + k[:, None], mask=(n < N) & (k[:, None] < K), other=0)  # (BK, BN)
            total += tl.dot(left, right.to(left.dtype), input_precision="ieee")
        total *= tl.load(scale + n, mask=n < N, other=0.0)
        tl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=(m < M) & (n < N))

    product.__globals__["tl"] = tl  # where Triton looks up a kernel's names
    return triton.jit(product)
