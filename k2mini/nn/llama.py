"""LLaMA (Touvron et al. 2023, arXiv 2302.13971) and its kin (see `ModelConfig`), with Hugging Face's parameter names.

Shapes: B batch, T tokens, S tokens attended to, D model dim, H query heads, K key/value heads, E head dim,
V vocabulary.

Switches, all off in a new model:
    recompute_every     Decoder    activation checkpointing; set by build.make_trainable
    by_document         Decoder    how packed rows attend on a CPU; set by build.make_trainable
    gathered_dtype      Llama      the dtype weights are computed in (`gathered_device`); set by build.make_trainable
    quantized_head      Llama      an int8 vocabulary projection; set by build.load_model(quantize_head=True)
    speculation         Llama      what drafts answers ahead; set by inference.speculate
    decode_blocks       Decoder    compiled decoding, with `decode_logits` of Llama; set by inference.compile
    hook                all parts  reads or replaces activations; set by audit.hooks while it is in use
    attention_override  Attention  the same for attention patterns; set by audit.hooks while it is in use
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from k2mini.model_config import ModelConfig
from k2mini.nn.layers import Attention, Embedding, Hook, Linear, Mask, RMSNorm, product, rotary_tables
from k2mini.nn.loss import token_loss
from k2mini.nn.packed import causal_mask, document_mask, for_compiler
from k2mini.nn.slots import Cache, Cached


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6)."""

    hook: Hook | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.dim, config.intermediate_dim)
        self.up_proj = Linear(config.dim, config.intermediate_dim)
        self.down_proj = Linear(config.intermediate_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.hook is None:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        gate, up = self.hook("gate", self.gate_proj(x)), self.hook("up", self.up_proj(x))
        return self.hook("out", self.down_proj(self.hook("hidden", F.silu(gate) * up)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    hook: Hook | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: Cached) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.hook is None:
            x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
            return x + self.mlp(self.post_attention_layernorm(x))
        x = self.hook("residual_in", x)
        x = self.hook("residual_mid", x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        return self.hook("residual_out", x + self.mlp(self.post_attention_layernorm(x)))


def document_bounds(positions: Tensor) -> Tensor:
    """Where the documents of all rows begin, row after row, and where the last one ends: (N+1) int64, from 0 to B*T.

    positions: (B, T) int64; 0 begins a document, -1 is padding, of which a run counts as a document.
    """
    begins = positions == 0
    begins[:, 0] = True
    begins[:, 1:] |= (positions[:, 1:] < 0) & (positions[:, :-1] >= 0)
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel())


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: tokens to hidden states."""

    hook: Hook | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.by_document = False  # attend to packed documents one by one, not under a mask over whole rows
        self.decode_blocks: Callable[..., Tensor] | None = None  # the blocks, compiled
        self.recompute_every = 0  # activation checkpointing of every n-th block; 0: of none

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: Cache = None, mask: Mask = None
    ) -> Tensor:
        """(B, T) int64 -> (B, T, D); the arguments are those of `Llama.forward` and `Llama.loss`."""
        num_tokens, window = tokens.shape[1], self.config.sliding_window
        if positions is not None and positions.shape != tokens.shape:
            raise ValueError(f"positions {tuple(positions.shape)} must have the shape of tokens {tuple(tokens.shape)}")
        if cache is not None:
            if cache.batch_size != tokens.shape[0]:
                raise ValueError(f"a cache of {cache.batch_size} rows was given for {tokens.shape[0]} rows of tokens")
            positions, mask = cache.advance(num_tokens, positions)
        elif positions is None:
            positions = torch.arange(num_tokens, device=tokens.device).unsqueeze(0)
            mask = None if window is None else causal_mask(num_tokens, window, tokens.device)
        elif mask is None and self.by_document:
            compiled = self.layers[0]._compiled_call_impl is not None
            mask = for_compiler(document_bounds(positions)) if compiled else document_bounds(positions).diff().tolist()
        elif mask is None:
            mask = document_mask(positions, window)
        x = self.embed_tokens(tokens)  # (B, T, D)
        if self.hook is not None:
            x = self.hook("embed", x)
        cos, sin = rotary_tables(positions, self.config, x.dtype)
        if self.decode_blocks is not None and cache is not None and cache.compiled(num_tokens):
            return self.norm(self.decode_blocks(self.layers, x, cos, sin, mask, cache))
        for index, layer in enumerate(self.layers):
            layer_cache = cache.layer(index) if cache is not None else None
            if self.recompute_every and index % self.recompute_every == 0 and torch.is_grad_enabled():
                # Chen et al. 2016, arXiv 1604.06174: only the block's input is kept.
                x = checkpoint(layer, x, cos, sin, mask, layer_cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, layer_cache)
        return self.norm(x) if self.hook is None else self.hook("final_norm", self.norm(x))


class Llama(nn.Module):
    """The language model: one class to train, to sample from, to score with and to audit.

    A new one has no values yet: load a checkpoint into it, or call `init_weights`.
    """

    hook: Hook | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        # A tied head has no parameter of its own, so that loading, sharding and casting can't untie it.
        self.lm_head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.decode_logits: Callable[..., Tensor] | None = None  # `logits`, compiled
        self.speculation: Callable[..., Any] | None = None  # makes what drafts the answers of a Scheduler's slots
        self.quantized_head: Linear | None = None  # answers in the head's place, at inference
        self.gathered_dtype: torch.dtype | None = None  # weights are cast to it as they are gathered, or used
        self.gathered_device: torch.device | None = None  # and sent to it, where they are offloaded

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache = None) -> Tensor:
        """Logits of the token after each one given.

        Args:
            tokens: (B, T) int64. Tokens at padding positions are ignored, but must be valid ids.
            positions: (B, T) int64. Each row counts 0, 1, 2, … within a document; 0 starts a document that does not
                attend to those before it; -1 marks padding, on either side. None: one document a row, no padding.
            cache: holds the tokens before these. With it a row is one document, whose positions continue the cache's.

        Returns: (B, T, V) in the compute dtype. Logits at padding are finite and meaningless.
        """
        hidden = self.model(tokens, positions, cache)
        if self.decode_logits is not None and cache is not None and cache.compiled(tokens.shape[1]):
            return self.decode_logits(self, hidden)
        return self.logits(hidden) if self.hook is None else self.hook("logits", self.logits(hidden))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache = None) -> Tensor:
        """The final norm's output, of which `forward` makes logits: (B, T, D)."""
        return self.model(tokens, positions, cache)

    def logits(self, hidden: Tensor, by: Callable[[Tensor, Tensor], Tensor] = product) -> Tensor:
        """The vocabulary projection of the final norm's output: (…, D) -> (…, V); `by`: which product makes it."""
        return by(hidden, self.head_weight) if self.quantized_head is None else self.quantized_head(hidden)

    def loss(
        self, tokens: Tensor, positions: Tensor | None, labels: Tensor, places: Tensor | None = None, mask: Mask = None
    ) -> Tensor:
        """The training loss: cross-entropy in nats, summed over supervised tokens; the logits never exist at once.

        Args:
            tokens, positions: as in `forward`.
            labels: (B, T) int64, the token that each position should predict, or `IGNORE_INDEX`.
            places: (N) int64, the supervised positions, of which alone `labels` are, (N). None: they are looked for.
            mask: the documents that positions say, if they are known already (on a GPU, `nn/packed.py`).
        """
        return token_loss(self.model(tokens, positions, mask=mask), self.head_weight, labels, places)

    def units(self) -> list[nn.Module]:
        """The modules that FSDP gathers one at a time: all but the last norm and the head."""
        return [*self.model.layers, *([] if self.lm_head is None else [self.model.embed_tokens])]

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection's weight. (V, D)."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.gathered_dtype or self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.gathered_device or self.model.embed_tokens.weight.device
