"""From a folder of papers to a model that was tuned on what they say: each step is a command of the README."""

import json
import random
import re
import shlex

import pytest

from k2mini.corpus.shards import read_corpus, read_manifest
from k2mini.demo.sources import BASE
from k2mini.demo.world import by_entity, read_facts
from tests.conftest import ROOT

for package in ("lxml", "pypdfium2", "ftfy", "py3langid", "reportlab"):
    pytest.importorskip(package)

# The README's, in a folder with mini/ and configs/, where `runs/demo/base` is the demo's base.
COMMANDS = """
k2mini corpus mini/papers --out mini/corpus --workers 2 --set references.keep=false
k2mini prepare mini/corpus --tokenizer runs/demo/base --out mini/tokens
k2mini pretrain configs/tiny_pretrain.yaml data.path=mini/tokens data.val_path=null train.max_steps=800 run.dir=runs/read
k2mini signals mini/corpus mini/tables --out mini/signals.json --questions mini/asked.json --held-out 50 --tasks fact caption citation keywords --phrasings 6 --answer-prefix "Answer: "
k2mini finetune configs/tiny_stage2.yaml model.path=runs/read/model data.path=mini/signals.json 'eval.benchmark=[mini/asked_unseen.json]' run.dir=runs/tuned
k2mini eval --model runs/read/model --adapter runs/tuned/adapter --benchmark mini/asked_unseen.json --tasks npee/choice --scoring text --answer-prefix "Answer: " --json
""".strip().splitlines()  # noqa: E501
# The same tuning over a base that has not read the papers.
CONTROL = [
    command.replace("runs/read/model", "runs/demo/base").replace("runs/tuned", "runs/control")
    for command in COMMANDS[4:]
]
QUICK = "train.max_steps=2 train.global_batch_size=4 train.micro_batch_size=4 data.val_size=8 eval.limit=2"


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import make_papers
    return make_papers


def make_world(tool, folder, papers, monkeypatch):
    tool.make(folder / "mini", papers, 0)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "runs/demo").mkdir(parents=True)
    (folder / "runs/demo/base").symlink_to(BASE)
    monkeypatch.chdir(folder)


def run_all(run, commands):
    """What the last command prints, as JSON."""
    for command in commands:
        status, out, err = run(*shlex.split(command)[1:])
        assert status == 0, f"{command}\n{err}"
    return json.loads(out)


def words(text):
    return re.findall(r"\w+", text)


def test_from_papers_to_answers(tool, tmp_path, monkeypatch, run):
    """30 papers in seven formats: what is kept and why the others are not; each step takes what was before it."""
    make_world(tool, tmp_path, 30, monkeypatch)
    short = [command.replace("train.max_steps=800", "train.max_steps=2") for command in COMMANDS]
    short[4] += f" {QUICK}"
    short[5] += " --limit 4"
    report = run_all(run, short)
    assert [(task["task"], task["n"]) for task in report["tasks"]] == [("npee/choice", 4)]

    # Of 30 papers one is a near copy, one in German, one junk; the tool's own papers are written again to compare.
    papers = tool.write_papers(27, random.Random(0))
    kept = list(read_corpus(tmp_path / "mini/corpus"))
    rejected = [json.loads(line) for line in (tmp_path / "mini/corpus/rejected.jsonl").read_text().splitlines()]
    assert len(kept) == len(papers)
    assert sorted(entry["filter"] for entry in rejected) == ["language", "near duplicates", "quality"]
    known = {" ".join(words(paper.title)): paper for paper in papers}
    for record in kept:
        whole = " ".join(words(record["text"]))
        (title,) = (title for title in known if title in whole.partition(" Abstract ")[0])
        paper = known.pop(title)
        for said in (paper.abstract, *paper.captions, *(line for _, lines in paper.sections for line in lines)):
            assert " ".join(words(said)) in whole, record["source"]
        if not record["source"].endswith((".pdf", ".txt", ".txt.gz")):
            assert record["title"] == paper.title
    assert not known
    assert read_manifest(tmp_path / "mini/corpus")["licences"]

    # What is asked of held-out entities stands in the papers, but in no instruction.
    names = by_entity(read_facts("geoscience"))
    asked = json.loads((tmp_path / "mini/asked_unseen.json").read_text())["choice"]["question"]
    held = {name for name in names if any(re.search(rf"\b{name}[ ?.,]", text.split("\n")[0]) for text in asked)}
    told = (tmp_path / "mini/signals.json").read_text()
    assert len(held) > len(names) / 3
    corpus = " ".join(record["text"] for record in kept).casefold()
    for name in held:
        assert not re.search(rf"(?i)\b{re.escape(name)}\b", told), name
        assert name.casefold() in corpus


@pytest.mark.slow
def test_what_papers_say_is_learned(tool, tmp_path, monkeypatch, run, capfd):
    """The whole example: unseen entities are answered for, and not without having read the papers."""
    make_world(tool, tmp_path, 300, monkeypatch)
    (read,) = run_all(run, COMMANDS)["tasks"]
    (control,) = run_all(run, CONTROL)["tasks"]
    with capfd.disabled():
        for name, task in (("read", read), ("control", control)):
            accuracy, low, high = (f"{100 * task[key]:.1f} %" for key in ("accuracy", "low", "high"))
            print(f"{name}: {accuracy} of {task['n']} ({low} – {high})")
    assert read["n"] == control["n"] > 300
    assert read["accuracy"] >= 0.6
    assert control["low"] <= 0.25 <= control["high"]
