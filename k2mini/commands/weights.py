"""The commands of weights: `merge`, `delta`, `convert`, `info`, `verify`."""

from __future__ import annotations

import argparse
import json
import logging

from k2mini.dtypes import DTYPES
from k2mini.sizes import parse_size
from k2mini.weights.adapter import merge_adapter
from k2mini.weights.convert import convert
from k2mini.weights.delta import apply_delta, make_delta
from k2mini.weights.info import describe_directory, inspect_directory
from k2mini.weights.model_directory import model_directory
from k2mini.weights.verify import verify

log = logging.getLogger("k2mini.commands")


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
