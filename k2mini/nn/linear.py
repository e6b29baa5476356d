"""Matrices without a start value: filling them is `init_weights`' or a checkpoint's business.

PyTorch's own modules draw a start value on construction, which a model about to be loaded throws away; on the meta
device that draw alone imports torch._dynamo, three seconds of nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T, without bias: (…, in) -> (…, out). The weight is (out, in)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as allocated."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return product(x, self.weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T. (…, in) and (out, in) -> (…, out).

    One row on a CPU, compiled, is written out: the code made of it streams the weight twice as fast as the library's.
    """
    if compiled_row(x):
        precise = torch.promote_types(x.dtype, torch.float32)
        return (x.to(precise) * weight.to(precise)).sum(dim=-1).to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def compiled_row(x: Tensor) -> bool:
    """Whether a compiler is looking on, and x is one row on a CPU that needs no gradient."""
    return (
        torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.numel() == x.shape[-1]
        and not torch.is_grad_enabled()
    )


class Embedding(nn.Embedding):
    """Rows by token id: (…) int64 -> (…, D). The weight is (V, D)."""

    def reset_parameters(self) -> None:
        """Leave the weight as allocated."""
