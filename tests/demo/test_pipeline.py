"""The shrunken demo, all stages: what it leaves, that it survives interruption, that its parts are the commands."""

import json
import os
import shlex
import signal
import time

import pytest
import torch

from k2mini.build import load_model
from k2mini.demo.pipeline import run_demo
from k2mini.demo.sources import BASE
from k2mini.training.loop import read_metrics
from k2mini.weights.model_directory import CheckpointReader
from tests.faults.server import Request

STAGES = ["base", "pretrain", "stage1", "stage2", "control"]
RUNS = ["pretrain", "stage1", "stage2", "control_stage1", "control"]


@pytest.fixture(scope="module")
def lora_demo(tmp_path_factory):
    """The folder, and the reports, of a demo with LoRA on documents."""
    out = tmp_path_factory.mktemp("demo") / "the demo"
    return out, run_demo(out, quick=True, lora=True), (out / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo(lora_demo):
    """The same folder once it has the control too, of which alone its report is then."""
    out, _, _ = lora_demo
    return out, run_demo(out, quick=True, control=True)


def losses(out):
    return {
        name: [entry.get("loss", entry.get("val_loss")) for entry in read_metrics(out / name / "metrics.jsonl")]
        for name in RUNS
        if (out / name / "metrics.jsonl").exists()
    }


def test_the_report_has_its_fields(demo):
    out, report = demo
    assert report == json.loads((out / "report.json").read_text())
    assert [row["stage"] for row in report["stages"]] == STAGES
    for row in report["stages"]:
        assert {"perplexity", "accuracy", "low", "high", "chance", "n", "seen", "unseen", "letter"} <= set(row)
        assert row["n"] == 20
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["perplexity"] > 1
    assert report["seconds"] > 0
    text = (out / "report.md").read_text()
    assert "k2mini pretrain" in text
    assert "95 % interval" in text
    assert [set(entry["answers"]) for entry in report["answers"]] == [set(STAGES)] * len(report["answers"])
    steps = [json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert set(steps) == {"pretrain", "stage1", "stage2"}


def test_the_base_knows_the_words_and_is_small(demo):
    _, report = demo
    model, tokenizer = load_model(BASE)
    assert report["stages"][0]["perplexity"] < tokenizer.vocab_size
    assert model.config.num_parameters() < 1.2e6
    assert (BASE / "model.safetensors").stat().st_size < 3e6


def test_the_delta_gives_back_the_tuned_weights(demo):
    out, _ = demo
    tuned, restored = CheckpointReader(out / "pretrain/model"), CheckpointReader(out / "restored")
    for name in tuned.names():
        assert torch.equal(tuned.tensor(name).view(torch.int32), restored.tensor(name).view(torch.int32))


def test_every_directory_loads_in_transformers_and_peft(demo):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    out, _ = demo
    tokens = torch.randint(1200, (2, 40))
    for name in ("base", "pretrain/model", "restored", "merged"):
        reference = LlamaForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                load_model(out / name)[0](tokens), reference(tokens).logits, rtol=0, atol=1e-4, msg=name
            )
    for adapter, base in [("stage1", "pretrain/model"), ("stage2", "pretrain/model"), ("control", "base")]:
        reference = LlamaForCausalLM.from_pretrained(out / base, dtype=torch.float32)
        reference = PeftModel.from_pretrained(reference, out / adapter / "adapter").eval()
        with torch.no_grad():
            ours = load_model(out / base, adapter=out / adapter / "adapter")[0](tokens)
            torch.testing.assert_close(ours, reference(tokens).logits, rtol=0, atol=1e-4, msg=adapter)


def test_a_second_start_does_nothing_again(demo, caplog):
    out, report = demo
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    with caplog.at_level("INFO", logger="k2mini"):
        again = run_demo(out, quick=True, control=True)
    assert "run.dir" not in caplog.text
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert f"what is finished in {out} is not run again; to run it anew, remove it or name another --out" in caplog.text


def test_another_seed_needs_another_folder(demo, tmp_path):
    out, _ = demo
    with pytest.raises(
        ValueError,
        match=r"holds a demo with seed 0, not 1; remove .* to run it anew, or name another folder with --out",
    ):
        run_demo(out, seed=1, quick=True)
    with pytest.raises(ValueError, match=r"holds a quick demo, not a full one; remove .*, or name another folder"):
        run_demo(out)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        run_demo(tmp_path / "file", quick=True)


def test_its_stages_are_the_products_commands(demo, tmp_path, run, monkeypatch):
    """The commands of report.md as they stand, in their order: the same losses and bytes by hand."""
    out, report = demo
    monkeypatch.chdir(tmp_path)
    block = (out / "report.md").read_text(encoding="utf-8").split("## Every stage by hand")[1]
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("k2mini ")]
    names = "pretrain, delta, delta, finetune, finetune, finetune, finetune, merge, generate, eval"
    assert ", ".join(name for _, name, *_ in commands) == names
    for _, *arguments in commands:
        status, printed, err = run(*arguments, *(["--json"] if arguments[0] == "eval" else []))
        assert status == 0, err
        assert printed
    correct = sum(task["accuracy"] * task["n"] for task in json.loads(printed)["tasks"])
    assert correct / 10 == pytest.approx(report["stages"][3]["unseen"])
    assert not list(tmp_path.iterdir())
    assert losses(out / "by_hand") == losses(out)
    for name in ("restored", "merged", "pretrain/model"):
        model = (out / "by_hand" / name / "model.safetensors").read_bytes()
        assert model == (out / name / "model.safetensors").read_bytes()
    newest = sorted((out / "pretrain/checkpoints").iterdir())[-1]
    assert run("export", newest, "--out", tmp_path / "exported")[0] == 0
    assert (tmp_path / "exported/model.safetensors").read_bytes() == (
        out / "pretrain/model/model.safetensors"
    ).read_bytes()


