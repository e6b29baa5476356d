"""Real runs from the command line, killed without warning and started again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from k2mini.training.checkpoint import checkpoints
from k2mini.training.loop import read_metrics
from tests.faults.server import Request

CONFIGS = Path(__file__).parents[2] / "configs"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
# What torchrun needs to come back cleanly after a rank is killed (see the README).
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def command(out, *overrides, ranks=0, restarts=0):
    launcher = [*TORCHRUN, f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"] if ranks else [sys.executable]
    # Half an epoch of a corpus of two rows a step: several epochs, a checkpoint every few steps.
    small = ["train.max_steps=40", "train.global_batch_size=4", "train.micro_batch_size=2", "checkpoint.every=3"]
    return [
        *launcher,
        "-m",
        "k2mini",
        "pretrain",
        str(CONFIGS / "tiny_pretrain.yaml"),
        f"run.dir={out}",
        *small,
        *overrides,
    ]


def stage(number, out, *overrides, ranks=0):
    launcher = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks else [sys.executable]
    command = ["-m", "k2mini", "finetune", str(CONFIGS / f"tiny_stage{number}.yaml"), f"run.dir={out}"]
    return [*launcher, *command, "train.max_steps=24", "checkpoint.every=4", "train.val_every=8", *overrides]


def start(*arguments, made_by=command, forks=None, **options):
    """A run in a process of its own, or under torchrun."""
    if forks and not options.get("ranks"):
        return forks.start(Request([made_by(*arguments, **options)[3:]], str(CONFIGS), limit=300))
    environment = {**os.environ, **RESTARTS, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        made_by(*arguments, **options),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_ranks(forks, *arguments):
    """Two ranks without torchrun, each of which says for itself how it ended."""
    return forks.start_ranks(2, Request([command(*arguments)[3:]], str(CONFIGS), limit=300))


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out, err


def rows(out):
    keys = ("step", "loss", "grad_norm", "tokens", "val_loss")
    return [{key: row[key] for key in keys if key in row} for row in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def world(tmp_path_factory, forks):
    """A corpus of a few blocks, so that 40 steps are several epochs, and the undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("kills")
    texts = [f"The hardness of {name} is {n}. " * 9 for n, name in enumerate(["quartz", "talc", "topaz", "gypsum"] * 3)]
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": t + str(n)}) + "\n" for n, t in enumerate(texts)))
    data = (f"data.path={folder / 'few.jsonl'}", f"data.val_path={folder / 'few.jsonl'}", "data.seq_len=32")
    finish(start(folder / "whole", *data, forks=forks))
    return folder, data


def killed(data, out, draw, ranks=0, restarts=0, forks=None):
    """Kill (one rank, where there are restarts) after a random time of training, or in the midst of a save."""
    return kill(start(out, *data, ranks=ranks, restarts=restarts, forks=forks), out, draw, restarts)


def kill(process, out, draw, restarts=0):
    saving = draw.random() < 0.5
    metrics, moment = out / "metrics.jsonl", draw.random() * 1.5
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    if saving:
        end = time.monotonic() + 3
        while not list((out / "checkpoints").glob(".*.tmp")) and time.monotonic() < end and process.poll() is None:
            pass
    else:
        time.sleep(moment)
    if restarts:
        ranks_running = [int(pid) for pid in _children(process.pid)]
        if ranks_running:
            os.kill(draw.choice(ranks_running), signal.SIGKILL)
    elif process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process


def _children(pid):
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return found.stdout.split()


def test_alone_killed(world, tmp_path, forks):
    folder, data = world
    process = killed(data, tmp_path / "run", random.Random(0), forks=forks)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finish(start(tmp_path / "run", *data, forks=forks))
    assert rows(tmp_path / "run") == rows(folder / "whole")


