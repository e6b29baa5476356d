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
from k2mini.config import FinetuneConfig, InstructionSection, LoraSection, PretrainConfig, TrainSection
from k2mini.data.batches import Blocks, Example, Examples, shuffled
from k2mini.data.corpus import Corpus, fingerprint, is_prepared, read_corpus_manifest
from k2mini.data.documents import list_files
from k2mini.data.instructions import read_examples
from k2mini.data.packing import PackedExamples
from k2mini.data.prepare import prepare
from k2mini.data.prompts import get_template
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import World
from k2mini.dtypes import DTYPES
from k2mini.files import make_writable, sha256, write_text
from k2mini.nn.llama import Llama
from k2mini.training.checkpoint import StoredModel, best_checkpoint, read_state
from k2mini.training.loop import ALONE, train
from k2mini.weights.adapter import load_adapter, read_adapter_config, save_adapter
from k2mini.weights.model_directory import ModelDirectory
from k2mini.weights.model_files import save_model

log = logging.getLogger(__name__)

Benchmark = Callable[[Llama, Tokenizer], dict[str, float]]  # a score a task


def pretrain(
    config: PretrainConfig,
    world: World = ALONE,
    label: str = "pretrain",
    benchmark: Benchmark | None = None,
) -> Path:
    """Train all parameters on plain documents, on all ranks. Returns the directory of the model, `run.dir/model`.

    `benchmark` is run every `eval.every` steps.

    A run that is complete is left as it is; one that was stopped goes on (see `checkpoint.resume`).
    """
    run_dir, out = _prepare(config, "model", world)
    if out.exists():
        return out
    _set_precision(config.train)
    model, base = training_model(config.model, config.train, config.parallel, world)
    data, seed = config.data, config.run.seed
    directory = _prepared(Path(data.path), config, base.require_tokenizer_file(), world)
    samples = Blocks(Corpus(directory), data.seq_len, document_mask=data.document_mask, seed=seed)
    val = None
    if data.val_path is not None:
        val_corpus: Corpus | None = Corpus(_prepared(Path(data.val_path), config, base.require_tokenizer_file(), world))
    else:
        val_corpus = Corpus(directory, "val") if "val" in read_corpus_manifest(directory)["splits"] else None
    if val_corpus is not None:
        val = Blocks(val_corpus, data.seq_len, document_mask=data.document_mask, seed=None)
    last = train(
        model,
        samples,
        run_dir,
        seed=seed,
        section=config.train,
        checkpoint=config.checkpoint,
        identity=_identity(config, fingerprint(directory), base.require_tokenizer_file()),
        val=val,
        label=label,
        world=world,
        tensorboard=config.run.tensorboard,
        evaluate=_evaluation(config, base, benchmark),
        eval_every=config.eval.every,
    )
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

    `benchmark` is run every `eval.every` steps.

    A run that is complete is left as it is; one that was stopped goes on (see `checkpoint.resume`).
    """
    run_dir, out = _prepare(config, "adapter", world)
    if out.exists():
        return out
    _set_precision(config.train)
    template, section = get_template(config.data.template), config.lora
    model, base = training_model(config.model, config.train, config.parallel, world, section, config.run.seed)
    tokenizer = base.require_tokenizer()
    if section.init_adapter is not None:
        _start_from(model, section, Path(section.init_adapter))

    def read(path: str) -> list[Example]:
        examples = read_examples(
            Path(path),
            tokenizer,
            template,
            train_on_inputs=config.data.train_on_inputs,
            max_seq_len=config.data.max_seq_len,
        )
        return examples

    examples, held_out = _split(read(config.data.path), config)
    samples = _samples(examples, config.data, config.run.seed)
    if config.data.val_path is not None:
        held_out = read(config.data.val_path)
    last = train(
        model,
        samples,
        run_dir,
        seed=config.run.seed,
        section=config.train,
        checkpoint=config.checkpoint,
        identity=_identity(config, sha256(Path(config.data.path)), tokenizer.path),
        val=Examples(held_out, seed=None) if held_out else None,
        label=label,
        world=world,
        tensorboard=config.run.tensorboard,
        save_best=True,
        evaluate=_evaluation(config, base, benchmark),
        eval_every=config.eval.every,
    )
    if world.is_main:
        kept = best_checkpoint(last.parent) or last
        if kept != last:
            log.info("the adapter of the lowest validation loss is kept: %s", kept)
        stored = StoredModel(kept)
        adapters = {name: stored.tensor(name) for name in stored.names()}
        save_adapter(adapters, section, out, base=config.model.path)
    world.barrier()
    return out


def _evaluation(
    config: PretrainConfig | FinetuneConfig, base: ModelDirectory, benchmark: Benchmark | None
) -> Callable[[Llama], dict[str, float]] | None:
    """What the loop is to call. All ranks answer all questions, since each gathers what the others keep."""
    if not config.eval.every or benchmark is None:
        return None
    return lambda trained: benchmark(trained, base.require_tokenizer())


def _split(examples: list[Example], config: FinetuneConfig) -> tuple[list[Example], list[Example]]:
    """What is trained on, and the `data.val_size` examples that run.seed sets aside, drawn whatever their order."""
    size = config.data.val_size
    if size >= len(examples):
        raise ValueError(f"data.val_size ({size}) leaves nothing of the {len(examples)} examples to train on")
    drawn = [shuffled(position, len(examples), config.run.seed) for position in range(size)]
    aside = set(drawn)
    return [e for index, e in enumerate(examples) if index not in aside], [examples[index] for index in drawn]


def _samples(examples: list[Example], data: InstructionSection, seed: int) -> Examples:
    if not data.packing:
        return Examples(examples, seed=seed)
    return PackedExamples(examples, data.max_seq_len, seed=seed)


def _set_precision(section: TrainSection) -> None:
    torch.set_float32_matmul_precision("high" if section.tf32 else "highest")


def _prepare(config: PretrainConfig | FinetuneConfig, result: str, world: World) -> tuple[Path, Path]:
    """The run's directory, made, with the configuration in it; and where its result goes."""
    run_dir = Path(config.run.dir)
    out = run_dir / result
    if world.is_main:
        make_writable(run_dir)
        if out.exists():
            log.info("%s is complete; set run.dir to another folder to train anew", out)
        else:
            # JSON is YAML, so this file can be given back to the command.
            write_text(run_dir / "config.yaml", json.dumps(asdict(config), indent=2) + "\n")
    world.barrier()
    return run_dir, out


