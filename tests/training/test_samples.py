"""Runs over several sources, from the command line: what is taken, resumed, said and refused."""

import json
import random

import pytest

from k2mini.demo.world import instructions, read_facts
from k2mini.training.loop import read_metrics
from k2mini.weights.model_directory import manifest_text

TEXT = "granite is made of quartz and basalt erodes in the mantle. "


@pytest.fixture
def files(tmp_path, tiny_tokenizer, run):
    """A few instructions in three files, and documents: prepared with a split of their own, and not."""
    records = instructions(read_facts("geoscience"), 60, random.Random(0))
    (tmp_path / "a.json").write_text(json.dumps(records[:24]))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records[24:40])))
    rows = [f'"{record["instruction"]}","{record["output"]}"' for record in records[40:]]
    (tmp_path / "c.csv").write_text("\n".join(["instruction,output", *rows]))
    for name in ("one", "two"):
        lines = [json.dumps({"text": f"{name} {number}. " + TEXT * 3}) for number in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    arguments = ("--tokenizer", tiny_tokenizer.path, "--val-percent", 20, "--out", tmp_path / "prepared")
    assert run("prepare", tmp_path / "one.jsonl", *arguments)[0] == 0
    return tmp_path


@pytest.fixture
def train(files, tiny_directory, run):
    def call(command, sources, *overrides, name="run"):
        config = {
            "run": {"dir": str(files / name)},
            "model": {"path": str(tiny_directory)},
            "data": {
                "sources": sources,
                **({"template": "alpaca_short"} if command != "pretrain" else {"seq_len": 32}),
            },
            "train": {"lr": 1e-3, "global_batch_size": 4, "micro_batch_size": 2, "epochs": 1.5},
            "checkpoint": {"every": 2, "keep_last": 9},
        }
        (files / f"{name}.yaml").write_text(json.dumps(config))
        return run(command, files / f"{name}.yaml", *overrides)

    return call


def losses(folder):
    return [row.get("loss", row.get("val_loss")) for row in read_metrics(folder / "metrics.jsonl")]


def of(files, **weights):
    names = {"a": "a.json", "b": "b.jsonl", "c": "c.csv", "one": "prepared", "two": "two.jsonl"}
    return [{"path": str(files / names[name]), "weight": weight} for name, weight in weights.items()]


def test_instructions_of_several_files(files, train):
    """Twenty records validate, drawn from all; steps resume on the same samples, and a changed weight is named."""
    mixed = of(files, a=2, b=1, c=0.5)
    status, _, err = train("finetune", mixed, "data.val_size=20")
    assert status == 0, err
    taken = [line.split(": an epoch takes ")[1].split() for line in err.splitlines() if "an epoch takes" in line]
    assert sum(int(words[2]) for words in taken) == 40
    doubled, once, half = ((int(words[0]), int(words[2])) for words in taken)
    assert doubled[0] == 2 * doubled[1] < 48
    assert once[0] == once[1] < 16
    assert half[0] == (half[1] + 1) // 2 < 10
    steps = -(-15 * (doubled[0] + once[0] + half[0]) // 40)
    found = losses(files / "run")
    assert len(found) == steps + 1  # with a validation
    checkpoint = files / "run/checkpoints/step_0000004"
    status, _, err = train("finetune", mixed, "data.val_size=20", f"checkpoint.resume={checkpoint}", name="again")
    assert status == 0, err
    assert losses(files / "again") == found[4:]
    # Neither a checkpoint nor a complete run is of other weights.
    for name, resume in (("third", [f"checkpoint.resume={checkpoint}"]), ("run", [])):
        status, out, err = train("finetune", of(files, a=2, b=1, c=1), "data.val_size=20", *resume, name=name)
        assert (status, out) == (2, "")
        assert "another data.sources.weight ([2.0, 1.0, 0.5], now [2.0, 1.0, 1.0])" in err
    (files / "b.jsonl").write_text((files / "b.jsonl").read_text() + "\n")
    resume = f"checkpoint.resume={checkpoint}"
    assert "another data.content" in train("finetune", mixed, "data.val_size=20", resume, name="third")[2]


def test_a_checkpoint_from_before_there_were_sources(files, train):
    """Its identity lacks the keys that one path has no use for."""
    config = [f"data.path={files}/a.json", "data.sources=null"]
    assert train("finetune", None, *config)[0] == 0
    checkpoint = files / "run/checkpoints/step_0000004"
    state = json.loads((checkpoint / "state.json").read_text())
    assert not [key for key in state["identity"]["data"] if key.startswith("sources")]
    for key in ("limit", "fields"):
        assert state["identity"]["data"].pop(key) is None
    (checkpoint / "state.json").write_text(manifest_text({k: v for k, v in state.items() if k != "sha256"}))
    status, _, err = train("finetune", None, *config, f"checkpoint.resume={checkpoint}", name="again")
    assert status == 0, err
    assert losses(files / "again") == losses(files / "run")[4:]


def test_documents_of_several_sources(files, train):
    """One is prepared and has a split to validate on; the other is prepared on first use."""
    status, out, err = train("pretrain", of(files, one=0.5, two=2), "train.epochs=0.2")
    assert status == 0, err
    assert out == f"{files}/run/model\n"
    said = [line for line in err.splitlines() if "an epoch takes" in line]
    assert len(said) == 2
    assert "(weight 2)" in said[1]
    found = losses(files / "run")
    assert [row for row in read_metrics(files / "run/metrics.jsonl") if "val_loss" in row]
    resume = f"checkpoint.resume={files}/run/checkpoints/step_0000002"
    assert train("pretrain", of(files, one=0.5, two=2), "train.epochs=0.2", resume, name="again")[0] == 0
    assert losses(files / "again") == found[2:]


def test_samples_can_be_looked_at_and_planned(files, train, run):
    counts = []
    for command, mixed in (("finetune", of(files, a=1, c=0.5)), ("pretrain", of(files, one=1, two=2))):
        train(command, mixed, "train.lr=0")  # writes the configuration
        status, out, err = run("preview", files / "run.yaml", "--number", 3)
        assert status == 0, err
        counts.append(int(out.split("sample 0 of ")[1].split("\n")[0].replace(",", "")))
        assert out.count("position") == 3
    assert counts[0] == 24 + 10
    room = ("--world-size", 1, "--gpu-memory", "4GiB", "--json")
    status, out, err = run("plan", files / "run.yaml", *room)
    assert status == 0, err
    assert json.loads(out)["epoch_steps"] is None  # the other's tokens are not counted yet
    both = [{"path": str(files / "prepared"), "weight": 1.5}]
    once, more = (
        json.loads(run("plan", files / "run.yaml", *data, *room)[1])
        for data in (["data.sources=null", f"data.path={files}/prepared"], [f"data.sources={json.dumps(both)}"])
    )
    assert more["epoch_tokens"] == round(1.5 * once["epoch_tokens"])
    assert once["epoch_steps"] < more["epoch_steps"] <= 2 * once["epoch_steps"]


def test_a_trial_on_a_few_records(files, train):
    status, _, err = train("finetune", of(files, a=1, c=3), "data.limit=6")
    assert status == 0, err
    assert "a.json: the first 6 of 24 records (data.limit)" in err
    assert "c.csv: an epoch takes 18 of 6 samples (weight 3)" in err
    status, _, err = train("finetune", of(files, a=1, c=3), "data.limit=7")
    assert status == 2
    assert "another data.limit (6, now 7)" in err


def test_the_demos_files_as_sources(files, train):
    mixed = [{"path": "demo:general.json", "weight": 0.01}, {"path": "demo:expert.json", "weight": 0.01}]
    status, _, err = train("finetune", mixed, "model.path=demo:base", "data.limit=200", "data.max_seq_len=128")
    assert status == 0, err
    assert err.count("an epoch takes 2 of 200 samples (weight 0.01)") == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.sources=[{path: a.json, weight: 0}]"], "data.sources[0].weight must be positive, not 0"),
        (["data.sources=[{path: a}, {path: b, weight: -2}]"], "data.sources[1].weight must be positive, not -2"),
        (["data.sources=[{path: a.json, weight: .inf}]"], "data.sources[0].weight must be finite, not inf"),
        (["data.sources=[{path: a.json, weight: .nan}]"], "data.sources[0].weight must be finite, not nan"),
        (["data.sources=[{path: a.json, wieght: 2}]"], "unknown key data.sources[0].wieght; did you mean"),
        (["data.sources=[{weight: 2}]"], "data.sources[0].path is missing"),
        (["data.sources=[a.json]"], "data.sources[0] must be a section with keys, not 'a.json'"),
        (["data.sources=a.json"], "data.sources must be a list of {path, weight}, not 'a.json'"),
        (["data.sources=[]"], "data.sources must name one path or more, each once with its weight, not none"),
        (["data.sources=[{path: a}, {path: ./a}]"], "each once with its weight, not a, ./a"),
        (["data.path=a.json"], "set exactly one of data.path and data.sources"),
        (["data.sources=null"], "set exactly one of data.path and data.sources"),
        (["data.sources=[{path: none.json}]"], "there is no data file none.json"),
        (["data.limit=0"], "data.limit must be positive, not 0"),
        (["data.fields={question: instruction}"], "data.fields must be {instruction, input, output}, each a text"),
        (["data.fields={instruction: 3}"], "data.fields must be {instruction, input, output}, each a text"),
        (["data.fields={instruction: question}"], "a.json has no 'question', which data.fields.instruction names; it"),
    ],
)
def test_bad_input(files, train, overrides, said):
    status, out, err = train("finetune", of(files, a=1, b=1), *overrides)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert not (files / "run").exists()


def test_documents_that_are_not_there(files, train):
    status, out, err = train("pretrain", [*of(files, two=1), {"path": "nowhere.jsonl"}])
    assert (status, out) == (2, "")
    assert "there is no file or folder nowhere.jsonl" in err


def test_a_source_by_two_names(files, train):
    """They would be prepared into one folder, and one weight lost."""
    (files / "also.jsonl").symlink_to(files / "two.jsonl")
    both = [{"path": str(files / name), "weight": 2} for name in ("two.jsonl", "also.jsonl")]
    status, _, err = train("pretrain", both)
    assert (status, "each once with its weight" in err) == (2, True), err


def test_a_refused_start_leaves_the_counts(files, train):
    assert train("finetune", of(files, a=1), "train.epochs=null", "train.max_steps=2")[0] == 0
    before = (files / "run/data.json").read_text()
    assert '"records": 24' in before
    assert train("finetune", of(files, a=1), "train.epochs=null", "train.max_steps=4", "data.limit=9")[0] == 2
    assert (files / "run/data.json").read_text() == before
