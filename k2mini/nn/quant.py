"""Quantised weights: the matrices of all blocks in int8, with one float32 scale a row, or in NF4 (see nn/nf4.py).

int8 is row-wise absmax quantisation (Dettmers et al. 2022, arXiv 2208.07339, section 2.1), which bitsandbytes calls
`load_in_8bit`, without the outlier columns of that paper. Both are weight-only: for each product the weight is
dequantised to the compute dtype, and freed afterwards. Where a CPU multiplies int8, few rows are rounded to 16 bits and
multiplied with the int8 weight (`product_of_digits`); compiled code keeps up to four in float32. Embedding, norms,
biases and head are not quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from k2mini.cpu import MULTIPLIES_INT8
from k2mini.distributed import is_dtensor, local_part, local_rows
from k2mini.nn import nf4
from k2mini.nn.decode_ops import writes_out, written_out
from k2mini.nn.int8_kernel import int8_rows, takes_kernel
from k2mini.nn.layers import Linear, product

MOST_ROWS = 256  # what one step of the engine takes, and more; of many more, dequantising costs less
LONGEST = 1 << 17
# By the weight's dtype: int8, NF4.
PARTS = {torch.int8: ("weight", "scale"), torch.uint8: ("weight", "absmax", "scale")}


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


class QuantizedLinear(Linear):
    """y = x W^T with W quantised: (…, in) -> (…, out). The frozen `weight` keeps its name; beside it are other `PARTS`.

    All are parameters, not buffers, so that FSDP shards them.
    """

    how: ClassVar[str]
    scale: nn.Parameter

    def __init__(self, base: Linear, name: str = "weight") -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features)
        device, self.bias = base.weight.device, base.bias
        self.dtype = base.weight.dtype  # of what goes beside it, adapters
        for part, (shape, dtype) in part_shapes(self.how, name, (base.out_features, base.in_features)).items():
            values = torch.empty(shape, dtype=dtype, device=device)
            setattr(self, part.rpartition(".")[2], nn.Parameter(values, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype."""
        return self.biased(quantized_product(x, *parts_of(self)))


class Int8Linear(QuantizedLinear):
    """`weight` (out, in) int8 and `scale` (out,)."""

    how = "int8"


class Nf4Linear(QuantizedLinear):
    """`weight` (out, in/2), `absmax` (out, in/64) and `scale`, as `nf4.quantize` gives them."""

    how = "nf4"


def parts_of(layer: Linear) -> list[Tensor]:
    """The weight of a linear layer, adapted or not, and what is beside it if it is quantised."""
    return [getattr(layer, part) for part in PARTS.get(layer.weight.dtype, ("weight",))]


def quantized_product(x: Tensor, weight: Tensor, *scales: Tensor) -> Tensor:
    """x W^T, with a gradient for x alone. x: (…, in); weight and scales: `parts_of` a quantised layer."""
    is_int8 = weight.dtype == torch.int8
    if is_int8 and torch.compiler.is_dynamo_compiling() and writes_out(x, weight):
        return (written_out(x, weight) * scales[0]).to(x.dtype).view(*x.shape[:-1], -1)
    if (is_int8 or x.shape[-1] % nf4.BLOCK == 0) and takes_kernel(x, fuses=is_int8):
        if is_int8:
            return int8_rows(x, weight, *scales)
        from k2mini.nn.nf4_kernel import nf4_rows

        return nf4_rows(x, weight, *scales)
    if is_int8 and takes_digits(x):
        return product_of_digits(x, weight, *scales)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return product(x, dequantized(x.dtype, weight, *scales).view(-1, x.shape[-1]))
    out = _Product.apply(x, weight, *scales)
    assert isinstance(out, Tensor)
    return out


def takes_digits(x: Tensor) -> bool:
    """Whether `product_of_digits` is for x (…, in): few rows, without a gradient, on a CPU that multiplies int8.

    Of one column `torch._int_mm` is wrong (PyTorch 2.13); of more than LONGEST sums could pass 32 bits.
    """
    here = MULTIPLIES_INT8 and x.device.type == "cpu" and x.dtype != torch.float64 and not torch.is_grad_enabled()
    return here and 1 < x.shape[-1] <= LONGEST and 0 < x.numel() <= MOST_ROWS * x.shape[-1]


