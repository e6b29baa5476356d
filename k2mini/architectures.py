"""What differs between the architectures that the one model class runs, and how rotary positions are stretched.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """How Hugging Face's config.json spells an architecture.

    Attributes:
        names: what `architectures` may say; the first is written.
        only: fields of which k2mini's model has this value alone. transformers' classes of these architectures have
            them, or once had, and compute something else under another value.
        defaults: what transformers takes for fields that are left out, where that is not what LLaMA takes.
    """

    names: tuple[str, ...]
    only: dict[str, Any]
    defaults: dict[str, Any]


_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "is_causal": True}
_QWEN = {"use_sliding_window": False, "use_mrope": False}
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_QWEN2_ONLY = {"hidden_act": "silu", "mlp_bias": False, "is_causal": True}  # it has no attention_bias

ARCHITECTURES = {  # by model_type
    # The second name is how checkpoints of March 2023 spell it.
    "llama": Architecture(("LlamaForCausalLM", "LLaMAForCausalLM"), _ONLY, {}),
    "mistral": Architecture(
        ("MistralForCausalLM",),
        _ONLY,
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Architecture(("Qwen2ForCausalLM",), _QWEN2_ONLY | _QWEN, _QWEN_DEFAULTS),
    "qwen3": Architecture(("Qwen3ForCausalLM",), _ONLY | _QWEN, _QWEN_DEFAULTS | {"head_dim": 128}),
}


@dataclass(frozen=True)
class LinearRopeScaling:
    """The `linear` rule: positions are divided by `factor` (Chen et al. 2023, arXiv 2306.15595, equation 3)."""

    factor: float

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor must be at least 1, not {self.factor}")

    def hf_fields(self) -> dict[str, Any]:
        """`rope_scaling` of config.json."""
        return {"rope_type": "linear", "factor": self.factor}


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

    def hf_fields(self) -> dict[str, Any]:
        """`rope_scaling` of config.json."""
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_seq_len,
        }


RopeScaling = LinearRopeScaling | Llama3RopeScaling


# What config.json has as quantization_config where k2mini wrote quantised weights.
QUANTIZED = {
    "int8": {"quant_method": "k2mini", "format": "int8, one float32 scale a row, symmetric"},
    "nf4": {"quant_method": "k2mini", "format": "nf4, blocks of 64, double quantisation in blocks of 256"},
}


def quantization(said: Any) -> str | None:
    """The key of QUANTIZED that config.json's quantization_config names; None: it is another program's."""
    return next((how for how, fields in QUANTIZED.items() if said == fields), None)