def test_documents_by_lora_alone_beside_full_pretraining(lora_demo, run):
    """Three stages more, the others as they were; by hand they give the same losses and bytes."""
    out, report, text = lora_demo
    names = ["lora_documents", "lora_stage1", "lora_stage2"]
    assert [row["stage"] for row in report["stages"]] == ["base", "pretrain", "stage1", "stage2", *names]
    assert all(set(entry["answers"]) > set(names) for entry in report["answers"])
    config = json.loads((out / "configs/lora_documents.yaml").read_text())
    assert config["lora"]["target_modules"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert config["data"] == json.loads((out / "configs/pretrain.yaml").read_text())["data"]
    table = text.split("```")[1].splitlines()
    assert len({line.find("%") for line in table[2:9]}) == 1  # the columns stand below one another
    block = text.split("## Every stage by hand")[1]
    for line in block.splitlines():
        if "lora_" in line:
            status, _, err = run(*shlex.split(line)[1:])
            assert status == 0, err
    for name in names:
        found = [read_metrics(folder / name / "metrics.jsonl") for folder in (out, out / "by_hand")]
        assert len({str([row.get("loss", row.get("val_loss")) for row in rows]) for rows in found}) == 1
    merged = [(folder / "lora_model/model.safetensors").read_bytes() for folder in (out, out / "by_hand")]
    assert merged[0] == merged[1]


def start(forks, out):
    words = ["demo", "--quick", "--control", "--threads", "1", "--out", str(out)]
    return forks.start(Request([words], str(out.parent), limit=300))


def interrupt(forks, out, number, after):
    """Start the demo, send a signal once a file is there, and return how it ended."""
    process = start(forks, out)
    while not (out / after).exists() and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, number)
    return process.wait()


def test_two_demos_in_one_folder_are_refused(tmp_path, forks):
    process = start(forks, tmp_path / "out")
    while not (tmp_path / "out/data").exists():
        assert process.poll() is None
        time.sleep(0.002)
    try:
        with pytest.raises(ValueError, match=rf"out is being written by process {process.pid} on "):
            run_demo(tmp_path / "out", quick=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"seed": 0, "quick": "yes", "seconds": 1}', "demo.json: quick must be true or false, not 'yes'"),
        ("[]", r"demo.json must be an object, not \[\]"),
        ("{", "demo.json is not valid JSON"),
    ],
)
def test_a_damaged_note_of_the_demo_is_named(tmp_path, content, message):
    (tmp_path / "demo.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path, quick=True)


def test_interrupted_anywhere_its_losses_are_the_same(demo, tmp_path, forks):
    whole, _ = demo
    out = tmp_path / "out"
    end = interrupt(forks, out, signal.SIGINT, "pretrain/metrics.jsonl")
    assert end.status == 130, end.err
    assert "stopped by SIGINT; saved" in end.err
    for after in ("stage1/metrics.jsonl", "stage2/config.yaml"):
        assert interrupt(forks, out, signal.SIGKILL, after).status == -signal.SIGKILL
    final = start(forks, out).wait()
    assert final.status == 0, final.err
    assert losses(out) == losses(whole)
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (out, whole))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_full_demo_learns(tmp_path, seed):
    """The claim itself: knowledge comes from further pretraining, the ability to answer from instruction tuning."""
    report = run_demo(tmp_path / "out", seed=seed, control=True)
    stages = {row["stage"]: row for row in report["stages"]}
    assert stages["base"]["n"] >= 300
    assert 0.18 <= stages["base"]["accuracy"] <= 0.33
    assert stages["stage2"]["accuracy"] >= 0.6
    assert stages["stage2"]["seen"] >= 0.6
    assert stages["stage2"]["unseen"] >= 0.6
    assert stages["control"]["accuracy"] < 0.35
    assert stages["base"]["perplexity"] < 1200
    assert stages["pretrain"]["perplexity"] <= stages["base"]["perplexity"] / 2
