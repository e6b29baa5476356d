"""What only a GPU can show, against the CPU: python -m pytest -m gpu tests/test_gpu.py."""

import copy
import signal
import subprocess
import sys
import time
import warnings
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from k2mini.build import pick_device
from k2mini.config import LoraSection, TrainSection
from k2mini.data.batches import Batch
from k2mini.data.packing import PackedExamples
from k2mini.inference.beam import Beams, beam_search, prefill
from k2mini.inference.compile import compile_decoding
from k2mini.inference.decoding import Decoding, can_replay
from k2mini.inference.generate import generate
from k2mini.inference.request import Request
from k2mini.inference.sampling import Sampling, sample, uniforms
from k2mini.inference.scheduler import Scheduler
from k2mini.nn import nf4
from k2mini.nn.decode_ops import check_compiler
from k2mini.nn.int8_kernel import int8_rows, takes_kernel
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.layers import log_softmax
from k2mini.nn.lora import attach, init_adapters
from k2mini.nn.nf4_kernel import nf4_rows
from k2mini.nn.quant import quantize_rows, quantized_product
from k2mini.training.loop import read_metrics
from k2mini.training.plan import plan_run
from k2mini.training.step import accumulate, build_optimizer, loss_sum, train_step
from k2mini.weights.model_files import save_model
from tests.conftest import ROOT, tiny_config, tiny_llama
from tests.helpers import adapted, examples, quantised
from tests.training.test_plan import pretraining

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
PROMPTS = [[1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [1, 5, 6, 7, 8, 9, 10, 11, 12], [1, 20, 21], [1] + [30, 31, 32] * 30]


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """float32 products in float32, not TF32, on the current device."""
    pick_device("cuda")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = False


def on_gpu(model):
    return copy.deepcopy(model).to("cuda")


def close(found, expected, bound):
    """The relative error, in the Frobenius norm, is at most `bound`; a single value may be off by twice as much."""
    expected = expected.detach().double().cpu()
    off = found.detach().double().cpu() - expected
    assert off.norm() <= bound * expected.norm()
    assert off.abs().max() <= 2 * bound * expected.abs().max()


@pytest.fixture
def compiler():
    """A compiler, and the counts of dynamo from zero on."""
    try:
        check_compiler(torch.device("cuda"))
    except ValueError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_logits_and_gradients(shape, dtype, bound):
    """Packed and padded rows, of all shapes of models: bfloat16 against float32 of the same weights."""
    mine = tiny_llama(shape, dtype=dtype)
    reference, model = copy.deepcopy(mine).float(), on_gpu(mine)
    batches = PackedExamples(examples(), 64, seed=0).rank_batches(0, 12, 2, 0, 1)
    count = sum(batch.num_supervised() for batch in batches)
    for batch in batches:
        real = batch.positions >= 0
        ours = model(batch.tokens.cuda(), batch.positions.cuda()).cpu()
        close(ours[real], reference(batch.tokens, batch.positions)[real], bound)
    losses = [float(accumulate(each, batches, count)) for each in (model, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=bound)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        close(ours.grad, theirs.grad, 2 * bound)  # bfloat16 on a CPU is off by 2 % as well


def test_adapters_in_bfloat16_over_int8():
    model = adapted(dtype=torch.bfloat16)
    reference, ours = copy.deepcopy(model).float(), on_gpu(model)
    tokens = torch.randint(199, (2, 25))
    for each, place in ((reference, "cpu"), (ours, "cuda")):
        each.loss(tokens.to(place), None, tokens.to(place)).backward()
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            assert mine.grad.dtype == torch.float32
            close(mine.grad, theirs.grad, 4e-2)


@pytest.mark.parametrize("chunk", [7, 512])
@torch.inference_mode()
def test_prefill_of_ragged_rows_in_chunks(chunk):
    model = tiny_llama()
    ours, theirs = (prefill(each, PROMPTS, capacity=128, chunk=chunk)[1] for each in (on_gpu(model), model))
    close(ours, theirs, 1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        *("float32", "grouped", "int8", "compiled", "compiled int8", "bfloat16", "bfloat16 grouped compiled"),
        *("window grouped", "bfloat16 window grouped compiled", "bias", "bias compiled int8"),
    ],
)
@torch.inference_mode()
def test_graphs_decode_what_the_full_forward_pass_does(kind, request):
    """Ragged rows, over several capacities of the cache, against one pass over a row and its answer."""
    dtype, bound = (torch.bfloat16, 2e-2) if "bfloat16" in kind else (torch.float32, 1e-3)
    features = {"sliding_window": 60 if "window" in kind else None, "attention_bias": "bias" in kind}
    shape = tiny_config(max_seq_len=640, num_kv_heads=2 if "grouped" in kind else 4, **features)
    model = tiny_llama(shape, dtype=dtype)
    model = on_gpu(quantised(model) if "int8" in kind else model)
    if "compiled" in kind:
        found = request.getfixturevalue("compiler")
        compile_decoding(model)
    answers = generate(model, PROMPTS, Decoding(300, top_logprobs=2), stop_ids=[])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = torch.tensor([prompt + answer.tokens], device="cuda")
        logprobs = log_softmax(model(tokens)[0, len(prompt) - 1 : -1])
        close(torch.tensor(answer.logprobs), logprobs.gather(1, tokens[0, len(prompt) :, None])[:, 0], bound)
    if "compiled" in kind:
        assert not found["graph_break"]


TRANSFORMS = [Sampling(), Sampling(no_repeat_ngram_size=2, repetition_penalty=1.2), Sampling(0.9, 50, 0.9)]


@pytest.mark.parametrize("sampling", TRANSFORMS, ids=["greedy", "constrained", "sampled"])
def test_answers_are_those_of_the_cpu(sampling):
    model = on_gpu(tiny_llama(tiny_config(max_seq_len=512)))
    assert can_replay(model)
    found = generate(model, PROMPTS, Decoding(180, sampling), stop_ids=[7, 8])
    expected = generate(model.cpu(), PROMPTS, Decoding(180, sampling), stop_ids=[7, 8])
    assert [c.tokens for c in found] == [c.tokens for c in expected]


def test_beams():
    model, decoding = tiny_llama(), Decoding(24, Sampling(no_repeat_ngram_size=2), beams=Beams(4))
    ours, theirs = (beam_search(each, PROMPTS, decoding, stop_ids=[7]) for each in (on_gpu(model), model))
    assert [c.tokens for (c,) in ours] == [c.tokens for (c,) in theirs]


def test_draws_are_those_of_the_cpu():
    """For the same float32 logits and seeds."""
    logits = 3 * torch.randn(64, 32_000, generator=torch.Generator().manual_seed(0))
    sampling, drawn = Sampling(0.9, 50, 0.9), uniforms(range(64), 1)[:, 0]
    assert torch.equal(sample(logits.cuda(), sampling, drawn.cuda()).cpu(), sample(logits, sampling, drawn))


@pytest.mark.parametrize("rows", [1, 2, 16, 64, 512])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-3)])
@torch.inference_mode()
def test_int8_products(rows, dtype, bound):
    weight, scale = quantize_rows(torch.randn(1100, 700))
    x = torch.randn(rows, 700).to(dtype)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T
    close(quantized_product(x.cuda(), weight.cuda(), scale.cuda()), exact, bound)
    assert takes_kernel(x.cuda()) == (rows <= 64)
    if rows <= 64:
        close(int8_rows(x.cuda(), weight.cuda(), scale.cuda()), exact, bound)


