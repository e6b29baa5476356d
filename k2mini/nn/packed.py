"""Rows of several documents on a GPU, where calls count: one call of attention for all, not one for each as on a CPU.

`varlen_attn` (PyTorch 2.13; FlashAttention's kernels) computes nothing of what a mask would hide. Where it has no
kernel, attention runs under a mask over whole rows.
"""

from __future__ import annotations

import functools
import logging
from typing import cast

import torch
from torch import Tensor

from k2mini.distributed import send

log = logging.getLogger(__name__)


def causal_mask(length: int, window: int, device: torch.device) -> Tensor | None:
    """The attention mask of a document, (1, 1, T, T) bool; None where no token is out of a later one's window."""
    if length <= window:
        return None
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def document_mask(positions: Tensor, window: int | None = None) -> Tensor:
    """The attention mask of rows that hold several documents, each starting at position 0: causal, within a document.

    Args:
        positions: (B, T) int64; -1 is padding.
        window: how many tokens a query attends to, its own among them; None: all.

    Returns: (B, 1, T, T) bool.
    """
    document = (positions == 0).cumsum(dim=1)  # (B, T)
    mask = (document[:, :, None] == document[:, None, :]).tril().unsqueeze(1)  # (B, T, T) -> (B, 1, T, T)
    return mask if window is None or window >= positions.shape[1] else mask.triu(1 - window)


@functools.cache
def takes_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a GPU has `varlen_attn`'s kernels. Where it has not, the log says why, once."""
    why = None
    if torch.__version__ < "2.13":
        why = f"PyTorch {torch.__version__} is older than 2.13"
    elif dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        why = f"FlashAttention has no kernel for heads of {head_dim} in {dtype}"
    elif torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        why = "FlashAttention needs a GPU of compute capability 8.0 or later"
    if why is not None:
        log.info("a mask keeps the documents of a row apart, which is slower: %s", why)
    return why is None


def sent_bounds(bounds: Tensor, device: torch.device, dtype: torch.dtype, head_dim: int) -> Tensor | None:
    """`document_bounds`, made on a CPU since a GPU would be waited for, as `varlen` takes them: (N+1) int32 on the GPU.

    None where there is no kernel (see `takes_varlen`).
    """
    if not takes_varlen(device, dtype, head_dim):
        return None
    bounds = send(bounds.int(), device)
    torch._dynamo.maybe_mark_dynamic(bounds, 0)  # compiled blocks are for any number of documents
    return bounds


def varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, row: int, window: int | None = None, *, grouped: bool
) -> Tensor:
    """Causal attention within each document. q: (B*T, H, E); k, v: (B*T, K, E), in rows of T = `row`. (B*T, H, E)."""
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, which takes seconds

    sides = (-1 if window is None or window >= row else window - 1, 0)  # keys before a query's own, and after it
    return cast(Tensor, varlen_attn(q, k, v, bounds, bounds, row, row, window_size=sides, enable_gqa=grouped))
