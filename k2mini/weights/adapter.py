"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from k2mini.config import LoraSection
from k2mini.distributed import fill
from k2mini.errors import short
from k2mini.files import new_directory, read_json, sha256
from k2mini.model_config import ModelConfig, number, tensor_shapes
from k2mini.nn.layers import Linear
from k2mini.nn.llama import Llama
from k2mini.nn.lora import TARGETS, WHOLE, Adapter, lora_modules, whole_weights
from k2mini.weights.model_directory import ModelDirectory, model_directory, read_manifest
from k2mini.weights.model_files import write_manifest
from k2mini.weights.stream import Tensors, Written, write_safetensors
from k2mini.weights.torch_file import read_bin

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = ("lora_A", "lora_B")
PREFIX = "base_model.model."  # how peft wraps the model; the module's own name follows


def save_adapter(
    adapters: Mapping[str, Tensor],
    section: LoraSection,
    directory: Path,
    base: str,
    *,
    trained: bool = True,
    note: Mapping[str, str] | None = None,
) -> None:
    """Write the adapters of a model, read them back and compare; the directory appears whole or not at all.

    Args:
        adapters: parameter name -> tensor, as `adapter_tensors` gives them, and the weights that trained whole.
        base: adapter_config.json's name of the base model.
        note: for the manifest: `base`, the base's fingerprint, and `quantize`, in what its weights were. None: the
            fingerprint of `base`, where it is a directory.
        trained: refuse an adapter whose B matrices are all zero, since training has then changed nothing.

    Raises ValueError where there is no adapter or nothing in it, or `directory` exists and is not empty.
    """
    tensors = {f"{PREFIX}{name.removesuffix('.weight')}.weight": adapters[name].cpu().contiguous() for name in adapters}
    if not tensors:
        raise ValueError("the model has no adapter to save")
    if trained and not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
        raise ValueError("every B of the adapter is zero, so it would change nothing; it was not written")
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
    if section.modules_to_save:
        config["modules_to_save"] = section.modules_to_save
    with new_directory(directory) as beside:
        if note is None:
            note = {"base": ModelDirectory(base).fingerprint()} if Path(base).is_dir() else {}
        content = Written(note=note)
        write_safetensors(Tensors(tensors), list(tensors), beside / WEIGHTS, content)
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        written, read = read_adapter(beside, read_adapter_config(beside)), read_weights(beside)[1]
        flat = {f"{module}.{kind}": t for module, pair in written.items() for kind, t in zip(KINDS, pair, strict=True)}
        flat |= {name: read[PREFIX + name] for name in WHOLE.values() if PREFIX + name in read}
        if flat.keys() != adapters.keys() or any(not torch.equal(flat[k], adapters[k].cpu()) for k in flat):
            raise OSError(f"{directory}: what was written does not read back as it was")
        write_manifest(beside, "adapter", content)


def check_base(directory: Path, *bases: ModelDirectory) -> ModelDirectory:
    """The one of some models that an adapter was trained on by its manifest; without one, as peft writes it, the first.

    A model and what was quantised from it are one base. Raises ValueError where it is none of them.
    """
    note = (read_manifest(directory) or {}).get("base")
    for base in bases:
        if note is None or note in (own := base.fingerprint(), quantized_from(base, own)):
            return base
    named = ", ".join(str(base.path) for base in bases)
    raise ValueError(f"{directory} was trained on another base than {named}; they do not belong together")


def quantized_from(base: ModelDirectory, own: str) -> str | None:
    """The fingerprint of the model that a base was quantised from; None: it was not, or has changed since.

    Args:
        own: the base's own fingerprint, of its quantised weights.
    """
    noted = base.manifest or {}
    return noted.get("quantized_from") if noted.get("fingerprint") == own else None


def checked_adapter(directory: Path, base: ModelDirectory, *, stacked: bool = False) -> LoraSection:
    """The shape of an adapter, once base and files fit it: before a rank of 10**12 gets memory.

    Args:
        stacked: it is to stand beside other adapters over one model.

    Raises ValueError where they don't, or it can't.
    """
    check_base(directory, base)
    section = read_adapter_config(directory)
    if stacked and section.modules_to_save:
        names = " and ".join(section.modules_to_save)
        raise ValueError(
            f"{directory} has its own {names}, where adapters share the base's; `k2mini merge` it, and serve that"
        )
    read_whole(directory, section, base.config)
    read_adapter(directory, section)
    return section


