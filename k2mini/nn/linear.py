"""Matrices without a start value: filling them is `init_weights`' or a checkpoint's business.

PyTorch's own modules draw a start value on construction, which a model about to be loaded throws away; on the meta
device that draw alone imports torch._dynamo, three seconds of nothing.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """y = x W^T, without bias: (…, in) -> (…, out). The weight is (out, in)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as allocated."""


class Embedding(nn.Embedding):
    """Rows by token id: (…) int64 -> (…, D). The weight is (V, D)."""

    def reset_parameters(self) -> None:
        """Leave the weight as allocated."""
