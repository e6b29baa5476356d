"""A run's directory: one writer, nothing of refused runs, nothing reused that was made otherwise."""

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from k2mini import cpu
from k2mini.config import LoraSection, PretrainConfig
from k2mini.config_file import load_config
from k2mini.model_config import tensor_shapes
from k2mini.training.checkpoint import checkpoints, read_state
from k2mini.training.loop import read_metrics, summary
from k2mini.weights.model_directory import ModelDirectory
from k2mini.weights.model_files import save_model
from tests.conftest import tiny_config, tiny_llama
from tests.faults.server import Request

TRAIN = {"lr": 1e-3, "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 4}


@pytest.fixture
def base(tiny_directory, tmp_path):
    return shutil.copytree(tiny_directory, tmp_path / "base")


@pytest.fixture
def settings(base, tmp_path):
    """The configuration of a run of four steps, as a file."""
    documents = tmp_path / "documents"
    documents.mkdir()
    lines = [json.dumps({"text": f"granite is made of quartz {n} " * 9}) for n in range(20)]
    (documents / "few.jsonl").write_text("\n".join(lines))
    content = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(base)},
        "data": {"path": str(documents), "seq_len": 32},
        "train": TRAIN,
        "checkpoint": {"every": 2},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    return tmp_path / "run.yaml"


