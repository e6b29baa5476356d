"""`k2mini pretrain` and `k2mini finetune`: from a configuration to a model or an adapter on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from k2mini.build import training_model
from k2mini.config import FinetuneConfig, LoraSection, PretrainConfig, RunConfig
from k2mini.data.batches import Blocks, shuffled
from k2mini.data.corpus import Corpus, fingerprint, is_prepared, read_corpus_manifest
from k2mini.data.documents import list_files
from k2mini.data.instructions import read_examples
from k2mini.data.packing import Example, Examples, PackedExamples
from k2mini.data.prepare import prepare
from k2mini.data.prompts import get_template
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import ALONE, World
from k2mini.dtypes import DTYPES
from k2mini.files import check_output, sha256, write_text
from k2mini.nn.llama import Llama
from k2mini.training.checkpoint import StoredModel, best_checkpoint, read_state
from k2mini.training.loop import Task, train
from k2mini.weights.adapter import load_adapter, read_adapter_config, save_adapter
from k2mini.weights.model_directory import ModelDirectory
from k2mini.weights.model_files import save_model

log = logging.getLogger(__name__)

# What `eval.benchmark` is scored with: scores by name. All ranks call it, since each has a part of the model.
Benchmark = Callable[[Llama, Tokenizer], dict[str, float]]


def pretrain(
    config: PretrainConfig,
    world: World = ALONE,
    label: str = "pretrain",
    benchmark: Benchmark | None = None,
) -> Path:
    """Train all parameters on plain documents, on all ranks. Returns the directory of the model, `run.dir/model`.

    A run that is complete is left as it is; one that was stopped goes on (see `checkpoint.resume`).

    Args:
        label: of the progress line.
        benchmark: run every `eval.every` steps; its scores go into the metrics.
    """
    out = _start(config, "model", world)
    if out.exists():
        return out
    model, base = training_model(config.model, config.train, config.parallel, world)
    data, seed = config.data, config.run.seed

    def blocks(corpus: Corpus, seed: int | None) -> Blocks:
        return Blocks(corpus, data.seq_len, document_mask=data.document_mask, seed=seed)

    directory = _prepared(Path(data.path), config, base, world)
    val = None
    if data.val_path is not None:
        val = blocks(Corpus(_prepared(Path(data.val_path), config, base, world)), None)
    elif "val" in read_corpus_manifest(directory)["splits"]:
        val = blocks(Corpus(directory, "val"), None)
    identity = _identity(config, fingerprint(directory), base.require_tokenizer_file())
    task = Task(blocks(Corpus(directory), seed), val, identity, label)
    evaluate = None if benchmark is None else lambda trained: benchmark(trained, base.require_tokenizer())
    last = train(model, task, config.run, config.train, config.checkpoint, config.eval, evaluate, world)
    if world.is_main:
        export(last, out, config.model.dtype)
    world.barrier()
    return out


def finetune(
    config: FinetuneConfig,
    world: World = ALONE,
    label: str = "finetune",
    benchmark: Benchmark | None = None,
) -> Path:
    """Train LoRA on instructions, on all ranks. Returns the directory of the adapter, `run.dir/adapter`.

    A run that is complete is left as it is; one that was stopped goes on (see `checkpoint.resume`). Of all checkpoints,
    the one of the lowest validation loss becomes the adapter.

    Args:
        label: of the progress line.
        benchmark: run every `eval.every` steps; its scores go into the metrics.
    """
    out = _start(config, "adapter", world)
    if out.exists():
        return out
    template, data, section, seed = get_template(config.data.template), config.data, config.lora, config.run.seed
    model, base = training_model(config.model, config.train, config.parallel, world, section, seed)
    tokenizer = base.require_tokenizer()
    if section.init_adapter is not None:
        _start_from(model, section, Path(section.init_adapter))
    examples, held_out = _split(read_examples(Path(data.path), tokenizer, template, data), config)
    if data.val_path is not None:
        held_out = read_examples(Path(data.val_path), tokenizer, template, data)
    pack = data.packing
    samples = PackedExamples(examples, data.max_seq_len, seed=seed) if pack else Examples(examples, seed=seed)
    val = Examples(held_out, seed=None) if held_out else None
    task = Task(samples, val, _identity(config, sha256(Path(data.path)), tokenizer.path), label, save_best=True)
    evaluate = None if benchmark is None else lambda trained: benchmark(trained, tokenizer)
    last = train(model, task, config.run, config.train, config.checkpoint, config.eval, evaluate, world)
    if world.is_main:
        kept = best_checkpoint(last.parent) or last
        if kept != last:
            log.info("the adapter of the lowest validation loss is kept: %s", kept)
        stored = StoredModel(kept)
        adapters = {name: stored.tensor(name) for name in stored.names()}
        save_adapter(adapters, section, out, base=config.model.path)
    world.barrier()
    return out


def _split(examples: list[Example], config: FinetuneConfig) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and the `data.val_size` examples that are drawn by run.seed to validate."""
    size = config.data.val_size
    if size >= len(examples):
        raise ValueError(f"data.val_size ({size}) leaves nothing of the {len(examples)} examples to train on")
    drawn = [shuffled(position, len(examples), config.run.seed) for position in range(size)]
    aside = set(drawn)
    return [e for index, e in enumerate(examples) if index not in aside], [examples[index] for index in drawn]


