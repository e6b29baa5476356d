"""The checks of `k2mini doctor`: what a tiny model computes on a device, against float64 on the CPU."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from k2mini import cpu
from k2mini.build import load_model, make_trainable, pick_device
from k2mini.config import (
    IGNORE_INDEX,
    CheckpointSection,
    CorpusSection,
    ModelSection,
    ParallelSection,
    PretrainConfig,
    RunSection,
)
from k2mini.config import TrainSection as Train
from k2mini.data.batches import Batch
from k2mini.demo.sources import BASE
from k2mini.distributed import ALONE, World, device_mesh, fill, ranks
from k2mini.inference.compile import compile_decoding
from k2mini.inference.decoding import Decoding
from k2mini.inference.generate import generate
from k2mini.model_config import ModelConfig, hf_config
from k2mini.nn import nf4
from k2mini.nn.decode_ops import check_compiler
from k2mini.nn.init import init_weights
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama
from k2mini.nn.quant import quantize_rows, quantized_product
from k2mini.sizes import readable
from k2mini.training.checkpoint import load_checkpoint
from k2mini.training.plan import BUDGET, plan_run
from k2mini.training.save import Saver
from k2mini.training.step import build_optimizer, loss_sum, train_step

TINY = ModelConfig(128, 2, 4, 2, 32, 256, 320)  # D, layers, H, K, E, the MLP's width, V
PLANNED = ModelConfig(1024, 4, 16, 16, 64, 2752, 320)
TRAIN = Train(lr=1e-3, max_steps=4, global_batch_size=4, micro_batch_size=2)
PROMPTS = [[1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [1, 5, 6, 7, 8, 9, 10, 11, 12], [1, 20, 21, 22, 23, 24]]
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}  # what rounding alone may do, as a share of the largest value
Compared = tuple[str, Any, Any, float]  # what; as it is and as it should be, tensors or lists; how far off it may be
# Rows of two documents and padding, in two micro-batches.
TOKENS = torch.randint(3, TINY.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.cat((torch.arange(20), torch.arange(24), torch.full((4,), -1))).repeat(2, 1)
BATCHES = [Batch(TOKENS, POSITIONS, torch.where(POSITIONS >= 0, TOKENS.roll(-1, dims=1), IGNORE_INDEX))] * 2
# SHA-256 of the packaged model.safetensors and tokenizer.model, as tools/make_demo_base.py has written them.
DEMO = "41e67bc4a17cea89bbb34d285339884a68bb171224fdacb83b5b3f082f43d06c"


def examine(name: str, device: torch.device) -> str:
    """Run a check. Returns what it has found; any error says what is wrong."""
    found, worst = CHECKS[name][0](device), dict[float, float]()
    if not isinstance(found, Iterator):
        return found or "it is there"
    for what, *values, bound in found:
        ours, right = (torch.as_tensor(value, dtype=torch.float64).detach().cpu() for value in values)
        off = float((ours - right).abs().max() / right.abs().max())
        if not off <= bound:
            raise ValueError(f"{what}: off by {off:.1e} of the largest value, where {bound:.0e} is allowed")
        worst[bound] = max(off, worst.get(bound, 0.0))
    return "off by " + ", ".join(f"{off:.0e} (allowed: {bound:.0e})" for bound, off in worst.items())


def find_device(wanted: str) -> str:
    """What `--device` stands for: on a GPU the card, driver and memory that is free, once it has added something up."""
    wants_gpu = shutil.which("nvidia-smi") if wanted == "auto" else wanted.startswith("cuda")
    if wants_gpu and not torch.cuda.is_available():
        torch.cuda.init()  # says why: no driver, one that is too old, a PyTorch without CUDA
    device = pick_device(wanted)
    torch.ones(1, device=device).sum().item()  # a card that is too old for this PyTorch fails here
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads, {cpu.describe()}"
    name, room = torch.cuda.get_device_name(device), [readable(size) for size in torch.cuda.mem_get_info(device)]
    return f"{device}, {name}, CUDA {torch.version.cuda}, {' of '.join(room)} free"


def demo(device: torch.device) -> str:
    """The packaged base model: its bytes, and an answer."""
    content = b"".join((BASE / name).read_bytes() for name in ("model.safetensors", "tokenizer.model"))
    if hashlib.sha256(content).hexdigest() != DEMO:
        raise ValueError(f"{BASE} is not what was packaged (its SHA-256 differs)")
    model, tokenizer = load_model(BASE, device=device)
    assert tokenizer is not None
    prompt = tokenizer.encode("A cat is", bos=True, eos=False)
    (answer,) = generate(model, [prompt], Decoding(12), stop_ids=tokenizer.stop_ids)
    return f"A cat is {tokenizer.decode(answer.tokens).strip()}"


def parity(device: torch.device) -> Iterator[Compared]:
    """Logits and gradients of rows with two documents and padding."""
    for name, bound in BOUNDS.items():
        model, exact, real = _llama(name).to(device), _llama(name).double(), POSITIONS >= 0
        logits = model(TOKENS.to(device), POSITIONS.to(device)).cpu()
        yield f"logits in {name}", logits[real], exact(TOKENS, POSITIONS)[real], bound
        for each in (model, exact):
            loss_sum(each, BATCHES[0]).backward()
        for (part, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
            yield f"the gradient of {part} in {name}", ours.grad, theirs.grad, 2 * bound


@torch.inference_mode()
def int8(device: torch.device) -> Iterator[Compared]:
    """Products with a weight in int8 and in NF4, against those of the same weight in float64."""
    x, matrix = torch.randn(2, 500, 320, generator=torch.Generator().manual_seed(0))
    (weight, scale), four = quantize_rows(matrix), nf4.quantize(matrix)
    plain = weight.double() * scale.double()[:, None], nf4.dequantize(*four, torch.float64)
    for how, parts, exact in zip(("int8", "NF4"), ((weight, scale), four), plain, strict=True):
        right = x.double() @ exact.T
        for rows in (1, 2, 16, 64, 500):
            ours = quantized_product(x[:rows].to(device), *(part.to(device) for part in parts))
            yield f"an {how} product of {rows} rows", ours, right[:rows], BOUNDS["float32"]


def compiled(device: torch.device) -> Iterator[Compared]:
    """A compiled training step, against one that is not, and compiled decoding, of one block: that takes a while."""
    one = replace(TINY, num_layers=1)
    expected, found = (_steps(_trainable(device, one, compile=compile), 1) for compile in (False, True))
    yield "a compiled training step", found, expected, BOUNDS["float32"]
    model = _llama(shape=one).to(device)
    compile_decoding(model)
    yield from _decoded(model)


def fsdp(device: torch.device) -> Iterator[Compared]:
    """Training steps sharded over one rank, against steps of the whole model."""
    expected = _steps(_trainable(device), 2)
    try:
        with ranks(device, ParallelSection(), alone_too=True) as world:
            mesh = device_mesh(world, ParallelSection())
            found = {dtype: _steps(_trainable(device, mesh=mesh, dtype=dtype), 2, world) for dtype in BOUNDS}
    finally:
        if (
            dist.is_initialized() and dist.get_world_size() == 1
        ):  # after an error; the next check wants a group of its own
            dist.destroy_process_group()
    for dtype, bound in BOUNDS.items():
        yield f"sharded training steps in {dtype}", found[dtype], expected, bound


def checkpoint(device: torch.device) -> Iterator[Compared]:
    """Steps after a checkpoint, against the same steps without a stop: the same bits on a CPU."""
    first, second = ((model, build_optimizer(model, TRAIN)) for model in (_trainable(device), _trainable(device)))
    with TemporaryDirectory(prefix="k2mini-") as folder:
        _steps(first[0], 2, optimizer=first[1])
        with Saver(Path(folder), CheckpointSection(), World(device=device)) as saver:
            path = saver.save(2, *first, {"identity": {}, "tokens": 0, "val_loss": None}, wait=True)
        load_checkpoint(path, *second, ALONE)
    expected, found = (_steps(model, 2, optimizer=optimizer) for model, optimizer in (first, second))
    yield "training steps from a checkpoint", found, expected, 0.0 if device.type == "cpu" else BOUNDS["float32"]


def plan(device: torch.device) -> str:
    """What `k2mini plan` says of a step, against what a GPU's allocator reserves for it."""
    with TemporaryDirectory(prefix="k2mini-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(PLANNED, "float32", 1, 2)), encoding="utf-8")
        data, model = CorpusSection("", seq_len=TOKENS.shape[1]), ModelSection(folder)
        said = plan_run(PretrainConfig(RunSection(""), model, data, TRAIN), world_size=1).peak
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    took = -torch.cuda.memory_reserved(device)
    _steps(_trainable(device, PLANNED), 2)
    took += torch.cuda.max_memory_reserved(device)
    figures = f"a training step took {readable(took)}, the plan says {readable(said)}"
    if BUDGET * took > said:  # a run of which the plan says that it fits might not
        raise ValueError(figures)
    return figures


def _llama(dtype: str = "float32", shape: ModelConfig = TINY) -> Llama:
    """The tiny model on the CPU, its logits' standard deviation near 1."""
    model = Llama(shape)
    init_weights(model, 0, std=0.1)
    return model.to(getattr(torch, dtype)).eval()


def _trainable(device: Any, shape: ModelConfig = TINY, mesh: Any = None, dtype: Any = "float32", **train: Any) -> Llama:
    """The same model, put together as `build.training_model` does."""
    model = Llama(shape).to("meta")
    make_trainable(model, ModelSection("", dtype), replace(TRAIN, **train), ParallelSection(), None, device, mesh)
    model.to_empty(device=device)
    for name, values in _llama(shape=shape).state_dict().items():
        fill(model.get_parameter(name), values.to(device))
    return model.train()


def _steps(model: Llama, number: int, world: World = ALONE, optimizer: Any = None) -> list[float]:
    """Loss and gradient norm of training steps."""
    optimizer = optimizer or build_optimizer(model, TRAIN)
    figures = [train_step(model, optimizer, BATCHES, TRAIN, step, 4, world) for step in range(number)]
    return [figure[name] for figure in figures for name in ("loss", "grad_norm")]


@torch.inference_mode()
def _decoded(model: Llama, *, replayed: bool = True) -> Iterator[Compared]:
    """Log-probabilities of decoded tokens, against those of the likeliest ones in full forward passes in float64."""
    if not replayed:
        model.__dict__["_hooks"] = None  # as the audit does
    exact = _llama("float64", model.config)
    for prompt, answer in zip(PROMPTS, generate(model, PROMPTS, Decoding(8, top_logprobs=1), stop_ids=[]), strict=True):
        logits = exact(torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1 : -1]
        yield "decoded tokens", answer.logprobs, log_softmax(logits).amax(dim=-1), BOUNDS["float32"]


DEVICE = "free a GPU or name it in CUDA_VISIBLE_DEVICES, install a PyTorch for the driver, or use --device cpu"
PRODUCTS = "unset NVIDIA_TF32_OVERRIDE and its like; until this passes, trust no result of this device"
CHECKS: dict[str, tuple[Callable[[torch.device], str | Iterator[Compared] | None], str]] = {
    "compiler": (check_compiler, "without it --compile and train.compile do not work; the rest does"),
    "demo": (demo, "install k2mini again, or restore k2mini/demo/base"),
    "parity": (parity, PRODUCTS),
    "cache": (lambda device: _decoded(_llama().to(device), replayed=False), PRODUCTS),
    "int8": (int8, f"leave out --quantize; {PRODUCTS}"),
    "compile": (compiled, f"leave out --compile and train.compile; {PRODUCTS}"),
    "graph": (lambda device: _decoded(_llama().to(device)), PRODUCTS),
    "fsdp": (fsdp, "set GLOO_SOCKET_IFNAME=lo where this host's name has no address; float32 alone shards nothing"),
    "checkpoint": (checkpoint, "set TMPDIR to a folder with room, on another disk; keep run.dir off a disk that errs"),
    "plan": (plan, "give k2mini plan a --gpu-memory smaller by what is missing"),
}
GPU_ONLY = {"graph": "CUDA graphs are a GPU's", "plan": "a CPU has no allocator that could be asked"}
