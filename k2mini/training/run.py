"""`k2mini pretrain` and `k2mini finetune`: from a configuration to a model or an adapter on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from k2mini.build import load_model
from k2mini.config import FinetuneConfig, LoraSection, PretrainConfig
from k2mini.files import make_writable, write_text
from k2mini.nn.llama import Llama
from k2mini.nn.lora import attach
from k2mini.text.batches import Blocks, Examples
from k2mini.text.corpus import read_documents
from k2mini.text.instructions import read_examples
from k2mini.text.prompts import get_template
from k2mini.text.tokenizer import Tokenizer
from k2mini.training.checkpoint import read_state
from k2mini.training.loop import train
from k2mini.weights.adapter import load_adapter, read_adapter_config, save_adapter
from k2mini.weights.formats import model_directory, save_model
from k2mini.weights.hf_config import read_model_config

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, device: torch.device | str = "cpu", label: str = "pretrain") -> Path:
    """Train all parameters on plain documents. Returns the directory of the model, `run.dir/model`.

    A run that is complete is left as it is; one that was stopped goes on (see `checkpoint.resume`).
    """
    run_dir, out = _prepare(config, "model")
    if out.exists():
        return out
    model, tokenizer = _load(config.model.path, config.model.dtype, device)
    data = config.data
    documents = read_documents(Path(data.path), tokenizer, eos=data.eos)
    samples = Blocks(documents, data.seq_len, document_mask=data.document_mask, seed=config.run.seed)
    val = None
    if data.val_path is not None:
        documents = read_documents(Path(data.val_path), tokenizer, eos=data.eos)
        val = Blocks(documents, data.seq_len, document_mask=data.document_mask, seed=None)
    train(
        model,
        samples,
        run_dir,
        seed=config.run.seed,
        section=config.train,
        checkpoint=config.checkpoint,
        identity=_identity(config),
        val=val,
        label=label,
    )
    save_model(model.state_dict(), model.config, out, tokenizer=tokenizer)
    return out


def finetune(config: FinetuneConfig, device: torch.device | str = "cpu", label: str = "finetune") -> Path:
    """Train LoRA on instructions. Returns the directory of the adapter, `run.dir/adapter`.

    A run that is complete is left as it is; one that was stopped goes on (see `checkpoint.resume`).
    """
    run_dir, out = _prepare(config, "adapter")
    if out.exists():
        return out
    template = get_template(config.data.template)
    model, tokenizer = _load(config.model.path, config.model.dtype, device)
    section = _attach(model, config)

    def read(path: str, seed: int | None) -> Examples:
        examples = read_examples(
            Path(path),
            tokenizer,
            template,
            train_on_inputs=config.data.train_on_inputs,
            max_seq_len=config.data.max_seq_len,
        )
        return Examples(examples, seed=seed)

    train(
        model,
        read(config.data.path, config.run.seed),
        run_dir,
        seed=config.run.seed,
        section=config.train,
        checkpoint=config.checkpoint,
        identity=_identity(config),
        val=None if config.data.val_path is None else read(config.data.val_path, None),
        label=label,
    )
    save_adapter(model, section, out, base=config.model.path)
    return out


def _prepare(config: PretrainConfig | FinetuneConfig, result: str) -> tuple[Path, Path]:
    """The run's directory, made, with the configuration in it; and where its result goes."""
    run_dir = Path(config.run.dir)
    make_writable(run_dir)
    out = run_dir / result
    if out.exists():
        log.info("%s is complete; set run.dir to another folder to train anew", out)
    else:
        # JSON is YAML, so this file can be given back to the verb.
        write_text(run_dir / "config.yaml", json.dumps(asdict(config), indent=2) + "\n")
    return run_dir, out


def _load(path: str, dtype: str, device: torch.device | str) -> tuple[Llama, Tokenizer]:
    model, tokenizer = load_model(path, dtype=dtype, device=device)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer.model; copy the one the model was trained with")
    return model, tokenizer


def _attach(model: Llama, config: FinetuneConfig) -> LoraSection:
    section = config.lora
    attach(model, section, seed=config.run.seed)
    if section.init_adapter is not None:
        given = read_adapter_config(Path(section.init_adapter))
        for key in ("rank", "alpha", "target_modules"):
            ours, theirs = getattr(section, key), getattr(given, key)
            if isinstance(ours, list):
                ours, theirs = sorted(ours), sorted(theirs)
            if ours != theirs:
                raise ValueError(f"lora.{key} is {ours}, that of lora.init_adapter {section.init_adapter} is {theirs}")
        load_adapter(model, Path(section.init_adapter), given)
    return section


def _identity(config: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    """What a checkpoint must agree on to be resumed."""
    raw = asdict(config)
    train_section = {key: value for key, value in raw["train"].items() if key != "val_every"}
    data = {key: value for key, value in raw["data"].items() if not key.endswith("path")}
    tokenizer = model_directory(config.model.path) / "tokenizer.model"
    return {
        "train": train_section,
        "data": {**data, "sha256": _sha256(Path(config.data.path))},
        "tokenizer": _sha256(tokenizer),
        "seed": config.run.seed,
        "lora": raw.get("lora"),
        "model": str(config.model.path),
        "dtype": config.model.dtype,
    }


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def export(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint of `pretrain` as a Hugging Face directory.

    Raises ValueError where it is no such checkpoint, or `out` exists and is not empty.
    """
    state = read_state(checkpoint)
    identity = state["identity"]
    if identity["lora"] is not None:
        raise ValueError(f"{checkpoint} holds an adapter, not a model; the run's end writes it to run.dir/adapter")
    base = model_directory(identity["model"])
    with safe_open(checkpoint / "tensors.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118 (it is no dict)
        tensors = {name.removeprefix("model."): file.get_tensor(name) for name in names}
    save_model(tensors, read_model_config(base), out, tokenizer=Tokenizer(base / "tokenizer.model"))
