"""`k2mini pretrain` and `k2mini finetune`: from a configuration to a model or an adapter on disk."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from k2mini.build import kept_dtype, training_model
from k2mini.config import FinetuneConfig, PretrainConfig, RunConfig
from k2mini.config_file import check_context, load_config, settings_of
from k2mini.data.chats import OWN, open_template
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import ALONE, World
from k2mini.dtypes import DTYPES
from k2mini.files import output, write_text
from k2mini.model_config import tensor_shapes
from k2mini.nn.decode_ops import check_compiler
from k2mini.nn.llama import Llama
from k2mini.nn.lora import whole_weights
from k2mini.training.boards import check_boards
from k2mini.training.checkpoint import (
    best_checkpoint,
    changes,
    check_room,
    checkpoints,
    find_checkpoint,
    read_state,
    remove_leftovers,
)
from k2mini.training.export import export, export_adapter
from k2mini.training.loop import FILE as METRICS
from k2mini.training.loop import Answer, Task, train
from k2mini.training.samples import COUNTS, Read, documents, instructions
from k2mini.training.step import total_steps
from k2mini.weights.adapter import quantized_from, start_from
from k2mini.weights.model_directory import ModelDirectory, model_directory, read_manifest

log = logging.getLogger(__name__)

CONFIG = "config.yaml"  # in run.dir: the configuration that the run was last accepted with
MARK = (CONFIG, "checkpoints", "model", "adapter", METRICS)

# What `eval.benchmark` is scored with: scores by name. All ranks call it, since each has a part of the model.
Benchmark = Callable[[Llama, Tokenizer], dict[str, float]]


def pretrain(
    config: PretrainConfig,
    world: World = ALONE,
    label: str = "pretrain",
    benchmark: Benchmark | None = None,
    answer: Answer | None = None,
) -> Path:
    """Train on plain documents, on all ranks. Returns the directory of the model or, with `lora`, of the adapter.

    A run that is complete is left as it is; one that was stopped goes on (see `checkpoint.resume`). `label` is that of
    the progress line; `benchmark` is run every `eval.every` steps, and its scores go into the metrics; `answer` is
    called at each validation, and its answers go into samples.jsonl.
    """
    return _run(config, world, label, benchmark, answer, documents)


def finetune(
    config: FinetuneConfig,
    world: World = ALONE,
    label: str = "finetune",
    benchmark: Benchmark | None = None,
    answer: Answer | None = None,
) -> Path:
    """Train on instructions; all else is as of `pretrain`.

    Of all checkpoints, the one of the lowest validation loss becomes the adapter or the model.
    """
    if config.data.template is None:
        base = _base(config)
        template = open_template(None, base.path, base.require_tokenizer())
        config = replace(config, data=replace(config.data, template=template.name))
    return _run(config, world, label, benchmark, answer, instructions)


def _run(
    config: RunConfig,
    world: World,
    label: str,
    benchmark: Benchmark | None,
    answer: Answer | None,
    read: Callable[[Any, Any, World], Read],
) -> Path:
    out, lora = Path(config.run.dir) / ("model" if config.lora is None else "adapter"), config.lora
    with run_directory(config, world):
        if not _is_complete(config, out, world):
            base = _base(config)
            _check_room(config, base)
            samples, val, known_by, counts = read(config, base, world)
            best, identity = isinstance(config, FinetuneConfig), _identity(config, known_by, base, world)
            task = Task(samples, val, identity, label, save_best=best, answer=answer)
            find_checkpoint(Path(config.run.dir) / "checkpoints", config.checkpoint, identity, world)
            _check_room(config, base, task)
            if world.is_main and load_config(type(config), Path(config.run.dir) / CONFIG) != config:
                _write_config(config)  # now that the run may go on with it
            if world.is_main and counts:
                write_text(Path(config.run.dir) / COUNTS, json.dumps(counts, indent=2) + "\n")
            with keep_freed_memory() if world.device.type == "cpu" else nullcontext():
                model, _ = training_model(config.model, config.train, config.parallel, world, lora, config.run.seed)
                if lora is not None and lora.init_adapter is not None:
                    start_from(model, lora, model_directory(lora.init_adapter))
                evaluate = None if benchmark is None else lambda trained: benchmark(trained, base.require_tokenizer())
                last = train(model, task, config.run, config.train, config.checkpoint, config.eval, evaluate, world)
                del model
            if world.is_main:
                kept = (best_checkpoint(last.parent) if best else None) or last
                if kept != last:
                    log.info("the %s of the lowest validation loss is kept: %s", out.name, kept)
                if lora is None:
                    export(kept, out, config.model.dtype, checked=kept == last)
                else:
                    full = quantized_from(base, identity["base"])
                    export_adapter(kept, out, lora, config.model.path, full)
            world.barrier()
    return out


@contextmanager
def run_directory(config: RunConfig, world: World = ALONE) -> Iterator[None]:
    """Keep `run.dir` for this run until the block ends, on ranks that are all started with the same configuration.

    It gets the configuration, and what a killed process left of checkpoints is removed. Where the block fails before
    there is more in a new directory, that is removed, too.

    Raises ValueError where ranks differ, it holds something else, or another process writes it.
    """
    values = {f"{name}.{key}": value for name, part in asdict(config).items() for key, value in (part or {}).items()}
    agree(values, world)
    if config.train.compile:
        check_compiler(world.device)  # before a corpus is prepared, which may take hours
    if config.run.tensorboard or config.run.wandb:
        check_boards(config.run, world)
    run_dir, inputs = Path(config.run.dir), [config.model.path]
    if config.lora is not None and config.lora.init_adapter is not None:
        inputs.append(config.lora.init_adapter)
    is_new = not run_dir.exists()
    with output(run_dir if world.is_main else None, mark=MARK, inputs=inputs):
        try:
            if world.is_main:
                remove_leftovers(run_dir / "checkpoints")
                if not (run_dir / CONFIG).exists():
                    _write_config(config)
            world.barrier()
            torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
            yield
        except BaseException:
            if world.is_main and is_new and {entry.name for entry in run_dir.glob("*")} <= {CONFIG, COUNTS, "demo"}:
                shutil.rmtree(run_dir, ignore_errors=True)
            raise


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let this process keep what it frees until the end, where the C library is glibc, which gives large blocks back.

    A training step frees and allocates a gigabyte, whose pages the system fills with zeros: a tenth of its time.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    assert libc is not None
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
    try:
        yield
    finally:  # as glibc is once large blocks have been freed
        libc.mallopt(-4, 1 << 16)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20)
        libc.malloc_trim(0)


def _write_config(config: RunConfig) -> None:
    # JSON is YAML, so this file can be given back to the command.
    write_text(Path(config.run.dir) / CONFIG, json.dumps(asdict(config), indent=2) + "\n")


def agree(values: dict[str, Any], world: World) -> None:
    """Raise ValueError on all ranks, naming what differs, unless all of them have the same values."""
    first, *others = world.all_gather(values)
    for rank, other in enumerate(others, start=1):
        for name in first:
            if other.get(name) != first[name]:
                found = f"{first[name]} on rank 0, {other.get(name)} on rank {rank}"
                raise ValueError(f"{name} is {found}; start all ranks with the same configuration and files")


def _is_complete(config: RunConfig, out: Path, world: World) -> bool:
    """Whether the run's result is there. Raises ValueError where it is damaged, or the configuration has changed."""
    if not out.exists():
        return False
    with output(out if world.is_main else None, force=True):
        pass  # a process that was killed when it was complete left its lock
    remedy = f"remove {out}, and the next start writes it again from the last checkpoint"
    try:
        manifest = read_manifest(out)
    except ValueError as error:
        raise ValueError(f"{error}; or {remedy}") from None
    if manifest is None or not all((out / name).is_file() for name in manifest["files"]):
        raise ValueError(f"{out} is not complete (by its manifest.json); {remedy}")
    was, now = settings_of(load_config(type(config), Path(config.run.dir) / CONFIG)), settings_of(config)
    saved = checkpoints(Path(config.run.dir) / "checkpoints")
    if isinstance(config, FinetuneConfig) and config.data.template == OWN and saved:  # whose text may have changed
        base = _base(config)
        now["data"]["template"] += open_template(OWN, base.path, base.require_tokenizer()).digest
        was["data"]["template"] = read_state(saved[-1])["identity"]["data"]["template"]
    if changed := changes(was, now):
        said = f"{out} was made with {', '.join(changed)}"
        raise ValueError(f"{said}; set run.dir to a new folder, or restore what changed")
    log.info("%s is complete; to train anew, set run.dir to another folder or remove %s", out, config.run.dir)
    return True


