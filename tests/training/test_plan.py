"""Plans against closed forms; against real ranks it is tools/bench_plan.py's business."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k2mini.config import (
    CorpusSection,
    FinetuneConfig,
    InstructionSection,
    LoraSection,
    ModelSection,
    ParallelSection,
    PretrainConfig,
    RunSection,
    TrainSection,
)
from k2mini.config_file import load_config
from k2mini.sizes import parse_size
from k2mini.training.memory_tracker import MemoryTracker
from k2mini.training.plan import plan_run, smallest_change
from k2mini.weights.model_files import save_model
from tests.conftest import tiny_config, tiny_llama

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """9 blocks, so that a straight line through 4 and 8 has something to foretell."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    config = tiny_config(num_layers=9, dim=128, intermediate_dim=344, head_dim=32, vocab_size=2000)
    save_model(tiny_llama(config).state_dict(), config, folder)
    return folder


def pretraining(directory, **train):
    settings = {"lr": 1e-3, "max_steps": 1, "global_batch_size": 16, "micro_batch_size": 4, **train}
    return PretrainConfig(
        RunSection("x"),
        ModelSection(str(directory)),
        CorpusSection("x", seq_len=128, document_mask=False),
        TrainSection(**settings),
    )


def test_peaks_of_streams_add_up(directory):
    """What was freed on one stream is not another's: 4 + 6 bytes, although never more than 8 exist at a time."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with MemoryTracker(model, optimizer) as tracker:
        before = tracker.peak
        with torch.cpu.stream(torch.cpu.Stream()):
            torch.empty(4, dtype=torch.uint8)  # freed at once
            torch.empty(3, dtype=torch.uint8)
        with torch.cpu.stream(torch.cpu.Stream()):
            kept = torch.empty(6, dtype=torch.uint8)
    assert tracker.peak - before == 4 + len(kept)


def test_a_second_micro_batch_meets_gradients(directory):
    """From the second on the gradients of those before it are there, and stay."""
    one, two, three = (plan_run(pretraining(directory, micro_batch_size=16 // n), 1) for n in (1, 2, 4))
    assert two.kinds["gradients"] == three.kinds["gradients"] == 4 * two.parameters
    smaller = pretraining(directory, micro_batch_size=8, global_batch_size=8)
    assert two.peak > plan_run(smaller, 1).peak
    assert one.kinds["gradients"] < two.kinds["gradients"]


def test_what_is_given_is_counted_exactly(directory):
    config = pretraining(directory)
    one, four = plan_run(config, 1), plan_run(config, 4)
    parameters = tiny_config(num_layers=9, dim=128, intermediate_dim=344, head_dim=32, vocab_size=2000).num_parameters()
    assert one.parameters == one.trained == parameters
    assert one.kinds["parameters"] == 4 * parameters
    assert one.kinds["optimiser"] == 8 * parameters
    assert four.kinds["parameters"] == parameters
    assert one.checkpoint == four.checkpoint == 12 * parameters
    assert one.received == 0
    # Four ranks, one micro-batch: gathered twice, reduced once, three quarters of it from others.
    assert four.received == int(3 * 4 * parameters * 3 / 4)
    assert sum(one.kinds.values()) == one.peak
    assert one.step_tokens == 16 * 128


def test_what_saves_memory_saves_it(directory):
    config = pretraining(directory)
    kept, recomputed = plan_run(config, 1), plan_run(pretraining(directory, activation_checkpointing=1), 1)
    assert recomputed.peak < 0.9 * kept.peak
    sharded = plan_run(config, 4)
    assert sharded.peak < kept.peak
    bf16 = replace(config, model=replace(config.model, dtype="bfloat16"))
    assert plan_run(bf16, 4).peak < sharded.peak
    zero2 = plan_run(replace(config, parallel=ParallelSection(reshard_after_forward=False)), 4)
    assert zero2.peak > sharded.peak
    assert zero2.received < sharded.received


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_straight_line_foretells_more_blocks(directory, ranks):
    config = pretraining(directory)
    assert plan_run(config, ranks, exact=False).peak == pytest.approx(plan_run(config, ranks).peak, rel=0.02)


def test_lora(directory):
    config = FinetuneConfig(
        RunSection("x"),
        ModelSection(str(directory)),
        InstructionSection("x", max_seq_len=128),
        TrainSection(lr=1e-3, max_steps=1, global_batch_size=16, micro_batch_size=4),
        LoraSection(rank=4),
    )
    found = plan_run(config, 1)
    assert found.trained == 9 * 3 * 2 * 4 * 128
    assert found.kinds["optimiser"] == 8 * found.trained
    assert found.peak < plan_run(pretraining(directory), 1).peak


def test_the_smallest_change_that_fits(directory):
    config = pretraining(directory)
    recomputed = plan_run(pretraining(directory, activation_checkpointing=1), 1).peak
    assert smallest_change(config, 1, int(recomputed / 0.9) + 1000, 0.9).startswith(
        "train.activation_checkpointing=1 ("
    )


def test_from_the_command_line():
    def run(*arguments):
        command = [sys.executable, "-m", "k2mini", "plan", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run("configs/tiny_pretrain.yaml", "--world-size", "2", "--gpu-memory", "1GiB", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
    done = run("configs/tiny_pretrain.yaml", "--world-size", "2", "--gpu-memory", "20MiB")
    assert "it does not fit" in done.stdout
    assert "the smallest change that fits: train.activation_checkpointing=1" in done.stdout


def test_a_base_that_another_run_has_yet_to_make(tmp_path):
    config = load_config(FinetuneConfig, ROOT / "configs/instruct_stage1_7b.yaml", ["model.path=runs/further/model"])
    with pytest.raises(ValueError, match=r"no directory runs/further/model.* plan from a preset .*model.path=llama-7b"):
        plan_run(config, 1)


def test_no_ranks(directory):
    with pytest.raises(ValueError, match="--world-size must be at least 1"):
        plan_run(pretraining(directory), 0)
    with pytest.raises(ValueError, match="times the 3 ranks"):
        plan_run(pretraining(directory), 3)


def test_sizes():
    assert parse_size("40GiB", "--gpu-memory") == 40 * 2**30
    assert parse_size("1.5gb", "--gpu-memory") == 1_500_000_000
    for text in ("40", "GiB", "-1GiB", "40TB"):
        with pytest.raises(ValueError, match="must be a size such as 40GiB"):
            parse_size(text, "--gpu-memory")
