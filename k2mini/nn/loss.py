"""The training loss, as a sum and a count, so that ranks and accumulation steps add up to the global mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from k2mini.config import IGNORE


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over supervised tokens.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64; labels[b, t] is the token that logits[b, t] should predict, or `IGNORE`.

    Returns: the sum in nats, in `promote_types(logits.dtype, float32)`, and the number of supervised tokens (int64).
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(precise.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total, (labels != IGNORE).sum()
