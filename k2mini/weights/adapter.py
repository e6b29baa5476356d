"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from k2mini.config import LoraSection
from k2mini.distributed import fill
from k2mini.files import new_directory, read_json
from k2mini.model_config import read_model_config
from k2mini.nn.lora import lora_modules, merged_weight
from k2mini.weights.manifest import model_fingerprint, read_manifest, write_manifest
from k2mini.weights.model_directory import CheckpointReader, model_directory, read_bin
from k2mini.weights.model_files import find_tokenizer, save_model
from k2mini.weights.stream import Tensors, Written, write_safetensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = ("lora_A", "lora_B")
PREFIX = "base_model.model."  # how peft wraps the model; the module's own name follows


def save_adapter(
    adapters: Mapping[str, Tensor], section: LoraSection, directory: Path, base: str, *, trained: bool = True
) -> None:
    """Write the adapters of a model, read them back and compare; the directory appears whole or not at all.

    Args:
        adapters: parameter name -> tensor, as `adapter_tensors` gives them.
        base: the base model's directory; its fingerprint is noted where it is one.
        trained: refuse an adapter whose B are all zero, since nothing was learned.

    Raises ValueError where there is no adapter or nothing in it, or `directory` exists and is not empty.
    """
    tensors = {f"{PREFIX}{name}.weight": adapters[name].cpu().contiguous() for name in adapters}
    if not tensors:
        raise ValueError("the model has no adapter to save")
    if trained and not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
        raise ValueError("every B of the adapter is zero: it would have no effect, so nothing was learned")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": section.rank,
        "lora_alpha": section.alpha if section.alpha % 1 else int(section.alpha),
        "lora_dropout": section.dropout,
        "target_modules": section.target_modules,
        "use_rslora": section.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with new_directory(directory) as beside:
        content = Written()
        write_safetensors(Tensors(tensors), list(tensors), beside / WEIGHTS, content)
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        written = read_adapter(beside, read_adapter_config(beside))
        flat = {f"{module}.{kind}": t for module, pair in written.items() for kind, t in zip(KINDS, pair, strict=True)}
        if flat.keys() != adapters.keys() or any(not torch.equal(flat[k], adapters[k].cpu()) for k in flat):
            raise OSError(f"{directory}: what was written does not read back as it was")
        known = Path(base).is_dir()
        note = {"base": model_fingerprint(CheckpointReader(model_directory(base)))} if known else {}
        write_manifest(beside, "adapter", content, note)


def check_base(directory: Path, base: CheckpointReader) -> None:
    """Raise ValueError where an adapter says that it was trained on another base (one of peft's does not say)."""
    note = (read_manifest(directory) or {}).get("base")
    if note is not None and note != model_fingerprint(base):
        raise ValueError(f"{directory} was trained on another base than {base.directory}; they do not belong together")


def read_adapter_config(directory: Path) -> LoraSection:
    """The shape of an adapter. Raises ValueError where `directory` is not one, or uses what k2mini does not have."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no adapter_config.json, so it is not an adapter")
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA")
    for key in ("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern"):
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
            rslora=bool(raw.get("use_rslora")),
            target_modules=sorted(targets),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_adapter(directory: Path, section: LoraSection) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (A (R, in), B (out, R)). Raises ValueError where the file is damaged or of another rank."""
    path, tensors = _read_weights(directory)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if kind not in KINDS or not key.startswith(PREFIX):
            raise ValueError(f"{path} holds {key}, which is no LoRA weight")
        pairs.setdefault(module, {})[kind] = tensor
    if not pairs:
        raise ValueError(f"{path} is empty: it holds no LoRA weight")
    for module, pair in pairs.items():
        if set(pair) != set(KINDS):
            raise ValueError(f"{path}: {module} has only {next(iter(pair))}")
        if pair["lora_A"].shape[0] != section.rank or pair["lora_B"].shape[1] != section.rank:
            raise ValueError(f"{path}: {module} is not of rank {section.rank}, which adapter_config.json says")
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in pairs.items()}


def _read_weights(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """The adapter's file, safetensors or, as peft wrote in 2023, .bin; and the tensors in it."""
    path, old = directory / WEIGHTS, directory / "adapter_model.bin"
    if not path.is_file() and old.is_file():
        return old, read_bin(old)
    try:
        with safe_open(path, framework="pt") as file:
            return path, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged ({error})") from None


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


def merge_adapter(base: Path, adapter: Path, out: Path, *, force: bool = False) -> None:
    """Write base + adapter as a Hugging Face directory, in the base's dtype, with the base's tokenizer.

    A few megabytes are merged at a time.

    Raises ValueError where the two do not belong together, or the result is not finite.
    """
    source = merged_reader(CheckpointReader(base), adapter)
    save_model(
        source, read_model_config(base), out, tokenizer=find_tokenizer(base), force=force, inputs=(base, adapter)
    )


def merged_reader(reader: CheckpointReader, adapter: Path) -> MergedReader:
    """A base's tensors with an adapter merged into them.

    Raises ValueError where the two do not belong together.
    """
    section = read_adapter_config(adapter)
    pairs = read_adapter(adapter, section)
    check_base(adapter, reader)
    for module, (lora_a, lora_b) in pairs.items():
        name = f"{module}.weight"
        if name not in reader.files or reader.shape(name) != (lora_b.shape[0], lora_a.shape[1]):
            raise ValueError(f"{adapter}: {module} does not fit {reader.directory}; they do not belong together")
    return MergedReader(reader, pairs, section.scaling)


class MergedReader(CheckpointReader):
    """The tensors of a directory with an adapter merged into them as they are read."""

    def __init__(self, reader: CheckpointReader, pairs: dict[str, tuple[Tensor, Tensor]], scaling: float) -> None:
        self.directory, self.files, self.is_int8 = reader.directory, reader.files, reader.is_int8
        self._reader, self._pairs, self._scaling = reader, pairs, scaling
        self.shape, self.stored_dtype = reader.shape, reader.stored_dtype  # type: ignore[method-assign]

    def tensor(self, name: str) -> Tensor:
        """One tensor, merged."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The base's, with the same rows of B @ A added."""
        weight, pair = self._reader.rows(name, start, stop), self._pairs.get(name.removesuffix(".weight"))
        if pair is None:
            return weight
        try:
            return merged_weight(weight, pair[0], pair[1][start:stop], self._scaling)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