def _base(config: RunConfig) -> ModelDirectory:
    """The base, whose context has room for the samples. Raises ValueError where it is missing or has not."""
    try:
        base = ModelDirectory(config.model.path)
    except ValueError as error:
        hint = "set model.path to a Hugging Face directory (k2mini convert makes one of Meta's files)"
        raise ValueError(f"model.path: {error}; {hint}") from None
    check_context(config, base.config.max_seq_len)
    return base


def _check_room(config: RunConfig, base: ModelDirectory, task: Task | None = None) -> None:
    """Raise ValueError where the disk lacks room for what the run keeps; without a task, for the least that it can."""
    section, trained, number = config.checkpoint, base.config.num_parameters(), 1
    itemsize = result = kept_dtype(config.model, None).itemsize
    if (lora := config.lora) is not None:
        shapes = {name: shape for name, shape in tensor_shapes(base.config).items() if len(shape) == 2}
        trained = sum(math.prod(shapes[name]) for name in whole_weights(lora, base.config))
        named = [shape for name, shape in shapes.items() if name.split(".")[-2] in lora.target_modules]
        trained += lora.rank * sum(map(sum, named))
    else:
        result = DTYPES[config.model.dtype].itemsize
    if task is not None:
        steps = total_steps(config.train, task.samples.num_samples)
        saves = -(-steps // section.every) + task.save_best * -(-steps // (config.train.val_every or steps))
        number = min(saves, section.keep_last + (section.keep_best and task.val is not None) + 1)  # one not yet pruned
    check_room(Path(config.run.dir) / "checkpoints", number, 3 * trained * itemsize, trained * result)


def _identity(config: RunConfig, known_by: dict[str, Any], base: ModelDirectory, world: World) -> dict[str, Any]:
    """What a checkpoint must agree on to be resumed; `known_by` is what `Read` has.

    Raises ValueError on all ranks where they have other files than one another.
    """
    settings = settings_of(config)
    # The directory is opened anew, since files that have been read stay mapped.
    fingerprint, tokenizer = ModelDirectory(base.path).fingerprint(), base.tokenizer_hash()
    files = {"model.path": fingerprint, "data.path": known_by["content"], "tokenizer.model": tokenizer}
    agree({f"the hash of {name}": digest for name, digest in files.items()}, world)
    data = {key: value for key, value in settings["data"].items() if not key.endswith("path")}
    return {
        "schedule": settings["train"],
        "data": data | known_by,
        "tokenizer": tokenizer,
        "seed": config.run.seed,
        "lora": settings["lora"] or None,
        "model": str(config.model.path),
        "base": fingerprint,
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
    }
