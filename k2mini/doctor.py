"""The checks of `k2mini doctor`: does this machine compute what it should?

Each does with a model of 0.5 M parameters what a command does with a large one. What a device computes is compared with
float64 on the CPU, over the same weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from k2mini.build import load_model, make_trainable
from k2mini.build import pick_device as pick_device
from k2mini.config import IGNORE_INDEX, CorpusSection, ModelSection, ParallelSection, PretrainConfig, RunSection
from k2mini.config import TrainSection as Train
from k2mini.data.batches import Batch
from k2mini.demo.sources import BASE
from k2mini.distributed import ALONE, World, device_mesh, fill, ranks
from k2mini.files import sha256
from k2mini.inference.compile import compile_decoding
from k2mini.inference.generate import Decoding, generate
from k2mini.model_config import ModelConfig, hf_config
from k2mini.nn.decode_ops import check_compiler
from k2mini.nn.init import init_weights
from k2mini.nn.int8_kernel import takes_kernel
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama
from k2mini.nn.quant import int8_product, quantize_rows
from k2mini.sizes import readable
from k2mini.training.checkpoint import load_checkpoint, save_checkpoint
from k2mini.training.plan import plan_run
from k2mini.training.step import build_optimizer, loss_sum, train_step

TINY = ModelConfig(
    dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_dim=256, vocab_size=320
)  # fmt: skip
PLANNED = replace(TINY, dim=1024, num_layers=4, num_heads=16, num_kv_heads=16, head_dim=64, intermediate_dim=2752)
TRAIN = Train(lr=1e-3, max_steps=4, global_batch_size=4, micro_batch_size=2)
PROMPTS = [[1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [1, 5, 6, 7, 8, 9, 10, 11, 12], [1, 20, 21, 22, 23, 24]]
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}  # what rounding alone may do, as a share of the largest value
FREE = 1 << 30  # bytes of a GPU, at least
# SHA-256 of the packaged base model, as tools/make_demo_base.py has written it.
DEMO = {
    "model.safetensors": "57800ec11bc3cd68c467271d41247ef61fedd0c80609291829ebbdc93e2112aa",
    "tokenizer.model": "f2f52551b059b3618d03cdfa4f0fab2c93c303628addff6a9fe85f9c82b7a091",
}


def close(what: str, found: Any, right: Any, bound: float) -> float:
    """The largest difference of tensors or lists, as a share of the largest value. Raises ValueError above `bound`."""
    ours, theirs = (torch.as_tensor(values, dtype=torch.float64).detach().cpu() for values in (found, right))
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= bound:
        raise ValueError(f"{what}: off by {difference:.1e} of the largest value, where {bound:.0e} is allowed")
    return difference


def find_device(wanted: str) -> str:
    """What `--device` stands for, once it has multiplied, and on a GPU how much is free, and the driver's CUDA."""
    expected = wanted.startswith("cuda") or (wanted == "auto" and shutil.which("nvidia-smi"))
    if expected and not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:  # no driver, one that is too old, a PyTorch without CUDA
            raise ValueError(f"PyTorch {torch.__version__} finds no GPU: {str(error).splitlines()[0]}") from None
    device, x = pick_device(wanted), torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    close("a product", x.to(device) @ x.to(device), x.double() @ x.double(), 1e-5)
    if device.type == "cpu":
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    card, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
    room = f"{device}, {card.name}, {readable(free)} of {readable(total)} free"
    if free < FREE:
        raise ValueError(f"{room}; nvidia-smi names the processes that hold the rest")
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    cuda = f"CUDA {torch.version.cuda} (the driver's: {driver // 1000}.{driver % 1000 // 10})"
    return f"{room}, capability {card.major}.{card.minor}, {cuda}"


def find_compiler(device: torch.device) -> str:
    """Whether torch.compile has what it needs."""
    check_compiler(device)
    return "of C++" if device.type == "cpu" else "of C, with Python.h"


def demo(device: torch.device) -> str:
    """The packaged base model: its bytes, and an answer."""
    for name, digest in DEMO.items():
        if sha256(BASE / name) != digest:
            raise ValueError(f"{BASE / name} is not what was packaged (its SHA-256 differs)")
    model, tokenizer = load_model(BASE, device=device)
    assert tokenizer is not None
    prompt = tokenizer.encode("A cat is", bos=True, eos=False)
    (answer,) = generate(model, [prompt], Decoding(12), stop_ids=[tokenizer.eos_id])
    return f"A cat is {tokenizer.decode(answer.tokens).strip()}"


