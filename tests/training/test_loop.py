"""The training step against transformers, against itself in other portions, and across kills."""

import json
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from k2mini import gpu
from k2mini.config import CheckpointSection, RunSection
from k2mini.data.batches import Batch, Blocks
from k2mini.data.corpus import Documents
from k2mini.distributed import ALONE, World
from k2mini.errors import StoppedBySignalError
from k2mini.training import loop, save
from k2mini.training.checkpoint import checkpoints
from k2mini.training.loop import Task, Throughput, read_metrics, train
from k2mini.training.step import accumulate, build_optimizer, loss_sum, lr_at, train_step
from tests.conftest import tiny_config, tiny_llama
from tests.faults.server import Request
from tests.helpers import section
from tests.reference import to_transformers


def documents():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 60, (40,), generator=generator).tolist()
    return [[1, *torch.randint(3, 199, (length,), generator=generator).tolist()] for length in lengths]


def samples(seed=0, document_mask=True):
    return Blocks(Documents(documents()), 32, document_mask=document_mask, seed=seed)


def test_twenty_adamw_steps_equal_transformers():
    """With K2's own scheme (no document mask), since transformers has no other for plain rows."""
    model = tiny_llama()
    reference = to_transformers(model).train()
    data = samples(document_mask=False)
    training = section(weight_decay=0.1, schedule="constant")
    ours = build_optimizer(model, training)
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    rest = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(20):
        batch = data.batch(4 * step, 4)
        figures = train_step(model, ours, [batch], training, step, 20)
        expected = torch.nn.functional.cross_entropy(
            reference(batch.tokens).logits.flatten(0, 1), batch.labels.flatten()
        )
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad()
        assert figures["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert figures["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert figures["lr"] == 1e-3


def gradients(batches):
    model = tiny_llama(dtype=torch.float64)
    loss = accumulate(model, batches, sum(batch.num_supervised() for batch in batches)).item()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def test_the_loss_is_the_mean_over_the_global_batch_however_it_is_cut():
    """Micro-batches hold unequal numbers of supervised tokens, so a mean of means would differ."""
    data = samples()
    whole = data.batch(0, 8)
    assert len({data.batch(i, 1).num_supervised() for i in range(8)}) > 1
    loss, expected = gradients([whole])
    for size in (1, 2, 4):
        other, found = gradients([data.batch(start, size) for start in range(0, 8, size)])
        assert other == pytest.approx(loss, abs=1e-12)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


def test_a_step_without_supervision_changes_nothing():
    empty = Batch(torch.ones(1, 4, dtype=torch.int64), None, torch.full((1, 4), -100))
    loss, found = gradients([empty])
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_learning_rates():
    def rates(**changes):
        return [lr_at(step, 10, section(lr=1.0, **changes)) for step in range(10)]

    assert rates(schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    assert rates(schedule="linear") == pytest.approx([1 - step / 10 for step in range(10)])
    assert rates(schedule="cosine", warmup_steps=2)[2] == 1
    assert rates(schedule="cosine", warmup_steps=2)[6] == pytest.approx(0.5)


def run(directory, *, steps=12, every=3, model=None, **options):
    model = model or tiny_llama(seed=5)
    train(
        model,
        Task(samples(seed=7), samples(seed=None), identity={"data": "x"}),
        RunSection(str(directory), seed=7),
        section(max_steps=steps, warmup_steps=2, val_every=5),
        CheckpointSection(every=every, **options),
    )
    return model


def losses(directory):
    return [
        {key: value for key, value in entry.items() if key != "tokens_per_second"}
        for entry in read_metrics(directory / "metrics.jsonl")
    ]


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    undisturbed = run(tmp_path / "whole")
    lines = losses(tmp_path / "whole")
    assert [entry["step"] for entry in lines if "loss" in entry] == list(range(1, 13))
    assert [entry["step"] for entry in lines if "val_loss" in entry] == [5, 10, 12]

    # A kill after step 8: the checkpoint is of step 6, the metrics know 8 steps and half a line.
    kept = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="killed"):
        run_until(kept, 8)
    with (kept / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    resumed = run(kept)
    assert losses(kept) == lines
    for (name, a), b in zip(undisturbed.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [path.name for path in checkpoints(kept / "checkpoints")] == ["step_0000009", "step_0000012"]


def run_until(directory, step):
    """Train with checkpoints every 3 steps, and die in the forward pass of step + 1."""
    model = tiny_llama(seed=5)
    calls = []

    def die(module, _inputs):
        calls.append(module.training)
        if calls.count(True) > step:
            raise RuntimeError("killed")

    model.model.register_forward_pre_hook(die)
    run(directory, model=model)


@pytest.mark.parametrize("every", [3, 12])
def test_a_disk_that_refuses_stops_the_run(tmp_path, every):
    """One of its steps, before there is a second save, or its end."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"step_00000{every:02} could not be saved \(.*File too large"):
            run(tmp_path, every=every)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert losses(tmp_path)[-1]["step"] <= every + 3
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_save_that_has_failed_ends_the_next_step(tmp_path, monkeypatch):
    """No other save is due; and where something else ends the run, the failure is logged."""
    failing = threading.Event()

    def fail(*arguments):
        failing.set()
        raise OSError("the disk is full")

    monkeypatch.setattr(save, "_save", fail)
    model = tiny_llama(seed=5)
    model.model.register_forward_pre_hook(lambda *_: time.sleep(0.05 * failing.is_set()))
    with pytest.raises(OSError, match="the disk is full"):
        run(tmp_path / "run", steps=200, every=100, model=model)
    assert 100 < losses(tmp_path / "run")[-1]["step"] < 110


def test_a_signal_does_not_say_saved_of_what_the_disk_refused(tmp_path, monkeypatch):
    def fail(*arguments):
        time.sleep(0.2)
        raise OSError("the disk is full")

    monkeypatch.setattr(save, "_save", fail)
    model = tiny_llama(seed=5)
    model.model.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGTERM) if len(calls) == 2 else None)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(0))
    with pytest.raises(OSError, match="the disk is full"):
        run(tmp_path, steps=200, every=1000, model=model)
    assert losses(tmp_path)[-1]["step"] == 3


def test_a_save_goes_on_although_the_run_ends(tmp_path, monkeypatch, caplog):
    """It is complete, or its failure is logged beside the error that ended the run."""
    write = save._save

    def slow(*arguments):
        time.sleep(0.5)
        write(*arguments)

    def fail(*arguments):
        time.sleep(0.5)
        raise OSError("the disk is full")

    for name, replaced in (("slow", slow), ("full", fail)):
        monkeypatch.setattr(save, "_save", replaced)
        with pytest.raises(RuntimeError, match="killed"):
            run_until(tmp_path / name, 3)
    assert [path.name for path in checkpoints(tmp_path / "slow/checkpoints")] == ["step_0000003"]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["the disk is full"]


def killed_in_a_save(words):
    """Train, and be killed while the checkpoint of step 6 is being written and step 8 is over."""
    finish, directory = save._finish, Path(words[0])

    def kill(beside, path, *arguments):
        if path.name == "step_0000006":
            while losses(directory)[-1]["step"] < 8:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        finish(beside, path, *arguments)

    save._finish = kill
    run(directory)


def test_killed_while_training_went_on_beside_a_save(tmp_path, forks):
    call = "tests.training.test_loop:killed_in_a_save"
    end = forks.start(Request([[str(tmp_path / "run")]], str(tmp_path), call=call, limit=120)).wait()
    assert end.status == -signal.SIGKILL, end.err
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.name[0] != "."] == ["step_0000003"]
    assert [path.name for path in (tmp_path / "run/checkpoints").glob(".*")] == [".step_0000006.tmp"]
    resumed, whole = run(tmp_path / "run"), run(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses of a long run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, steps=80, every=1000)
    return losses(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_so(tmp_path, number, undisturbed):
    metrics = tmp_path / "stopped/metrics.jsonl"

    def signal_training():
        while not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=signal_training)
    thread.start()
    with pytest.raises(StoppedBySignalError, match=f"stopped by {number.name}; saved .*step_") as caught:
        run(tmp_path / "stopped", steps=80, every=1000)
    thread.join()
    assert caught.value.number == number
    stopped = losses(tmp_path / "stopped")[-1]["step"]
    assert checkpoints(tmp_path / "stopped" / "checkpoints")[-1].name == f"step_{stopped:07}"
    run(tmp_path / "stopped", steps=80, every=1000)
    assert losses(tmp_path / "stopped") == undisturbed


def test_what_can_not_be_resumed_is_refused(tmp_path):
    run(tmp_path / "run", steps=6)
    with pytest.raises(ValueError, match=r"checkpoint.resume is none, but .* holds a run"):
        run(tmp_path / "run", resume="none")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        run(tmp_path / "run", resume=str(tmp_path))
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**state, "tokens": 1}))
    with pytest.raises(ValueError, match=r"state.json is damaged: it does not match its own hash; remove "):
        run(tmp_path / "run")
    del state["sha256"]
    (newest / "state.json").write_text(json.dumps({**state, "identity": {"data": "y"}}))
    with pytest.raises(ValueError, match=r"was made with another data .y, now x."):
        run(tmp_path / "run")
    (newest / "state.json").write_text(json.dumps(state))
    weights = newest / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"__0_0.distcp is not what was saved"):
        run(tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(tmp_path):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before["model.norm.weight"][0] = torch.inf
    model.load_state_dict(before)
    with pytest.raises(ValueError, match=r"stopped before step 1 \(samples 0 to 3\): its loss is nan"):
        run(tmp_path, model=model)
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


CARDS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA GH200 144G HBM3e": 989,
    "NVIDIA B200": 2250,
    "NVIDIA B300 SXM6 AC": 2250,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A40": 150,
    "NVIDIA A10G": 70,
    "NVIDIA L40S": 362,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 5090": 209,
    "NVIDIA RTX A6000": 155,
    "NVIDIA RTX 6000 Ada Generation": 364,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-PCIE-32GB": 112,
    "Tesla T4": 65,
}
OTHERS = [
    "NVIDIA RTX A1000",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA RTX 6000",
    "B9",
]


def test_peaks_of_cards_are_known_by_name_or_measured(monkeypatch):
    monkeypatch.setattr(gpu, "product_rate", lambda _: 6.121e14)
    measured = 6.121e14, "612 TFLOP/s measured"
    expected = {name: (peak * 1e12, f"the data sheet's {peak} TFLOP/s") for name, peak in CARDS.items()}
    expected |= dict.fromkeys([*OTHERS, "NVIDIA A100-SXM4-80GB MIG 1g.10gb"], measured)
    for name, found in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert gpu.peak_flops(torch.device("cuda")) == found, name


def test_mfu_is_said_of_a_gpu_and_of_no_cpu(monkeypatch, caplog):
    model, figures = tiny_llama(), {"loss": 1.0, "lr": 1e-3}
    line = Throughput(model, ALONE).line(figures, 1e9)
    assert re.fullmatch(r"loss 1\.000, lr 1\.0e-03, 1,000,000,000 tokens/s, [\d.]+ GiB", line)
    monkeypatch.setattr(loop, "peak_flops", lambda _: (1e12, "1 TFLOP/s measured"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "B9")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 0)
    trained = model.config.num_parameters() - model.model.embed_tokens.weight.numel()
    with caplog.at_level("INFO"):
        throughput = Throughput(model, World(device=torch.device("cuda")))
    assert caplog.messages == ["MFU is the share of 1 TFLOP/s measured (B9)"]
    assert f", MFU {6 * trained * 1e6 / 1e10:.0f} %, " in throughput.line(figures, 1e6)


@pytest.mark.parametrize(("dtype", "bounds"), [(torch.bfloat16, [0, 3, 8, 10, 13, 16]), (torch.float32, None)])
def test_a_gpu_gets_the_bounds_of_documents_with_the_batch(dtype, bounds, monkeypatch):
    """What is asked of the model, where a GPU has a kernel for packed rows and where it has none."""
    for module in ("k2mini.training.step", "k2mini.nn.packed"):
        monkeypatch.setattr(f"{module}.send", lambda values, _device: values)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batch = Blocks(Documents([[1, 5, 5], [1, 5, 5, 5, 5], [1, 5]] * 2), 8, document_mask=True, seed=None).batch(0, 2)
    model = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, config=tiny_config(), loss=lambda *args: args)
    tokens, positions, labels, places, mask = loss_sum(model, batch)
    assert (tokens is batch.tokens, positions is batch.positions) == (True, True)
    assert torch.equal(labels, batch.labels.flatten()[places])
    assert (mask if mask is None else mask.tolist()) == bounds
    assert loss_sum(model, Batch(batch.tokens, None, batch.labels))[1::3] == (None, None)
