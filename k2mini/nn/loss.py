"""The training loss: cross-entropy as a sum, so that micro-batches and ranks add up to the mean of the global batch."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from k2mini.config import IGNORE_INDEX
from k2mini.nn.layers import product

CHUNK_ROWS = 512  # positions whose logits exist at the same time


def token_loss(hidden: Tensor, weight: Tensor, labels: Tensor, places: Tensor | None = None) -> Tensor:
    """Cross-entropy of the vocabulary projection, summed over supervised tokens.

    Logits are computed for `CHUNK_ROWS` supervised positions at a time. Where gradients are wanted, those of `hidden`
    and `weight` are computed from the same logits at once (as in Liger Kernel, Hsu et al. 2024, arXiv 2410.10989,
    section 3.2), so the logits of all positions never exist together and none are computed twice.

    Args:
        hidden: (…, D), of the final norm.
        weight: (V, D), of the output head.
        labels: (…) int64; the token that each position should predict, or `IGNORE_INDEX`.
        places: (N) int64, the supervised positions of `hidden` when it is flattened, where `labels` has no others, (N).
            None: they are looked for, and a GPU is waited for.

    Returns: the sum in nats, in `promote_types(hidden.dtype, float32)`.
    """
    if places is None:
        places, labels = supervised(labels)
    hidden = hidden.flatten(0, -2).index_select(0, places)  # (N, D); no place comes twice, so nothing has to be sorted
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return projected_loss(hidden, weight, labels)
    total = hidden.new_zeros((), dtype=_precise(hidden))
    for rows, targets in zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        total += F.cross_entropy(_logits(rows, weight), targets, reduction="sum")
    return total


def supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The places, in flattened labels (…), of those that are not `IGNORE_INDEX`; and these labels. Both (N)."""
    places = (labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    return places, labels.flatten()[places]


def projected_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`token_loss` with gradients, where every position is supervised: hidden (N, D), weight (V, D), labels (N)."""
    return cast(Tensor, _ProjectedLoss.apply(hidden, weight, labels))


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _keeps_sums(x: Tensor) -> bool:
    """Whether products come in float32, as they are summed: of 16 bits, on a GPU from 8.0 on, with PyTorch 2.8."""
    can = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.addmm, "dtype_out")
    return can and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _logits(rows: Tensor, weight: Tensor) -> Tensor:
    if _keeps_sums(rows):
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return product(rows, weight).to(_precise(rows))


class _ProjectedLoss(torch.autograd.Function):
    """`forward` computes the loss and its gradients; `backward` only scales the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        precise = _precise(hidden)
        total = hidden.new_zeros((), dtype=precise)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        fresh = torch.empty_like if len(hidden) and precise == hidden.dtype else torch.zeros_like  # to be added to
        grad_weight = fresh(weight, dtype=precise) if wants_weight else None
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows, targets = hidden[start : start + CHUNK_ROWS], labels[start : start + CHUNK_ROWS, None]
            logits = _logits(rows, weight)  # (N, V)
            largest = logits.amax(dim=-1, keepdim=True)
            picked = logits.gather(-1, targets) - largest
            exponentials = logits.sub_(largest).exp_()
            sums = exponentials.sum(dim=-1, keepdim=True)
            total += (sums.log() - picked).sum()
            # d loss / d logits = softmax - one-hot
            grad = exponentials.div_(sums)
            grad.scatter_add_(-1, targets, grad.new_full(targets.shape, -1.0))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + CHUNK_ROWS] = product(grad, weight.T)
            if grad_weight is not None and grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, rows, beta=min(start, 1))  # 0: overwritten
            elif grad_weight is not None and _keeps_sums(rows):
                torch.addmm(grad_weight, grad.T, rows, out_dtype=precise, out=grad_weight)
            elif grad_weight is not None:
                grad_weight += grad.T @ rows
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (scale,) = grads
        hidden, weight = (None if kept is None else kept * scale.to(kept.dtype) for kept in ctx.saved_tensors)
        return hidden, weight, None
