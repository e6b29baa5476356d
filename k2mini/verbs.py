"""What each verb of the command line does with its options."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k2mini.build import DTYPES, load_model
from k2mini.config import FinetuneConfig, PretrainConfig
from k2mini.config_file import config_kind, load_config
from k2mini.demo import pipeline
from k2mini.demo.report import answer_table, stage_table
from k2mini.demo.sources import with_demo_files
from k2mini.directories import make_writable
from k2mini.distributed import disconnect
from k2mini.evaluation.asking import Asking
from k2mini.evaluation.compare import compare, comparison_table, draw
from k2mini.evaluation.geobench import SUBJECTIVE, load_geobench, load_subjective
from k2mini.evaluation.perplexity import text_perplexity
from k2mini.evaluation.questions import Question, load_questions
from k2mini.evaluation.report import table
from k2mini.evaluation.run import run_benchmark
from k2mini.evaluation.subjective import run_subjective, subjective_table
from k2mini.files import read_json, write_text
from k2mini.inference import terminal
from k2mini.inference.beam import Beams
from k2mini.inference.compiled import compile_decoding
from k2mini.inference.generate import check_length
from k2mini.inference.questions import Decoding, answers, read_questions
from k2mini.inference.sampling import Sampling
from k2mini.nn.llama import Llama
from k2mini.progress import progress_bar
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
from k2mini.weights.formats import CheckpointReader, model_directory
from k2mini.weights.info import describe_directory, inspect_directory
from k2mini.weights.manifest import model_fingerprint, verify

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
    model, tokenizer = load_model(
        options.model,
        options.adapter,
        options.dtype,
        _device(options),
        options.quantize,
        merge=options.merge,
        quantize_head=options.quantize_head,
    )
    if options.compile:
        compile_decoding(model)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer.model; copy the one the model was trained with")
    dtype = str(model.dtype).removeprefix("torch.")
    parameters = model.config.num_parameters() / 1e6
    log.info("%s: %.1f M parameters, %s, on %s", options.model, parameters, dtype, model.device)
    return model, tokenizer


def _decoding(options: argparse.Namespace) -> Decoding:
    """How to decode; what has no effect is said."""
    sampling = Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
    )
    beams = None
    if options.num_beams != 1:
        beams = Beams(options.num_beams, options.length_penalty, options.early_stopping)
        idle = [name for name, off in (("temperature", 0), ("top_k", 0), ("top_p", 1)) if getattr(options, name) != off]
        if idle:
            names = ", ".join("--" + name.replace("_", "-") for name in idle)
            log.warning("%s: no effect with --num-beams %d, which searches and does not sample", names, beams.num_beams)
    return Decoding(
        options.max_new_tokens,
        sampling,
        options.seed or 0,
        tuple(options.stop),
        beams,
        getattr(options, "batch_size", 1),
    )


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
    """Print an answer as it is made, or the answers to many as JSON."""
    # What costs nothing is checked before the model is loaded.
    decoding, template = _decoding(options), get_template(options.template)
    if options.input is not None:
        name = options.input
        questions = read_questions(Path(name), sys.stdin.read() if name == "-" else None)
    else:
        questions = [sys.stdin.read() if options.prompt == "-" else options.prompt]
    model, tokenizer = _load(options)
    prompts = [terminal.encode_prompt(tokenizer, template, question) for question in questions]
    if options.input is None and decoding.beams is None and not options.json and options.out is None:
        text, completion = terminal.answer(
            model,
            tokenizer,
            prompts[0],
            sampling=decoding.sampling,
            seed=decoding.seed,
            max_new_tokens=decoding.max_new_tokens,
            out=sys.stdout,
            stop=decoding.stop,
        )
        print()
        if completion.finish == "length":
            log.info("stopped after --max-new-tokens %d", decoding.max_new_tokens)
        return
    field = "prompt" if options.input is None else "question"
    for prompt in prompts:
        check_length(len(prompt), decoding.max_new_tokens, model.config.max_seq_len)
    entries = []
    with progress_bar(len(prompts), "answering", "questions", shown=len(prompts) > 1) as progress:
        for question, (text, completion) in zip(questions, answers(model, tokenizer, prompts, decoding), strict=True):
            entries.append({field: question, "answer": text, "tokens": completion.tokens, "finish": completion.finish})
            progress.update()
    if options.out is not None:
        write_text(options.out, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
        print(options.out)
    elif options.input is not None or options.json:
        print(json.dumps(entries, ensure_ascii=False))
    else:
        print(entries[0]["answer"])


def run_chat(options: argparse.Namespace) -> None:
    """Talk until end of file."""
    decoding, template = _decoding(options), get_template(options.template)
    model, tokenizer = _load(options)
    conversation = terminal.Conversation(
        model,
        tokenizer,
        template,
        sampling=decoding.sampling,
        seed=decoding.seed,
        max_new_tokens=decoding.max_new_tokens,
        stop=decoding.stop,
    )
    terminal.chat(conversation)


def run_eval(options: argparse.Namespace) -> None:
    """Score the benchmarks; print a table or JSON, and keep all results where --out says."""
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {options.limit}")
    if not options.benchmark and not options.perplexity:
        raise ValueError("name what to evaluate on: --benchmark FILE or --perplexity FILE")
    asking = Asking(
        options.scoring,
        options.template,
        options.answer_prefix.replace("\\n", "\n"),
        options.normalize,
        options.score_end,
        options.shots,
        options.shots_file,
        options.seed or 0,
    )
    questions = [question for path in options.benchmark for question in _questions(path)]
    wanted = set(options.tasks or [])
    if wanted:
        questions = [question for question in questions if question.task in wanted]
    if options.limit is not None:
        questions = [question for question in questions if question.index < options.limit]
    if len({(question.task, question.index) for question in questions}) < len(questions):
        raise ValueError("the same benchmark is named twice")
    open_tasks = [kind for kind in SUBJECTIVE if f"npee/{kind}" in wanted]
    unknown = wanted - {question.task for question in questions} - {f"npee/{kind}" for kind in open_tasks}
    if unknown:
        raise ValueError(f"--tasks {sorted(unknown)[0]}: the benchmarks have no such task")
    texts = [path.read_text(encoding="utf-8") for path in options.perplexity]
    pairs = {kind: _open_pairs(options, kind) for kind in open_tasks}
    model, tokenizer = _load(options)
    report: dict[str, Any] = {"model": str(options.model), "tasks": []}
    if questions:
        fingerprint = model_fingerprint(CheckpointReader(model_directory(options.model)))
        report = run_benchmark(
            model,
            tokenizer,
            questions,
            asking,
            name=str(options.model) + (f" + {options.adapter}" if options.adapter else ""),
            out=options.out,
            fingerprint=fingerprint,
            batch_size=options.batch_size,
        )
    if open_tasks:
        if options.out is not None:
            make_writable(options.out)
        decoding = Decoding(options.max_new_tokens, Sampling(), options.seed or 0, batch_size=options.batch_size)
        report["subjective"] = [
            run_subjective(
                model,
                tokenizer,
                pairs[kind],
                task=f"npee/{kind}",
                template=options.template,
                decoding=decoding,
                out=options.out,
            )
            for kind in open_tasks
        ]
    if texts:
        found = text_perplexity(model, tokenizer, texts, window=options.window, stride=options.stride)
        report["perplexity"] = {"files": [str(path) for path in options.perplexity], **asdict(found)}
    if options.out is not None and (open_tasks or texts):
        make_writable(options.out)
        write_text(options.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
        return
    if questions:
        print(table(report["tasks"]))
    if open_tasks:
        print(subjective_table(report["subjective"]))
    if texts:
        print(f"perplexity {found.perplexity:.2f}, {found.bits_per_byte:.4f} bits a byte, over {found.tokens:,} tokens")


def _questions(path: Path) -> list[Question]:
    """GeoBench's questions, or those of a user's JSONL."""
    if not path.is_file():
        raise ValueError(f"there is no benchmark file {path}")
    return load_questions(path) if path.suffix == ".jsonl" else load_geobench(path)


def _open_pairs(options: argparse.Namespace, kind: str) -> list[tuple[str, str]]:
    for path in options.benchmark:
        if path.suffix != ".jsonl" and isinstance(read_json(path), dict):
            return load_subjective(path, kind)[: options.limit]
    raise ValueError(f"npee/{kind} is in geobench_npee.json, which is not among the benchmarks")


def run_compare(options: argparse.Namespace) -> None:
    """Runs of `eval` side by side."""
    found = compare(options.runs)
    if options.chart is not None:
        draw(found, options.chart)
    print(json.dumps(found) if options.json else comparison_table(found))


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
    convert(
        source,
        options.to,
        options.out,
        dtype=dtype,
        shard_bytes=shard_bytes,
        quantize=options.quantize,
        force=options.force,
    )
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