def _prepared(path: Path, config: PretrainConfig, tokenizer: Path, world: World) -> Path:
    """The prepared corpus at `path`, or made of what is there, once, within the run's directory.

    Raises ValueError where it was prepared with another tokenizer or in another way.
    """
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
    if manifest["eos"] != config.data.eos:
        raise ValueError(f"{path} was prepared with eos {manifest['eos']}, data.eos is {config.data.eos}")
    return path


def _start_from(model: Llama, section: LoraSection, directory: Path) -> None:
    """Put the values of `lora.init_adapter` into the model's adapters."""
    given = read_adapter_config(directory)
    for key in ("rank", "alpha", "target_modules"):
        ours, theirs = getattr(section, key), getattr(given, key)
        if isinstance(ours, list):
            ours, theirs = sorted(ours), sorted(theirs)
        if ours != theirs:
            raise ValueError(f"lora.{key} is {ours}, that of lora.init_adapter {directory} is {theirs}")
    load_adapter(model, directory, given)


# How a step is computed, not what it computes: these may change when a run is resumed.
_FREE = ("micro_batch_size", "val_every", "activation_checkpointing", "compile", "tf32")


def _identity(config: PretrainConfig | FinetuneConfig, data: str, tokenizer: Path) -> dict[str, Any]:
    """What a checkpoint must agree on to be resumed."""
    raw = asdict(config)
    return {
        "schedule": {key: value for key, value in raw["train"].items() if key not in _FREE},
        "data": {**{key: value for key, value in raw["data"].items() if not key.endswith("path")}, "content": data},
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