def parity(device: torch.device) -> str:
    """Logits and gradients of rows with two documents and padding."""
    worst = dict.fromkeys(BOUNDS, 0.0)
    for name, bound in BOUNDS.items():
        model, exact, (batch, _) = _llama(name).to(device), _llama(name).double(), _batches()
        tokens, positions = batch.tokens, batch.positions
        assert positions is not None
        logits = model(tokens.to(device), positions.to(device)).cpu()[positions >= 0]
        worst[name] = close(f"logits in {name}", logits, exact(tokens, positions)[positions >= 0], bound)
        for each in (model, exact):
            loss_sum(each, batch).backward()
        for (part, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
            off = close(f"the gradient of {part} in {name}", ours.grad, theirs.grad, 2 * bound)
            worst[name] = max(worst[name], off)
    return f"logits and gradients: off by {_said(worst)}"


def cache(device: torch.device) -> str:
    """Decoding by the KV cache, no graph replayed, against the full forward pass."""
    model = _llama().to(device)
    model._hooks = None  # as the audit does: then nothing is replayed
    return f"token by token against all at once: off by {_decoded(model):.0e}"


def graph(device: torch.device) -> str:
    """Decoding as a GPU does it, by replaying a graph, against the full forward pass."""
    return f"replayed against all at once: off by {_decoded(_llama().to(device)):.0e}"


@torch.inference_mode()
def int8(device: torch.device) -> str:
    """Products with an int8 weight, against those of the same weight in float64."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    weight, scale = quantize_rows(torch.randn(500, 300, generator=generator))
    for rows in (1, 2, 16, 64):
        x = torch.randn(rows, 300, generator=generator)
        ours = int8_product(x.to(device), weight.to(device), scale.to(device))
        right = x.double() @ (weight.double() * scale.double()[:, None]).T
        worst = max(worst, close(f"an int8 product of {rows} rows", ours, right, BOUNDS["float32"]))
    how = "by the Triton kernel" if takes_kernel(x.to(device)) else "converted first"
    return f"1, 2, 16 and 64 rows, {how}: off by {worst:.0e}"


def compiled(device: torch.device) -> str:
    """A compiled training step, against one that is not, and compiled decoding, of one block: that takes a while."""
    one = replace(TINY, num_layers=1)
    expected, found = (_steps(_trainable(device, one, compile=compile), 1) for compile in (False, True))
    worst = {"training": close("a compiled training step", found, expected, BOUNDS["float32"])}
    model = _llama(shape=one).to(device)
    compile_decoding(model)
    return f"against what is not compiled: off by {_said(worst | {'decoding': _decoded(model)})}"


def fsdp(device: torch.device) -> str:
    """Training steps sharded over one rank, against steps of the whole model."""
    expected, worst = _steps(_trainable(device), 2), {}
    try:
        with ranks(device, ParallelSection(), alone_too=True) as world:
            mesh = device_mesh(world, ParallelSection())
            for dtype, bound in BOUNDS.items():
                found = _steps(_trainable(device, mesh=mesh, dtype=dtype), 2, world)
                worst[dtype] = close(f"sharded training steps in {dtype}", found, expected, bound)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return f"sharded training steps against whole ones: off by {_said(worst)}"


def checkpoint(device: torch.device) -> str:
    """Steps after a checkpoint, against the same steps without a stop: to the bit on a CPU."""
    with TemporaryDirectory(prefix="k2mini-", ignore_cleanup_errors=True) as folder:
        first, second = ((model, build_optimizer(model, TRAIN)) for model in (_trainable(device), _trainable(device)))
        _steps(first[0], 2, optimizer=first[1])
        path = save_checkpoint(Path(folder), 2, *first, {"identity": {}, "tokens": 0, "val_loss": None}, ALONE)
        load_checkpoint(path, *second, ALONE)
        expected, found = (_steps(model, 2, optimizer=optimizer) for model, optimizer in (first, second))
        bound = 0.0 if device.type == "cpu" else BOUNDS["float32"]  # a GPU adds up in an order of its own
        worst = close("steps from a checkpoint", found, expected, bound)
        size = sum(file.stat().st_size for file in path.iterdir())
    return f"{readable(size)} saved and resumed, against going on: off by {worst:.0e}"


def plan(device: torch.device) -> str:
    """What `k2mini plan` says of a step, against what a GPU's allocator reserves for it."""
    with TemporaryDirectory(prefix="k2mini-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(PLANNED, "float32", 1, 2)), encoding="utf-8")
        config = PretrainConfig(RunSection(""), ModelSection(folder), CorpusSection("", seq_len=48), TRAIN)
        said, took = plan_run(config, 1).peak, _reserved(device)
    figures = f"a training step took {readable(took)}, the plan says {readable(said)}"
    if took > said:
        raise ValueError(figures)
    return figures


def _reserved(device: torch.device) -> int:
    """Bytes that the allocator of a GPU reserves for training steps of `PLANNED`, beyond what it held before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    _steps(_trainable(device, PLANNED), 2)
    return torch.cuda.max_memory_reserved(device) - before


def _llama(dtype: str = "float32", shape: ModelConfig = TINY) -> Llama:
    """The tiny model on the CPU, its logits' standard deviation near 1."""
    model = Llama(shape)
    init_weights(model, 0, std=0.1)
    return model.to(getattr(torch, dtype)).eval()


def _trainable(
    device: torch.device, shape: ModelConfig = TINY, mesh: Any = None, dtype: Any = "float32", **train: Any
) -> Llama:
    """The same model, put together as `build.training_model` does."""
    with torch.device("meta"):
        model = Llama(shape)
    make_trainable(model, ModelSection("", dtype), replace(TRAIN, **train), ParallelSection(), None, device, mesh)
    model.to_empty(device=device)
    for name, values in _llama(shape=shape).state_dict().items():
        fill(model.get_parameter(name), values.to(device))
    return model.train()


def _batches() -> list[Batch]:
    """Two micro-batches of two rows, each of two documents and padding."""
    tokens = torch.randint(3, TINY.vocab_size, (4, 48), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(20), torch.arange(24), torch.full((4,), -1))).repeat(4, 1)
    labels = torch.where(positions >= 0, tokens.roll(-1, dims=1), IGNORE_INDEX)
    return [Batch(*part) for part in zip(tokens.split(2), positions.split(2), labels.split(2), strict=True)]


def _steps(model: Llama, number: int, world: World = ALONE, optimizer: Any = None) -> list[float]:
    """Loss and gradient norm of training steps."""
    optimizer = optimizer or build_optimizer(model, TRAIN)
    figures = [train_step(model, optimizer, _batches(), TRAIN, step, 4, world) for step in range(number)]
    return [figure[name] for figure in figures for name in ("loss", "grad_norm")]


@torch.inference_mode()
def _decoded(model: Llama) -> float:
    """How far log-probabilities of decoded tokens are from those of the likeliest ones in a full forward pass."""
    exact, worst = _llama("float64", model.config), 0.0
    for prompt, answer in zip(PROMPTS, generate(model, PROMPTS, Decoding(8, top_logprobs=1), stop_ids=[]), strict=True):
        logits = exact(torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1 : -1]
        right = log_softmax(logits).amax(dim=-1)
        worst = max(worst, close("decoded tokens", answer.logprobs, right, BOUNDS["float32"]))
    return worst


def _said(worst: dict[str, float]) -> str:
    return ", ".join(f"{value:.0e} ({name})" for name, value in worst.items())


DEVICE = (  # what to do where `find_device` fails
    "set CUDA_VISIBLE_DEVICES to a GPU that is free, install a PyTorch for this driver (pytorch.org says which) or a "
    "newer driver, or use --device cpu"
)
WRONG = (
    "unset NVIDIA_TF32_OVERRIDE and what else changes products, and install PyTorch as constraints.txt has it; until "
    "this passes, trust no result of this device"
)
SHARDING = "set GLOO_SOCKET_IFNAME=lo where this host's name has no address; model.dtype=float32 alone shards nothing"
FILES = (
    "free room where temporary files go, or set TMPDIR to a folder of another disk; keep run.dir off a disk that does "
    "not give back what was written"
)
CHECKS: dict[str, tuple[Callable[[torch.device], str], str]] = {  # with what to do where they fail
    "compiler": (find_compiler, "without it --compile and train.compile do not work; the rest does"),
    "demo": (demo, "install k2mini again, or restore k2mini/demo/base"),
    "parity": (parity, WRONG),
    "cache": (cache, WRONG),
    "int8": (int8, f"leave out --quantize; {WRONG}"),
    "compile": (compiled, f"leave out --compile and train.compile; {WRONG}"),
    "graph": (graph, WRONG),
    "fsdp": (fsdp, SHARDING),
    "checkpoint": (checkpoint, FILES),
    "plan": (plan, "give k2mini plan a --gpu-memory smaller by what is missing"),
}
GPU_ONLY = {"graph": "CUDA graphs are a GPU's", "plan": "a CPU has no allocator that could be asked"}
