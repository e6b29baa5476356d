"""The commands of training: `prepare`, `config`, `pretrain`, `finetune`, `preview`, `export`, `plot`."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from k2mini.config import DTYPE_NAMES, FinetuneConfig, PretrainConfig, RunConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from k2mini.config_file import Config

log = logging.getLogger("k2mini.commands")

KEYS = "k2mini config --list explains every key of CONFIG."


def prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prepare`, whose defaults are those of the function."""
    from k2mini.data.prepare import prepare

    default = {name: parameter.default for name, parameter in signature(prepare).parameters.items()}
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help=".jsonl, .json, .txt, .md (or .gz), or folders"
    )
    parser.add_argument(
        "--tokenizer", required=True, type=Path, metavar="FILE", help="tokenizer.model or .json, or its folder"
    )
    parser.add_argument(
        "--val-percent",
        type=float,
        default=default["val_percent"],
        metavar="P",
        help="set aside P %% of the documents",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=default["workers"],
        metavar="N",
        help=f"files encoded at a time (default: {default['workers']})",
    )
    parser.add_argument("--no-eos", dest="eos", action="store_false", help="no EOS after each document")
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default=default["on_error"],
        help=f"at a malformed line: stop, or leave it out and count (default: {default['on_error']})",
    )
    parser.set_defaults(run=run_prepare)


def run_prepare(options: argparse.Namespace) -> None:
    """Encode documents into a prepared corpus, and print what is in it."""
    from k2mini.data.prepare import describe, prepare
    from k2mini.hub import MODEL
    from k2mini.weights.model_directory import ModelDirectory, model_directory

    tokenizer = options.tokenizer
    if tokenizer.is_dir() or (MODEL.fullmatch(str(tokenizer)) and not tokenizer.exists()):
        tokenizer = ModelDirectory(model_directory(tokenizer, weights=False)).require_tokenizer_file()
    manifest = prepare(
        options.inputs,
        tokenizer,
        options.out,
        eos=options.eos,
        val_percent=options.val_percent,
        on_error=options.on_error,
        workers=options.workers,
        force=options.force,
    )
    print(describe(manifest))


def plot_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `plot`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run.dir of pretrain or finetune")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png")
    parser.add_argument(
        "--chain",
        action="store_true",
        help="the runs are stages: draw each where the one before ends (default: all from step 0)",
    )
    parser.add_argument("--force", action="store_true", help="replace a picture that exists")
    parser.set_defaults(run=run_plot)


def run_plot(options: argparse.Namespace) -> None:
    """Draw the losses of runs."""
    from k2mini.files import output
    from k2mini.training import loop
    from k2mini.training.plot import plot_losses

    runs = {str(folder): folder / loop.FILE for folder in options.runs}
    with output(options.out, file=True, force=options.force, inputs=list(runs.values())):
        plot_losses(runs, options.out, chain=options.chain)
    print(options.out)


def pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    """`pretrain` has a configuration and the common options, which `cli.py` adds."""
    parser.set_defaults(run=run_pretrain)
    parser.epilog = KEYS


def run_pretrain(options: argparse.Namespace) -> None:
    """Train on documents as the configuration says, and print where the model or adapter is."""
    from k2mini.training.run import pretrain

    _train(options, PretrainConfig, pretrain)


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """`finetune` has a configuration and the common options, which `cli.py` adds."""
    parser.set_defaults(run=run_finetune)
    parser.epilog = KEYS


def run_finetune(options: argparse.Namespace) -> None:
    """Train on instructions as the configuration says, and print where the adapter or model is."""
    from k2mini.training.run import finetune

    _train(options, FinetuneConfig, finetune)


