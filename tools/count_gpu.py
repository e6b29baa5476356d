"""What the host asks of a GPU for a token and for a micro-batch of a 7B model, and the memory that training takes.

    python tools/count_gpu.py [--rows WORD …] [--layers N]

Launches, graphs and kernels of cuDNN are counted by torch.profiler, waits by PyTorch's warnings of them; memory is what
its allocator has reserved at most, beside what `k2mini plan` foretells. No time is measured.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable
from functools import partial

import torch
from bench_gpu import BF16, PENALISED, PROMPT
from gpu_models import answering, batch_of, begun, draw, empty, tokens

from k2mini.build import make_trainable, pick_device
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
from k2mini.distributed import World, device_mesh, ranks
from k2mini.inference.decoding import Decoding
from k2mini.inference.sampling import Sampling
from k2mini.nn.lora import init_adapters
from k2mini.training.plan import plan_run
from k2mini.training.step import build_optimizer, loss_sum, train_step

STEPS = 8  # of decoding, counted together
WAIT = "called a synchronizing CUDA operation"  # begins PyTorch's warning


def counted(work: Callable[[], object]) -> dict[str, int]:
    """Launches, graphs, waits and kernels of cuDNN of some work, which is done twice."""
    with torch.profiler.profile() as profile:
        work()
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in profile.key_averages()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    launches = ("cudaLaunchKernel", "cuLaunchKernel")
    return {
        "launches": sum(count for name, count in calls.items() if name.startswith(launches)),
        "graphs": calls.get("cudaGraphLaunch", 0),
        "waits": sum(WAIT in str(each.message) for each in said),
        "cuDNN": sum(count for name, count in calls.items() if "cudnn" in name.lower()),
    }


def show(label: str, found: dict[str, int], number: int = 1, memory: str = "") -> None:
    """A row of the table, a step."""
    print(f"{label:40}" + "".join(f"{count / number:9,g}" for count in found.values()) + memory, flush=True)


@torch.inference_mode()
def token(layers: int, rows: int, how: str) -> None:
    """A step of decoding, and before it the launches that are captured for it."""
    model = answering(layers, int8="int8" in how, nf4="nf4" in how, compiled="compiled" in how)
    prompts, sampling = tokens(rows, PROMPT).tolist(), PENALISED if "penalty" in how else Sampling()
    engine = begun(model, prompts, Decoding(4 * STEPS, sampling))

    def some() -> None:
        for _ in range(STEPS):
            engine.step()

    label = f"a token, {how}, {rows} row{'s' * (rows > 1)}"
    engine.step()  # as it stands
    show(f"{label}, captured", counted(engine.step))
    some()
    show(label, counted(some), STEPS)


def micro_batch(layers: int, world: World, config: RunConfig, length: int, label: str) -> None:
    """A micro-batch of compiled blocks, and the peak of whole steps of two."""
    lora = config.lora if isinstance(config, FinetuneConfig) else None
    mesh = device_mesh(world, config.parallel) if lora is None else None
    model = empty(layers, torch.float32 if lora is None else torch.bfloat16)
    make_trainable(model, config.model, config.train, config.parallel, lora, world.device, mesh)
    draw(model).train()
    if lora is not None:
        init_adapters(model, 0)
    optimizer, batch = build_optimizer(model, config.train), batch_of([length])
    torch.cuda.reset_peak_memory_stats()
    for step in range(3):
        train_step(model, optimizer, [batch] * 2, config.train, step, 100)
    reserved, planned = torch.cuda.max_memory_reserved(), ""
    if layers == 32:
        planned = f" {plan_run(config, 1).peak / 2**30:8.2f}"
    show(label, counted(lambda: loss_sum(model, batch).backward()), memory=f"{reserved / 2**30:9.2f}{planned}")


def configurations() -> dict[str, tuple[RunConfig, int]]:
    """What is trained, by label, and the tokens of a row; four rows a micro-batch, two of them a step."""
    run, parallel = RunSection("unused"), ParallelSection()
    compiled = TrainSection(1e-5, 8, 4, max_steps=100, compile=True)
    corpus = CorpusSection("unused", seq_len=1024, document_mask=False)
    pretrain = PretrainConfig(run, ModelSection("llama-7b", dtype=BF16.dtype), corpus, compiled, parallel=parallel)
    int8 = ModelSection("llama-7b", dtype=BF16.dtype, quantize="int8")
    instructions = InstructionSection("unused", max_seq_len=512)
    tune = FinetuneConfig(run, int8, instructions, compiled, LoraSection(), parallel=parallel)
    return {"all, 4 x 1,024": (pretrain, 1024), "LoRA over int8, 4 x 512": (tune, 512)}


def main() -> None:
    """Count what the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", nargs="+", metavar="WORD", default=[""], help="only rows with one of these in its name"
    )
    parser.add_argument("--layers", type=int, default=32, help="blocks; training of all parameters takes 8 at most")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU")
    with ranks(pick_device("cuda"), ParallelSection(), alone_too=True) as world:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.layers} blocks; a step:")
        print(f"{'':40} launches   graphs    waits    cuDNN reserved  planned (GiB)")
        work: dict[str, Callable[[], None]] = {}
        plain, compiled = ("bf16", "int8", "nf4"), ("bf16 compiled", "int8 compiled", "nf4 compiled")
        for how, rows in (*((how, 1) for how in (*plain, *compiled)), ("bf16", 64), ("penalty", 64), ("nf4", 64)):
            work[f"a token, {how}, {rows}"] = partial(token, options.layers, rows, how)
        for label, (config, length) in configurations().items():
            layers = options.layers if "LoRA" in label else min(8, options.layers)
            work[label] = partial(micro_batch, layers, world, config, length, f"{label}, {layers} blocks")
        for label, each in work.items():
            if any(word in label for word in options.rows):
                each()
                torch._dynamo.reset()
                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
