"""What a directory is, from headers alone: nothing of 13 GB is read to tell it."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from k2mini.architectures import QUANTIZED
from k2mini.data.tokenizer import open_tokenizer
from k2mini.distributed import local_part
from k2mini.model_config import ModelConfig, tensor_shapes
from k2mini.nn.quant import int8_matrices, quantized_tensors
from k2mini.sizes import readable
from k2mini.weights.adapter import read_adapter, read_adapter_config, read_weights
from k2mini.weights.convert import open_layout
from k2mini.weights.model_directory import CheckpointReader, ModelDirectory, tokenizer_file

WEIGHTS = (".safetensors", ".bin", ".pth")


def inspect_directory(path: Path) -> dict[str, Any]:
    """What a model, delta or adapter is made of.

    Returns: `kind` ('model', 'meta', 'delta' or 'adapter'), `parameters`, `dtypes` (name -> parameters), `files` (name
    -> bytes), `tokenizer`, `manifest` (whether there is one); of a model and a delta `shape`; of a delta `delta`, its
    format; of a model `memory` (see `memory`); of an adapter `rank`, `alpha`, `target_modules`, `modules_to_save` and
    `modules`, the number of those adapted.

    Raises ValueError, naming the file, where the directory is none of these, or not complete.
    """
    directory = ModelDirectory(path)
    manifest = directory.manifest
    found: dict[str, Any] = {"directory": str(path), "files": _files(path), "manifest": manifest is not None}
    if (path / "adapter_config.json").is_file():
        return found | _adapter(path)
    source, config = open_layout(directory)
    sizes: Counter[str] = Counter()
    for name in source.names():
        stored = source.stored_dtype(name) if isinstance(source, CheckpointReader) else source.dtype(name)
        in_nf4 = stored == torch.uint8 and name.endswith(".weight")  # two a byte
        sizes["nf4" if in_nf4 else str(stored).removeprefix("torch.")] += prod(source.shape(name)) * (1 + in_nf4)
    default = "model" if isinstance(source, CheckpointReader) else "meta"
    kind = manifest["kind"] if manifest is not None else default
    found |= {
        "kind": kind,
        "shape": {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "rope_scaling"},
        "parameters": sum(sizes.values()),
        "dtypes": dict(sizes),
        "tokenizer": _tokenizer(path),
    }
    if kind == "delta":
        return found | {"delta": manifest["delta"] if manifest else None}
    return found | {"memory": memory(config)}


def memory(config: ModelConfig) -> dict[str, dict[str, int]]:
    """precision -> {'weights': bytes, 'cache': bytes of the keys and values of one sequence of max_seq_len tokens}.

    Quantised are the blocks' matrices alone, with their scales; all else, and the cache, is bfloat16. NF4 is not there
    where it does not go with the matrices' sizes.
    """
    total, shapes = config.num_parameters(), tensor_shapes(config)
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim * config.max_seq_len
    found = {"float32": {"weights": 4 * total, "cache": 4 * cached}}
    found["bfloat16"] = {"weights": 2 * total, "cache": 2 * cached}
    left = 2 * (total - sum(prod(shapes[name]) for name in int8_matrices(shapes)))
    for how in QUANTIZED:
        with suppress(ValueError):
            parts = quantized_tensors(shapes, how).values()
            weights = left + sum(prod(shape) * dtype.itemsize for shape, dtype in parts)
            found[how] = {"weights": weights, "cache": 2 * cached}
    return found


def _files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.suffix in WEIGHTS}


def _tokenizer(directory: Path) -> dict[str, int | None] | None:
    if (path := tokenizer_file(directory)) is None:
        return None
    tokenizer = open_tokenizer(path)
    return {"tokens": tokenizer.vocab_size, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}


def _adapter(directory: Path) -> dict[str, Any]:
    section = read_adapter_config(directory)
    pairs = read_adapter(directory, section)
    dtypes: Counter[str] = Counter()
    for tensor in read_weights(directory)[1].values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return {
        "kind": "adapter",
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes),
        "rank": section.rank,
        "alpha": section.alpha,
        "target_modules": section.target_modules,
        "modules_to_save": section.modules_to_save,
        "modules": len(pairs),
        "tokenizer": None,
    }


def nonfinite_tensor(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that holds a NaN or an infinity; None: all are finite.

    Reads all weights, so ask it once something is known to be wrong. Of a sharded model each rank sees its own part.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(local_part(tensor.detach()).isfinite().all()):
            return name
    return None


def describe_directory(found: dict[str, Any]) -> str:
    """`inspect_directory`'s findings as lines for people."""
    lines = [f"{found['directory']}: {_title(found)}"]
    dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in found["dtypes"].items())
    lines.append(f"parameters: {found['parameters']:,} ({dtypes})")
    if found["kind"] == "adapter":
        lines.append(
            f"LoRA: rank {found['rank']}, alpha {found['alpha']:g}, on {', '.join(found['target_modules'])} "
            f"({found['modules']} modules){''.join(f', and {name} whole' for name in found['modules_to_save'])}"
        )
    else:
        shape = found["shape"]
        lines.append(
            f"shape: dim {shape['dim']}, {shape['num_layers']} layers, {shape['num_heads']} heads "
            f"({shape['num_kv_heads']} of keys and values) of {shape['head_dim']}, "
            f"intermediate_dim {shape['intermediate_dim']}, vocab_size {shape['vocab_size']}, "
            f"max_seq_len {shape['max_seq_len']}"
            + (f", sliding_window {shape['sliding_window']}" if shape["sliding_window"] else "")
        )
        tokenizer = found["tokenizer"]
        known = "none"
        if tokenizer is not None:
            bos = "no BOS" if tokenizer["bos"] is None else f"BOS {tokenizer['bos']}"
            known = f"{tokenizer['tokens']:,} tokens, {bos}, EOS {tokenizer['eos']}"
        lines.append(f"tokenizer: {known}")
    sizes = found["files"]
    lines.append(f"weights: {len(sizes)} file{'s' * (len(sizes) != 1)}, {readable(sum(sizes.values()))}")
    lines.append("manifest: yes; k2mini verify checks every byte" if found["manifest"] else "manifest: none")
    for precision, parts in found.get("memory", {}).items():
        lines.append(
            f"to run it in {precision}: {readable(parts['weights'])} of weights and, for one row of "
            f"{found['shape']['max_seq_len']:,} tokens, {readable(parts['cache'])} of cache"
        )
    return "\n".join(lines)


def _title(found: dict[str, Any]) -> str:
    kind = found.get("shape", {}).get("model_type", "llama")
    titles = {
        "model": f"a {'LLaMA' if kind == 'llama' else kind.capitalize()} model",
        "meta": "a LLaMA model in Meta's layout",
        "adapter": "a LoRA adapter",
        "delta": f"a delta of format {found.get('delta')}; k2mini delta apply puts it on its base",
    }
    return titles[found["kind"]]