def _train(options: argparse.Namespace, kind: type[Config], start: Callable[..., Path]) -> None:
    """Read a configuration of a kind, join the ranks, and `start` the run; rank 0 says what came, and prints where."""
    from torch import OutOfMemoryError

    from k2mini.build import is_sharded, pick_device, set_threads
    from k2mini.commands import following
    from k2mini.config_file import config_kind, load_config
    from k2mini.distributed import ranks
    from k2mini.gpu import repeat_exactly
    from k2mini.training import fit, loop
    from k2mini.training.run import run_directory

    set_threads(options.threads)
    device = pick_device(options.device)
    try:
        config = load_config(kind, options.config, _overrides(options))
    except ValueError:
        if kind is PretrainConfig and options.config.is_file() and config_kind(options.config) is FinetuneConfig:
            why = "not for pretrain (it has keys such as data.template and data.max_seq_len)"
            raise ValueError(f"{options.config} is a file for k2mini finetune, {why}") from None
        raise
    if config.run.deterministic and device.type == "cuda":
        repeat_exactly()
    alone_too = is_sharded(config.model, config.parallel, config.lora, 1)
    with ranks(device, config.parallel, alone_too=alone_too) as world, run_directory(config, world):
        config = with_demo_files(config, is_main=world.is_main)
        world.barrier()  # until the first rank has made them
        try:
            benchmark = following.benchmark(config, world) if config.eval.every else None
            answer = following.answer(config) if config.eval.prompts else None
            out = start(config, world, benchmark=benchmark, answer=answer)
        except OutOfMemoryError as error:
            error.add_note(fit.what_takes_less(config, world.size))  # which `errors.sentence` says
            raise
    if world.is_main:
        print(out, flush=True)
        metrics: Path = out.with_name(loop.FILE)
        if metrics.exists():
            for line in (*loop.summary(metrics).splitlines(), f"every step is in {metrics}, the {out.name} in {out}"):
                log.info("%s", line)


def _overrides(options: argparse.Namespace) -> list[str]:
    """`--seed` and `--dtype` are the file's run.seed and model.dtype."""
    common = [f"run.seed={options.seed}"] if options.seed is not None else []
    common += [f"model.dtype={options.dtype}"] if options.dtype is not None else []
    return common + options.overrides


def with_demo_files(config: Config, *, is_main: bool = True) -> Config:
    """The configuration with its `demo:` paths, if it has any, replaced by files of the demo's world."""
    from k2mini.demo.sources import PREFIX, with_demo_files

    data = [config.data.path, config.data.val_path, *(source.path for source in config.data.sources or ())]
    paths = (config.model.path, *data, *config.eval.benchmark)
    named = any(path is not None and path.startswith(PREFIX) for path in paths)
    return with_demo_files(config, is_main=is_main) if named else config


def either_config(options: argparse.Namespace) -> RunConfig:
    """The configuration that the command line names, of pretraining or of instruction tuning, with its overrides."""
    from k2mini.config_file import config_kind, load_config

    return load_config(config_kind(options.config), options.config, options.overrides)


def preview_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `preview`, but for the configuration."""
    parser.add_argument("--number", type=int, default=2, metavar="N", help="samples (default: 2)")
    parser.set_defaults(run=run_preview)


def run_preview(options: argparse.Namespace) -> None:
    """Print the first samples that a run would take."""
    from k2mini.training.preview import preview

    for line in preview(with_demo_files(either_config(options)), options.number):
        print(line)


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `config`."""
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--list", action="store_true", help="every key of a configuration, its default and meaning")
    either.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="a file, printed with all defaults")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    parser.set_defaults(run=run_config)


def run_config(options: argparse.Namespace) -> None:
    """Print what can be configured, or all of a configuration, as YAML, before anything of it is looked for."""
    import yaml

    from k2mini.config_file import describe_keys

    if options.list:
        print(describe_keys())
    else:
        print(yaml.safe_dump(asdict(either_config(options)), sort_keys=False, allow_unicode=True), end="")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `export`."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run.dir/checkpoints/step_N of pretrain")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of the tensors written (default: the run's model.dtype)")
    parser.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> None:
    """Write a checkpoint as a model's directory."""
    from k2mini.training.export import export

    export(options.checkpoint, options.out, options.dtype, force=options.force)
    print(options.out)
