"""What a training step holds and what saving costs it: python tools/bench_train_memory.py memory|save.

memory     peak of the loss over (2,048, 32,000), and of a model with and without activation checkpointing
save       what a checkpoint of 330 MB costs the steps: written while they go on, and waited for

The model is that of bench_train.py.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_train import CONFIG, LENGTH, ROWS

from k2mini.config import CheckpointSection, TrainSection
from k2mini.cpu import describe
from k2mini.data.batches import Blocks
from k2mini.data.corpus import Documents
from k2mini.distributed import ALONE
from k2mini.nn.init import init_weights
from k2mini.nn.llama import Llama
from k2mini.nn.loss import token_loss
from k2mini.training.save import Saver
from k2mini.training.step import build_optimizer, train_step


def peak_of(what: str) -> float:
    """Run one of the single measurements in a process of its own. Returns the MiB that it prints."""
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def loss_peak(naive: bool) -> None:
    """Print by how many MiB the loss, forward and backward over 2,048 positions, raises the peak."""
    hidden = torch.randn(2048, CONFIG.dim, requires_grad=True)
    weight = torch.randn(CONFIG.vocab_size, CONFIG.dim, requires_grad=True)
    labels = torch.randint(CONFIG.vocab_size, (2048,))
    token_loss(hidden[:2], weight, labels[:2]).backward()  # what a first call allocates, and the gradients
    before = _rss()
    if naive:
        F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum").backward()
    else:
        token_loss(hidden, weight, labels).backward()
    gradient = weight.numel() * 4 / 2**20  # the step's own, before it is added
    print(_rss() - before - gradient)


def model_peak(recompute: int) -> None:
    """Print by how many MiB the model, forward and backward over two rows of 512, raises the peak."""
    model = Llama(CONFIG)
    init_weights(model, 0)
    model.model.recompute_every = recompute
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, LENGTH))
    model.loss(tokens[:, :2], None, tokens[:, :2]).backward()
    before = _rss()
    model.loss(tokens, None, tokens).backward()
    print(_rss() - before)


def memory() -> None:
    """Print the peaks of the loss and of the model, each measured in a process of its own."""
    naive, chunked = peak_of("naive-loss"), peak_of("chunked-loss")
    print(f"loss over (2,048, 32,000): naive {naive:,.0f}, k2mini {chunked:,.0f} MiB: {naive / chunked:.1f} times less")
    kept, recomputed = peak_of("kept"), peak_of("recomputed")
    print(
        f"model, 2 x 512: activations kept {kept:,.0f} MiB, checkpointed {recomputed:,.0f} MiB, {kept / recomputed:.1f}"
    )


def saving(number: int, steps: int) -> None:
    """Print how long a checkpoint of 27 M parameters keeps a step waiting, and steps with it against steps alone."""
    config = replace(CONFIG, vocab_size=8000, num_layers=6)
    model = Llama(config)
    init_weights(model, 0)
    section = TrainSection(lr=1e-5, global_batch_size=ROWS, micro_batch_size=ROWS, max_steps=steps)
    samples = Blocks(Documents(torch.randint(3, 8000, (64, LENGTH)).tolist()), LENGTH, document_mask=False, seed=None)
    optimizer, numbers = build_optimizer(model.train(), section), iter(range(10**6))

    def run(saver: Saver | None) -> tuple[float, float]:
        start = time.perf_counter()
        if saver is not None:
            saver.save(next(numbers), model, optimizer, {"identity": {}, "tokens": 0}, wait=False)
        waited = time.perf_counter() - start
        for step in range(steps):
            train_step(model, optimizer, [samples.batch(step * ROWS, ROWS)], section, step, steps)
        if saver is not None:
            saver.wait()
        return waited, time.perf_counter() - start

    run(None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        savers: dict[str, Saver | None] = {"no save": None}
        for name, beside in (("beside the steps", True), ("waited for", False)):
            saver = Saver(Path(folder) / name, CheckpointSection(async_save=beside, keep_last=1), ALONE)
            savers[name] = stack.enter_context(saver)
        rounds = [{name: run(saver) for name, saver in savers.items()} for _ in range(number + 1)]
    for name in savers:
        waits, times = zip(*(one[name] for one in rounds[1:]), strict=True)  # the first makes the memory for the copy
        print(
            f"{name:<17} a step waits {statistics.median(waits):.2f} s, {steps} steps {statistics.median(times):.2f} s"
        )


def main() -> None:
    """Run the measurement that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "save", "naive-loss", "chunked-loss", "kept", "recomputed"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; {describe()}")
    match options.what:
        case "memory":
            memory()
        case "save":
            saving(options.pairs, options.steps)
        case "naive-loss" | "chunked-loss":
            loss_peak(options.what == "naive-loss")
        case _:
            model_peak(int(options.what == "recomputed"))


if __name__ == "__main__":
    main()
