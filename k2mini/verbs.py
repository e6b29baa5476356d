"""What each verb of the command line does with its options."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from k2mini.build import DTYPES, load_model
from k2mini.config import FinetuneConfig, PretrainConfig
from k2mini.config_file import config_kind, load_config
from k2mini.demo import pipeline
from k2mini.demo.report import answer_table, stage_table
from k2mini.demo.sources import with_demo_files
from k2mini.distributed import disconnect
from k2mini.evaluation.geobench import load_geobench
from k2mini.evaluation.report import table
from k2mini.evaluation.run import Asking, run_benchmark
from k2mini.inference import terminal
from k2mini.inference.sampling import Sampling
from k2mini.nn.llama import Llama
from k2mini.sizes import parse_size, readable
from k2mini.text.prepare import describe, prepare
from k2mini.text.prompts import get_template
from k2mini.text.tokenizer import Tokenizer
from k2mini.training import metrics, run
from k2mini.training.plan import BUDGET as PLAN_BUDGET
from k2mini.training.plan import describe as describe_plan
from k2mini.training.plan import plan_run, smallest_change
from k2mini.training.plot import plot_losses
from k2mini.training.preview import preview
from k2mini.weights.adapter import merge_adapter
from k2mini.weights.convert import convert
from k2mini.weights.delta import apply_delta, make_delta
from k2mini.weights.formats import model_directory
from k2mini.weights.info import describe_directory, inspect_directory
from k2mini.weights.manifest import verify

log = logging.getLogger(__name__)


def _set_threads(options: argparse.Namespace) -> None:
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)


def _device(options: argparse.Namespace) -> torch.device:
    _set_threads(options)
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise ValueError(f"--device {options.device} is not a device; try cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {options.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _load(options: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    model, tokenizer = load_model(options.model, options.adapter, options.dtype, _device(options), options.quantize)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer.model; copy the one the model was trained with")
    dtype = str(model.dtype).removeprefix("torch.")
    parameters = model.config.num_parameters() / 1e6
    log.info("%s: %.1f M parameters, %s, on %s", options.model, parameters, dtype, model.device)
    return model, tokenizer


def _sampling(options: argparse.Namespace) -> Sampling:
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {options.max_new_tokens}")
    return Sampling(options.temperature, options.top_k, options.top_p)


def run_demo(options: argparse.Namespace) -> None:
    """The pipeline in miniature."""
    _set_threads(options)
    report = pipeline.run_demo(options.out, seed=options.seed, quick=options.quick, control=options.control)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
        return
    print(stage_table(report["stages"]))
    print()
    print(answer_table(report["answers"]))
    print(f"\n{report['seconds']:.0f} s; all of it is in {options.out}, with the commands of every stage in report.md")


def run_generate(options: argparse.Namespace) -> None:
    """Print the answer as it is made, or JSON at the end."""
    # What costs nothing is checked before the model is loaded.
    sampling, template = _sampling(options), get_template(options.template)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    model, tokenizer = _load(options)
    text, completion = terminal.answer(
        model,
        tokenizer,
        terminal.encode_prompt(tokenizer, template, prompt),
        sampling=sampling,
        seed=options.seed or 0,
        max_new_tokens=options.max_new_tokens,
        out=io.StringIO() if options.json else sys.stdout,
    )
    if options.json:
        entry = {"prompt": prompt, "answer": text, "tokens": completion.tokens, "finish": completion.finish}
        print(json.dumps([entry], ensure_ascii=False))
        return
    print()
    if completion.finish == "length":
        log.info("stopped after --max-new-tokens %d", options.max_new_tokens)


def run_chat(options: argparse.Namespace) -> None:
    """Talk until end of file."""
    sampling, template = _sampling(options), get_template(options.template)
    model, tokenizer = _load(options)
    conversation = terminal.Conversation(
        model,
        tokenizer,
        template,
        sampling=sampling,
        seed=options.seed or 0,
        max_new_tokens=options.max_new_tokens,
    )
    terminal.chat(conversation)


def run_eval(options: argparse.Namespace) -> None:
    """Score the benchmarks; print a table or JSON, and keep all results where --out says."""
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {options.limit}")
    asking = Asking(options.scoring, options.template, options.answer_prefix, options.normalize, options.score_end)
    questions = [question for path in options.benchmark for question in load_geobench(path)]
    if options.limit is not None:
        questions = [question for question in questions if question.index < options.limit]
    if len({(question.task, question.index) for question in questions}) < len(questions):
        raise ValueError("the same benchmark is named twice")
    model, tokenizer = _load(options)
    report = run_benchmark(model, tokenizer, questions, asking, name=str(options.model), out=options.out)
    print(json.dumps(report, ensure_ascii=False) if options.json else table(report["tasks"]))


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
    device = _device(options)
    config = with_demo_files(load_config(PretrainConfig, options.config, _overrides(options)))
    assert isinstance(config, PretrainConfig)
    _print_first(run.pretrain(config, device))


def run_finetune(options: argparse.Namespace) -> None:
    """Instruction tuning."""
    device = _device(options)
    config = with_demo_files(load_config(FinetuneConfig, options.config, _overrides(options)))
    assert isinstance(config, FinetuneConfig)
    _print_first(run.finetune(config, device))


def _print_first(path: Path) -> None:
    """A run's result, from one of its ranks; then all of them part."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(path)
    disconnect()


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


def run_merge(options: argparse.Namespace) -> None:
    """An adapter into its base."""
    merge_adapter(model_directory(options.base), options.adapter, options.out, force=options.force)
    print(options.out)


def run_delta_make(options: argparse.Namespace) -> None:
    """tuned - base."""
    base, tuned = model_directory(options.base), model_directory(options.tuned)
    lost = make_delta(base, tuned, options.out, kind=options.format, force=options.force)
    if options.format == "add":
        log.info("%s elements will not come back exactly; --format bits gives every one back", f"{lost:,}")
    print(options.out)


def run_delta_apply(options: argparse.Namespace) -> None:
    """base + delta."""
    base, delta = model_directory(options.base), model_directory(options.delta)
    apply_delta(base, delta, options.out, resize_vocab=options.resize_vocab, force=options.force)
    print(options.out)


def run_convert(options: argparse.Namespace) -> None:
    """A model in another layout."""
    dtype = DTYPES[options.dtype] if options.dtype else None
    shard_bytes = parse_size(options.shard_size, "--shard-size")
    source = model_directory(options.model)
    convert(source, options.to, options.out, dtype=dtype, shard_bytes=shard_bytes, force=options.force)
    print(options.out)


def run_info(options: argparse.Namespace) -> None:
    """What a directory holds."""
    found = inspect_directory(model_directory(options.directory))
    print(json.dumps(found) if options.json else describe_directory(found))


def run_verify(options: argparse.Namespace) -> None:
    """A directory against its manifest."""
    number, unknown = verify(model_directory(options.directory))
    if unknown:
        log.warning("not in the manifest, so not checked: %s", ", ".join(unknown))
    print(f"{options.directory}: {number} files are as they were written")
