"""Deltas: what a licence lets one publish instead of the tuned weights. Made and applied without losing a bit.

The difference is that of the raw words, as integers that wrap: adding it back gives the tuned weights exactly, with
-0.0 and the payloads of NaNs, which no floating-point difference does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from k2mini.files import new_directory, read_json
from k2mini.text.tokenizer import Tokenizer
from k2mini.weights.formats import CheckpointReader, save_model
from k2mini.weights.hf_config import read_model_config

WORDS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
NAMES = {str(dtype): dtype for dtype in WORDS}


def content_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and raw bytes."""
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    words = tensor.contiguous().view(WORDS.get(tensor.dtype, tensor.dtype))
    return hashlib.sha256(header + words.numpy().tobytes()).hexdigest()


def make_delta(base: Path, tuned: Path, out: Path) -> None:
    """Write the difference tuned - base, with the hashes of both sides.

    Raises ValueError where the two are not models of one shape, or `out` exists and is not empty.
    """
    if read_model_config(base) != read_model_config(tuned):
        raise ValueError(f"{base} and {tuned} are models of different shapes (their config.json differ)")
    base_reader, tuned_reader = CheckpointReader(base), CheckpointReader(tuned)
    _same_tensors(base_reader, tuned_reader)
    tensors: dict[str, Tensor] = {}
    hashes = {}
    for name in tuned_reader.names():
        original, after = base_reader.tensor(name), tuned_reader.tensor(name)
        words = WORDS[after.dtype]
        tensors[name] = after.view(words) - original.to(after.dtype).view(words)
        hashes[name] = {"dtype": str(after.dtype), "base": content_hash(original), "tuned": content_hash(after)}
    manifest = {"format": "bits", "tensors": hashes}
    with new_directory(out) as beside:
        save_file(tensors, beside / "delta.safetensors")
        (beside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for file in ("config.json", "tokenizer.model"):
            if (tuned / file).exists():
                shutil.copyfile(tuned / file, beside / file)


def apply_delta(base: Path, delta: Path, out: Path) -> None:
    """Write base + delta, checked tensor by tensor against the tuned weights' hashes.

    Raises ValueError where `base` is not what the delta was made against, or the delta is damaged; nothing is
    written then.
    """
    manifest = read_json(delta / "manifest.json") if (delta / "manifest.json").is_file() else None
    if not isinstance(manifest, dict) or manifest.get("format") != "bits":
        raise ValueError(f"{delta} is not a delta that k2mini made (no manifest.json of format 'bits')")
    reader, hashes = CheckpointReader(base), manifest["tensors"]
    if set(hashes) != set(reader.names()):
        odd = sorted(set(hashes) ^ set(reader.names()))[0]
        raise ValueError(f"{base} and {delta} do not have the same tensors ({odd})")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(delta / "delta.safetensors", framework="pt") as file:
            for name, expected in hashes.items():
                original, dtype = reader.tensor(name), NAMES[expected["dtype"]]
                if content_hash(original) != expected["base"]:
                    raise ValueError(f"{base}: {name} differs from the base that {delta} was made against")
                words = WORDS[dtype]
                tensors[name] = (original.to(dtype).view(words) + file.get_tensor(name)).view(dtype)
                if content_hash(tensors[name]) != expected["tuned"]:
                    raise ValueError(f"{delta}: {name} does not give the tuned weights; the delta is damaged")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{delta}/delta.safetensors is missing or damaged ({error})") from None
    file_ = delta / "tokenizer.model"
    tokenizer = Tokenizer(file_) if file_.exists() else None
    save_model(tensors, read_model_config(delta), out, tokenizer=tokenizer)


def _same_tensors(base: CheckpointReader, tuned: CheckpointReader) -> None:
    odd = sorted(set(base.names()) ^ set(tuned.names()))
    if odd:
        raise ValueError(f"{odd[0]} is not in both {base.directory} and {tuned.directory}")
    for name in base.names():
        if base.shape(name) != tuned.shape(name):
            raise ValueError(f"{name} is {base.shape(name)} in {base.directory} and {tuned.shape(name)} in the other")
