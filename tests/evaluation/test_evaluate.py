"""`k2mini eval` as a user runs it: killed and started again, compared, with open tasks."""

import json
import math
import signal
import time

import pytest
import torch

import k2mini.evaluation.evaluate
from k2mini.build import load_model
from k2mini.data.chats import open_template
from k2mini.data.prompts import get_template
from k2mini.evaluation.benchmarks import load_subjective
from tests.faults.server import Request
from tests.helpers import CHATML, copy_model


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "rocks.jsonl"
    words = ["granite", "basalt", "quartz", "rock", "mineral", "crust", "mantle"]
    rows = [
        {"question": f"What is {a}, after {b}?", "choices": [a, b, "volcano"], "answer": i % 3}
        for i, (a, b) in enumerate((a, b) for a in words for b in words if a != b)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_killed_half_way_it_goes_on(tiny_directory, task, tmp_path, run, forks):
    whole, out = tmp_path / "whole", tmp_path / "out"
    common = ["eval", "--model", tiny_directory, "--benchmark", task, "--shots", 2, "--batch-size", 1, "--seed", 3]
    assert run(*common, "--out", whole)[0] == 0
    process = forks.start(Request([[*map(str, common), "--out", str(out)]], str(tmp_path), limit=120))
    journal = out / "results.jsonl"
    while process.poll() is None and not (journal.is_file() and len(journal.read_text().splitlines()) > 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_text().splitlines()
    assert 3 < len(before) < 42, "killed too late to prove anything"
    journal.write_text(journal.read_text() + before[0][:20])  # a line that was cut
    assert run(*common, "--out", out)[0] == 0
    assert (out / "results.jsonl").read_text() == (whole / "results.jsonl").read_text()
    assert (out / "report.json").read_text() == (whole / "report.json").read_text()
    status, _, err = run(*common[:-1], 4, "--out", out)
    assert status == 2
    assert "holds results with seed 3, not 4; name another --out" in err


def test_interrupted_it_says_where_the_results_are(tiny_directory, task, tmp_path, run, monkeypatch):
    common = ["eval", "--model", tiny_directory, "--benchmark", task]
    whole = k2mini.evaluation.evaluate.score

    def interrupted(*arguments, **options):
        yield next(whole(*arguments, **options))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(k2mini.evaluation.evaluate, "score", interrupted)
        status, out, err = run(*common, "--out", tmp_path / "out")
        assert (status, out) == (130, "")
        assert f"the results so far are in {tmp_path / 'out/results.jsonl'}, start again to go on" in err
        status, out, err = run(*common)
        assert (status, out) == (130, "")
        assert err.endswith("k2mini: interrupted\n")
    assert run(*common, "--out", tmp_path / "out")[0] == 0
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 42


def test_compare(tiny_directory, task, tmp_path, run):
    common = ["eval", "--model", tiny_directory, "--benchmark", task]
    for name, scoring in (("a", "letter"), ("b", "text")):
        assert run(*common, "--scoring", scoring, "--out", tmp_path / name)[0] == 0
    status, out, _ = run("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert status == 0
    (found,) = json.loads(out)
    assert (found["task"], found["n"]) == ("rocks", 42)
    a, b = (
        {json.loads(line)["index"]: json.loads(line) for line in (tmp_path / n / "results.jsonl").open()} for n in "ab"
    )
    better = sum(b[i]["prediction"] == b[i]["answer"] != a[i]["prediction"] for i in a)
    assert found["runs"][1]["better"] == better
    assert "better" in run("compare", tmp_path / "a", tmp_path / "b")[1]
    for runs, said in (
        ([tmp_path / "a"], "at least two runs"),
        ([tmp_path / "a", tmp_path], "is no run of k2mini eval"),
    ):
        status, _, err = run("compare", *runs)
        assert (status, said in err) == (2, True)


def test_open_tasks_and_perplexity(tiny_directory, tmp_path, run, geobench):
    text = tmp_path / "text.txt"
    text.write_text("granite is made of quartz. " * 30)
    status, out, err = run(
        *("eval", "--model", tiny_directory, "--benchmark", geobench["npee"], "--tasks", "npee/noun", "npee/tf"),
        *("--limit", 5, "--max-new-tokens", 8, "--perplexity", text, "--out", tmp_path / "out", "--json"),
    )
    assert status == 0, err
    report = json.loads(out)
    assert [row["task"] for row in report["tasks"]] == ["npee/tf"]
    (noun,) = report["subjective"]
    assert (noun["task"], noun["n"]) == ("npee/noun", 5)
    model, tokenizer = load_model(tiny_directory)
    total, tokens = 0.0, 0
    for question, reference in load_subjective(geobench["npee"], "noun")[:5]:
        context = get_template("alpaca").prompt(question)
        ids = torch.tensor([tokenizer.encode(context + reference, bos=True, eos=False)])
        start = len(tokenizer.encode(context, bos=True, eos=False))
        with torch.inference_mode():
            logprobs = model(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).flatten()
        total, tokens = total + logprobs[start - 1 :].sum().item(), tokens + ids.shape[1] - start
    assert noun["likelihood"] == pytest.approx(total / tokens, abs=1e-5)  # of the references, a token
    assert noun["perplexity"] == pytest.approx(math.exp(-noun["likelihood"]))
    assert report["perplexity"]["tokens"] > 50
    answers = json.loads((tmp_path / "out" / "answers_npee_noun.json").read_text())
    assert [set(entry) for entry in answers] == [{"question", "answer"}] * 5
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_a_models_own_template_is_the_default_and_known_again(chat_directory, task, tmp_path, run):
    model, out = copy_model(chat_directory, tmp_path / "model", eos_token_id=[0, 2]), tmp_path / "out"
    npee, empty = tmp_path / "npee.json", {"question": [], "answer": []}
    noun = {"question": ["What is granite?"], "answer": ["a rock"]}
    npee.write_text(json.dumps({"choice": empty, "tf": empty, "noun": noun}))
    common = ["eval", "--model", model, "--benchmark", task, npee, "--tasks", "rocks", "npee/noun", "--limit", 4]
    common += ["--max-new-tokens", 4, "--out", out]
    status, _, err = run(*common)
    assert status == 0, err
    assert "the template is the model's own" in err
    report = json.loads((out / "report.json").read_text())
    assert [row["template"] for row in (*report["tasks"], *report["subjective"])] == ["own", "own"]
    loaded, tokenizer = load_model(model)
    text = "<|im_start|>user\nWhat is granite?<|im_end|>\n<|im_start|>assistant\n"
    prompt, ids = (tokenizer.encode(each, bos=False, eos=False, special=True) for each in (text, text + "a rock"))
    with torch.inference_mode():
        logprobs = loaded(torch.tensor([ids]))[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])
    mean = logprobs[len(prompt) - 1 :].mean().item()
    assert report["subjective"][0]["likelihood"] == pytest.approx(mean, abs=1e-5)
    assert run(*common)[0] == 0  # kept
    for name, content, said in (
        ("generation_config.json", {"eos_token_id": [0, 2, 5]}, "holds results with stop_ids [0, 2], not [0, 2, 5]"),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>", "chat_template": CHATML + " "}, "with template 'own@"),
    ):
        before = (model / name).read_text()
        (model / name).write_text(json.dumps(content))
        status, printed, err = run(*common)
        assert (status, printed, said in err.splitlines()[-1]) == (2, "", True), err
        (model / name).write_text(before)
    status, _, err = run(*common, "--template", "chatml")
    assert (status, "holds results with template 'own@" in err) == (2, True)
    assert open_template("own", model, tokenizer).digest in err


def test_a_benchmark_while_training_is_asked_in_the_models_own_template(
    chat_directory, task, tmp_path, run, monkeypatch
):
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "What is granite?", "output": "a rock"}] * 4))
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(chat_directory)},
        "data": {"path": str(tmp_path / "data.json"), "max_seq_len": 64},
        "train": {"lr": 1e-3, "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 2},
        "eval": {"benchmark": [str(task)], "every": 2},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    evaluate, asked = k2mini.evaluation.evaluate.evaluate, []

    def recording(model, tokenizer, questions, config, **options):
        asked.append(config.prompt(questions[0]))
        return evaluate(model, tokenizer, questions, config, **options)

    monkeypatch.setattr(k2mini.evaluation.evaluate, "evaluate", recording)
    for template in ("null", "alpaca"):
        more = [f"eval.template={template}", f"run.dir={tmp_path}/{template}"]
        status, _, err = run("finetune", tmp_path / "config.yaml", *more)
        assert status == 0, err
    assert [prompt[:16] for prompt in asked] == ["<|im_start|>user", "Below is an inst"]
    status, _, err = run("finetune", tmp_path / "config.yaml", "eval.template=x", f"run.dir={tmp_path}/x")
    assert (status, "there is no template 'x'" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name what to evaluate on"),
        (["--benchmark", "TASK", "--shots", "99"], "--shots 99: rocks has 42 distinct questions"),
        (["--benchmark", "TASK", "--tasks", "npee/noun"], "npee/noun is in geobench_npee.json, which is not among"),
        (
            ["--benchmark", "TASK", "--tasks", "other"],
            "--tasks other: the benchmarks have no such task; they have rocks",
        ),
        (["--benchmark", "TASK", "--scoring", "k2"], "reads LLaMA's ids of the letters"),
    ],
)
def test_bad_input(tiny_directory, task, run, options, said):
    options = [str(task) if option == "TASK" else option for option in options]
    status, out, err = run("eval", "--model", tiny_directory, *options)
    assert (status, out) == (2, "")
    assert said in err.strip().splitlines()[-1]


