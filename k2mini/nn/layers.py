"""The layers that a LLaMA is built of: matrix products, the norm, rotary positions, attention.

New matrices hold no values: `init_weights` or a checkpoint fills them. PyTorch's own modules draw random values, which
loading would throw away; on the meta device that draw alone imports torch._dynamo, which takes three seconds.

Rotary embeddings (Su et al. 2021, arXiv 2104.09864) are in Hugging Face's rotate-half layout. Their tables are computed
from the positions, once a forward pass: no buffer has to be filled, and `model.to(bfloat16)` rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2mini.cpu import MKL, ONEDNN
from k2mini.model_config import ModelConfig
from k2mini.nn.decode_ops import attend_once, attends_once, onednn_product, writes_out, written_out
from k2mini.nn.packed import causal_mask, varlen
from k2mini.nn.rope import stretched
from k2mini.nn.slots import Cached, SlotLayer

# Which positions a query attends to. (B or 1, 1, T, S) bool: those that are True. A list: the lengths of the documents
# in all rows, row after row; (N+1) int32: their bounds, on a GPU. None: each row is one document.
Mask = Tensor | list[int] | None

# Reads or replaces an activation (audit/hooks.py): called with its name and value, returns the value to go on with.
Hook = Callable[[str, Tensor], Tensor]


class Linear(nn.Linear):
    """y = x W^T, plus a bias where there is one: (…, in) -> (…, out). The weight is (out, in)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Leave the weight as allocated."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return self.biased(product(x, self.weight))

    def biased(self, out: Tensor) -> Tensor:
        """The product, plus the bias. (…, out)."""
        return out if self.bias is None else out + self.bias


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T. (…, in) and (out, in) -> (…, out).

    On a CPU, float32 products run in oneDNN, 1.2 to 2 times as fast as PyTorch's MKL on processors other than Intel's.
    Compiled code writes products of few rows out (`written_out`), which reads the weight faster still.
    """
    if torch.compiler.is_dynamo_compiling() and writes_out(x, weight):
        return written_out(x, weight).to(x.dtype).view(*x.shape[:-1], -1)
    if not _takes_onednn(x, weight):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return cast(Tensor, _Product.apply(x, weight))
    return _onednn(x, weight)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    if torch.compiler.is_dynamo_compiling():
        return onednn_product(x, weight)
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    compiling = torch.compiler.is_dynamo_compiling()  # here, not in another thread
    return (
        ONEDNN
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and (compiling or type(weight) in (Tensor, nn.Parameter))  # no sharded or fake tensors
        and not (compiling and torch.is_grad_enabled() and MKL)
    )


class _Product(torch.autograd.Function):
    """`F.linear` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = _onednn(grad, weight.T) if wants_x else None
        return grad_x, grad.flatten(0, -2).T @ x.flatten(0, -2) if wants_weight else None


class Embedding(nn.Embedding):
    """Rows by token id: (…) int64 -> (…, D). The weight is (V, D)."""

    def reset_parameters(self) -> None:
        """Leave the weight as allocated."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4).

    Computed in `promote_types(x.dtype, float32)` and cast back *before* the multiplication, as LLaMA's checkpoints
    expect (F.rms_norm multiplies first, which differs in bf16).
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (precise * scale).to(x.dtype)


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Angular frequencies theta_i = rope_theta^(-2i/E) in radians a position (Su et al., section 3.2.2). (E/2,)"""
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim  # (E/2,)
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else stretched(frequencies, config.rope_scaling)


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

    x: (B, T, heads, E); cos, sin: (B or 1, T, 1, E/2). Returns (B, T, heads, E) in x's dtype.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # each (B, T, heads, E/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and, where K < H, grouped queries (Ainslie et al. 2023)."""

    hook: Hook | None = None
    attention_override: Callable[[Hook, Tensor, Tensor, Tensor, Mask, Tensor], Tensor] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.sliding_window
        self.grouped = config.num_kv_heads != config.num_heads
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, q_dim, bias=config.attention_bias)
        self.k_proj = Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.v_proj = Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.o_proj = Linear(q_dim, config.dim)
        both = [RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)]
        self.q_norm, self.k_norm = both

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: Cached) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch_size, num_tokens, _ = x.shape
        heads = (batch_size, num_tokens, -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), cos, sin)  # (B, T, H, E)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), cos, sin)  # (B, T, K, E)
        v = self.v_proj(x).view(heads)  # (B, T, K, E)
        if self.hook is not None:
            q, k, v = self.hook("q", q), self.hook("k", k), self.hook("v", v)
        if isinstance(mask, list) or (mask is not None and mask.ndim == 1):
            return self.o_proj(self._by_document(q, k, v, mask).view(batch_size, num_tokens, -1))
        if isinstance(cache, SlotLayer):
            out = cache.attend(q, k, v)  # (B, T, H, E)
        else:
            k, v = (k.transpose(1, 2), v.transpose(1, 2)) if cache is None else cache.append(k, v)  # (B, K, S, E)
            q = q.transpose(1, 2)  # (B, H, T, E)
            bias: Any = mask
            if mask is None and 1 < num_tokens < k.shape[2]:  # after tokens that the cache holds
                from torch.nn.attention.bias import causal_lower_right  # takes a second to import

                bias = causal_lower_right(num_tokens, k.shape[2])
            if torch.compiler.is_dynamo_compiling() and attends_once(q, k):
                out = attend_once(q, k, v, mask)
            else:
                pair, groups = [k, v], q.shape[1] // k.shape[1]
                if q.is_cuda and type(bias) is Tensor and num_tokens > 1 < groups:  # or a kernel keeps all scores
                    pair, groups = [each.repeat_interleave(groups, dim=1) for each in pair], 1
                how = {"is_causal": bias is None and num_tokens > 1, "enable_gqa": groups > 1}
                out = F.scaled_dot_product_attention(q, pair[0], pair[1], attn_mask=bias, **how)
            out = out.transpose(1, 2)
        if self.hook is None:
            return self.o_proj(out.reshape(batch_size, num_tokens, -1))  # (B, T, H*E) -> (B, T, D)
        if self.attention_override is not None:
            if isinstance(cache, SlotLayer):
                raise ValueError("attention patterns are looked at, and changed, in calls of the model; not in answers")
            out = self.attention_override(self.hook, q, k, v, mask, out)
        out = self.hook("head_out", out)
        return self.hook("out", self.o_proj(out.reshape(batch_size, num_tokens, -1)))

    def _by_document(self, q: Tensor, k: Tensor, v: Tensor, documents: list[int] | Tensor) -> Tensor:
        """Causal attention within each document of packed rows; what a mask would hide is not computed.

        q: (B, T, H, E); k, v: (B, T, K, E); `documents`: a `Mask`. Returns (B*T, H, E).
        """
        row, (q, k, v) = q.shape[1], (part.flatten(0, 1) for part in (q, k, v))
        if isinstance(documents, Tensor):
            return varlen(q, k, v, documents, row, self.window, grouped=self.grouped)
        outs = []
        for document in zip(q.split(documents), k.split(documents), v.split(documents), strict=True):
            own_q, own_k, own_v = (part.transpose(0, 1).unsqueeze(0) for part in document)  # (1, H or K, t, E)
            bias = None if self.window is None else causal_mask(own_q.shape[2], self.window, q.device)
            own = {"is_causal": bias is None and own_q.shape[2] > 1, "enable_gqa": self.grouped}
            outs.append(F.scaled_dot_product_attention(own_q, own_k, own_v, bias, **own).squeeze(0).transpose(0, 1))
        return torch.cat(outs)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, in `promote_types(dtype, float32)`."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
