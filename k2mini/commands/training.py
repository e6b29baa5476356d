"""The commands of training: `prepare`, `pretrain`, `finetune`, `preview`, `plan`, `export`, `plot`."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

from k2mini.build import is_sharded
from k2mini.commands.common import pick_device
from k2mini.config import FinetuneConfig, PretrainConfig
from k2mini.config_file import config_kind, load_config
from k2mini.data.prepare import describe, prepare
from k2mini.data.tokenizer import Tokenizer
from k2mini.demo.sources import with_demo_files
from k2mini.distributed import World, ranks
from k2mini.evaluation.benchmarks import read_benchmark
from k2mini.evaluation.evaluate import evaluate
from k2mini.evaluation.instances import EvalConfig
from k2mini.evaluation.report import summarise
from k2mini.nn.llama import Llama
from k2mini.sizes import parse_size, readable
from k2mini.training import metrics, run
from k2mini.training.plan import BUDGET as PLAN_BUDGET
from k2mini.training.plan import describe as describe_plan
from k2mini.training.plan import plan_run, smallest_change
from k2mini.training.plot import plot_losses
from k2mini.training.preview import preview

log = logging.getLogger("k2mini.commands")


def run_prepare(options: argparse.Namespace) -> None:
    """Documents into a prepared corpus."""
    tokenizer = options.tokenizer / "tokenizer.model" if options.tokenizer.is_dir() else options.tokenizer
    manifest = prepare(
        options.inputs,
        tokenizer,
        options.out,
        eos=options.eos,
        val_percent=options.val_percent,
        on_error=options.on_error,
        workers=options.workers,
    )
    print(describe(manifest))


def run_plot(options: argparse.Namespace) -> None:
    """Loss curves of runs."""
    plot_losses({str(folder): folder / metrics.FILE for folder in options.runs}, options.out)
    print(options.out)


def run_pretrain(options: argparse.Namespace) -> None:
    """Further pretraining."""
    device = pick_device(options)
    config = with_demo_files(load_config(PretrainConfig, options.config, _overrides(options)))
    assert isinstance(config, PretrainConfig)
    with ranks(device, config.parallel, alone_too=is_sharded(config.model, None, 1)) as world:
        out = run.pretrain(config, world, benchmark=_benchmark(config, world))
    if world.is_main:
        print(out)


def run_finetune(options: argparse.Namespace) -> None:
    """Instruction tuning."""
    device = pick_device(options)
    config = with_demo_files(load_config(FinetuneConfig, options.config, _overrides(options)))
    assert isinstance(config, FinetuneConfig)
    with ranks(device, config.parallel, alone_too=is_sharded(config.model, config.lora, 1)) as world:
        out = run.finetune(config, world, benchmark=_benchmark(config, world))
    if world.is_main:
        print(out)


def _benchmark(config: PretrainConfig | FinetuneConfig, world: World) -> run.Benchmark | None:
    """What `eval` asks for, its questions read before the long run begins."""
    section = config.eval
    if not section.every:
        return None
    eval_config = EvalConfig(section.scoring, section.template, section.answer_prefix)
    questions = [question for path in section.benchmark for question in read_benchmark(Path(path))]
    questions = [question for question in questions if section.limit is None or question.index < section.limit]

    def benchmark(model: Llama, tokenizer: Tokenizer) -> dict[str, float]:
        results = evaluate(model, tokenizer, questions, eval_config, shown=world.is_main)
        summaries = summarise(questions, results, eval_config.settings())
        return {f"accuracy/{row['task']}": row["accuracy"] for row in summaries}

    return benchmark


def _overrides(options: argparse.Namespace) -> list[str]:
    """`--seed` and `--dtype` are the file's run.seed and model.dtype."""
    common = [f"run.seed={options.seed}"] if options.seed is not None else []
    common += [f"model.dtype={options.dtype}"] if options.dtype is not None else []
    return common + options.overrides


def _either_config(options: argparse.Namespace) -> PretrainConfig | FinetuneConfig:
    if config_kind(options.config) is PretrainConfig:
        return with_demo_files(load_config(PretrainConfig, options.config, options.overrides))
    return with_demo_files(load_config(FinetuneConfig, options.config, options.overrides))


def run_preview(options: argparse.Namespace) -> None:
    """What a run would be fed."""
    for line in preview(_either_config(options), options.number):
        print(line)


def run_plan(options: argparse.Namespace) -> None:
    """What a run would take."""
    memory = parse_size(options.gpu_memory, "--gpu-memory")
    config = _either_config(options)
    found = plan_run(config, options.world_size)
    fits = found.peak <= PLAN_BUDGET * memory
    change = None if fits else smallest_change(config, options.world_size, memory, PLAN_BUDGET)
    if options.json:
        print(json.dumps({**asdict(found), "fits": fits, "change": change}))
        return
    print(describe_plan(found, options.world_size))
    share = f"{100 * PLAN_BUDGET:.0f} % of {options.gpu_memory}"
    size = readable(found.peak)
    if fits:
        print(f"it fits: {size} are within {share}")
    else:
        print(f"it does not fit: {size} are more than {share}; the smallest change that fits: {change or 'none found'}")


def run_export(options: argparse.Namespace) -> None:
    """A checkpoint as a model."""
    run.export(options.checkpoint, options.out, options.dtype, force=options.force)
    print(options.out)
