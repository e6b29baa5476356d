"""What only a GPU can show, against the CPU: python -m pytest -m gpu tests/test_gpu.py."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch

from k2mini.build import pick_device
from k2mini.config import TrainSection
from k2mini.data.batches import Batch
from k2mini.data.packing import PackedExamples
from k2mini.inference.beam import Beams, beam_search
from k2mini.inference.generate import Decoding, can_replay, generate, prefill, steps
from k2mini.inference.sampling import Sampling, sample, uniforms
from k2mini.nn.int8_kernel import int8_rows, takes_kernel
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.llama import Llama
from k2mini.nn.quant import int8_product, quantize_rows
from k2mini.training.loop import read_metrics
from k2mini.training.plan import plan_run
from k2mini.training.step import accumulate, build_optimizer, loss_sum, train_step
from k2mini.weights.model_files import save_model
from tests.conftest import ROOT, tiny_config, tiny_llama
from tests.helpers import adapted, examples
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
    """Within `bound` of the largest value."""
    worst = (found.cpu().double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert worst <= bound, float(worst)


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
        close(ours.grad, theirs.grad, 2 * bound)


def test_adapters_in_bfloat16_over_int8():
    model = adapted(dtype=torch.bfloat16)
    reference, ours = copy.deepcopy(model).float(), on_gpu(model)
    tokens = torch.randint(199, (2, 25))
    for each, place in ((reference, "cpu"), (ours, "cuda")):
        each.loss(tokens.to(place), None, tokens.to(place)).backward()
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            assert mine.grad.dtype == torch.float32
            close(mine.grad, theirs.grad, 6e-2)


@pytest.mark.parametrize("chunk", [7, 512])
@torch.inference_mode()
def test_prefill_of_ragged_rows_in_chunks(chunk):
    model = tiny_llama()
    ours, theirs = (prefill(each, PROMPTS, capacity=128, chunk=chunk)[1] for each in (on_gpu(model), model))
    close(ours, theirs, 1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(no_repeat_ngram_size=2, repetition_penalty=1.2)], ids=str)
def test_graphs_decode_what_the_full_forward_pass_does(sampling):
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
    close(int8_product(x.cuda(), weight.cuda(), scale.cuda()), exact, bound)
    assert takes_kernel(x.cuda()) == (rows <= 64)
    if rows <= 64:
        close(int8_rows(x.cuda(), weight.cuda(), scale.cuda()), exact, bound)


def waits_of(work):
    """Do something in which waiting for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_micro_batch_waits_for_nothing():
    model = on_gpu(tiny_llama())
    optimizer, section = build_optimizer(model, TrainSection(lr=1e-3, max_steps=9)), TrainSection(lr=1e-3, max_steps=9)
    (batch, *_) = PackedExamples(examples(), 64, seed=0).rank_batches(0, 12, 2, 0, 1)
    train_step(model, optimizer, [batch], section, 0, 9)
    waits_of(lambda: loss_sum(model, batch).backward())


@torch.inference_mode()
def test_a_step_of_decoding_is_one_graph_and_waits_once():
    model = on_gpu(tiny_llama())
    sampling = Sampling(0.9, 20, 0.9, repetition_penalty=1.2)
    cache, logits = prefill(model, PROMPTS[:2], capacity=64)
    decoded = steps(model, logits, cache, PROMPTS[:2], Decoding(20, sampling), stop_ids=[])
    for _ in range(4):
        next(decoded)
    with torch.profiler.profile() as profile:
        for _ in range(8):
            next(decoded)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["cudaGraphLaunch"] == 8
    assert calls.get("cudaLaunchKernel", 0) + calls.get("cudaLaunchKernelExC", 0) == 0
    assert calls["cudaMemcpyAsync"] == 8


@torch.inference_mode()
def test_the_cache_of_another_device_is_not_taken():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    model = tiny_llama().to("cuda:1")
    cache = KVCache(model.config, 1, device=model.device)
    assert model(torch.tensor([[1, 2]], device=model.device), cache=cache).device.index == 1


def train(folder, *overrides, device="cuda:0"):
    command = [sys.executable, "-m", "k2mini", "pretrain", "configs/tiny_pretrain.yaml", f"run.dir={folder}"]
    done = subprocess.run(
        [*command, "train.max_steps=12", "checkpoint.every=4", "--device", device, *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_checkpoints_go_on(tmp_path, dtype, device):
    """NCCL with one rank for bfloat16. What either GPU saved goes on to the bit as if never stopped."""
    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip(f"there is no {device}")
    overrides = ("run.deterministic=true", f"model.dtype={dtype}")
    whole = train(tmp_path / "whole", *overrides, device=device)
    train(tmp_path / "part", *overrides, device=device)
    for step in (8, 12):  # as if killed after step 4
        shutil.rmtree(tmp_path / f"part/checkpoints/step_{step:07}")
    shutil.rmtree(tmp_path / "part/model")
    again, exact = train(tmp_path / "part", *overrides, device=device), ("step", "loss", "grad_norm")
    assert [[row[key] for key in exact] for row in again] == [[row[key] for key in exact] for row in whole]


def test_the_plan_is_what_the_allocator_reserves(tmp_path):
    """Of a model that is large enough to count, in two micro-batches."""
    shape = tiny_config(dim=1024, num_layers=8, num_heads=16, num_kv_heads=16, head_dim=64, intermediate_dim=2752)
    save_model(tiny_llama(shape).state_dict(), shape, tmp_path / "model")
    config = pretraining(tmp_path / "model", global_batch_size=32, micro_batch_size=16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    model = on_gpu(Llama(shape))
    optimizer, rows = build_optimizer(model, config.train), torch.randint(3, 199, (16, 129))
    batches = [Batch(rows[:, :-1], None, rows[:, 1:].clone())] * 2
    for step in range(3):
        train_step(model, optimizer, batches, config.train, step, 4)
    reserved = torch.cuda.max_memory_reserved() - before
    assert reserved <= plan_run(config, 1).peak <= 1.1 * reserved
