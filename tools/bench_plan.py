"""`k2mini plan` against what real ranks use on a CPU: python tools/bench_plan.py [CASE …] (six minutes).

Each case runs three steps of a 118 M model (dim 768, 12 layers, vocabulary 32,000) in processes of its own; measured is
the growth of the resident memory over what a process has before the model is made, while it trains, not while it loads.
Of several ranks that is less: a plan counts the peaks of a GPU's streams, which a CPU's memory does not keep apart. Of
LoRA without recomputation it is a tenth more: a CPU attends document by document, and keeps copies of each. The gaps
and workspaces that a plan of NF4 counts are of a GPU's allocator, and left out here.

Offload has no case here: device and host would be the same memory, in which the peaks of the two don't meet.

With --cuda, cases of LLaMA-7B's shape, most of them in few blocks, beside what PyTorch's allocator has reserved at most
on a GPU, as rank 0 of several that do not exist. Those need a driver whose collectives return alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from k2mini.build import is_sharded, kept_dtype, make_trainable, training_model
from k2mini.config import (
    CorpusSection,
    FinetuneConfig,
    InstructionSection,
    LoraSection,
    ModelSection,
    ParallelSection,
    PretrainConfig,
    RunConfig,
    RunSection,
    TrainSection,
)
from k2mini.config_file import config_kind, load_config
from k2mini.data.batches import Batch
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import World, device_mesh, ranks
from k2mini.gpu import use_gpu
from k2mini.model_config import PRESETS, ModelConfig
from k2mini.nn.init import init_weights
from k2mini.nn.llama import Llama
from k2mini.training.plan import FRAGMENTATION, plan_run
from k2mini.training.step import accumulate, build_optimizer, clip_gradients, train_step
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
NF4 = "data: {path: x, max_seq_len: 512}\nlora: {rank: 16, target_modules: all}"
# name: (ranks, data section, more of the train section)
CASES: dict[str, tuple[int, str, str]] = {
    "1 rank, full training": (1, PRETRAIN, ""),
    "2 ranks, full training": (2, PRETRAIN, ""),
    "2 ranks, checkpointing": (2, PRETRAIN, ", activation_checkpointing: 1"),
    "1 rank, LoRA": (1, FINETUNE, ""),
    "2 ranks, LoRA, checkpointing": (2, FINETUNE, ", activation_checkpointing: 1"),
    "1 rank, LoRA over NF4": (1, NF4, ", activation_checkpointing: 1"),
}
OFFLOAD, ZERO_2 = ParallelSection(offload="cpu"), ParallelSection(offload="cpu", reshard_after_forward=False)
# name: (blocks, ranks, quantize, the parallel section)
ON_CUDA: dict[str, tuple[int, int, str | None, ParallelSection]] = {
    "LoRA over NF4": (32, 1, "nf4", ParallelSection()),
    "LoRA over NF4, offloaded": (8, 1, "nf4", OFFLOAD),
    "LoRA over int8, offloaded": (8, 1, "int8", OFFLOAD),
    "all, offloaded": (8, 1, None, OFFLOAD),
    "all, offloaded, rank 0 of 8": (8, 8, None, OFFLOAD),
    "all, offloaded, ZeRO-2, rank 0 of 8": (8, 8, None, ZERO_2),
}


def read(path: Path) -> PretrainConfig | FinetuneConfig:
    """A configuration file, of further pretraining or of instruction tuning."""
    return (
        load_config(PretrainConfig, path) if config_kind(path) is PretrainConfig else load_config(FinetuneConfig, path)
    )


def resident(field: str = "VmRSS") -> int:
    """The resident memory of this process, in bytes; `VmHWM`: its peak."""
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index(f"{field}:") + 1]) * 1024


def measure(path: Path) -> None:
    """Take three steps on every rank, and print what was planned and the largest growth of memory of any of them."""
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # large blocks are given back at once, as a GPU's allocator would
    config, size = read(path), int(os.environ.get("WORLD_SIZE", "1"))
    found = plan_run(config, size)
    planned = (1 + FRAGMENTATION) * (found.peak - found.kinds["fragmentation"])
    with ranks(torch.device("cpu"), config.parallel) as world:
        before = resident()
        model, _ = training_model(config.model, config.train, config.parallel, world, config.lora)
        optimizer = build_optimizer(model.train(), config.train)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak: while loading, files are mapped
        rows = config.train.micro_batch_size
        tokens = torch.randint(3, SHAPE.vocab_size, (rows, 513))
        positions = None if config.lora is None else torch.arange(512).repeat(rows, 1)
        batch = Batch(tokens[:, :-1], positions, tokens[:, 1:])
        for step in range(3):
            train_step(model, optimizer, [batch], config.train, step, 3, world)
        largest = max(world.all_gather(resident("VmHWM") - before))
        if world.is_main:
            line(path.stem, planned / 2**20, largest / 2**20, "measured")


def measure_cuda(case: str) -> None:
    """Take four steps of two micro-batches on a GPU, and print the plan beside what the allocator has reserved."""
    from gpu_models import empty

    blocks, size, quantize, parallel = ON_CUDA[case]
    PRESETS["few-blocks"] = replace(PRESETS["llama-7b"], num_layers=blocks)
    rows, length = (4, 512) if quantize else (2, 2048)
    run, base = RunSection("unused"), ModelSection("few-blocks", dtype="bfloat16", quantize=quantize)  # type: ignore[arg-type]
    train = TrainSection(1e-5, 2 * rows * size, rows, max_steps=100, activation_checkpointing=1)
    lora = LoraSection(16, target_modules="all") if quantize else None
    if lora is None:
        corpus = CorpusSection("unused", seq_len=length)
        config: RunConfig = PretrainConfig(run, base, corpus, train, parallel=parallel)
    else:
        config = FinetuneConfig(
            run, base, InstructionSection("unused", max_seq_len=length), train, lora, parallel=parallel
        )
    device, mesh = use_gpu("cuda"), None
    if is_sharded(base, parallel, lora, size):
        from torch.testing._internal.distributed import fake_pg  # noqa: F401 (makes the backend known)

        dist.init_process_group("cpu:fake,cuda:nccl", store=HashStore(), rank=0, world_size=size)
        mesh = device_mesh(World(0, size, device), parallel)
    model = empty(blocks, kept_dtype(base, lora))
    make_trainable(model, base, train, parallel, lora, device, mesh)
    model.to_empty(device=parallel.offload or device).train()
    optimizer = build_optimizer(model, train)
    tokens = torch.randint(3, 32000, (rows, length + 1))
    batch = Batch(tokens[:, :-1], torch.arange(length).repeat(rows, 1), tokens[:, 1:].clone())
    for _ in range(4):
        accumulate(model, [batch] * 2, 2 * rows * length)
        clip_gradients(model, 1.0)
        if parallel.offload is None:  # else it is the host's, whose memory it would fill
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    reserved = torch.cuda.max_memory_reserved() / 2**20
    if mesh is not None:
        dist.destroy_process_group()
    del model, optimizer
    gc.collect()
    line(f"{case}, {blocks} blocks", plan_run(config, size).peak / 2**20, reserved, "reserved")


def line(label: str, predicted: float, found: float, how: str) -> None:
    """A row of the table, in MiB."""
    off = 100 * (predicted / found - 1)
    print(f"{label:<46} predicted {predicted:>6,.0f} MiB   {how} {found:>6,.0f} MiB   {off:+.1f} %", flush=True)


def launch(path: Path, ranks: int) -> None:
    """Run `measure` on so many ranks, each a process of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    print(done.stdout, end="", flush=True)


