"""NF4: four bits a weight (Dettmers et al. 2023, arXiv 2305.14314, section 3), with the values that bitsandbytes has.

A matrix is cut into blocks of 64, row after row. Each is divided by its largest absolute value, its absmax, and each of
its values becomes the nearest of 16, the quantiles of a normal distribution. Double quantisation: the absmaxes, less
their mean, are kept in 8 bits, in blocks of 256 with a float32 scale each. That is 4.13 bits a weight in all.

Of rows that are not whole blocks, as few as are it together, G, are kept as one row, so that ranks share whole blocks:
8 of 344 values are 43 blocks. G is 1 for multiples of 64, and left out of the shapes below.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, GROUP = 64, 256  # weights that have an absmax in common, absmaxes that have a scale in common
CODEBOOK = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# What `scale` begins with. The tables go where the matrix goes: to a device, over ranks, into a file, a captured graph.
TABLES = (16, 256, 1)  # the codebook, the map of the absmaxes' codes, the absmaxes' mean; their scales come after


def part_shapes(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shapes of a matrix's codes, absmaxes and `scale`. Raises ValueError where it is not of whole blocks."""
    rows, columns = shape
    together = BLOCK // math.gcd(BLOCK, columns)
    if rows % together:
        raise ValueError(
            f"{name} is {rows} x {columns}, and NF4 takes whole blocks of {BLOCK} values; quantise to int8"
        )
    rows, blocks = rows // together, together * columns // BLOCK
    return (rows, blocks * BLOCK // 2), (rows, blocks), (sum(TABLES) - (-rows * blocks // GROUP),)


def quantize(weight: Tensor, name: str = "a weight") -> tuple[Tensor, Tensor, Tensor]:
    """(out, in) floating -> two codes a byte, the first in the high bits, (out, in/2) uint8; the absmaxes' codes
    (out, in/64) uint8; and `scale`, float32: the tables, and a scale for each 256 absmaxes of the whole matrix.

    Raises ValueError, with the tensor's `name`, where it is not of whole blocks, or a value is not finite.
    """
    packed, blocks, _ = part_shapes(name, tuple(weight.shape))
    precise = weight.to(torch.float32).reshape(-1, BLOCK)
    absmax = precise.abs().amax(dim=1)  # (out * in/64,)
    if not torch.isfinite(absmax).all():
        raise ValueError(f"{name} is not finite, so it can't be quantised")
    codebook, table = torch.tensor(CODEBOOK, device=weight.device), dynamic_map().to(weight.device)
    codes = _nearest(precise * (1 / absmax.clamp(min=1e-38))[:, None], codebook).view(*packed, 2)
    offset = absmax.mean()
    groups = F.pad(absmax - offset, (0, -len(absmax) % GROUP), value=0.0).view(-1, GROUP)
    largest = groups.abs().amax(dim=1)  # (G,)
    # bitsandbytes looks these up on a grid of 2^16 values (on a CPU), so that its codes are not always the nearest.
    normal = (groups * (1 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    grid = ((normal + 1) * 0.5 * 65535 + 0.5).floor() / 65535 * 2 - 1
    nested = (_nearest(grid, table) * (largest > 0)[:, None]).flatten()[: len(absmax)]
    scale = torch.cat([codebook, table, offset[None], largest])
    return codes[..., 0] << 4 | codes[..., 1], nested.view(blocks), scale


def dequantize(weight: Tensor, absmax: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` gives -> (out, in), or (out/G, G*in), in a floating dtype, computed in float32."""
    codebook, table, offset, largest = scale.split([*TABLES, len(scale) - sum(TABLES)])
    steps = largest.repeat_interleave(GROUP, output_size=len(largest) * GROUP)[: absmax.numel()]
    blocks = table[absmax.flatten().long()] * steps + offset  # (out * in/64,)
    pairs = torch.stack((codebook.repeat_interleave(16, output_size=256), codebook.repeat(16)), dim=1)  # of each byte
    values = pairs[weight.flatten().long()].view(-1, BLOCK) * blocks[:, None]
    return values.view(weight.shape[0], -1).to(dtype)


def dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' 8-bit dynamic type (Dettmers 2016, arXiv 1511.04561), ascending. float32.

    In each of seven decades below 1 there are twice as many as in the one below it, the middles of equal parts.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest of a table's ascending values; the lower one where two are as near. uint8."""
    return torch.bucketize(x, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
