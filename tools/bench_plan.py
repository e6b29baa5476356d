"""`k2mini plan` against what real ranks use on a CPU: python tools/bench_plan.py [CASE …] (four minutes).

Each case runs three steps of a 118 M model (dim 768, 12 layers, vocabulary 32,000) in processes of its own; measured is
the growth of the resident memory over what a process has before the model is made. Of several ranks that is less: a
plan counts the peaks of a GPU's streams, which a CPU's memory does not keep apart.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from k2mini.build import training_model
from k2mini.config import FinetuneConfig, LoraSection, PretrainConfig
from k2mini.config_file import config_kind, load_config
from k2mini.data.batches import Batch
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import ranks
from k2mini.model_config import ModelConfig
from k2mini.nn.init import init_weights
from k2mini.nn.llama import Llama
from k2mini.training.plan import plan_run
from k2mini.training.step import build_optimizer, train_step
from k2mini.weights.model_files import save_model

SHAPE = ModelConfig(
    dim=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    intermediate_dim=2048,
    vocab_size=32000,
    max_seq_len=2048,
)
PRETRAIN = "data: {path: x, seq_len: 512, document_mask: false}"
FINETUNE = "data: {path: x, max_seq_len: 512}\nlora: {rank: 8}"
# name: (ranks, data section, more of the train section)
CASES: dict[str, tuple[int, str, str]] = {
    "1 rank, full training": (1, PRETRAIN, ""),
    "2 ranks, full training": (2, PRETRAIN, ""),
    "2 ranks, checkpointing": (2, PRETRAIN, ", activation_checkpointing: 1"),
    "1 rank, LoRA": (1, FINETUNE, ""),
    "2 ranks, LoRA, checkpointing": (2, FINETUNE, ", activation_checkpointing: 1"),
}


def read(path: Path) -> PretrainConfig | FinetuneConfig:
    """A configuration file, of further pretraining or of instruction tuning."""
    return (
        load_config(PretrainConfig, path) if config_kind(path) is PretrainConfig else load_config(FinetuneConfig, path)
    )


def resident() -> int:
    """The resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(path: Path) -> None:
    """Take three steps on every rank, and print the largest growth of memory of any of them."""
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # large blocks are given back at once, as a GPU's allocator would
    config = read(path)
    with ranks(torch.device("cpu"), config.parallel) as world:
        lora: LoraSection | None = config.lora if isinstance(config, FinetuneConfig) else None
        before = resident()
        model, _ = training_model(config.model, config.train, config.parallel, world, lora)
        optimizer = build_optimizer(model.train(), config.train)
        rows = config.train.micro_batch_size
        tokens = torch.randint(3, SHAPE.vocab_size, (rows, 513))
        positions = None if lora is None else torch.arange(512).repeat(rows, 1)
        batch = Batch(tokens[:, :-1], positions, tokens[:, 1:])
        for step in range(3):
            train_step(model, optimizer, [batch], config.train, step, 3, world)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        largest = max(world.all_gather(peak))
        if world.is_main:
            print(json.dumps({"peak": largest}))


def launch(path: Path, ranks: int) -> Any:
    """Run `measure` on so many ranks, each a process of its own. Returns the peak in bytes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)["peak"]


def main() -> None:
    """Print, for each case, the peak that `plan` predicts and the peak that was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[""], metavar="CASE", help=f"how one begins: {', '.join(CASES)}")
    options = parser.parse_args()
    if Path(options.cases[0]).is_file():  # one of the processes that `launch` starts
        measure(Path(options.cases[0]))
        return
    from k2mini.demo.sources import BASE

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Llama(SHAPE)
        init_weights(model, 0)
        save_model(model.state_dict(), SHAPE, folder / "model")
        del model
        stand_in(folder / "model", Tokenizer(BASE / "tokenizer.model"))
        for case, (ranks, data, train) in CASES.items():
            if not case.startswith(tuple(options.cases)):
                continue
            path = folder / "case.yaml"
            settings = f"lr: 1.0e-4, max_steps: 3, global_batch_size: {2 * ranks}, micro_batch_size: 2{train}"
            path.write_text(f"run: {{dir: x}}\nmodel: {{path: {folder}/model}}\n{data}\ntrain: {{{settings}}}\n")
            predicted, measured = plan_run(read(path), ranks).peak / 2**20, launch(path, ranks) / 2**20
            off = 100 * (predicted / measured - 1)
            print(
                f"{case:<30} predicted {predicted:>6,.0f} MiB   measured {measured:>6,.0f} MiB   {off:+.1f} %",
                flush=True,
            )


def stand_in(directory: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer of the model's vocabulary size: loading checks the size, and no text is tokenised."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2

    model = proto.ModelProto()
    model.ParseFromString(tokenizer.path.read_bytes())
    for number in range(SHAPE.vocab_size - len(model.pieces)):
        model.pieces.add(piece=f"<x{number}>", score=0.0, type=4)
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