def _start(config: RunConfig, result: str, world: World) -> Path:
    """Make the run's directory with the configuration in it. Returns where the result goes; it may exist already."""
    run_dir = Path(config.run.dir)
    out = run_dir / result
    if world.is_main:
        check_output(run_dir, mark="config.yaml")
        run_dir.mkdir(parents=True, exist_ok=True)
        if out.exists():
            log.info("%s is complete; to train anew, set run.dir to another folder or remove %s", out, run_dir)
        else:
            # JSON is YAML, so this file can be given back to the command.
            write_text(run_dir / "config.yaml", json.dumps(asdict(config), indent=2) + "\n")
    world.barrier()
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    return out


def _prepared(path: Path, config: PretrainConfig, base: ModelDirectory, world: World) -> Path:
    """The prepared corpus at `path`; documents there are prepared first, once, into the run's directory.

    Raises ValueError where the corpus was prepared with another tokenizer than the base's or another `data.eos`.
    """
    tokenizer = base.require_tokenizer_file()  # a prepared corpus needs its hash alone
    if not is_prepared(path):
        sources = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in list_files([path])]
        key = hashlib.sha256(f"{sources} {config.data.eos} {sha256(tokenizer)}".encode()).hexdigest()[:12]
        made = Path(config.run.dir) / "data" / f"{path.stem}-{key}"
        if world.is_main and not is_prepared(made):
            prepare([path], tokenizer, made, eos=config.data.eos)
        world.barrier()
        path = made
    manifest = read_corpus_manifest(path)
    if manifest["tokenizer"] != sha256(tokenizer):
        raise ValueError(f"{path} was prepared with another tokenizer than {tokenizer}; prepare it again")
    base.check_vocab_size(manifest["vocab_size"])
    if manifest["eos"] != config.data.eos:
        raise ValueError(f"{path} was prepared with eos {manifest['eos']}, data.eos is {config.data.eos}")
    return path


def _start_from(model: Llama, section: LoraSection, directory: Path) -> None:
    """Load `lora.init_adapter`, at `directory`, into the model's adapters. Raises ValueError where it does not fit."""
    given = read_adapter_config(directory)
    for key in ("rank", "alpha", "target_modules"):
        ours, theirs = getattr(section, key), getattr(given, key)
        if isinstance(ours, list):
            ours, theirs = sorted(ours), sorted(theirs)
        if ours != theirs:
            raise ValueError(f"lora.{key} is {ours}, that of lora.init_adapter {directory} is {theirs}")
    load_adapter(model, directory, given)


# Settings of how a step is computed, or of what is done with data that can't be used. None of them changes what a step
# computes, so they may change when a run is resumed.
_FREE = ("micro_batch_size", "val_every", "activation_checkpointing", "compile", "tf32", "on_error")


def _identity(config: RunConfig, content: str, tokenizer: Path) -> dict[str, Any]:
    """What a checkpoint must agree on to be resumed; `content` is a hash of the training data."""
    raw = asdict(config)
    data = {key: value for key, value in raw["data"].items() if key not in _FREE and not key.endswith("path")}
    return {
        "schedule": {key: value for key, value in raw["train"].items() if key not in _FREE},
        "data": {**data, "content": content},
        "tokenizer": sha256(tokenizer),
        "seed": config.run.seed,
        "lora": raw.get("lora"),
        "model": str(config.model.path),
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
    }


def export(checkpoint: Path, out: Path, dtype: str | None = None, *, force: bool = False) -> None:
    """Write a checkpoint of `pretrain` as a Hugging Face directory, tensor by tensor.

    Args:
        dtype: of the tensors written; None: that of the run's `model.dtype`.
        force: replace a directory that exists.

    Raises ValueError where it is no such checkpoint, or `out` exists and is not empty.
    """
    state = read_state(checkpoint)
    identity = state["identity"]
    if identity["lora"] is not None:
        raise ValueError(f"{checkpoint} holds an adapter, not a model; the run's end writes it to run.dir/adapter")
    base = ModelDirectory(identity["model"])
    tensors = StoredModel(checkpoint, DTYPES[dtype or identity["dtype"]])
    tokenizer = Tokenizer(base.require_tokenizer_file())
    save_model(tensors, base.config, out, tokenizer=tokenizer, force=force, inputs=(checkpoint, base.path))