def main() -> None:
    """Print, for each case, the peak that `plan` predicts and the peak that was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[""], metavar="CASE", help=f"how one begins: {', '.join(CASES)}")
    parser.add_argument("--cuda", action="store_true", help=f"on a GPU: {', '.join(ON_CUDA)}")
    options = parser.parse_args()
    if options.cuda:
        if options.cases[0] in ON_CUDA:  # in a process of its own: what one leaves reserved is the next one's
            measure_cuda(options.cases[0])
            return
        for case in ON_CUDA:
            if case.startswith(tuple(options.cases)):
                subprocess.run([*sys.orig_argv[: sys.orig_argv.index("--cuda")], "--cuda", case], check=True)
        return
    if Path(options.cases[0]).is_file():  # one of the processes that `launch` starts
        measure(Path(options.cases[0]))
        return
    from k2mini.demo.sources import BASE

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Llama(SHAPE).bfloat16()  # read into float32: nothing stays mapped
        init_weights(model, 0)
        save_model(model.state_dict(), SHAPE, folder / "model")
        del model
        stand_in(folder / "model", Tokenizer(BASE / "tokenizer.model"))
        for case, (ranks, data, train) in CASES.items():
            if not case.startswith(tuple(options.cases)):
                continue
            path, quantize = folder / f"{case}.yaml", ", quantize: nf4" if "NF4" in case else ""
            settings = f"lr: 1.0e-4, max_steps: 3, global_batch_size: {2 * ranks}, micro_batch_size: 2{train}"
            path.write_text(
                f"run: {{dir: x}}\nmodel: {{path: {folder}/model{quantize}}}\n{data}\ntrain: {{{settings}}}\n"
            )
            launch(path, ranks)


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
