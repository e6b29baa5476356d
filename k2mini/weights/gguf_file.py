"""GGUF, which llama.cpp runs: a model's tensors in F32 or F16, with the vocabulary. Extra: gguf.

Names, metadata and the order of q's and k's rows are those of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from k2mini.architectures import LinearRopeScaling, Llama3RopeScaling
from k2mini.data.tokenizer import Tokenizer
from k2mini.errors import need_extra, short
from k2mini.files import new_file, output, progress_bar, read_json, read_text
from k2mini.model_config import ModelConfig
from k2mini.nn.layers import inverse_frequencies
from k2mini.weights.meta import interleave, is_rotary
from k2mini.weights.stream import SHOWN, Source, num_bytes

log = logging.getLogger(__name__)

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# llama.cpp's names of what cuts a text before byte-level BPE (its src/llama-vocab.cpp has the expressions).
WORDS = (
    r"Split (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = {
    ("ByteLevel True",): "gpt-2",
    ("Digits True", "ByteLevel True"): "smollm",
    (WORDS.replace("DIGITS", "{1,3}") + " ", "ByteLevel False"): "llama-bpe",
    (WORDS.replace("DIGITS", "") + " ", "ByteLevel False"): "qwen2",
}
SCALED = "rope_freqs.weight"  # what each rotary frequency is divided by, under LLaMA 3.1's scaling


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor that has Hugging Face's."""
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{INNER[inner]}.{kind}"


