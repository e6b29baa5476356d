"""The commands of weights: `merge`, `delta`, `convert`, `info`, `verify`."""

from __future__ import annotations

import argparse
import json
import logging
from inspect import signature
from pathlib import Path
from typing import Any

from k2mini.commands.common import LIST, TARGET
from k2mini.config import DTYPE_NAMES
from k2mini.sizes import parse_size

log = logging.getLogger("k2mini.commands")


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `merge`."""
    parser.add_argument("--base", required=True, metavar="DIR", help="the model that the adapters were trained on")
    parser.add_argument(
        "--adapter", required=True, **LIST, type=Path, metavar="DIR", help="one, or several of the same base"
    )
    parser.add_argument(
        "--weights", **LIST, type=float, default=[], metavar="W", help="of each adapter's product (default: 1 each)"
    )
    parser.set_defaults(run=run_merge)


def run_merge(options: argparse.Namespace) -> None:
    """Write a base model with adapters added into its weights."""
    from k2mini.weights.merge import merge_adapters
    from k2mini.weights.model_directory import model_directory

    if len(options.adapter) > 1 and not options.weights:
        log.info("each adapter has weight 1; --weights gives others")
    base, adapters = model_directory(options.base), [model_directory(path) for path in options.adapter]
    merge_adapters(base, adapters, options.out, weights=options.weights, force=options.force)
    print(options.out)


def delta_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands `delta make` and `delta apply`."""
    kinds: Any = parser.add_subparsers(dest="kind", metavar="make|apply", required=True)
    kinds.add_parser("make", declare=_make_arguments, parents=[TARGET], help="tuned - base")
    kinds.add_parser(
        "apply", declare=_apply_arguments, parents=[TARGET], help="base + delta; FastChat's and K2's deltas, too"
    )


def _make_arguments(parser: argparse.ArgumentParser) -> None:
    from k2mini.weights.delta import FORMATS, make_delta

    kind = signature(make_delta).parameters["kind"].default
    parser.add_argument("--base", required=True, metavar="DIR", help="the model that whoever applies the delta has")
    parser.add_argument("--tuned", required=True, metavar="DIR", help="what became of it")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=kind,
        help=f"bits: exact; add: float16 sums, as FastChat and K2 published them (default: {kind})",
    )
    parser.set_defaults(run=run_delta_make)


def run_delta_make(options: argparse.Namespace) -> None:
    """Write the difference between a tuned model and its base."""
    from k2mini.weights.delta import make_delta
    from k2mini.weights.model_directory import model_directory

    base, tuned = model_directory(options.base), model_directory(options.tuned)
    lost = make_delta(base, tuned, options.out, kind=options.format, force=options.force)
    if options.format == "add":
        log.info("%s elements will not come back exactly; --format bits gives every one back", f"{lost:,}")
    print(options.out)


def _apply_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="DIR", help="the model that the delta was made from")
    parser.add_argument("--delta", required=True, metavar="DIR", help="what `delta make` wrote, or a published one")
    parser.add_argument("--resize-vocab", action="store_true", help="tokens that the base lacks come from the delta")
    parser.set_defaults(run=run_delta_apply)


def run_delta_apply(options: argparse.Namespace) -> None:
    """Write the tuned model that a base and a delta give."""
    from k2mini.weights.delta import apply_delta
    from k2mini.weights.model_directory import model_directory

    base, delta = model_directory(options.base), model_directory(options.delta)
    apply_delta(base, delta, options.out, resize_vocab=options.resize_vocab, force=options.force)
    print(options.out)


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `convert`."""
    from k2mini.weights.convert import FORMATS
    from k2mini.weights.stream import SHARD_BYTES

    shard_size = f"{SHARD_BYTES // 10**9}GB"
    parser.add_argument(
        "model", metavar="DIR", help="Hugging Face's (safetensors, .bin) or Meta's (consolidated.*.pth)"
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="hf: safetensors; bin: PyTorch's; meta: consolidated.00.pth; gguf: a file for llama.cpp (extra: gguf)",
    )
    parser.add_argument("--dtype", choices=DTYPE_NAMES[:3], help="of the tensors written (default: as stored)")
    parser.add_argument("--quantize", choices=("int8", "nf4"), help="with --to hf: store the blocks' matrices so")
    parser.add_argument(
        "--shard-size", default=shard_size, metavar="SIZE", help=f"of a file at most (default: {shard_size})"
    )
    parser.set_defaults(run=run_convert)


def run_convert(options: argparse.Namespace) -> None:
    """Write a model in another format, dtype or shard size."""
    from k2mini.dtypes import DTYPES
    from k2mini.weights.convert import convert
    from k2mini.weights.model_directory import model_directory

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


def info_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `info`."""
    parser.add_argument("directory", metavar="DIR", help="a model's or an adapter's")
    parser.add_argument("--json", action="store_true", help="print it as JSON and nothing else")
    parser.set_defaults(run=run_info)


def run_info(options: argparse.Namespace) -> None:
    """Print what a directory holds: a model, a delta or an adapter."""
    from k2mini.weights.info import describe_directory, inspect_directory
    from k2mini.weights.model_directory import model_directory

    found = inspect_directory(model_directory(options.directory)) | {"directory": str(Path(options.directory))}
    print(json.dumps(found) if options.json else describe_directory(found))


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `verify`."""
    parser.add_argument("directory", metavar="DIR", help="a model, an adapter, a corpus, a run or a checkpoint")
    parser.set_defaults(run=run_verify)


def run_verify(options: argparse.Namespace) -> None:
    """Compare a directory's files with its manifest, a checkpoint's with its state; ValueError names what differs."""
    from k2mini.weights.model_directory import model_directory
    from k2mini.weights.verify import verify, verify_files

    parts = [model_directory(options.directory)]
    if (parts[0] / "checkpoints").is_dir():  # a run: its corpora, its checkpoints and its result
        made = sorted(path for folder in ("checkpoints", "data") for path in (parts[0] / folder).glob("[!.]*"))
        parts = [*made, *(parts[0] / name for name in ("model", "adapter") if (parts[0] / name).is_dir())]
    number, unknown = 0, []
    for part in parts:
        if (part / "state.json").is_file():
            from k2mini.training.checkpoint import STATE, read_state

            found = verify_files(part, read_state(part)["files"], STATE)
        else:
            found = verify(part)
        number += found[0]
        unknown += [name if len(parts) == 1 else f"{part.name}/{name}" for name in found[1]]
    if unknown:
        log.warning("not in the manifest, so not checked: %s", ", ".join(unknown))
    print(f"{options.directory}: {number} files are as they were written")
