"""The shape of a LLaMA, and its translation from and to Hugging Face's config.json, whose names stand here alone.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2mini.files import read_json

INT8 = {"quant_method": "k2mini", "format": "int8, one float32 scale a row, symmetric"}
ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")  # the second is how checkpoints of March 2023 spell it
MOST_LAYERS = 1000  # more are a damaged file's: their names alone would fill the memory


def number(raw: Mapping[str, Any], key: str, kind: type, default: Any = None, *, most: float = 1e15) -> Any:
    """The positive number `raw[key]`, as an int or a float. Raises ValueError where it is none, or above `most`."""
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{key} is missing")
    if kind is int:
        most = min(most, 2**31 - 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (0 < value <= most and kind(value) != value):
        raise ValueError(f"{key} must be {'a whole number' if kind is int else 'a number'}, not {value!r:.80}")
    if not value > 0:
        raise ValueError(f"{key} must be positive, not {value!r:.80}")
    if value > most:
        raise ValueError(f"{key} must be at most {most:,}, not {value!r:.80}")
    return kind(value)


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
        for name in ("dim", "num_heads", "num_kv_heads", "head_dim", "intermediate_dim", "vocab_size", "max_seq_len"):
            number(vars(self), name, int)
        number(vars(self), "num_layers", int, most=MOST_LAYERS)
        for name in ("rope_theta", "norm_eps"):
            number(vars(self), name, float)
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


def read_model_config(directory: Path) -> ModelConfig:
    """The model's shape, from `directory/config.json`. Raises ValueError as the two functions below do."""
    return parse_config(read_config_json(directory), directory)


def read_config_json(directory: Path) -> dict[str, Any]:
    """The fields of `directory/config.json` as they stand. Raises ValueError where there is no such file or object."""
    path = directory / "config.json"
    if not path.is_file():
        hints = {
            "adapter_config.json": "; it is an adapter, which goes beside its base as --adapter",
            "params.json": f"; it is in Meta's layout, which k2mini convert {directory} --to hf --out DIR translates",
        }
        hint = next((hint for file, hint in hints.items() if (directory / file).is_file()), "")
        raise ValueError(f"{directory} has no config.json, so it is not a Hugging Face model directory{hint}")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return raw


def parse_config(raw: dict[str, Any], directory: Path) -> ModelConfig:
    """The model's shape, from the fields of config.json.

    Raises:
        ValueError: another architecture, or a feature that k2mini's model does not have. A feature is never dropped in
            silence, since the weights would then mean something else. The message names the file in `directory`.
    """
    try:
        return _translate(raw)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None


def _translate(raw: dict[str, Any]) -> ModelConfig:
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"architectures must be a list, not {architectures!r:.80}")
    if raw.get("model_type") != "llama" or any(name not in ARCHITECTURES for name in architectures):
        name = ", ".join(map(str, architectures)) or "not named"
        raise ValueError(
            f"model_type is {raw.get('model_type')!r:.80}, architecture {name:.80}; "
            "k2mini runs LLaMA causal language models only (model_type 'llama', LlamaForCausalLM)"
        )
    unsupported = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    quantization = raw.get("quantization_config")
    if quantization not in (None, INT8):
        raise ValueError(f"quantization_config is {quantization!r:.80}; k2mini reads its own int8 weights only")
    for key, supported in unsupported.items():
        if raw.get(key, supported) != supported:
            raise ValueError(f"{key} is {raw[key]!r:.80}; k2mini's LLaMA supports {supported!r} only")

    dim = number(raw, "hidden_size", int)
    num_heads = number(raw, "num_attention_heads", int)
    if num_heads < 1 or (raw.get("head_dim") is None and dim % num_heads):
        raise ValueError(f"hidden_size ({dim}) must be a multiple of num_attention_heads ({num_heads})")
    tied = raw.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings must be true or false, not {tied!r:.80}")
    rope_theta, rope_scaling = _rope(raw)
    return ModelConfig(
        dim=dim,
        num_layers=number(raw, "num_hidden_layers", int, most=MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=number(raw, "num_key_value_heads", int, num_heads),
        head_dim=number(raw, "head_dim", int, dim // num_heads),
        intermediate_dim=number(raw, "intermediate_size", int),
        vocab_size=number(raw, "vocab_size", int),
        # The conversions of March 2023 say max_sequence_length.
        max_seq_len=number(raw, "max_position_embeddings", int, raw.get("max_sequence_length", 2048)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=number(raw, "rms_norm_eps", float, 1e-6),
        tie_embeddings=tied,
    )


def _rope(raw: dict[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """rope_theta and scaling: `rope_theta` + `rope_scaling` up to transformers 4, `rope_parameters` since 5."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_scaling must be an object, not {parameters!r:.80}")
    theta = number({**raw, **parameters}, "rope_theta", float, 10000.0)
    for holder in (raw, parameters):
        if holder.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"partial_rotary_factor {holder['partial_rotary_factor']!r:.80} is not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_scaling of type {kind!r:.80} is not supported; k2mini knows 'default' and 'llama3'")
    return theta, Llama3RopeScaling(
        factor=number(parameters, "factor", float),
        low_freq_factor=number(parameters, "low_freq_factor", float),
        high_freq_factor=number(parameters, "high_freq_factor", float),
        original_max_seq_len=number(
            parameters, "original_max_position_embeddings", int, raw.get("max_position_embeddings")
        ),
    )


def hf_config(config: ModelConfig, dtype: str, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """The content of config.json, in transformers 4's names, which 5 reads as well (K2's users are on 4.28).

    Args:
        dtype: 'float32', 'float16' or 'bfloat16'.
        bos_id, eos_id: the tokenizer's, or None where there is no tokenizer.
    """
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.intermediate_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model under Hugging Face's name, with its shape; a tied output has none of its own."""
    dim, q_dim, kv_dim = config.dim, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, dim)}
    for layer in range(config.num_layers):
        block: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (q_dim, dim),
            "self_attn.k_proj": (kv_dim, dim),
            "self_attn.v_proj": (kv_dim, dim),
            "self_attn.o_proj": (dim, q_dim),
            "mlp.gate_proj": (config.intermediate_dim, dim),
            "mlp.up_proj": (config.intermediate_dim, dim),
            "mlp.down_proj": (dim, config.intermediate_dim),
            "input_layernorm": (dim,),
            "post_attention_layernorm": (dim,),
        }
        shapes.update({f"model.layers.{layer}.{module}.weight": shape for module, shape in block.items()})
    shapes["model.norm.weight"] = (dim,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, dim)
    return shapes
