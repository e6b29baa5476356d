"""Meta's own layout of LLaMA (github:meta-llama/llama, model.py): consolidated.NN.pth and params.json.

Its names differ, and so do the rows of q and k: there the two numbers of a rotary pair are neighbours, here (and at
Hugging Face) they are half a head apart. Models of more than 7B come in several files, split by model parallelism:
column-parallel matrices and the output by rows, row-parallel ones by columns, the embedding by one or the other.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2mini.architectures import Llama3RopeScaling
from k2mini.data.tokenizer import Tokenizer
from k2mini.dtypes import SAFETENSORS_FLOATS
from k2mini.files import new_directory, progress_bar, read_json
from k2mini.model_config import MOST_LAYERS, ModelConfig, number
from k2mini.weights.model_directory import MANIFEST, ModelDirectory
from k2mini.weights.model_files import copy_tokenizer, write_manifest
from k2mini.weights.stream import SHOWN, Source, Written, total_bytes
from k2mini.weights.torch_file import read_bin, write_torch

log = logging.getLogger(__name__)

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
GATE, NORM = "model.layers.0.mlp.gate_proj.weight", "model.norm.weight"
OUTER = {"tok_embeddings.weight": EMBEDDING, "norm.weight": NORM, "output.weight": OUTPUT}
INNER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
BY_COLUMNS = re.compile(r"\.(wo|w2)\.weight$")  # how the row-parallel matrices are split
SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)


def hf_name(name: str) -> str | None:
    """Hugging Face's name of one of Meta's tensors, or None where it is none."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if match and match[2] in INNER:
        return f"model.layers.{match[1]}.{INNER[match[2]]}.weight"
    return OUTER.get(name)


def meta_name(name: str) -> str:
    """Meta's name of a tensor that has Hugging Face's."""
    backward = {ours: theirs for theirs, ours in (*OUTER.items(), *INNER.items())}
    match = re.fullmatch(r"model\.(layers\.\d+)\.(.+)\.weight", name)
    return f"{match[1]}.{backward[match[2]]}.weight" if match else backward[name]


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from halves to neighbouring pairs. (H*E, D) -> (H*E, D)."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from neighbouring pairs to halves. (H*E, D) -> (H*E, D)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def is_rotary(name: str) -> bool:
    """Whether a tensor, of Hugging Face's name, is a q or k projection."""
    return name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight"))


class MetaReader:
    """Meta's files as a source of tensors with Hugging Face's names and rows.

    Raises ValueError, naming the file, where one is missing, damaged, holds code, or does not fit the others.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        paths = sorted(directory.path.glob("consolidated.*.pth"))
        if not paths:
            raise ValueError(f"{directory.path} has no consolidated.00.pth")
        numbers = [path.name.split(".")[1] for path in paths]
        if numbers != [f"{number:02}" for number in range(len(paths))]:
            raise ValueError(f"{directory.path}: consolidated.*.pth are not numbered 00, 01, …; one is missing")
        self._parts = [read_bin(path) for path in paths]
        self._names = {}  # Hugging Face's name -> Meta's
        for name in self._parts[0]:
            if name == "rope.freqs":  # follows from params.json
                continue
            ours = hf_name(name)
            if ours is None or any(name not in part for part in self._parts):
                raise ValueError(f"{paths[0]}: {name} is no tensor of a LLaMA, or is missing in another of the files")
            kinds, first = {(part[name].dtype, part[name].shape) for part in self._parts}, self._parts[0][name]
            if (
                len(kinds) > 1
                or first.dtype not in SAFETENSORS_FLOATS.values()
                or first.dim() != 1 + (not name.endswith("norm.weight"))
            ):
                raise ValueError(
                    f"{paths[0]}: {name} is {first.dtype} of {tuple(first.shape)}, or another in another file"
                )
            self._names[ours] = name
        for name in (EMBEDDING, NORM, GATE):
            if name not in self._names:
                raise ValueError(f"{paths[0]} has no {meta_name(name)}")
        self.config = _read_config(directory, self)
        if self.config.tie_embeddings:
            self._names.pop(OUTPUT, None)
        self._lock = threading.Lock()  # rows are asked for from several threads
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> list[str]:
        """Hugging Face's names of all tensors, sorted."""
        return sorted(self._names)

    def dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype, as stored."""
        return self._parts[0][self._names[name]].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """One whole tensor's shape, put together from the parts in the files."""
        first = tuple(self._parts[0][self._names[name]].shape)
        along = self._split(name)
        return first if along is None else (*first[:along], first[along] * len(self._parts), *first[along + 1 :])

    def _split(self, name: str) -> int | None:
        """The dimension along which a tensor is spread over the files; None: all hold it whole."""
        theirs = self._names[name]
        first = self._parts[0][theirs]
        if len(self._parts) == 1 or first.dim() == 1:
            return None
        if name == EMBEDDING:  # LLaMA 1 and 2 split it by columns, LLaMA 3 by rows
            return 1 if first.shape[1] * len(self._parts) == self._parts[0]["norm.weight"].shape[0] else 0
        return 1 if BY_COLUMNS.search(theirs) else 0

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start, …, stop - 1. The whole tensor is put together first, and kept until another one is asked for."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = None
                self._last = name, self._whole(name)
            return self._last[1][start:stop]

    def _whole(self, name: str) -> Tensor:
        along, parts = self._split(name), [part[self._names[name]] for part in self._parts]
        whole = parts[0] if along is None else torch.cat(parts, dim=along)
        return deinterleave(whole, self.config.head_dim) if is_rotary(name) else whole