def product_of_digits(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T by products of int8 alone: (…, in), (out, in) int8 and (out,) -> (…, out) in x's dtype.

    A row of x is rounded to 16 bits with a scale of its own, in two int8 digits: step * (high + low / 254), so each
    value is off by at most the row's largest / 64,516. The sums of integers are exact, so a row's bits do not depend on
    the rows beside it.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    step = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127  # (N, 1)
    scaled = rows / step
    high = scaled.round()
    low = ((scaled - high) * 254).round()
    sums = torch._int_mm(torch.cat((high, low)).to(torch.int8), weight.T).float()  # (2N, out)
    high, low = sums.chunk(2)
    return ((high + low / 254) * (step * scale)).to(x.dtype).view(*x.shape[:-1], -1)


def dequantized(dtype: torch.dtype, weight: Tensor, *scales: Tensor) -> Tensor:
    """`parts_of` a quantised layer -> its values, row after row, in a floating dtype."""
    if weight.dtype == torch.int8:
        return dequantize(weight, scales[0], dtype)
    return nf4.dequantize(weight, scales[0], scales[1], dtype)


class _Product(torch.autograd.Function):
    """x W^T that dequantises W in the forward and again in the backward pass, so that it is not kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *scales: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *scales)
        return product(x, dequantized(x.dtype, weight, *scales).view(-1, x.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, *scales = ctx.saved_tensors
        whole = dequantized(grad.dtype, weight, *scales).view(grad.shape[-1], -1)
        return product(grad, whole.T), *[None] * (1 + len(scales))


KINDS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear}


def quantize_blocks(blocks: nn.ModuleList, how: str = "int8") -> None:
    """Replace every linear module of the blocks by a quantised one, without values yet.

    Raises ValueError where `how` is none of KINDS, or does not go with a matrix's size.
    """
    if how not in KINDS:
        raise ValueError(f"quantize must be {' or '.join(KINDS)}, not {how!r}")
    for number, block in enumerate(blocks):
        for name, module in list(block.named_modules()):
            if isinstance(module, Linear):
                parent, _, child = name.rpartition(".")
                layer = KINDS[how](module, f"model.layers.{number}.{name}.weight")
                setattr(block.get_submodule(parent), child, layer)


def fill(
    module: Any, name: str, rows: Callable[[str, int, int], Tensor], device: torch.device, *, stored: bool
) -> None:
    """Give a layer, adapted or not, its quantised matrix `name`, or this rank's rows of each part of it.

    Args:
        rows: reads rows of a tensor by its name.
        stored: the matrix is quantised in the files; else it is when read. NF4 is then made of the whole matrix on each
            rank: the mean and the groups of its absmaxes span all rows.
    """
    kept = {part: local_rows(getattr(module, part)) for part in PARTS[module.weight.dtype]}
    if stored:
        parts = [rows(name.removesuffix("weight") + part, *bounds).to(device) for part, bounds in kept.items()]
    elif module.weight.dtype == torch.int8:
        parts = [*quantize_rows(rows(name, *kept["weight"]).to(device), name)]
    else:
        whole = nf4.quantize(rows(name, 0, module.out_features).to(device), name)
        parts = [values[slice(*bounds)] for values, bounds in zip(whole, kept.values(), strict=True)]
    for part, values in zip(kept, parts, strict=True):
        parameter = getattr(module, part)
        if is_dtensor(parameter):
            local_part(parameter).copy_(values)
        else:
            setattr(module, part, nn.Parameter(values, requires_grad=False))


def quantized_head(weight: Tensor, how: str = "int8") -> QuantizedLinear:
    """A vocabulary projection quantised to int8 from a weight (V, D), which is left as it is."""
    with torch.device("meta"):
        head = KINDS[how](Linear(weight.shape[1], weight.shape[0]))
    for part, values in zip(("weight", "scale"), quantize_rows(weight.detach()), strict=True):
        setattr(head, part, nn.Parameter(values, requires_grad=False))
    return head


def part_shapes(how: str, name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The names, shapes and dtypes of what a matrix (out, in) is stored as, itself first.

    Raises ValueError where it can't be.
    """
    stem = name.removesuffix("weight")
    if how != "nf4":
        return {name: (shape, torch.int8), f"{stem}scale": (shape[:1], torch.float32)}
    codes, absmax, scale = nf4.part_shapes(name, shape)
    found = {name: (codes, torch.uint8), f"{stem}absmax": (absmax, torch.uint8)}
    return found | {f"{stem}scale": (scale, torch.float32)}


def int8_matrices(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of the tensors that are quantised, the matrices of the blocks, out of a model's names and shapes."""
    return [name for name, shape in shapes.items() if ".layers." in name and len(shape) == 2]


def quantized_tensors(
    shapes: Mapping[str, tuple[int, ...]], how: str | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The names, shapes and dtypes of all parts of the quantised matrices, out of a model's names and shapes."""
    names = int8_matrices(shapes) if how is not None else []
    return {part: kept for name in names for part, kept in part_shapes(str(how), name, shapes[name]).items()}