@pytest.fixture
def tuning(base, tmp_path):
    """The configuration of a fine-tuning of four steps, as a file."""
    records = [{"instruction": f"granite {n}", "input": "", "output": "rock quartz"} for n in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    content = {
        "run": {"dir": str(tmp_path / "tuned")},
        "model": {"path": str(base)},
        "data": {"path": str(tmp_path / "data.json"), "val_size": 4},
        "train": TRAIN,
        "lora": {"rank": 2},
    }
    (tmp_path / "tune.yaml").write_text(json.dumps(content))
    return tmp_path / "tune.yaml"


def start(forks, settings, *overrides, nohup=False):
    """A long run in a process of its own, once it has taken its first steps."""
    folder = settings.parent / "run"
    words = ["pretrain", str(settings), "train.max_steps=100000", *overrides]
    if nohup:
        pipe = subprocess.PIPE
        process = subprocess.Popen(["nohup", sys.executable, "-m", "k2mini", *words], stdout=pipe, stderr=pipe)
    else:
        process = forks.start(Request([words], str(settings.parent), limit=300))
    while process.poll() is None and not (
        (folder / "metrics.jsonl").exists() and read_metrics(folder / "metrics.jsonl")
    ):
        time.sleep(0.01)
    return process


def test_two_runs_in_one_directory_are_refused(settings, tmp_path, run, forks):
    process = start(forks, settings)
    try:
        before = time.monotonic()
        status, _, err = run("pretrain", settings)
        assert status == 2
        assert f"run is being written by process {process.pid} on " in err
        assert time.monotonic() - before < 10
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    steps = [entry["step"] for entry in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert not (tmp_path / "run/.lock").exists()


def test_sighup_saves_and_under_nohup_it_is_ignored(settings, tmp_path, forks):
    process = start(forks, settings, "checkpoint.every=100000")
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP, err
    assert "stopped by SIGHUP; saved" in err
    assert len(checkpoints(tmp_path / "run/checkpoints")) == 1
    shutil.rmtree(tmp_path / "run")
    process = start(forks, settings, "checkpoint.every=100000", nohup=True)
    process.send_signal(signal.SIGHUP)
    before = len(read_metrics(tmp_path / "run/metrics.jsonl"))
    while len(read_metrics(tmp_path / "run/metrics.jsonl")) < before + 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "override",
    ["model.path=nowhere", "data.path=nowhere", "data.seq_len=4000", "train.max_steps=null", "data.eos=3"],
)
def test_a_refused_run_leaves_no_directory(settings, tmp_path, run, override):
    status, _, err = run("pretrain", settings, override)
    assert status == 2
    assert override.split("=")[0].split(".")[1] in err or "nowhere" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override", ["lora.init_adapter=nowhere", "data.path=nowhere.json", "data.val_size=20"])
def test_a_refused_finetuning_leaves_no_directory(tuning, tmp_path, run, override):
    assert run("finetune", tuning, override)[0] == 2
    assert not (tmp_path / "tuned").exists()


def test_a_finished_run_is_not_taken_for_one_of_another_configuration(settings, tmp_path, run):
    assert run("pretrain", settings)[0] == 0
    for override in ("train.lr=5e-4", "data.seq_len=16", "run.seed=1", "train.max_steps=8", "model.dtype=bfloat16"):
        status, out, err = run("pretrain", settings, override)
        assert (status, out) == (2, ""), override
        assert f"run/model was made with another {override.split('=')[0]} (" in err
        assert "set run.dir to a new folder, or restore what changed" in err
    same_data = f"data.path={tmp_path}/base/../documents"
    for override in ("train.lr=1e-3", "checkpoint.every=1", "train.micro_batch_size=1", same_data):
        status, out, err = run("pretrain", settings, override)
        assert (status, out) == (0, f"{tmp_path}/run/model\n"), err
        assert "is complete" in err


def test_room_for_checkpoints_and_result_is_checked_before_any_work(settings, tuning, base, tmp_path, run, monkeypatch):
    """The least that a run writes before its documents are encoded, what it keeps at a time before its first step."""
    usage, config = shutil.disk_usage(tmp_path), ModelDirectory(base).config
    lora = 2 * sum(sum(shape) for name, shape in tensor_shapes(config).items() if re.search("[qkv]_proj", name))
    for command, file, out, trained in (
        ("pretrain", settings, "run", config.num_parameters()),
        ("finetune", tuning, "tuned", lora),
    ):
        more = ("checkpoint.every=1", "checkpoint.keep_last=1", "checkpoint.keep_best=false")
        for number, free in ((1, 16 * trained - 1), (2, 28 * trained - 1)):
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
            status, _, err = run(command, file, *more)
            assert status == 2
            said = f"{out}/checkpoints needs {free + 1:,} bytes (checkpoints at a time: {number}, and the result)"
            assert f"{said}, {free:,} are free on its disk" in err
            assert ("keep_last" in err) == (number > 1)
            assert ("encoding" in err) == (command == "pretrain" and number == 2)
            assert not (tmp_path / out / "checkpoints").exists()
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free + 1))
        assert run(command, file, *more)[0] == 0
    shutil.rmtree(tmp_path / "run/model")  # the checkpoints that are there take no more room
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=16 * config.num_parameters()))
    assert run("pretrain", settings, *more)[0] == 0


def test_a_run_ends_with_a_summary_and_a_complete_one_shows_it_again(tuning, tmp_path, run):
    (tmp_path / "q.jsonl").write_text(
        '{"question": "What is granite?", "choices": ["rock", "a fruit"], "answer": "A"}\n'
    )
    benchmark = ("train.val_every=1", f"eval.benchmark=[{tmp_path}/q.jsonl]", "eval.every=2")
    status, out, err = run("finetune", tuning, *benchmark)
    assert status == 0, err
    said = [line for line in err.splitlines() if line.startswith("k2mini: ")][-5:]
    metrics = read_metrics(tmp_path / "tuned/metrics.jsonl")
    losses, validated = [e["loss"] for e in metrics if "loss" in e], [e["val_loss"] for e in metrics if "val_loss" in e]
    tokens = next(e["tokens"] for e in reversed(metrics) if "tokens" in e)
    assert re.fullmatch(
        rf"k2mini: 4 steps, {tokens} tokens in 0:00:\d\d \([\d,]+ tokens/s, without validation and saving\)", said[0]
    )
    assert said[1] == f"k2mini: training loss {losses[0]:.3f} at step 1, {losses[-1]:.3f} at 4"
    assert min(validated) == validated[-1]
    perplexity = math.exp(validated[-1])
    assert said[2] == f"k2mini: validation loss {validated[-1]:.3f} at step 4 (perplexity {perplexity:.4g})"
    assert re.fullmatch(r"k2mini: accuracy of q [\d.]+ % at step 4", said[3])
    assert (
        said[4] == f"k2mini: every step is in {tmp_path}/tuned/metrics.jsonl, the adapter in {tmp_path}/tuned/adapter"
    )
    status, again, err = run("finetune", tuning, *benchmark)
    assert (status, again) == (0, out)
    assert err.splitlines()[-5:] == said