@pytest.mark.parametrize("rows", [1, 2, 16, 64, 512])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-3)])
@torch.inference_mode()
def test_nf4_products(rows, dtype, bound):
    parts, x = nf4.quantize(torch.randn(1100, 704)), torch.randn(rows, 704).to(dtype)
    exact, parts = x.double() @ nf4.dequantize(*parts, torch.float64).T, [part.cuda() for part in parts]
    close(quantized_product(x.cuda(), *parts), exact, bound)
    if rows <= 64:
        close(nf4_rows(x.cuda(), *parts), exact, bound)


def waits_of(work):
    """How often the host waits for the GPU in some work."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(each.message) for each in said)


def calls_of(work):
    """What some work calls of CUDA, and its kernels: (name) -> how often; and the sum of the launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in profile.key_averages()}
    return calls, sum(count for name, count in calls.items() if name.startswith(("cudaLaunchKernel", "cuLaunchKernel")))


def micro_batch(model):
    """A packed micro-batch, after two steps with it: forward and backward pass, and the whole step."""
    section = TrainSection(lr=1e-3, max_steps=9)
    optimizer = build_optimizer(model, section)
    (batch, *_) = PackedExamples(examples(), 64, seed=0).rank_batches(0, 12, 2, 0, 1)
    step = partial(train_step, model, optimizer, [batch], section, 0, 9)
    step(), step()
    return lambda: loss_sum(model, batch).backward(), step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_micro_batch_waits_for_nothing_and_a_step_once(dtype):
    backward, step = micro_batch(on_gpu(tiny_llama(dtype=dtype)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits_of(step) <= 1
    assert not [name for name in calls_of(step)[0] if "cudnn" in name.lower()]


@pytest.mark.parametrize("lora", [False, True], ids=["all", "LoRA over int8"])
def test_compiled_blocks_are_one_graph(compiler, lora):
    model = tiny_llama(tiny_config(num_layers=6), dtype=torch.bfloat16)
    if lora:
        attach(quantised(model), LoraSection())
        init_adapters(model, 0)
    model = on_gpu(model.train())
    launches = [calls_of(micro_batch(model)[0])[1]]
    for layer in model.model.layers:
        layer.compile()
    launches.append(calls_of(micro_batch(model)[0])[1])
    assert not compiler["graph_break"]
    assert compiler["stats"]["unique_graphs"] <= 2  # the first block's input may need no gradient
    assert launches[1] < launches[0]


@torch.inference_mode()
def test_a_step_of_decoding_is_one_graph_and_waits_once():
    model = on_gpu(tiny_llama(dtype=torch.bfloat16))
    engine = Scheduler(model, slots=2, capacity=64)
    for prompt in PROMPTS[:2]:
        sampling = Sampling(0.9, 20, 0.9, repetition_penalty=1.2)
        engine.admit(Request(prompt, Decoding(40, sampling), (), lambda _event: False))

    def some():
        for _ in range(8):
            engine.step()

    some()
    assert waits_of(some) <= 8
    calls, launches = calls_of(some)
    assert calls["cudaGraphLaunch"] == 8
    assert launches <= 16


@torch.inference_mode()
def test_the_cache_of_another_device_is_not_taken():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    model = tiny_llama().to("cuda:1")
    cache = KVCache(model.config, 1, device=model.device)
    assert model(torch.tensor([[1, 2]], device=model.device), cache=cache).device.index == 1


def train(folder, *overrides, device="cuda:0", kill_at=None):
    """The losses of 40 steps, with a checkpoint every 10. `kill_at`: end the process, as soon as it is that far."""
    command = [sys.executable, "-m", "k2mini", "pretrain", "configs/tiny_pretrain.yaml", f"run.dir={folder}"]
    command += ["train.max_steps=40", "train.val_every=40", "checkpoint.every=10", *overrides, "--device", device]
    metrics = folder / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while kill_at is not None and process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= kill_at:
                process.kill()
            time.sleep(0.001)
        said = process.stderr.read()
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), said
    return [row for row in read_metrics(metrics) if "loss" in row]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_what_was_killed_goes_on_to_the_bit(tmp_path, dtype, device):
    """From a checkpoint of either GPU; for bfloat16 NCCL runs with one rank."""
    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip(f"there is no {device}")
    overrides = ("run.deterministic=true", f"model.dtype={dtype}", "checkpoint.async_save=false")
    exact = ("step", "loss", "grad_norm")
    whole = train(tmp_path / "whole", *overrides, device=device)
    before = train(tmp_path / "part", *overrides, device=device, kill_at=15)
    assert (tmp_path / "part/checkpoints/step_0000010").exists()
    again = train(tmp_path / "part", *overrides, device=device)
    assert 15 <= len(before) < 40
    assert [[row[key] for key in exact] for row in again] == [[row[key] for key in exact] for row in whole]


def test_the_plan_is_what_the_allocator_reserves(tmp_path):
    """Of a model that is large enough to count, in two micro-batches."""
    shape = tiny_config(dim=1024, num_layers=8, num_heads=16, num_kv_heads=16, head_dim=64, intermediate_dim=2752)
    save_model(tiny_llama(shape).state_dict(), shape, tmp_path / "model")
    config = pretraining(tmp_path / "model", global_batch_size=32, micro_batch_size=16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    model = on_gpu(tiny_llama(shape))
    optimizer, rows = build_optimizer(model, config.train), torch.randint(3, 199, (16, 129))
    batches = [Batch(rows[:, :-1], None, rows[:, 1:].clone())] * 2
    for step in range(3):
        train_step(model, optimizer, batches, config.train, step, 4)
    reserved = torch.cuda.max_memory_reserved() - before
    assert reserved <= plan_run(config, 1).peak <= 1.1 * reserved
