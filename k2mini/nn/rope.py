"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), in the rotate-half layout of Hugging Face.

The tables are a pure function of the positions, computed once per forward pass and shared by all layers.
There is no buffer, so there is nothing to refill after a meta build and nothing that `model.to(bf16)` would round.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from k2mini.config import Llama3RopeScaling, ModelConfig


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Angular frequencies theta_i = rope_theta^(-2i/E), in radians per position.

    Returns: (E/2,) in `dtype`. Source: Su et al., section 3.2.2.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim  # (E/2,)
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = _llama3_scaled(frequencies, config.rope_scaling)
    return frequencies


def _llama3_scaled(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Slow frequencies are divided by `factor`, fast ones kept, those between interpolated. (E/2,) -> (E/2,)."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_seq_len / wavelengths  # full turns within the pretraining context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)  # 0: slow, divided; 1: fast, kept
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotary_tables(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles.

    Args:
        positions: (B or 1, T) int64.
        dtype: the model's compute dtype; the tables come in `promote_types(dtype, float32)`.

    Returns: cos and sin, each (B or 1, T, 1, E/2), to broadcast over heads.
    """
    precise = torch.promote_types(dtype, torch.float32)
    frequencies = inverse_frequencies(config, precise, positions.device)
    angles = positions[..., None].to(precise) * frequencies  # (B, T, E/2)
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+E/2}) by their position's angles, in the tables' precision.

    Args:
        x: (B, T, heads, E).
        cos, sin: (B or 1, T, 1, E/2).

    Returns: (B, T, heads, E) in x's dtype.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # each (B, T, heads, E/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