def test_the_lowest_validation_loss_of_a_summary(tmp_path):
    lines = [{"step": step, "val_loss": loss} for step, loss in ((2, 1.5), (4, 0.5), (6, 0.75))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert summary(tmp_path / "metrics.jsonl").splitlines() == [
        "validation loss 0.750 at step 6 (perplexity 2.117)",
        "the lowest was 0.500 at step 4 (perplexity 1.649)",
    ]


def test_a_result_without_its_manifest_is_not_complete(settings, tmp_path, run):
    assert run("pretrain", settings)[0] == 0
    model = tmp_path / "run/model"
    whole = (model / "model.safetensors").read_bytes()
    text = (model / "manifest.json").read_text()
    for damaged in (text.replace("0", "1", 1), None):
        (model / "manifest.json").unlink() if damaged is None else (model / "manifest.json").write_text(damaged)
        status, out, err = run("pretrain", settings)
        assert (status, out) == (2, "")
        assert f"remove {model}, and the next start writes it again from the last checkpoint" in err
    shutil.rmtree(model)
    assert run("pretrain", settings)[0] == 0
    assert (model / "model.safetensors").read_bytes() == whole


def test_another_base_under_the_same_path_is_not_resumed(settings, base, tmp_path, run, tiny_tokenizer):
    assert run("pretrain", settings)[0] == 0
    shutil.rmtree(tmp_path / "run/model")
    config = tiny_config(vocab_size=tiny_tokenizer.vocab_size, max_seq_len=1024)
    save_model(tiny_llama(config, seed=9).state_dict(), config, base, tokenizer=tiny_tokenizer, force=True)
    status, _, err = run("pretrain", settings)
    assert status == 2
    assert "step_0000004 was made with another base; set run.dir" in err
    newest = checkpoints(tmp_path / "run/checkpoints")[-1]
    status, _, err = run("export", newest, "--out", tmp_path / "out")
    assert status == 2
    assert f"{base} is no longer the base that {newest} was trained from" in err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_an_earlier_release_is_resumed(settings, tmp_path, run):
    """It does not say what its base was made of."""
    assert run("pretrain", settings)[0] == 0
    shutil.rmtree(tmp_path / "run/model")
    for path in checkpoints(tmp_path / "run/checkpoints"):
        state = json.loads((path / "state.json").read_text())
        del state["identity"]["base"], state["sha256"]
        (path / "state.json").write_text(json.dumps(state))
    status, out, err = run("pretrain", settings)
    assert (status, out) == (0, f"{tmp_path}/run/model\n"), err
    assert err.count("does not say what its base was made of, so that is not compared") == 1


def test_export_checks_every_file_of_a_checkpoint(settings, tmp_path, run):
    """Twenty flipped bits anywhere, or another step's file: refused, and nothing written."""
    assert run("pretrain", settings)[0] == 0
    older, newest = checkpoints(tmp_path / "run/checkpoints")
    generator = torch.Generator().manual_seed(0)
    for name in ("__0_0.distcp", ".metadata"):
        file = newest / name
        content = file.read_bytes()
        places = torch.randint(len(content), (20,), generator=generator).tolist()
        for place in places:
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            status, _, err = run("export", newest, "--out", tmp_path / "out")
            assert status == 2
            assert f"{file} is not what was saved (its SHA-256 differs); export another checkpoint" in err
        file.write_bytes((older / name).read_bytes())
        if (older / name).read_bytes() != content:
            assert run("export", newest, "--out", tmp_path / "out")[0] == 2
        file.write_bytes(content)
    assert not (tmp_path / "out").exists()
    assert run("export", newest, "--out", tmp_path / "out")[0] == 0
    status, _, err = run("export", tmp_path / "run", "--out", tmp_path / "other")
    assert status == 2
    assert f"it is a run, whose checkpoints are {older}, {newest}" in err


def test_the_adapter_comes_from_files_that_are_whole(tuning, tmp_path, run):
    assert run("finetune", tuning)[0] == 0
    shutil.rmtree(tmp_path / "tuned/adapter")
    from k2mini.training.export import export_adapter

    (newest,) = checkpoints(tmp_path / "tuned/checkpoints")
    content = bytearray((newest / "__0_0.distcp").read_bytes())
    content[len(content) // 3] ^= 4
    (newest / "__0_0.distcp").write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is not what was saved"):
        export_adapter(newest, tmp_path / "tuned/adapter", LoraSection(rank=2), str(tmp_path / "base"))
    assert not (tmp_path / "tuned/adapter").exists()


def test_verify_checks_checkpoints_and_whole_runs(settings, tmp_path, run):
    assert run("pretrain", settings)[0] == 0
    newest = checkpoints(tmp_path / "run/checkpoints")[-1]
    assert run("verify", newest)[1] == f"{newest}: 2 files are as they were written\n"
    assert run("verify", tmp_path / "run")[0] == 0
    content = bytearray((newest / "__0_0.distcp").read_bytes())
    content[-9] ^= 2
    (newest / "__0_0.distcp").write_bytes(content)
    for path in (newest, tmp_path / "run"):
        status, _, err = run("verify", path)
        assert status == 2
        assert f"{newest}/__0_0.distcp differs: its SHA-256 is not that of state.json" in err


def test_weights_that_are_not_finite_are_not_saved(settings, tmp_path, run):
    """The last step is one that no loss after it would tell of."""
    status, out, err = run(
        *("pretrain", settings, "train.lr=3e38", "train.warmup_steps=3", "train.max_steps=3", "checkpoint.every=1")
    )
    assert (status, out) == (2, "")
    assert "infinite or NaN" in err or "its loss is nan" in err
    shutil.rmtree(tmp_path / "run")
    status, out, err = run("pretrain", settings, "train.lr=3e38", "train.max_steps=1", "train.schedule=constant")
    assert (status, out) == (2, "")
    assert "step 1 has made model." in err
    assert "infinite or NaN, so nothing is saved of it" in err
    assert not (tmp_path / "run/model").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_run_inside_its_data_goes_on(settings, tmp_path, run):
    inside = f"run.dir={tmp_path}/documents/run"
    assert run("pretrain", settings, inside)[0] == 0
    shutil.rmtree(tmp_path / "documents/run/model")
    shutil.rmtree(checkpoints(tmp_path / "documents/run/checkpoints")[-1])
    status, _, err = run("pretrain", settings, inside)
    assert status == 0, err
    assert "resuming from" in err
    assert run("preview", settings, inside)[0] == 0


def test_leftovers_of_killed_processes_are_removed_at_the_next_start(settings, tmp_path, run):
    assert run("pretrain", settings)[0] == 0
    folder = tmp_path / "run/checkpoints"
    for name in (".step_0000009.tmp", ".step_0000002.old"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    status, _, err = run("pretrain", settings)
    assert status == 0
    for name in (".step_0000009.tmp", ".step_0000002.old"):
        assert f"removed {folder / name}, which a killed process left" in err
        assert not (folder / name).exists()


def test_more_than_the_context_is_refused_unless_asked_for(settings, tuning, tmp_path, run):
    sentence = f"the context of {tmp_path}/base 1,024 tokens by its config.json; shorten it, or set data.exceed_context"
    for command, file, key in (("pretrain", settings, "seq_len"), ("finetune", tuning, "max_seq_len")):
        override = f"data.{key}=1100"
        for arguments in ((command, file, override), ("preview", file, override)):
            status, _, err = run(*arguments)
            assert status == 2
            assert f"data.{key} is 1,100, {sentence}" in err
        plan = ("--world-size", 1, "--gpu-memory", "40GiB")
        status, _, err = run("plan", *plan, file, override)
        assert status == 2
        assert f"data.{key} is 1,100, {sentence}" in err
        assert run("plan", *plan, file, override, "data.exceed_context=true")[0] == 0
    assert run("finetune", tuning, "data.max_seq_len=1100", "data.exceed_context=true")[0] == 0


def test_out_of_memory_names_what_takes_less(settings, tuning, run, monkeypatch):
    """Of this run's own settings, in the order of what they cost, and only those that are not taken yet."""

    def full(*_arguments):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24.00 GiB of "
            "which 1.00 GiB is free."
        )

    monkeypatch.setattr("k2mini.training.run.train", full)
    begin = "k2mini: GPU 0 is out of memory: 2.00 GiB more were wanted, 1.00 GiB of its 24.00 GiB are free; "
    end = ", the cheapest first; k2mini plan says what a run takes"
    status, _, err = run("finetune", tuning, "model.dtype=bfloat16")
    taken = "train.micro_batch_size=1, train.activation_checkpointing=1, model.quantize=int8 take less"
    assert (status, err.splitlines()[-1]) == (2, f"{begin}{taken}{end}")
    status, _, err = run("pretrain", settings, "train.micro_batch_size=1", "train.activation_checkpointing=1")
    assert (status, err.splitlines()[-1]) == (2, f"{begin}model.dtype=bfloat16 takes less{end}")


def test_a_file_of_finetune_given_to_pretrain_says_so(tuning, run):
    status, _, err = run("pretrain", tuning)
    assert status == 2
    assert "tune.yaml is a file for k2mini finetune, not for pretrain" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r"metrics.jsonl, line 2 must be an object, not \[1\]"),
        ('{"loss": 1}', "metrics.jsonl, line 2: step must be a whole number, not None"),
        ('{"step": "3", "loss": 1}', "metrics.jsonl, line 2: step must be a whole number, not '3'"),
        ('{"step": 3, "loss": [1]}', r"metrics.jsonl, line 2: loss must be a number, not \[1\]"),
        (f'{{"step": 3, "tokens": {10**29}}}', "metrics.jsonl, line 2: tokens is 10{29}, which no run reaches"),
        ("{", "metrics.jsonl, line 2 is not valid JSON"),
    ],
)
def test_wrong_metrics_are_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n' + line + '\n{"step": 4, "no')
    with pytest.raises(ValueError, match=message):
        read_metrics(path)


def test_metrics_are_lines_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1, "note": "a\u2028b"}\n', encoding="utf-8")
    assert read_metrics(path)[0]["note"] == "a\u2028b"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step", "6", "state.json: step must be a whole number, not '6'"),
        ("step", -1, "state.json: step must be a whole number, not -1"),
        ("tokens", None, "state.json: tokens must be a whole number, not None"),
        ("identity", [], r"state.json: identity must be an object, not \[\]"),
        ("files", {}, "state.json, files: .metadata must be text, not None"),
        ("files", {".metadata": "a", "../x": "b"}, "is not of the format"),
        ("files", {".metadata": 3}, "state.json, files: .metadata must be text, not 3"),
        ("val_loss", "low", "state.json: val_loss must be a number, not 'low'"),
    ],
)
def test_wrong_states_are_named_by_field_and_value(settings, tmp_path, run, field, value, message):
    state = {"format": "k2mini checkpoint 1", "step": 1, "tokens": 1, "identity": {}, "files": {".metadata": "a"}}
    (tmp_path / "step_0000001").mkdir()
    (tmp_path / "step_0000001/state.json").write_text(json.dumps({**state, field: value}))
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path / "step_0000001")


