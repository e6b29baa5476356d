"""What several commands have in common: threads, device, model."""

from __future__ import annotations

import argparse
import logging

import torch

from k2mini.build import load_model
from k2mini.data.tokenizer import Tokenizer
from k2mini.dtypes import NAMES
from k2mini.inference.compile import compile_decoding
from k2mini.nn.llama import Llama
from k2mini.weights.model_directory import ModelDirectory

log = logging.getLogger("k2mini.commands")


def set_threads(options: argparse.Namespace) -> None:
    """`--threads`."""
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)


def pick_device(options: argparse.Namespace) -> torch.device:
    """`--device`, and `--threads`. Raises ValueError where there is no such device."""
    set_threads(options)
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise ValueError(f"--device {options.device} is not a device; try cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {options.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def load(options: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    """The model that the options name, as they want it, and its tokenizer. Raises ValueError where it has none."""
    directory = ModelDirectory(options.model)
    model, _ = load_model(
        directory,
        options.adapter,
        options.dtype,
        pick_device(options),
        options.quantize,
        merge=options.merge,
        quantize_head=options.quantize_head,
    )
    if options.compile:
        compile_decoding(model)
    tokenizer = directory.require_tokenizer()
    parameters = model.config.num_parameters() / 1e6
    log.info("%s: %.1f M parameters, %s, on %s", options.model, parameters, NAMES[model.dtype], model.device)
    return model, tokenizer
