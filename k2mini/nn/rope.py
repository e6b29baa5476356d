"""Rotary frequencies stretched past the context of pretraining."""

from __future__ import annotations

import math

from torch import Tensor

from k2mini.architectures import LinearRopeScaling, RopeScaling


def stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies under a scaling. (E/2,) -> (E/2,).

    `linear` divides all of them by `factor`, which is to divide the positions. `llama3` divides low ones, keeps high
    ones and interpolates those between.
    """
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_seq_len / wavelengths  # full turns within the pretraining context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)  # 0: low, divided; 1: high, kept
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