def test_a_wrong_configuration_of_a_run_is_named(settings, tmp_path, run):
    assert run("pretrain", settings)[0] == 0
    noted = tmp_path / "run/config.yaml"
    assert load_config(PretrainConfig, noted).train.lr == 1e-3
    noted.write_text(noted.read_text().replace('"lr": 0.001', '"lr": [3]'))
    status, _, err = run("pretrain", settings)
    assert status == 2
    assert f"{noted}: train.lr must be a number, not [3]" in err


def test_plot_replaces_a_picture_only_when_told_and_no_input(tmp_path, run):
    pytest.importorskip("matplotlib")
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 0.5}\n')
    picture = tmp_path / "loss.png"
    assert run("plot", metrics.parent, "--out", picture)[0] == 0
    picture.write_bytes(b"mine")
    status, _, err = run("plot", metrics.parent, "--out", picture)
    assert status == 2
    assert "exists already" in err
    assert picture.read_bytes() == b"mine"
    assert run("plot", metrics.parent, "--out", picture, "--force")[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "is itself an input" in run("plot", metrics.parent, "--out", metrics, "--force")[2]
    assert "a picture's name ends in one of" in run("plot", metrics.parent, "--out", tmp_path / "loss.txt")[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "run"]


def test_unreadable_is_not_damaged(tmp_path):
    if os.getuid() == 0:
        pytest.skip("root reads everything")
    path = tmp_path / "metrics.jsonl"
    path.touch(0o000)
    with pytest.raises(PermissionError):
        read_metrics(path)


WHOLE = {"rank": 2, "target_modules": "all", "train_embeddings": True, "train_head": True}


def test_embedding_and_head_are_saved_resumed_and_exported(settings, tmp_path, run, tiny_directory):
    """In checkpoints, once killed, and in the adapter; their room is counted; `plan`, `export`, `verify` know them."""
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "lora": WHOLE}))
    assert run("pretrain", settings)[0] == 0
    whole = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    last = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert run("verify", tmp_path / "run")[0] == 0
    for name in ("run/adapter", "run/checkpoints/step_0000004"):
        shutil.rmtree(tmp_path / name)
    assert run("pretrain", settings)[0] == 0
    again = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["loss"] == last["loss"]
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    base = load_file(tiny_directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (whole[f"base_model.model.{name}"] - base[name]).abs().max()
        assert 0 < moved < 5 * TRAIN["lr"]
    status, told, _ = run("plan", settings, "--gpu-memory", "24GiB", "--world-size", "1", "--json")
    assert (status, json.loads(told)["trained"]) == (0, sum(tensor.numel() for tensor in whole.values()))
    for flags in ("train_head=false", "train_embeddings=false", "rank=3"):
        override = (f"lora.init_adapter={tmp_path}/run/adapter", f"run.dir={tmp_path}/next", f"lora.{flags}")
        status, _, err = run("pretrain", settings, *override)
        assert status == 2
        assert f"lora.{flags.partition('=')[0]} is " in err
        assert "that of lora.init_adapter" in err
    status, _, err = run("serve", "--model", tiny_directory, "--adapter", f"one={tmp_path}/run/adapter")
    assert (status, "has its own embed_tokens and lm_head" in err) == (2, True)
    status, told, _ = run("audit", "diff", tiny_directory, tmp_path / "run/adapter", "--json")
    assert (status, "lm_head.weight" in told, "embed_tokens" in told) == (0, True, True)


def test_bfloat16_is_resumed_bit_for_bit(settings, tmp_path, run, monkeypatch):
    """On a CPU, whose processor is said to be slow at it: a warning, weights and moments in float32, the same bits."""
    monkeypatch.setattr(cpu, "rate", lambda _: 0.5)
    status, _, err = run("pretrain", settings, "model.dtype=bfloat16")
    assert (status, err.count("bfloat16: on this processor products")) == (0, 1)
    last, step = tmp_path / "run/checkpoints/step_0000004", read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    kept, exported = read_state(last)["files"], load_file(tmp_path / "run/model/model.safetensors")
    stored = FileSystemReader(last).read_metadata().state_dict_metadata.values()
    assert {each.properties.dtype for each in stored if hasattr(each, "properties")} == {torch.float32}
    for folder in (last, tmp_path / "run/model"):
        shutil.rmtree(folder)
    monkeypatch.setattr(cpu, "rate", lambda _: 2.0)
    status, _, err = run("pretrain", settings, "model.dtype=bfloat16")
    assert (status, "on this processor" in err) == (0, False)
    again = read_state(last)["files"]
    assert {name: kept[name] for name in kept if name != ".metadata"} == {
        name: again[name] for name in kept if name != ".metadata"
    }
    fields = ("step", "loss", "grad_norm")
    now = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert [now[field] for field in fields] == [step[field] for field in fields]
    after = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(after[name], exported[name]) for name in exported)
    assert {values.dtype for values in after.values()} == {torch.bfloat16}