def read_adapter_config(directory: Path) -> LoraSection:
    """The shape of an adapter. Raises ValueError where `directory` is not one, or uses what k2mini does not have."""
    path = directory / "adapter_config.json"
    if not directory.exists():
        raise ValueError(f"there is no directory {directory}")
    if not path.is_file():
        raise ValueError(f"{directory} has no adapter_config.json, so it is not an adapter")
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA")
    for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if raw.get(key):
            raise ValueError(f"{path}: {key} is {short(raw[key])}, which is not supported")
    whole = raw.get("modules_to_save") or []
    if not isinstance(whole, list) or any(module not in (*WHOLE,) for module in whole):
        raise ValueError(f"{path}: modules_to_save is {short(whole)}; k2mini has embed_tokens and lm_head")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {short(raw['bias'])}, only 'none' is supported")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{path}: target_modules must be a list of names, not {short(targets)}")
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise ValueError(f"{path}: target_modules has {short(unknown[0])}; k2mini adapts {', '.join(TARGETS)}")
    if type(raw.get("r")) is not int:
        raise ValueError(f"{path}: r must be a whole number, not {short(raw.get('r'))}")
    for key, kinds in (("lora_dropout", (int, float)), ("use_rslora", (bool,))):
        if raw.get(key) is not None and type(raw[key]) not in kinds:
            raise ValueError(f"{path}: {key} is {short(raw[key])}, which is not of its type")
    try:
        return LoraSection(
            rank=raw["r"],
            alpha=number(raw, "lora_alpha", float, raw["r"]),
            dropout=float(raw.get("lora_dropout") or 0.0),
            rslora=bool(raw.get("use_rslora")),
            target_modules=sorted(set(targets)),
            train_embeddings="embed_tokens" in whole,
            train_head="lm_head" in whole,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def adapter_digest(directory: str | Path) -> str:
    """SHA-256 of an adapter's files with their names, of a directory or an id on the hub."""
    files = sorted(model_directory(directory).glob("adapter_*"))
    return hashlib.sha256(json.dumps([(file.name, sha256(file)) for file in files]).encode()).hexdigest()


def read_adapter(directory: Path, section: LoraSection) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (A (R, in), B (out, R)). Raises ValueError where the file is damaged or of another rank."""
    path, tensors = read_weights(directory)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.removeprefix(PREFIX) in (WHOLE[name] for name in section.modules_to_save):
            continue
        module, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if kind not in KINDS or not key.startswith(PREFIX):
            raise ValueError(f"{path} holds {key}, which is no LoRA weight under the names that peft gives them")
        pairs.setdefault(module, {})[kind] = tensor
    if not pairs:
        raise ValueError(f"{path} is empty: it holds no LoRA weight")
    for module, pair in pairs.items():
        if set(pair) != set(KINDS):
            raise ValueError(f"{path}: of {module} there is only {next(iter(pair))}; both lora_A and lora_B are needed")
        if any(tensor.dim() != 2 or not tensor.is_floating_point() for tensor in pair.values()):
            raise ValueError(f"{path}: of {module}, lora_A or lora_B is no matrix of floating-point numbers")
        if pair["lora_A"].shape[0] != section.rank or pair["lora_B"].shape[1] != section.rank:
            raise ValueError(f"{path}: {module} is not of rank {section.rank}, which adapter_config.json says")
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in pairs.items()}


def read_whole(directory: Path, section: LoraSection, config: ModelConfig) -> dict[str, Tensor]:
    """Weight name -> what an adapter has in its place, whole (peft's `modules_to_save`).

    Raises ValueError where one is missing, damaged or of another shape than the model's, or the model has one for both.
    """
    try:
        names = whole_weights(section, config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    path, tensors = read_weights(directory)
    shapes, found = tensor_shapes(config), {}
    for name in names:
        tensor = tensors.get(PREFIX + name)
        if tensor is None or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path} has no {PREFIX}{name}, which adapter_config.json names, or it is not finite")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{directory}: {name} has another shape than the model's")
        found[name] = tensor
    return found


def read_weights(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """The adapter's file, safetensors or, as peft wrote in 2023, .bin; and the tensors in it."""
    path, old = directory / WEIGHTS, directory / "adapter_model.bin"
    if not path.is_file() and old.is_file():
        return old, read_bin(old)
    if not path.is_file():
        raise ValueError(f"{path} is missing or damaged (no such file)")
    try:
        with safe_open(path, framework="pt") as file:
            return path, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is missing or damaged ({error})") from None
    except OSError as error:
        raise OSError(f"{path}: {error}") from None


def start_from(model: Llama, section: LoraSection, directory: Path) -> None:
    """Load `lora.init_adapter`, at `directory`, into the model's adapters. Raises ValueError where it does not fit."""
    given = read_adapter_config(directory)
    for key in ("rank", "alpha", "rslora", "target_modules", "train_embeddings", "train_head"):
        ours, theirs = (sorted(v) if isinstance(v := getattr(s, key), list) else v for s in (section, given))
        if ours != theirs:
            raise ValueError(f"lora.{key} is {ours}, that of lora.init_adapter {directory} is {theirs}")
    load_adapter(model, directory, given)


def load_adapter(model: Llama, directory: Path, section: LoraSection) -> None:
    """Copy an adapter's values into a model to which `attach` has added LoRA modules.

    Raises ValueError, naming the module, unless the adapter has exactly the model's modules, shapes and rank.
    """
    whole = read_whole(directory, section, model.config)
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
    for name, tensor in whole.items():
        fill(model.get_parameter(name), tensor)


def load_adapters(model: Llama, base: ModelDirectory, directories: Mapping[str, Path]) -> dict[str, Adapter]:
    """Adapters by name, in the dtype and on the device of a model that was loaded from `base`; it stays as it is.

    Raises ValueError, naming the directory, where one does not fit.
    """
    loaded: dict[str, Adapter] = {}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, directory in directories.items():
        section = checked_adapter(directory, base, stacked=True)
        loaded[name] = adapter = {
            module: (lora_a.to(model.device, model.dtype), lora_b.to(model.device, model.dtype), section.scaling)
            for module, (lora_a, lora_b) in read_adapter(directory, section).items()
        }
        for module, (lora_a, lora_b, _) in adapter.items():
            if module not in modules:
                raise ValueError(f"{directory}: {module} is not in the model; they do not belong together")
            if (modules[module].out_features, modules[module].in_features) != (lora_b.shape[0], lora_a.shape[1]):
                raise ValueError(f"{directory}: {module} has another shape than the model's")
    return loaded