def _read_config(directory: ModelDirectory, reader: MetaReader) -> ModelConfig:
    """The model's shape: from the manifest that k2mini writes, else from params.json and the tensors' shapes."""
    known = (directory.manifest or {}).get("config")
    if known is not None:
        try:
            scaling = known["rope_scaling"]
            return ModelConfig(**{**known, "rope_scaling": scaling and Llama3RopeScaling(**scaling)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{directory.path / MANIFEST}: config is no shape of a model ({error})") from None
    path = directory.path / "params.json"
    if not path.is_file():
        raise ValueError(f"{directory.path} has no params.json")
    raw = read_json(path)
    try:
        dim, num_heads = number(raw, "dim", int), number(raw, "n_heads", int)
        num_layers, norm_eps = number(raw, "n_layers", int, most=MOST_LAYERS), number(raw, "norm_eps", float)
        num_kv_heads, rope_theta = number(raw, "n_kv_heads", int, num_heads), number(raw, "rope_theta", float, 10000.0)
        if dim % (2 * num_heads) or num_heads % num_kv_heads:
            raise ValueError(f"heads of {dim} / {num_heads} numbers, in groups of {num_heads} / {num_kv_heads}")
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path}: a field is missing or no number ({error})") from None
    if raw.get("sliding_window") is not None:
        raise ValueError(f"{path}: sliding_window is of Mistral's own layout; take the model's Hugging Face directory")
    # params.json does not say how long the context is. LLaMA 3 is known by its rotary base; the rest may be LLaMA 1 or
    # 2, and the shorter context of 1 is safe for both.
    max_seq_len = (131072 if raw.get("use_scaled_rope") else 8192) if "rope_theta" in raw else 2048
    log.warning(
        "%s does not say how long the context is; config.json will say %d (LLaMA 1: 2048, LLaMA 2: 4096)",
        path,
        max_seq_len,
    )
    output = reader._names.get(OUTPUT)
    first = reader._parts[0]
    tied = output is None or (
        first[output].shape == first["tok_embeddings.weight"].shape
        and all(torch.equal(part[output], part["tok_embeddings.weight"]) for part in reader._parts)
    )
    heads, scaling = (num_heads, num_kv_heads, dim // num_heads), SCALING if raw.get("use_scaled_rope") else None
    sizes = (reader.shape(GATE)[0], reader.shape(EMBEDDING)[0], max_seq_len)
    return ModelConfig(dim, num_layers, *heads, *sizes, rope_theta, scaling, norm_eps, tied)


class _InMetaLayout:
    """A source under Meta's names, with Meta's order of the rows of q and k. A tied output is a tensor of its own."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
        self._source, self._head_dim = source, config.head_dim
        self._ours = {meta_name(name): name for name in source.names()}
        self._ours.setdefault("output.weight", EMBEDDING)

    def names(self) -> list[str]:
        return list(self._ours)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._ours[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._ours[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        ours = self._ours[name]
        if not is_rotary(ours):
            return self._source.rows(ours, start, stop)
        first = start - start % self._head_dim  # whole heads are read, for their rows change places
        last = -(-stop // self._head_dim) * self._head_dim
        return interleave(self._source.rows(ours, first, last), self._head_dim)[start - first : stop - first]


def write_meta(
    source: Source,
    config: ModelConfig,
    out: Path,
    tokenizer: Tokenizer | None,
    *,
    force: bool = False,
    inputs: Sequence[Path] = (),
) -> None:
    """Write consolidated.00.pth, params.json and tokenizer.model, as Meta's code loads them.

    Raises ValueError where Meta's params.json has no field for a feature of `config`.
    """
    params = _params(config)
    renamed, written = _InMetaLayout(source, config), Written(note={"config": config.features()})
    total = total_bytes(renamed)
    with new_directory(out, force=force, inputs=inputs, size=total) as beside:
        with progress_bar(total, "writing", "B", shown=total > SHOWN) as progress:
            write_torch(renamed, renamed.names(), beside / "consolidated.00.pth", written, None, progress.update)
        (beside / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, beside)
        write_manifest(beside, "meta", written)


def _params(config: ModelConfig) -> dict[str, Any]:
    if config.attention_bias or config.qk_norm or config.sliding_window:
        raise ValueError("Meta's format has no biases, norms of q and k, or sliding window, as this model has; take hf")
    if config.head_dim * config.num_heads != config.dim:
        raise ValueError(
            f"Meta's format has no head_dim of its own: there it is dim / num_heads, here it is {config.head_dim}"
        )
    if config.rope_scaling not in (None, SCALING):
        raise ValueError(f"Meta's format knows LLaMA 3.1's rotary scaling only; this model has {config.rope_scaling}")
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        **_hidden(config),
    }
    # LLaMA 1's code refuses fields that it does not know.
    if config.num_kv_heads != config.num_heads:
        params["n_kv_heads"] = config.num_kv_heads
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        params["use_scaled_rope"] = True
    return params


def _hidden(config: ModelConfig) -> dict[str, Any]:
    """The fields from which Meta's code computes intermediate_dim: 2/3 of 4 dim, times a factor, rounded up."""
    wanted, hidden = config.intermediate_dim, int(2 * 4 * config.dim / 3)
    for multiple in (256, 1024, 4096, 512, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-hidden // multiple) * multiple == wanted:
            return {"multiple_of": multiple}
    for factor in (1.3, 1.5, wanted / hidden, (wanted + 0.5) / hidden):
        for multiple in (4096, 1024, 256, 1):
            if -(-int(factor * hidden) // multiple) * multiple == wanted:
                return {"multiple_of": multiple, "ffn_dim_multiplier": factor}
    raise ValueError(
        f"Meta's format has no fields that give an intermediate_dim of {wanted} for a dim of {config.dim}; "
        "convert to hf or bin"
    )
