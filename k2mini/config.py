"""The dataclasses that describe a model, checked when they are made. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3RopeScaling:
    """The `llama3` rule that stretches rotary wavelengths past the pretraining context.

    Source: Grattafiori et al. 2024 (arXiv 2407.21783); the formula is that of Meta's `apply_scaling`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int  # tokens

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor must be at least 1, not {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling needs 0 < low_freq_factor < high_freq_factor, "
                f"not {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.original_max_seq_len < 1:
            raise ValueError(f"rope_scaling.original_max_seq_len must be positive, not {self.original_max_seq_len}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a LLaMA (Touvron et al. 2023, arXiv 2302.13971; grouped queries: 2307.09288).

    Raises ValueError, naming the field and the value, where the shape is impossible.
    """

    dim: int  # D, hidden size
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K; equal to num_heads for multi-head attention
    head_dim: int  # E
    intermediate_dim: int
    vocab_size: int  # V, rows of the embedding
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # lm_head shares the embedding's weight

    def __post_init__(self) -> None:
        positive = (
            "dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_dim",
            "vocab_size",
            "max_seq_len",
            "rope_theta",
            "norm_eps",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")

    def num_parameters(self) -> int:
        """Number of weights, in closed form."""
        attention = self.dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.dim * self.intermediate_dim
        block = attention + mlp + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.num_layers * block + self.dim + embeddings


# Shapes: Touvron et al. 2023, table 2; norm_eps and intermediate_dim as in Meta's params.json and code.
PRESETS = {
    "llama-7b": ModelConfig(
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_dim=11008,
        vocab_size=32000,
    ),
    "llama-13b": ModelConfig(
        dim=5120,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        head_dim=128,
        intermediate_dim=13824,
        vocab_size=32000,
    ),
}
