"""int8 weights: the matrices of all blocks, symmetric, with one float32 scale a row, in plain tensors.

This is row-wise absmax quantisation (Dettmers et al. 2022, arXiv 2208.07339, section 2.1), which bitsandbytes calls
`load_in_8bit`, without the outlier columns of that paper. It is weight-only: for each product the weight is dequantised
to the compute dtype, and freed afterwards. Embedding, norms, biases and head are not quantised.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from k2mini.distributed import local_part
from k2mini.nn.decode_ops import writes_out, written_out
from k2mini.nn.int8_kernel import int8_rows, takes_kernel
from k2mini.nn.layers import Linear, product


def quantize_rows(weight: Tensor, name: str = "a weight") -> tuple[Tensor, Tensor]:
    """(out, in) floating -> (out, in) int8 and (out,) float32, with weight ≈ int8 * scale[:, None].

    Raises ValueError, with the tensor's `name`, where a value is not finite.
    """
    precise = weight.to(torch.float32)
    largest = precise.abs().amax(dim=1)  # (out,)
    if not torch.isfinite(largest).all():
        raise ValueError(f"{name} is not finite, so it can't be quantised")
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (precise / scale[:, None]).round_().to(torch.int8), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in) int8 and (out,) -> (out, in) in a floating dtype."""
    return (weight.to(scale.dtype) * scale[:, None]).to(dtype)


class Int8Linear(Linear):
    """y = x W^T with W in int8: (…, in) -> (…, out). The frozen `weight` keeps its name; `scale` (out,) is beside it.

    Both are parameters, not buffers, so that FSDP shards them.
    """

    def __init__(self, base: Linear) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features)
        device, self.bias = base.weight.device, base.bias
        shape = (base.out_features, base.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8, device=device), requires_grad=False)
        self.scale = nn.Parameter(
            torch.empty(base.out_features, dtype=torch.float32, device=device), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype."""
        return self.biased(int8_product(x, self.weight, self.scale))


def fill_int8(module: nn.Module, weight: Tensor, scale: Tensor) -> None:
    """Give a layer, adapted or not, its int8 matrix and scales; a sharded one takes this rank's rows."""
    for name, values in (("weight", weight), ("scale", scale)):
        parameter = getattr(module, name)
        if isinstance(parameter, DTensor):
            local_part(parameter).copy_(values)
        else:
            setattr(module, name, nn.Parameter(values, requires_grad=False))


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T, with a gradient for x alone. x: (…, in); weight: (out, in) int8; scale: (out,)."""
    if torch.compiler.is_dynamo_compiling() and writes_out(x, weight):
        return (written_out(x, weight) * scale).to(x.dtype).view(*x.shape[:-1], -1)
    if takes_kernel(x):
        return int8_rows(x, weight, scale)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return product(x, dequantize(weight, scale, x.dtype))
    out = _Product.apply(x, weight, scale)
    assert isinstance(out, Tensor)
    return out


class _Product(torch.autograd.Function):
    """x W^T that dequantises W in the forward and again in the backward pass, so that it is not kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return product(x, dequantize(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        weight, scale = ctx.saved_tensors
        return product(grad, dequantize(weight, scale, grad.dtype).T), None, None


class DynamicLinear(Int8Linear):
    """An Int8Linear that, for a single row on a CPU, quantises the row too (W8A8): several times faster and less exact.

    PyTorch's product has one scale for all rows of a call, so a row's result would depend on the rows beside it; calls
    with several rows take the weight-only product. `reduce_range` keeps AVX2's 16-bit sums from saturating.
    """

    _packed: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype."""
        if x.numel() != x.shape[-1] or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        if self._packed is None:
            self._packed = _pack(self.weight, self.scale)
        row = torch.ops.quantized.linear_dynamic(x.reshape(1, -1).float(), self._packed, reduce_range=True)
        return self.biased(row.to(x.dtype).view(*x.shape[:-1], -1))


def _pack(weight: Tensor, scale: Tensor) -> Any:
    """Weight and scales in the layout of PyTorch's int8 kernel. Only here are its quantised tensors, which are
    deprecated, used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        stored = torch._make_per_channel_quantized_tensor(weight.detach(), scale.detach().double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(stored, None)


def quantize_blocks(blocks: nn.ModuleList, kind: type[Int8Linear] = Int8Linear) -> None:
    """Replace every linear module of the blocks by an int8 module, without values yet."""
    for block in blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, Linear):
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, kind(module))


def quantized_head(weight: Tensor, kind: type[Int8Linear] = Int8Linear) -> Int8Linear:
    """A vocabulary projection quantised to int8 from a weight (V, D), which is left as it is."""
    with torch.device("meta"):
        head = kind(Linear(weight.shape[1], weight.shape[0]))
    values, scale = quantize_rows(weight.detach())
    head.weight, head.scale = (nn.Parameter(tensor, requires_grad=False) for tensor in (values, scale))
    return head


def scale_name(name: str) -> str:
    """The name of the scales of an int8 matrix."""
    return name.removesuffix("weight") + "scale"


def int8_matrices(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The names of the tensors that are kept in int8, the matrices of the blocks, out of a model's names and shapes."""
    return [name for name, shape in shapes.items() if ".layers." in name and len(shape) == 2]


def int8_scales(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the scales of all int8 matrices, out of a model's names and shapes."""
    return {scale_name(name): shapes[name][:1] for name in int8_matrices(shapes)}