def test_tasks_that_there_are(tiny_directory, task, geobench, run):
    """All of them, open ones too where the benchmark has them; and what is scored is one of them."""
    for task_name, benchmarks, there in (
        (
            "npee/foo",
            [geobench["npee"]],
            "npee/choice, npee/tf, npee/noun, npee/qa, npee/discussion, npee/completion, npee/subjective",
        ),
        ("ap2", [geobench["ap"], task], "ap, rocks"),
    ):
        status, out, err = run("eval", "--model", tiny_directory, "--benchmark", *benchmarks, "--tasks", task_name)
        assert (status, out) == (2, "")
        said = f"k2mini: --tasks {task_name}: the benchmarks have no such task; they have {there}"
        assert err.splitlines()[-1] == said


@pytest.mark.parametrize("option", ["--batch-size", "--max-new-tokens", "--limit"])
def test_numbers_below_one_are_refused_in_the_options_words(tiny_directory, task, run, option):
    status, out, err = run("eval", "--model", tiny_directory, "--benchmark", task, option, 0)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"k2mini: {option} must be at least 1, not 0"


def test_a_benchmark_while_training(tiny_directory, task, tmp_path, run):
    """Every two steps and at the end; the last figure is that of `eval` on the model that came out."""
    (tmp_path / "text.txt").write_text("granite is made of quartz. " * 200)
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "run": {"dir": str(tmp_path / "run")},
                "model": {"path": str(tiny_directory)},
                "data": {"path": str(tmp_path / "text.txt"), "seq_len": 32},
                "train": {"lr": 0.01, "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 5},
                "eval": {"benchmark": [str(task)], "every": 2, "limit": 20, "template": "none"},
            }
        )
    )
    status, out, err = run("pretrain", tmp_path / "run.yaml")
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["accuracy/rocks"] for line in lines if "accuracy/rocks" in line}
    assert sorted(scores) == [2, 4, 5]
    common = ["--benchmark", task, "--limit", 20, "--template", "none", "--json"]
    report = json.loads(run("eval", "--model", out.strip(), *common)[1])
    assert report["tasks"][0]["accuracy"] == scores[5]
    status, _, err = run("pretrain", tmp_path / "run.yaml", "eval.benchmark=[]", "run.dir=" + str(tmp_path / "other"))
    assert (status, "with an eval.benchmark to run" in err) == (2, True)
