"""Inference and training of a 7B model on one GPU: tokens a second, and shares of what the GPU can do.

    python tools/bench_gpu.py [--rows NAME …] [--layers N] [--pairs 3]     some twelve minutes

First come a copy within its memory and a product of 4,096 x 4,096 in bfloat16, on this very card. Then each row is
measured in turns with its peers: the same model in plain PyTorch ("eager"), transformers, peft. Printed are medians,
the range of the ratios pair by pair, and a share. Decoding: the bytes of weights and cache that the tokens need, over
what the copy reads and writes in that time. Prefill, training: 2 FLOP a weight and token (6 where it trains, 4 where it
is frozen), over the product's. Weights are random, in LLaMA-7B's shape.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from bench_inference import reference_of
from gpu_models import SHAPE, answering, batch_of, begun, draw, empty, tokens
from torch import Tensor, nn

from k2mini.build import make_trainable, pick_device
from k2mini.config import LoraSection, ModelSection, ParallelSection, TrainSection
from k2mini.data.batches import Batch
from k2mini.distributed import World, device_mesh, ranks, shard
from k2mini.gpu import best_seconds, peak_flops, product_rate
from k2mini.inference.decoding import Decoding
from k2mini.inference.sampling import Sampling
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.llama import Block, Llama
from k2mini.nn.lora import TARGETS, init_adapters
from k2mini.nn.slots import token_bytes
from k2mini.training.step import build_optimizer, train_step

PROMPT, NEW, WARM = 512, 128, 4  # tokens: before, measured, and between them (a step as it stands, one to capture)
LENGTH, STEPS = 1024, 4  # of a row in training, and steps that are measured together
PENALISED = Sampling(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.2)
COMPILED = TrainSection(1e-5, 4, 4, max_steps=10**6, compile=True)
BF16 = ModelSection("", dtype="bfloat16")
LORA = LoraSection(rank=8, target_modules=list(TARGETS))
CARDS = ("H100 80GB HBM3", "A100", "RTX 4090")  # parts of names, in the order of the bars
Measure = Callable[[], float]  # tokens a second
Forward = Callable[[Tensor, Any], tuple[Tensor, Any]]  # tokens (B, T) and what is cached -> last logits, cache


class Bench:
    """What this card can do, and how a row is measured and printed."""

    def __init__(self, world: World, layers: int | None, number: int) -> None:
        self.world, self.number, self.layers = world, number, layers or SHAPE.num_layers
        self.memory = torch.cuda.get_device_properties(world.device).total_memory
        name, (peak, source) = torch.cuda.get_device_name(world.device), peak_flops(world.device)
        found = [index for index, part in enumerate(CARDS) if part in name]
        self._card = found[0] if found and layers is None else None  # the bars are those of the whole model
        block = torch.zeros(1 << 28, device=world.device)  # 1 GiB
        target = block.clone()
        self.copied = 2 * 4 * block.numel() / best_seconds(lambda: target.copy_(block))
        self.product = product_rate(world.device)
        print(f"{name}, {self.memory / 2**30:.0f} GiB, torch {torch.__version__}, {self.layers} blocks")
        print(f"a copy reads and writes {self.copied / 1e9:,.0f} GB/s")
        print(f"a product: {self.product / 1e12:,.0f} TFLOP/s, {100 * self.product / peak:.0f} % of {source}\n")
        print(f"{'tokens a second':44} {'k2mini':>9} {'peer':>9}  ratio")

    def row(self, name: str, label: str, measures: dict[str, Measure], moved: float = 0, flops: float = 0) -> None:
        """Measure k2mini and its peers in turns, and print; `moved` bytes or `flops` of a token make a share."""
        rates: dict[str, list[float]] = {peer: [] for peer in measures}
        for _ in range(self.number + 1):
            for peer in list(rates):
                try:
                    rates[peer].append(measures[peer]())
                except torch.OutOfMemoryError:
                    if peer == "k2mini":
                        raise
                    print(f"{label}, {peer}: out of memory")
                    del rates[peer]
        own = rates.pop("k2mini")[1:]  # the first warms up: compilers, libraries, clocks
        rate, ratio = statistics.median(own), 0.0
        for peer, others in rates.items():
            ratios = [a / b for a, b in zip(own, others[1:], strict=True)]
            ratio = ratio or statistics.median(ratios)
            print(f"{label + ', ' + peer:44} {rate:9,.0f} {statistics.median(others[1:]):9,.0f}", end="  ")
            print(f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        share = 100 * rate * (moved / self.copied + flops / self.product)
        of = f"{share:.0f} % of the {'copy' if moved else 'product'}; " if share else ""
        least, tokens = (0, 0) if self._card is None else ROWS[name][1][self._card]
        bars = [f"{least:g}{' %' if least > 2 else ''}"] * bool(least) + [f"{tokens:,}"] * bool(tokens)
        met = (share if least > 2 else ratio) >= least and rate >= tokens
        print(f"{'':44} {of}bar {'; '.join(bars) or '-'}{(': met' if met else ': NOT MET') * bool(bars)}", flush=True)


def timed(step: Callable[[], object], number: int, tokens: int) -> float:
    """Tokens a second of a step that is done so many times, once the GPU has done all of them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        step()
    torch.cuda.synchronize()
    return number * tokens / (time.perf_counter() - start)


