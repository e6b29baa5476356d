"""The shape of a model, and its translation from and to Hugging Face's config.json, whose names stand here alone.

Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2mini.architectures import ARCHITECTURES, QUANTIZED, LinearRopeScaling, Llama3RopeScaling, RopeScaling
from k2mini.files import read_json

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
class ModelConfig:
    """The shape of a LLaMA (Touvron et al. 2023, arXiv 2302.13971; grouped queries: 2307.09288) or of one of its kin.

    These are Mistral (Jiang et al. 2023, 2310.06825), Qwen2 (Yang et al. 2024, 2407.10671) and Qwen3 (2505.09388).

    Raises ValueError, naming the field and the value, where the shape is impossible, or no architecture has it.
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
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # lm_head shares the embedding's weight
    attention_bias: bool = False  # of q, k and v
    qk_norm: bool = False  # an RMS norm of each head of q and k, before the rotary positions
    sliding_window: int | None = None  # a query attends to so many tokens, its own among them; None: to all
    model_type: str = ""  # Hugging Face's; '': the one that has these features

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
        if self.sliding_window is not None:
            number(vars(self), "sliding_window", int)
        features = {"qwen3": self.qk_norm, "qwen2": self.attention_bias, "mistral": self.sliding_window is not None}
        kind = self.model_type or next((name for name, has in features.items() if has), "llama")
        object.__setattr__(self, "model_type", kind)
        if kind not in ARCHITECTURES or any(
            has != (name == kind) for name, has in features.items() if has or "q" in name
        ):
            raise ValueError(
                f"no {kind} has attention_bias {self.attention_bias}, qk_norm {self.qk_norm} and sliding_window "
                f"{self.sliding_window}"
            )

    def features(self) -> dict[str, Any]:
        """All fields but those of features that it does not have: so a LLaMA's hashes are as they ever were."""
        plain = {"attention_bias": False, "qk_norm": False, "sliding_window": None, "model_type": "llama"}
        return {name: value for name, value in asdict(self).items() if plain.get(name, ...) != value}

    def num_parameters(self) -> int:
        """Number of weights, in closed form."""
        attention = self.dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.dim * self.intermediate_dim
        if self.attention_bias:
            attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        block = attention + mlp + 2 * self.dim + 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.num_layers * block + self.dim + embeddings


# dim, layers, heads, key/value heads, head_dim, intermediate_dim, vocabulary, context. LLaMA 1: Touvron et al. 2023,
# table 2; norm_eps and intermediate_dim as in Meta's params.json and code. The others: config.json of
# meta-llama/Meta-Llama-3-8B, mistralai/Mistral-7B-v0.1 and Qwen/Qwen2.5-7B.
PRESETS = {
    "llama-7b": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000),
    "llama-13b": ModelConfig(5120, 40, 40, 40, 128, 13824, 32000),
    "llama-3-8b": ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, 8192, rope_theta=5e5, norm_eps=1e-5),
    "mistral-7b": ModelConfig(4096, 32, 32, 8, 128, 14336, 32000, 32768, norm_eps=1e-5, sliding_window=4096),
    "qwen2.5-7b": ModelConfig(3584, 28, 28, 4, 128, 18944, 152064, 131072, rope_theta=1e6, attention_bias=True),
}


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file, none where it is not there. Raises ValueError where it holds something else."""
    if not isinstance(fields := read_json(path) if os.path.lexists(path) else {}, dict):
        raise ValueError(f"{path} must hold a JSON object, not {fields!r:.80}")
    return fields


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
    return read_fields(path)


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
    architectures, kind = raw.get("architectures") or [], raw.get("model_type")
    if not isinstance(architectures, list):
        raise ValueError(f"architectures must be a list, not {architectures!r:.80}")
    known = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if known is None or any(name not in known.names for name in architectures):
        name = ", ".join(map(str, architectures)) or "not named"
        raise ValueError(
            f"model_type is {kind!r:.80}, architecture {name:.80}; k2mini runs causal language models of model_type "
            f"{', '.join(ARCHITECTURES)} only (such as LlamaForCausalLM)"
        )
    quantization = raw.get("quantization_config")
    if quantization not in (None, *QUANTIZED.values()):
        raise ValueError(
            f"quantization_config is {quantization!r:.80}; k2mini reads its own int8 weights only, and NF4"
        )
    for key, supported in known.only.items():
        if raw.get(key, supported) != supported:
            raise ValueError(f"{key} is {raw[key]!r:.80}; k2mini's {kind} supports {supported!r} only")

    raw = known.defaults | raw
    dim = number(raw, "hidden_size", int)
    num_heads = number(raw, "num_attention_heads", int)
    if num_heads < 1 or (raw.get("head_dim") is None and dim % num_heads):
        raise ValueError(f"hidden_size ({dim}) must be a multiple of num_attention_heads ({num_heads})")
    tied = raw.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings must be true or false, not {tied!r:.80}")
    num_layers = number(raw, "num_hidden_layers", int, most=MOST_LAYERS)
    window = number(raw, "sliding_window", int) if kind == "mistral" and raw["sliding_window"] is not None else None
    each = "full_attention" if window is None else "sliding_attention"
    if raw.get("layer_types") not in (None, [each] * num_layers):
        raise ValueError(f"layer_types is {raw['layer_types']!r:.80}; k2mini's {kind} has {each!r} in all layers")
    rope_theta, rope_scaling = _rope(raw)
    return ModelConfig(
        dim=dim,
        num_layers=num_layers,
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
        attention_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        sliding_window=window,
        model_type=str(kind),
    )


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling: `rope_theta` + `rope_scaling` up to transformers 4, `rope_parameters` since 5."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_scaling must be an object, not {parameters!r:.80}")
    for name, value in parameters.items():
        if isinstance(value, dict):
            raise ValueError(f"rope_scaling has values of its own for {name!r:.80}, which is not supported")
    theta = number({**raw, **parameters}, "rope_theta", float, 10000.0)
    for holder in (raw, parameters):
        if holder.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"partial_rotary_factor {holder['partial_rotary_factor']!r:.80} is not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRopeScaling(number(parameters, "factor", float))
    if kind != "llama3":
        known = "'default', 'linear' and 'llama3'"
        raise ValueError(f"rope_scaling of type {kind!r:.80} is not supported; k2mini knows {known}")
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
    scaling, kind = config.rope_scaling, config.model_type
    own: dict[str, Any] = {"use_sliding_window": False}  # of Qwen
    if kind in ("llama", "mistral"):
        plain = {"attention_bias": False, "mlp_bias": False}
        own = plain if kind == "llama" else {"sliding_window": config.sliding_window}
    return {
        "architectures": [ARCHITECTURES[kind].names[0]],
        "model_type": kind,
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
        "rope_scaling": scaling and scaling.hf_fields(),
        **own,
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
        if config.qk_norm:
            block |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (config.head_dim,))
        shapes.update({f"model.layers.{layer}.{module}.weight": shape for module, shape in block.items()})
        for name, width in {"q": q_dim, "k": kv_dim, "v": kv_dim}.items() if config.attention_bias else ():
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (width,)
    shapes["model.norm.weight"] = (dim,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, dim)
    return shapes