def write_gguf(
    source: Source,
    config: ModelConfig,
    out: Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
    *,
    force: bool,
    inputs: Sequence[Path] = (),
) -> None:
    """Write a file that llama.cpp runs; it appears whole or not at all.

    Args:
        dtype: float32, or float16 for the matrices (vectors stay float32, as llama.cpp wants them).
        force: replace a file that exists.
        inputs: what is read, which the output must not touch.

    Raises ValueError where the extra is not installed, there is no tokenizer, `dtype` is another, a value is too large
    for it, llama.cpp has no such rotary scaling, `out` exists and is not to be replaced, or the disk is too small.
    """
    try:
        import gguf
    except ImportError:
        raise need_extra("gguf") from None
    if dtype not in (torch.float32, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"GGUF is written in float32 or float16, not {name}; name one with --dtype")
    if tokenizer is None:
        said = "there is no tokenizer.model or tokenizer.json"
        raise ValueError(f"GGUF holds the vocabulary too, and {said}; put it beside the weights")
    architecture = _architecture(config)
    dtypes = {name: dtype if len(source.shape(name)) > 1 else torch.float32 for name in source.names()}
    sizes = {name: num_bytes(source.shape(name), kind) for name, kind in dtypes.items()}
    total = sum(sizes.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    with output(out, file=True, force=force, inputs=inputs, size=total), new_file(out) as beside:
        writer = gguf.GGUFWriter(beside, architecture)
        try:
            _add_fields(writer, config, dtype, gguf)
            _add_vocabulary(writer, config, tokenizer, gguf)
            _write_tensors(writer, source, config, dtypes, total)
        finally:
            writer.close()


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture."""
    if config.model_type in ("llama", "mistral"):  # one and the same there
        if config.sliding_window is not None and config.sliding_window < config.max_seq_len:
            window = f"{config.sliding_window:,} tokens"
            log.warning("llama.cpp has no sliding window for this model: past %s its answers are others", window)
        return "llama"
    if isinstance(config.rope_scaling, Llama3RopeScaling):
        raise ValueError(f"llama.cpp's {config.model_type} has no rotary scaling of type llama3; convert to hf or bin")
    return config.model_type


def _write_tensors(
    writer: Any, source: Source, config: ModelConfig, dtypes: dict[str, torch.dtype], total: int
) -> None:
    """Write the header and all tensors, one after the other."""
    if isinstance(config.rope_scaling, Llama3RopeScaling):
        writer.add_tensor_info(SCALED, (config.head_dim // 2,), torch.empty(0).numpy().dtype, config.head_dim * 2)
    for name, kind in dtypes.items():
        array = torch.empty(0, dtype=kind).numpy()
        shape = source.shape(name)
        writer.add_tensor_info(gguf_name(name), shape, array.dtype, num_bytes(shape, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if isinstance(config.rope_scaling, Llama3RopeScaling):
        writer.write_tensor_data(_divisors(config).numpy())
    with progress_bar(total, "writing", "B", shown=total > SHOWN) as progress:
        for name, kind in dtypes.items():
            turned = is_rotary(name) and config.model_type in ("llama", "mistral")
            written = _tensor(source, name, kind, config.head_dim if turned else None).numpy()
            writer.write_tensor_data(written)
            progress.update(written.nbytes)


def _tensor(source: Source, name: str, dtype: torch.dtype, head_dim: int | None) -> Tensor:
    """A tensor as it is written; with `head_dim`, its rows in the order in which llama.cpp's llama turns them."""
    stored = source.rows(name, 0, source.shape(name)[0])
    cast = stored.to(dtype)
    if dtype == torch.float16 and bool((stored.isfinite() & ~cast.isfinite()).any()):
        raise ValueError(f"{name} has values that are too large for float16; use --dtype float32")
    return (cast if head_dim is None else interleave(cast, head_dim)).contiguous()


def _divisors(config: ModelConfig) -> Tensor:
    plain = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    return (plain / inverse_frequencies(config, torch.float64, torch.device("cpu"))).to(torch.float32)


def _add_fields(writer: Any, config: ModelConfig, dtype: torch.dtype, gguf: Any) -> None:
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.ALL_F32 if dtype == torch.float32 else kinds.MOSTLY_F16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if isinstance(config.rope_scaling, LinearRopeScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)


def _pre_tokenizer(part: Any) -> list[str]:
    """What tokenizer.json cuts texts by, first to last: regular expressions, and the types of the rest."""
    if not isinstance(part, dict):
        return []
    if "pretokenizers" in part:
        return [name for one in part["pretokenizers"] for name in _pre_tokenizer(one)]
    switch = {"ByteLevel": part.get("use_regex", True), "Digits": part.get("individual_digits")}
    return [" ".join(map(str, [part["type"], *part.get("pattern", {}).values(), switch.get(part["type"], "")]))]


def _add_byte_level(writer: Any, config: ModelConfig, tokenizer: Tokenizer, gguf: Any) -> None:
    """The vocabulary of byte-level BPE: its tokens, their merges, and llama.cpp's name of what cuts a text before."""
    content = read_json(tokenizer.path)
    cut, merges = tuple(_pre_tokenizer(content.get("pre_tokenizer"))), content["model"].get("merges")
    if cut not in PRE or merges is None or tokenizer.adds_space:
        said = f"GGUF has no name that k2mini knows for how {tokenizer.path} cuts texts ({short(cut)})"
        raise ValueError(f"{said}; put the model's tokenizer.model in its place, if there is one")
    known = [(tokenizer.piece(token), tokenizer.kind(token)) for token in range(tokenizer.vocab_size)]
    known += [(f"[PAD{token}]", "unused") for token in range(len(known), config.vocab_size)]
    added = {token["content"] for token in content.get("added_tokens", [])}
    kinds = [kind if kind != "normal" or piece not in added else "user_defined" for piece, kind in known]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE[cut])
    writer.add_token_list([piece for piece, _ in known])
    writer.add_token_types([getattr(gguf.TokenType, kind.upper()) for kind in kinds])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    file = tokenizer.path.with_name("chat_template.jinja")
    template = read_text(file) if file.is_file() else tokenizer.hf_config().get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _add_vocabulary(writer: Any, config: ModelConfig, tokenizer: Tokenizer, gguf: Any) -> None:
    if tokenizer.path.suffix == ".json":
        return _add_byte_level(writer, config, tokenizer, gguf)
    tokens, scores, kinds = [], [], []
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    for token in range(config.vocab_size):
        known = token < tokenizer.vocab_size  # rows beyond the tokenizer's are padding
        tokens.append((tokenizer.piece(token) if known else f"[PAD{token}]").encode())
        scores.append(model.get_score(token) if known else -1000.0)
        kinds.append(getattr(gguf.TokenType, tokenizer.kind(token).upper() if known else "UNUSED"))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.adds_space)