def read_a_token(model: Llama, rows: int) -> float:
    """Bytes of weights, and of the cache halfway through, that a token of one of so many rows needs."""
    idle = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if model.quantized_head is not None else set())
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in idle)
    return weights / rows + token_bytes(model.config, model.dtype) * (PROMPT + WARM + NEW / 2)


@torch.inference_mode()
def decode(model: Llama, rows: int, sampling: Sampling = Sampling()) -> float:  # noqa: B008 (it is frozen)
    """Tokens a second after prompts, by the engine's own steps."""
    prompts = tokens(rows, PROMPT).tolist()
    engine = begun(model, prompts, Decoding(1 + WARM + NEW, sampling))
    for _ in range(WARM):
        engine.step()
    return timed(engine.step, NEW, rows)


@torch.inference_mode()
def decode_plainly(forward: Forward, rows: int) -> float:
    """As many tokens in a plain loop of forward passes, each one's likeliest token read."""
    logits, cache = forward(tokens(rows, PROMPT).cuda(), None)

    def step() -> None:
        nonlocal logits, cache
        last = logits[:, -1:].argmax(-1)
        last.tolist()
        logits, cache = forward(last, cache)

    return timed(step, NEW, rows)


def forwards(model: Llama) -> dict[str, Forward]:
    """The forward pass of the model itself, and of transformers' LLaMA over the same tensors."""

    def eager(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        room = PROMPT + WARM + NEW
        cache = cache or KVCache(model.config, len(ids), dtype=model.dtype, device=model.device, capacity=room)
        return model.logits(model.model(ids, cache=cache)[:, -1:]), cache

    def theirs(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out = reference(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits, out.past_key_values

    found: dict[str, Forward] = {"eager": eager}
    try:
        if model.quantized_head is None:
            reference = reference_of(model).to("cuda")
            found["transformers"] = theirs
    except ImportError:
        print("transformers is not installed, so it is not measured")
    return found


def decoding(bench: Bench, name: str) -> None:
    """One row, compiled, in bfloat16 or int8; or 64 (16 where they do not fit), greedy or sampled, as graphs alone."""
    single = name in ("bf16", "int8")
    rows = 1 if single else 64 if bench.memory > 60e9 else 16
    model = answering(bench.layers, int8=name == "int8", compiled=single)
    ours = partial(decode, model, rows)
    measures: dict[str, Measure] = {"k2mini": partial(decode, model, rows, PENALISED), "greedy": ours}
    if name != "sampling":
        peers = {peer: partial(decode_plainly, forward, rows) for peer, forward in forwards(model).items()}
        measures = {"k2mini": ours, **peers}
    kind = {"int8": "int8 with head", "sampling": "sampled with penalty"}.get(name, "bf16")
    bench.row(name, f"{kind}, {rows} row{'s' * (rows > 1)}", measures, moved=read_a_token(model, rows))


def prefilling(bench: Bench, name: str) -> None:
    """Four prompts of 2,048 tokens into the cache, and their last logits."""
    model, ids = answering(bench.layers, compiled=False), tokens(4, 2048)
    prompts, there = ids.tolist(), ids.cuda()

    works: dict[str, Callable[[], object]] = {"k2mini": partial(begun, model, prompts, Decoding(2))}
    works |= {peer: partial(forward, there, None) for peer, forward in forwards(model).items()}
    rate = torch.inference_mode()(timed)
    measures: dict[str, Measure] = {peer: partial(rate, work, 1, ids.numel()) for peer, work in works.items()}
    bench.row(name, "prefill, 4 x 2,048", measures, flops=flops_of(model.model.layers) / 2)  # the forward half of 4


def rate_of_training(model: Llama, batch: Batch) -> Measure:
    """Tokens a second of whole steps: loss, gradients, clipping, AdamW."""
    optimizer = build_optimizer(model.train(), COMPILED)
    step = partial(train_step, model, optimizer, [batch], COMPILED, 0, 10**6)
    return partial(timed, step, STEPS, batch.num_tokens())


def eagerly(rate: Measure) -> float:
    """A rate of the same model without what was compiled of its blocks."""
    with patch.object(Block, "__call__", Block._call_impl):
        return rate()


def flops_of(model: nn.Module) -> float:
    """Arithmetic of a trained token, as the progress line counts it."""
    idle = ("embed_tokens.weight", ".scale")
    return sum((6 if p.requires_grad else 4) * p.numel() for n, p in model.named_parameters() if not n.endswith(idle))


def training(bench: Bench, name: str) -> None:
    """All parameters of 8 blocks (fewer where they do not fit), kept in float32, computed in bfloat16."""
    blocks = min(8 if bench.memory > 70e9 else 4 if bench.memory > 40e9 else 2, bench.layers)
    mesh, model = device_mesh(bench.world, ParallelSection()), empty(blocks, torch.float32)
    make_trainable(model, BF16, COMPILED, ParallelSection(), None, bench.world.device, mesh)
    plain = rate_of_training(draw(model), batch_of([LENGTH]))
    measures: dict[str, Measure] = {"k2mini": plain, "eager": partial(eagerly, plain)}
    if name == "packed":
        measures = {"k2mini": rate_of_training(model, batch_of([400, 300, 200, 100, 24])), "unpacked": plain}
    bench.row(name, f"{name}, {blocks} blocks, 4 x 1,024", measures, flops=flops_of(model))


def sharding(bench: Bench, name: str) -> None:
    """The same training twice, in bfloat16 throughout: sharded over one rank, and not sharded."""
    blocks, measures = min(8 if bench.memory > 70e9 else 4, bench.layers), {}
    mesh, methods = device_mesh(bench.world, ParallelSection()), ("loss", "hidden", "logits")
    for peer in ("k2mini", "unsharded"):
        model = empty(blocks)
        for layer in model.model.layers:
            layer.compile()
        if peer == "k2mini":
            shard(model, model.units(), methods, mesh, None, ParallelSection())
        measures[peer] = rate_of_training(draw(model), batch_of([LENGTH]))
    bench.row(name, f"FSDP2 at world size 1, {blocks} blocks", measures)


def adapting(bench: Bench, name: str) -> None:
    """LoRA on every module over a bfloat16 base."""
    section = replace(COMPILED, activation_checkpointing=0 if bench.memory > 70e9 else 1)
    model = empty(bench.layers)
    make_trainable(model, BF16, section, ParallelSection(), LORA, bench.world.device, mesh=None)
    init_adapters(draw(model), 0)
    ours = rate_of_training(model, batch_of([LENGTH]))
    measures: dict[str, Measure] = {"k2mini": ours, "eager": partial(eagerly, ours)}
    try:
        measures["peft"] = peft_rate(model)
    except ImportError as error:
        print(f"{error.name} is not installed, so it is not measured")
    bench.row(name, "LoRA r 8, all modules, 4 x 1,024", measures, flops=flops_of(model))


def peft_rate(model: Llama) -> Measure:
    """The same training by transformers and peft, over the same base."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA.rank, lora_alpha=16, lora_dropout=LORA.dropout, target_modules=LORA.target_modules)
    peer: Any = get_peft_model(reference_of(model).to("cuda"), config).train()
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-5, fused=True)
    ids = tokens(4, LENGTH).cuda()

    def step() -> None:
        peer(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return partial(timed, step, STEPS, ids.numel())


# How each row is measured, and what it has to reach on each of `CARDS`: a share in per cent or (below 2) a ratio to the
# first peer; and tokens a second; 0: none. The RTX 4090 decodes 16 rows, not 64.
ROWS: dict[str, tuple[Callable[[Bench, str], None], tuple[tuple[float, int], ...]]] = {
    "bf16": (decoding, ((65, 160), (68, 100), (75, 55))),
    "int8": (decoding, ((50, 235), (52, 150), (65, 90))),
    "rows": (decoding, ((0, 3500), (0, 2100), (0, 480))),
    "sampling": (decoding, ((0.9, 0),) * 3),
    "prefill": (prefilling, ((50, 0), (60, 0), (60, 0))),
    "training": (training, ((40, 0), (50, 0), (50, 0))),
    "packed": (training, ((0.97, 0),) * 3),
    "lora": (adapting, ((0, 0), (0, 3700), (0, 0))),
    "fsdp": (sharding, ((0.95, 0),) * 3),
}


def main() -> None:
    """Measure the rows that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--layers", type=int, help="fewer blocks, for a quick try; bars are not compared then")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU")
    with ranks(pick_device("cuda"), ParallelSection(), alone_too=True) as world:
        bench = Bench(world, options.layers, options.pairs)
        for name in options.rows:
            try:
                ROWS[name][0](bench, name)
            except (torch.OutOfMemoryError, ValueError) as error:
                print(f"{name} was not measured: {str(error).splitlines()[0]}", flush=True)
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