def test_room_for_embedding_and_head_is_counted(settings, base, tmp_path, run, monkeypatch):
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "lora": WHOLE}))
    shapes = {name: shape for name, shape in tensor_shapes(ModelDirectory(base).config).items() if len(shape) == 2}
    adapters = 2 * sum(sum(shape) for name, shape in shapes.items() if ".layers." in name)
    least = 16 * (adapters + sum(math.prod(shape) for name, shape in shapes.items() if ".layers." not in name))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=least - 1))
    status, _, err = run("pretrain", settings)
    assert (status, f"needs {least:,} bytes (checkpoints at a time: 1" in err) == (2, True)


@pytest.mark.parametrize("flag", ["train_embeddings", "train_head"])
def test_embedding_and_head_that_are_one_are_refused_before_any_work(settings, base, tmp_path, run, flag):
    config = tiny_config(tie_embeddings=True, vocab_size=400, max_seq_len=1024)
    for name in ("model.safetensors", "config.json", "manifest.json"):
        (base / name).unlink()
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "tied")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(tmp_path / "tied" / name, base)
    for command in (("pretrain",), ("plan", "--gpu-memory", "24GiB", "--world-size", "1")):
        status, out, err = run(*command, settings, "lora.rank=2", f"lora.{flag}=true")
        assert (status, out) == (2, "")
        assert "need a model whose embedding and head are two matrices; this one's are tied" in err.splitlines()[-1]
        assert not (tmp_path / "run").exists()


def test_flags_that_are_off_do_not_change_what_a_run_is_known_by(tuning, tmp_path, run):
    """Runs and checkpoints from before them go on."""
    assert run("finetune", tuning)[0] == 0
    state = read_state(tmp_path / "tuned/checkpoints/step_0000004")
    assert not {"train_embeddings", "train_head"} & state["identity"]["lora"].keys()
    assert run("finetune", tuning, "lora.train_head=true")[0] == 2
    shutil.rmtree(tmp_path / "tuned/adapter")
    status, _, err = run("finetune", tuning, "lora.train_head=true")
    assert (status, "another lora.train_head (None, now True)" in err) == (2, True)


MEMORY = """
import torch
from k2mini.training.run import keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) >> 8  # MiB, of pages of 4 KiB
before, found = resident(), []
with keep_freed_memory():
    torch.ones(1 << 26)
    found.append(resident() - before)
found.append(resident() - before)
torch.ones(1 << 26)
found.append(resident() - before)
print(*found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they keep")
def test_freed_memory_is_kept_while_it_is_asked_for():
    """Of 256 MiB: all while a run trains, none after it, as ever."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    kept, after, later = map(int, done.stdout.split())
    assert kept > 200
    assert after < 100
    assert later < 100
