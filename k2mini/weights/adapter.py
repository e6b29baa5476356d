"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from k2mini.config import LoraSection
from k2mini.distributed import fill
from k2mini.files import new_directory, read_json
from k2mini.nn.lora import lora_modules, merged_weight
from k2mini.text.tokenizer import Tokenizer
from k2mini.weights.formats import CheckpointReader, save_model
from k2mini.weights.hf_config import read_model_config

PREFIX = "base_model.model."  # how peft wraps the model; the module's own name follows


def save_adapter(adapters: Mapping[str, Tensor], section: LoraSection, directory: Path, base: str) -> None:
    """Write the adapters of a model; the directory appears whole or not at all.

    Args:
        adapters: parameter name -> tensor, as `adapter_tensors` gives them.
        base: the base model's path, for peft's `base_model_name_or_path`.

    Raises ValueError where there is no adapter, or `directory` exists and is not empty.
    """
    tensors = {f"{PREFIX}{name}.weight": adapters[name].cpu().contiguous() for name in adapters}
    if not tensors:
        raise ValueError("the model has no adapter to save")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": section.rank,
        "lora_alpha": section.alpha if section.alpha % 1 else int(section.alpha),
        "lora_dropout": section.dropout,
        "target_modules": section.target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with new_directory(directory) as beside:
        save_file(tensors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        (beside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter_config(directory: Path) -> LoraSection:
    """The shape of an adapter. Raises ValueError where `directory` is not one, or uses what k2mini does not have."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no adapter_config.json, so it is not an adapter")
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA")
    for key in ("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if raw.get(key):
            raise ValueError(f"{path}: {key} is {raw[key]!r}, which is not supported")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {raw['bias']!r}, only 'none' is supported")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not isinstance(raw.get("r"), int):
        raise ValueError(f"{path}: r must be a whole number and target_modules a list")
    try:
        return LoraSection(
            rank=raw["r"],
            alpha=float(raw.get("lora_alpha") or raw["r"]),
            dropout=float(raw.get("lora_dropout") or 0.0),
            target_modules=sorted(targets),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_adapter(directory: Path, section: LoraSection) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (A (R, in), B (out, R)). Raises ValueError where the file is damaged or of another rank."""
    path = directory / "adapter_model.safetensors"
    pairs: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                module, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
                if kind not in ("lora_A", "lora_B") or not key.startswith(PREFIX):
                    raise ValueError(f"{path} holds {key}, which is no LoRA weight")
                pairs.setdefault(module, {})[kind] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged ({error})") from None
    for module, pair in pairs.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise ValueError(f"{path}: {module} has only {next(iter(pair))}")
        if pair["lora_A"].shape[0] != section.rank or pair["lora_B"].shape[1] != section.rank:
            raise ValueError(f"{path}: {module} is not of rank {section.rank}, which adapter_config.json says")
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in pairs.items()}


def load_adapter(model: nn.Module, directory: Path, section: LoraSection) -> None:
    """Copy an adapter's values into a model that `attach` has prepared.

    Raises ValueError, naming the module, unless the adapter has exactly the model's modules, shapes and rank.
    """
    modules, pairs = lora_modules(model), read_adapter(directory, section)
    odd = sorted(set(modules) ^ set(pairs))
    if odd:
        where = "the adapter" if odd[0] in modules else "the model"
        raise ValueError(f"{directory}: {odd[0]} is not in {where}; they do not belong together")
    for name, (lora_a, lora_b) in pairs.items():
        module = modules[name]
        if lora_a.shape != module.lora_A.shape or lora_b.shape != module.lora_B.shape:
            raise ValueError(f"{directory}: {name} has another shape than the model's")
        fill(module.lora_A, lora_a)
        fill(module.lora_B, lora_b)


def merge_adapter(base: Path, adapter: Path, out: Path) -> None:
    """Write base + adapter as a Hugging Face directory, in the base's dtype, with the base's tokenizer.

    Raises ValueError where the two do not belong together, or the result is not finite.
    """
    config, section = read_model_config(base), read_adapter_config(adapter)
    reader, pairs = CheckpointReader(base), read_adapter(adapter, section)
    tensors = {name: reader.tensor(name) for name in reader.names()}
    for module, (lora_a, lora_b) in pairs.items():
        name = f"{module}.weight"
        if name not in tensors or tuple(tensors[name].shape) != (lora_b.shape[0], lora_a.shape[1]):
            raise ValueError(f"{adapter}: {module} does not fit {base}; they do not belong together")
        tensors[name] = merged_weight(tensors[name], lora_a, lora_b, section.alpha / section.rank)
    file = base / "tokenizer.model"
    save_model(tensors, config, out, tokenizer=Tokenizer(file) if file.exists() else None)
