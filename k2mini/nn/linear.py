"""Matrices without a start value: filling them is `init_weights`' or a checkpoint's business.

PyTorch's own modules draw a start value on construction, which a model about to be loaded throws away; on the meta
device that draw alone imports torch._dynamo, three seconds of nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2mini.nn.decode_ops import writes_out, written_out

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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

    On a CPU float32 goes to oneDNN, which PyTorch's own linear does not ask: MKL, which that takes, has no AVX-512 for
    processors that aren't Intel's (measured there: 1.2 to 1.7 times the rate at 512 rows, twice at 1 to 8). Few rows in
    compiled code are written out: what a compiler makes of that streams the weight faster still.
    """
    if writes_out(x, weight):
        return written_out(x, weight).to(x.dtype).view(*x.shape[:-1], -1)
    if not _takes_onednn(x, weight):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out = _Product.apply(x, weight)
        assert isinstance(out, Tensor)
        return out
    return _onednn(x, weight)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return _opaque(x, weight)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@torch.library.custom_op("k2mini::onednn_product", mutates_args=())
def _opaque(x: Tensor, weight: Tensor) -> Tensor:
    """The same, for a compiler, which would want the weight packed and constant."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@_opaque.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        ONEDNN
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and (torch.compiler.is_compiling() or type(weight) in (Tensor, nn.Parameter))  # no sharded or fake tensors
        and not (torch.compiler.is_compiling() and torch.is_grad_enabled())
    )


class _Product(torch.autograd.Function):
    """`F.linear` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        return (
            _onednn(grad, weight.T) if wants_x else None,
            grad.flatten(0, -2).T @ x.flatten(0, -2) if wants_weight else None,
        )


class Embedding(nn.Embedding):
    """Rows by token id: (…) int64 -> (…, D). The weight is (V, D)."""

    def reset_parameters(self) -> None:
        """Leave the weight as allocated."""
