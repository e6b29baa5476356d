"""Rows of several documents in one call of attention: on a GPU, where calls count, and in a CPU's compiled blocks.

`varlen_attn` (PyTorch 2.13; FlashAttention's kernels) computes nothing of what a mask would hide. Where it has no
kernel, attention runs under a mask over whole rows. On a CPU `attend_documents` is the one call.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator
from typing import Any, cast

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
    return for_compiler(send(bounds.int(), device))


def for_compiler(bounds: Tensor) -> Tensor:
    """Bounds as an argument of compiled blocks, which are for any number of documents."""
    torch._dynamo.maybe_mark_dynamic(bounds, 0)
    return bounds


def varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, row: int, window: int | None = None, *, grouped: bool
) -> Tensor:
    """Causal attention within each document. q: (B*T, H, E); k, v: (B*T, K, E), in rows of T = `row`. (B*T, H, E).

    Bounds in int64 are a CPU's, those of a GPU are int32.
    """
    if bounds.dtype == torch.int64:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) if grouped else part for part in (k, v))
        return cast(Tensor, attend_documents(q, k, v, bounds, window)[0])
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, which takes seconds

    sides = (-1 if window is None or window >= row else window - 1, 0)  # keys before a query's own, and after it
    return cast(Tensor, varlen_attn(q, k, v, bounds, bounds, row, row, window_size=sides, enable_gqa=grouped))


@torch.library.custom_op("k2mini::attend_documents", mutates_args=())
def attend_documents(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Causal attention within each document, one after the other, for compiled blocks on a CPU.

    The compiler sees one operation that it does not look into, so that one graph serves all lists of lengths.

    Args:
        q, k, v: (N, H, E), of all documents.
        bounds: int64, as `document_bounds` makes them.

    Returns: (N, H, E), and the logarithms of the softmaxes' sums, (N, H), which the gradient needs.
    """
    out, sums = _like(q), _sums_of(q)
    for own, mask in _documents(bounds, window, q):
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads(part[own]) for part in (q, k, v)), 0.0, True, attn_mask=mask
        )
        out[own], sums[own] = results[0][0].transpose(0, 1), results[1][0].T
    return out, sums


@torch.library.custom_op("k2mini::attend_documents_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, bounds: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _like(q), _like(q), _like(q)
    for own, mask in _documents(bounds, window, q):
        parts = [_heads(part[own]) for part in (grad, q, k, v, out)]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, sums[own].T[None], 0.0, True, attn_mask=mask
        )
        for whole, part in zip(grads, found, strict=True):
            whole[own] = part[0].transpose(0, 1)
    return grads


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _sums_of(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def _heads(document: Tensor) -> Tensor:
    """(t, H, E) -> (1, H, t, E), whose values of a head stand side by side, as the kernels take for granted."""
    return document.contiguous().transpose(0, 1)[None]


def _documents(bounds: Tensor, window: int | None, like: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """Where each document is, and the mask added to its scores, (1, 1, t, t), where not all before a token is seen."""
    for start, stop in itertools.pairwise(bounds.tolist()):
        seen = None if window is None else causal_mask(stop - start, window, like.device)
        hidden = None if seen is None else torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, -torch.inf)
        yield slice(start, stop), hidden


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad: Tensor, _sums: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bounds, out, sums = ctx.saved_tensors
    return *_attend_backward(grad, q, k, v, out, sums, bounds, ctx.window), None, None


attend_documents.register_fake(lambda q, *_: (_like(q), _sums_of(q)))
_attend_backward.register_fake(lambda _grad, q, *_: (_like(q), _like(q), _like(q)))
attend_documents.register_autograd(_gradients, setup_context=_keep)