def test_two_ranks_from_corpus_to_model(world, tmp_path, forks):
    """A rank killed under --max-restarts: what is left is what an undisturbed run leaves, and transformers loads it."""
    from transformers import LlamaForCausalLM

    folder, data = world
    for rank in start_ranks(forks, folder / "whole2", *data):
        finish(rank)
    out, _ = finish(killed(data, tmp_path / "run", random.Random(1), ranks=2, restarts=3))
    assert out == f"{tmp_path}/run/model\n"
    assert rows(tmp_path / "run") == rows(folder / "whole2")
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "run/model")
    whole = LlamaForCausalLM.from_pretrained(folder / "whole2/model")
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), whole.parameters(), strict=True))
    one = rows(folder / "whole")
    for ours, theirs in zip(rows(tmp_path / "run"), one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_sigterm_to_ranks_saves_and_says_so(world, tmp_path, forks):
    _, data = world
    ranks = start_ranks(forks, tmp_path / "run", *data, "train.max_steps=4000")
    while not checkpoints(tmp_path / "run/checkpoints"):
        time.sleep(0.01)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    ends = [rank.wait() for rank in ranks]
    assert all(end.status for end in ends)
    assert "stopped by SIGTERM; saved" in ends[0].err
    last = rows(tmp_path / "run")[-1]["step"]
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == f"step_{last:07}"


def test_mistakes_get_one_sentence(world, tmp_path, forks):
    folder, data = world
    cases = [
        (("parallel.replicate=3",), 2, "parallel.replicate (3) does not divide the 2 ranks"),
        (("train.lr=0.5", "checkpoint.resume=auto"), 0, "another schedule.lr (0.002, now 0.5)"),
    ]
    for overrides, ranks, message in cases:
        out = folder / "whole" if "checkpoint.resume=auto" in overrides else tmp_path / "run"
        if out == folder / "whole":
            (out / "model").rename(out / "model_aside")
        process = start(out, *data, *overrides, ranks=ranks, forks=forks)
        _, err = process.communicate(timeout=60)
        said = [line for line in err.splitlines() if line.startswith("k2mini: ") and message in line]
        assert len(said) == 1, err
        assert ranks or process.returncode == 2
        assert "Traceback" not in err.split(message)[0]
    (folder / "whole/model_aside").rename(folder / "whole/model")


@pytest.mark.slow  # the demo's test kills both stages, too
@pytest.mark.parametrize("ranks", [0, 2])
def test_two_stages_each_killed_and_resumed(tmp_path, ranks):
    """Adapters of both stages, and all losses, are those of runs that nothing disturbed."""
    draw = random.Random(ranks)
    for name in ("whole", "killed"):
        for number in (1, 2):
            out = tmp_path / name / f"stage{number}"
            first = [f"lora.init_adapter={tmp_path / name}/stage1/adapter"] if number == 2 else []
            quantised = ["model.quantize=int8"] if number == 2 else []
            if name == "killed":
                kill(start(number, out, *first, *quantised, made_by=stage, ranks=ranks), out, draw).communicate()
            finish(start(number, out, *first, *quantised, made_by=stage, ranks=ranks))
    for number in (1, 2):
        whole, mine = (tmp_path / name / f"stage{number}" for name in ("whole", "killed"))
        assert rows(mine) == rows(whole)
        file = "adapter/adapter_model.safetensors"
        assert (mine / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(30))
def test_alone_killed_at_random(world, tmp_path, number):
    folder, data = world
    draw = random.Random(100 + number)
    killed(data, tmp_path / "run", draw).communicate()
    finish(start(tmp_path / "run", *data))
    assert rows(tmp_path / "run") == rows(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_ranks_killed_at_random_under_max_restarts(world, tmp_path, number):
    folder, data = world
    if not (folder / "whole2/model").exists():
        finish(start(folder / "whole2", *data, ranks=2))
    finish(killed(data, tmp_path / "run", random.Random(200 + number), ranks=2, restarts=3))
    assert rows(tmp_path / "run") == rows(folder / "whole2")
