"""What `eval --out` keeps is reused for the same question, model and settings, and for nothing else."""

import json
import math
import shutil
import subprocess
import sys

import pytest

import k2mini.evaluation.evaluate
import k2mini.evaluation.subjective
from k2mini.commands.evaluation import check_names
from k2mini.config import LoraSection
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import ALONE
from k2mini.evaluation.report import sealed
from k2mini.evaluation.subjective import _answers
from k2mini.files import output
from k2mini.nn.lora import adapter_tensors, attach, init_adapters
from k2mini.weights.adapter import save_adapter
from tests.conftest import tiny_config, tiny_llama
from tests.faults.server import Request
from tests.helpers import fill_adapters

ROCKS = ["granite", "basalt", "quartz", "rock", "mineral", "crust"]


def write_task(path, number=12, key=lambda place: place % 3):
    words = [(a, b) for a in ROCKS for b in ROCKS if a != b][:number]
    rows = [
        {"question": f"What is {a}, after {b}?", "choices": [a, b, "volcano"], "answer": key(place)}
        for place, (a, b) in enumerate(words)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def task(tmp_path):
    return write_task(tmp_path / "rocks.jsonl")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_directory, tiny_tokenizer):
    """Two adapters of one shape and one configuration."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, std in (("one", 0.1), ("two", 0.3)):
        model = tiny_llama(tiny_config(vocab_size=tiny_tokenizer.vocab_size, max_seq_len=1024))
        section = LoraSection(rank=2, target_modules=["q_proj"])
        attach(model, section)
        init_adapters(model, 0)
        fill_adapters(model, std)
        save_adapter(adapter_tensors(model), section, folder / name, str(tiny_directory))
    return folder


def test_results_of_another_adapter_quantisation_dtype_or_merge_are_not_reused(
    tiny_directory, adapters, task, tmp_path, run
):
    common = ["eval", "--model", tiny_directory, "--benchmark", task, "--out", tmp_path / "out", "--limit", 4]
    first = ["--adapter", adapters / "one"]
    assert run(*common, *first)[0] == 0
    shutil.copytree(adapters, tmp_path / "run")  # the run says how the adapter was tuned
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"data": {"template": "alpaca_short"}}))
    kept = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for changed, said in (
        (["--adapter", adapters / "two"], "of another adapter"),
        ([], "of another adapter"),
        (["--adapter", tmp_path / "run" / "one"], "with template 'alpaca', not 'alpaca_short'"),
        ([*first, "--merge"], "with merge False, not True"),
        ([*first, "--quantize", "int8"], "with quantize None, not 'int8'"),
        ([*first, "--dtype", "bfloat16"], "with dtype 'float32', not 'bfloat16'"),
        ([*first, "--shots", 2], "with shots 0, not 2"),
    ):
        status, out, err = run(*common, *changed)
        assert (status, out) == (2, "")
        assert f"{tmp_path / 'out'} holds results {said}; name another --out" in err.splitlines()[-1]
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == kept
    assert run(*common, *first)[0] == 0


def test_another_tokenizer_config_or_shots_file_is_another_asking(tiny_directory, task, tmp_path, run):
    model = shutil.copytree(tiny_directory, tmp_path / "model")
    (model / "manifest.json").unlink()
    shots = tmp_path / "shots.txt"
    shots.write_text("granite is rock")
    common = ["eval", "--model", model, "--benchmark", task, "--out", tmp_path / "out", "--shots-file", shots]
    assert run(*common)[0] == 0
    shots.write_text("basalt is rock")
    assert "holds results of another examples" in run(*common)[2]
    shots.write_text("granite is rock")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    assert "holds results of another config" in run(*common)[2]
    (model / "config.json").write_text(json.dumps(config))
    with (model / "tokenizer.model").open("ab") as file:  # an empty trainer_spec: another file, the same ids
        file.write(b"\x12\x00")
    assert "holds results of another tokenizer" in run(*common)[2]


def test_a_changed_question_or_key_is_not_given_an_old_result(tiny_directory, task, tmp_path, run):
    common = ["eval", "--model", tiny_directory, "--benchmark", task, "--out", tmp_path / "out"]
    assert run(*common, "--limit", 4)[0] == 0
    four = (tmp_path / "out/results.jsonl").read_text()
    assert run(*common, "--limit", 9)[0] == 0  # more questions go on
    nine = (tmp_path / "out/results.jsonl").read_text()
    assert nine.startswith(four)
    status, _, err = run(*common, "--limit", 4)  # fewer would lose some
    assert (status, "question 4 of 'rocks', which is not asked now and would be lost" in err) == (2, True)
    assert (tmp_path / "out/results.jsonl").read_text() == nine
    write_task(task, key=lambda place: (place + 1) % 3)
    status, out, err = run(*common, "--limit", 9)
    assert (status, out) == (2, "")
    assert "has a result of question 0 of 'rocks', which has another text or key now" in err
    write_task(task)
    task.write_text(task.read_text().replace("What is granite", "What was granite", 1))
    assert "question 0 of 'rocks', which has another text or key now" in run(*common, "--limit", 9)[2]


def test_examples_are_drawn_from_all_questions_so_these_must_be_the_same(tiny_directory, task, tmp_path, run):
    common = ["eval", "--model", tiny_directory, "--benchmark", task, "--shots", 2, "--out", tmp_path / "out"]
    assert run(*common, "--limit", 4)[0] == 0
    assert "holds results of another questions" in run(*common, "--limit", 9)[2]


def test_results_say_what_was_asked(tiny_directory, task, tmp_path, run):
    """In a folder that an older k2mini wrote, too, once it is gone on with; it is compared as it is."""
    out, results = tmp_path / "out", tmp_path / "out/results.jsonl"
    common = ["eval", "--model", tiny_directory, "--benchmark", task]
    status, _, err = run(*common, "--out", out)
    assert status == 0
    assert err.splitlines()[-1] == f"k2mini: the results are in {out}"
    kept = results.read_text()
    for line, row in zip(kept.splitlines(), task.read_text().splitlines(), strict=True):
        result, asked = json.loads(line), json.loads(row)
        assert (result["question"], result["choices"]) == (asked["question"], asked["choices"])
        assert result["labels"] == ["A", "B", "C"]
        assert result["labels"][asked["answer"]] == result["answer"]
    new = {"question", "labels", "choices", "sha256"}
    old = [{key: value for key, value in json.loads(line).items() if key not in new} for line in kept.splitlines()]
    results.write_text("".join(sealed(fields) + "\n" for fields in old[:5]))
    assert run(*common, "--limit", 5, "--out", tmp_path / "five")[0] == 0
    status, said, _ = run("compare", out, tmp_path / "five")
    assert (status, "rocks (5 questions)" in said) == (0, True)
    assert run(*common, "--out", out)[0] == 0
    assert results.read_text() == kept


def test_what_is_known_without_the_model_is_compared_before_it_is_loaded(
    tiny_directory, adapters, task, tmp_path, run, monkeypatch
):
    from k2mini.weights.model_files import save_model

    tokenizer = Tokenizer(tiny_directory / "tokenizer.model")
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_seq_len=1024)
    save_model(tiny_llama(config, seed=1).state_dict(), config, tmp_path / "other", tokenizer=tokenizer)
    common = {"--benchmark": task, "--out": tmp_path / "out", "--limit": 4, "--model": tiny_directory}
    assert run("eval", *(word for pair in common.items() for word in pair))[0] == 0
    monkeypatch.setattr("k2mini.build.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for changed, said in (
        ({"--model": tmp_path / "other"}, "holds results of another model"),
        ({"--adapter": adapters / "one"}, "holds results of another adapter"),
        ({"--scoring": "text"}, "holds results with scoring 'letter', not 'text'"),
        ({"--template": "none"}, "holds results with template"),
        ({"--shots": 1}, "holds results with shots 0, not 1"),
        ({"--limit": 3}, "question 3 of 'rocks', which is not asked now"),
    ):
        status, out, err = run("eval", *(word for pair in {**common, **changed}.items() for word in pair))
        assert (status, out) == (2, "")
        assert said in err.splitlines()[-1]


@pytest.mark.parametrize("json_only", [[], ["--json"]])
def test_what_was_found_is_printed_although_a_file_cannot_be_written(tiny_directory, task, tmp_path, run, json_only):
    out = tmp_path / "out"
    common = ["eval", "--model", tiny_directory, "--benchmark", task, "--limit", 4, "--out", out, *json_only]
    status, printed, _ = run(*common)
    assert status == 0
    (out / "report.json").unlink()
    (out / "report.json").mkdir()
    status, again, err = run(*common)
    assert (status, again) == (2, printed)
    assert "report.json" in err.splitlines()[-1]


@pytest.mark.parametrize("options", [["--perplexity", "TEXT"], ["--benchmark", "NPEE", "--tasks", "npee/noun"]])
def test_out_is_checked_and_claimed_by_every_kind_of_eval(tiny_directory, tmp_path, run, options, monkeypatch):
    text, npee = tmp_path / "text.txt", tmp_path / "npee.json"
    text.write_text("granite is made of quartz. " * 30)
    empty = {"question": [], "answer": []}
    noun = {"question": ["What is granite?"], "answer": ["a rock"]}
    npee.write_text(json.dumps({"choice": empty, "tf": empty, "noun": noun}))
    options = [{"TEXT": text, "NPEE": npee}.get(option, option) for option in options]
    common = ["eval", "--model", tiny_directory, *options, "--max-new-tokens", 4]
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.json").touch()  # of a demo, say
    held = tmp_path / "held"
    with monkeypatch.context() as patch:
        patch.setattr("k2mini.build.open_model", lambda *_, **__: pytest.fail("the model was loaded"))
        for out, said in (
            (other, "holds something else: report.json, and no asking.json"),
            (tiny_directory, "is itself an input"),
            (tiny_directory / "eval", "which is an input"),
            (tmp_path, "is inside"),
        ):
            status, printed, err = run(*common, "--out", out)
            assert (status, printed) == (2, "")
            assert said in err.splitlines()[-1]
        code = f"import time, pathlib; from k2mini.files import output\nwith output(pathlib.Path({str(held)!r}), "
        code += "mark=('asking.json',)): print(flush=True); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            status, printed, err = run(*common, "--out", held)
            holder.kill()
        assert (status, printed, f"is being written by process {holder.pid}" in err) == (2, "", True)
    assert run(*common, "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out/asking.json").read_text())["dtype"] == "float32"
    status, _, err = run(*common, "--out", tmp_path / "out", "--dtype", "float64")
    assert (status, "holds results with dtype 'float32', not 'float64'" in err) == (2, True)


def test_open_tasks_keep_their_answers(tiny_directory, tmp_path, run, monkeypatch):
    npee, empty = tmp_path / "npee.json", {"question": [], "answer": []}
    asked = [f"What is {a} {b}?" for a in ROCKS for b in ROCKS][:10]
    noun = {"question": asked, "answer": ["a rock"] * 10}
    npee.write_text(json.dumps({"choice": empty, "tf": empty, "noun": noun}))
    common = ["eval", "--model", tiny_directory, "--benchmark", npee, "--tasks", "npee/noun", "--batch-size", 3]
    common += ["--max-new-tokens", 6, "--out"]
    assert run(*common, tmp_path / "whole")[0] == 0
    answers, made = k2mini.evaluation.subjective.answers, []

    def interrupted(*arguments, **options):
        for place, found in enumerate(answers(*arguments, **options)):
            if place == 7:
                raise KeyboardInterrupt
            yield found

    def counted(model, tokenizer, prompts, *rest, **options):
        made.append(len(prompts))
        return answers(model, tokenizer, prompts, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(k2mini.evaluation.subjective, "answers", interrupted)
        status, out, err = run(*common, tmp_path / "out")
        journal = tmp_path / "out/answers_npee_noun.jsonl"
        assert (status, out) == (130, "")
        assert f"the results so far are in {journal}, start again to go on" in err
    assert len(journal.read_text().splitlines()) == 7
    journal.write_text(journal.read_text() + '{"question": "Wh')  # a line that was cut
    with monkeypatch.context() as patch:
        patch.setattr(k2mini.evaluation.subjective, "answers", counted)
        assert run(*common, tmp_path / "out")[0] == 0
    assert made == [3], "seven answers were kept"
    for name in ("answers_npee_noun.json", "answers_npee_noun.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    npee.write_text(npee.read_text().replace("What is granite granite", "Who is granite granite"))
    status, _, err = run(*common, tmp_path / "out")
    assert (status, "noun.jsonl, line 1 answers another question than is asked now" in err) == (2, True)


def test_files_that_stand_beside_stay(tiny_directory, task, tmp_path, run):
    """A user's copies, with the names that ranks used to have and nearly those that they have."""
    out, asked = tmp_path / "out", tmp_path / "asked.txt"
    asked.write_text("granite\nbasalt")
    commands = {
        out / "results.jsonl": ["eval", "--model", tiny_directory, "--benchmark", task, "--out", out],
        tmp_path / "a.jsonl": ["generate", "--model", tiny_directory, "--input", asked, "--max-new-tokens", 3, "--out"],
    }
    commands[tmp_path / "a.jsonl"].append(tmp_path / "a.jsonl")
    for file, command in commands.items():
        assert run(*command)[0] == 0
        whole = file.read_bytes()
        names = [f"{file.stem}.20261127.jsonl", f"{file.stem}.1.jsonl", f"{file.name}.1", f"{file.name}.rank1.bak"]
        for name in names:
            (file.parent / name).write_bytes(whole)
        file.write_bytes(b"".join(whole.splitlines(keepends=True)[:1]))
        assert run(*command)[0] == 0
        assert all((file.parent / name).read_bytes() == whole == file.read_bytes() for name in names)
        rank = file.with_name(f"{file.name}.rank1")
        rank.write_text('{"mine": 1}\n')  # the name of ours, and not what we write
        status, _, err = run(*command)
        assert (status, f"{rank}, line 1" in err, rank.read_text()) == (2, True, '{"mine": 1}\n')


def test_names_of_open_tasks_do_not_meet(tiny_directory, tmp_path, run):
    """Nor does one with a bracket lose its journal."""
    names, command = ["geo-v1", "geo-v1.2", "geo[1]"], ["eval", "--model", tiny_directory, "--max-new-tokens", 3]
    for number, name in enumerate(names):
        (tmp_path / f"{name}.csv").write_text(f"question,answer\nWhat is {ROCKS[number]}?,a rock\nWhat?,mud\n")
        fields = {"question": "question", "answer": "answer"}
        config = {"name": name, "about": "rocks", "file": str(tmp_path / f"{name}.csv"), "fields": fields}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
    command += ["--benchmark", *(tmp_path / f"{name}.yaml" for name in names), "--out", tmp_path / "out"]
    for _ in range(2):
        status, _, err = run(*command)
        assert status == 0, err
        for number, name in enumerate(names):
            lines = (tmp_path / f"out/answers_{name}.jsonl").read_text().splitlines()
            assert [json.loads(line)["question"] for line in lines] == [f"What is {ROCKS[number]}?", "What?"]


def test_two_open_tasks_with_one_file_are_refused():
    check_names(["a/b", "a b", "c"])
    with pytest.raises(ValueError, match=r"'a/b' and 'a_b' would both be kept in answers_a_b\.jsonl"):
        check_names(["a/b", "c", "a_b"])


class Counted(str):
    seen = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Counted.seen += 1
        return str.__eq__(self, other)


def test_kept_answers_are_found_without_going_through_all_questions(tmp_path):
    """Of copies each has its own answer, in their order."""
    questions = [Counted(f"What is {number % 400}?") for number in range(800)]
    lines = [sealed({"question": str(question), "answer": str(n)}) for n, question in enumerate(questions)]
    (tmp_path / "answers.jsonl").write_text("".join(line + "\n" for line in lines))
    found = _answers(questions, [[1]] * 800, lambda _: iter(()), tmp_path / "answers.jsonl", ALONE)
    assert found == [str(number) for number in range(800)]
    assert Counted.seen < 8 * 800


def test_a_run_that_goes_on_scores_beside_the_same_others(tiny_directory, task, tmp_path, run, monkeypatch):
    """What 'pmi' subtracts, too: so the last bits are those of a run that was not stopped."""
    score, asked = k2mini.evaluation.evaluate.score, []

    def recording(model, requests, **how):
        asked.append(tuple(requests))
        return score(model, requests, **how)

    monkeypatch.setattr(k2mini.evaluation.evaluate, "score", recording)
    command = ["eval", "--model", tiny_directory, "--benchmark", task, "--scoring", "pmi", "--batch-size", 4]
    command += ["--out", tmp_path / "out"]
    assert run(*command)[0] == 0
    whole = (tmp_path / "out/results.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "out/results.jsonl").write_bytes(b"".join(lines[::2]) + lines[1][:30])
    assert run(*command)[0] == 0
    assert (tmp_path / "out/results.jsonl").read_bytes() == whole
    assert asked[:2] == asked[2:]
    assert len(asked[0]) > 4


def test_compare_pairs_by_question_and_key(tiny_directory, task, tmp_path, run):
    other = tmp_path / "other"
    other.mkdir()
    rows = task.read_text().splitlines(keepends=True)
    changed = json.loads(rows[0])
    changed["answer"] = 1
    (other / "rocks.jsonl").write_text(json.dumps(changed) + "\n" + "".join(reversed(rows[1:])))
    for name, file in (("a", task), ("b", other / "rocks.jsonl")):
        assert run("eval", "--model", tiny_directory, "--benchmark", file, "--out", tmp_path / name)[0] == 0
    status, out, err = run("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert status == 0, err
    (found,) = json.loads(out)
    assert (found["task"], found["n"]) == ("rocks", 11)
    assert [entry["left_out"] for entry in found["runs"]] == [1, 1]
    assert (found["runs"][1]["better"], found["runs"][1]["worse"]) == (0, 0)  # one model, one question, one answer
    assert "1 questions are left out" in run("compare", tmp_path / "a", tmp_path / "b")[1]
    write_task(task, key=lambda place: (place + 1) % 3)
    assert run("eval", "--model", tiny_directory, "--benchmark", task, "--out", tmp_path / "c")[0] == 0
    status, _, err = run("compare", tmp_path / "a", tmp_path / "c")
    assert (status, "have no question in common" in err) == (2, True)


def test_compare_draws_over_nothing(tiny_directory, task, tmp_path, run):
    pytest.importorskip("matplotlib")
    for name in "ab":
        assert run("eval", "--model", tiny_directory, "--benchmark", task, "--out", tmp_path / name)[0] == 0
    runs, chart = [tmp_path / "a", tmp_path / "b"], tmp_path / "chart.png"
    for place, said in (
        (tmp_path / "a" / "report.png", "which is an input"),
        (tmp_path / "chart.doc", "a picture's name ends in one of"),
        (tmp_path / "none" / "chart.png", "there is no folder"),
    ):
        status, out, err = run("compare", *runs, "--chart", place)
        assert (status, out, said in err) == (2, "", True)
    chart.write_text("mine")
    assert run("compare", *runs, "--chart", chart)[0] == 2
    assert chart.read_text() == "mine"
    assert run("compare", *runs, "--chart", chart, "--force")[0] == 0
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("asking.json", "[]", "asking.json is no JSON object"),
        ("asking.json", '{"model": "x", "shots": 0}', "which an older k2mini wrote, does not say with which config"),
        ("results.jsonl", "[]\n", "results.jsonl, line 1 has no sha256"),
        ("results.jsonl", '{"task": "rocks"}\n', "results.jsonl, line 1 has no sha256, as an older k2mini's"),
        ("results.jsonl", "{\n", "results.jsonl, line 1 is not valid JSON"),
        ("results.jsonl", sealed({"task": "rocks"}) + "\n", "results.jsonl, line 1 is no result of a question"),
        ("index", '"4"', "results.jsonl, line 1 is not as it was written"),
        ("logprobs", "[0, 0, 0]", "results.jsonl, line 1 is not as it was written"),
        ("prediction", '"Z"', "results.jsonl, line 1 is not as it was written"),
    ],
)
def test_damaged_results_are_named(tiny_directory, task, tmp_path, run, file, content, said):
    command = ["eval", "--model", tiny_directory, "--benchmark", task, "--limit", 2, "--out", tmp_path / "out"]
    assert run(*command)[0] == 0
    assert run(*command[:-1], tmp_path / "whole")[0] == 0
    if file.endswith((".json", ".jsonl")):
        (tmp_path / "out" / file).write_text(content)
    else:
        results = tmp_path / "out/results.jsonl"
        line = json.loads(results.read_text().splitlines()[0])
        assert line[file] != json.loads(content)
        results.write_text(json.dumps({**line, file: json.loads(content)}) + "\n")
    status, out, err = run(*command)
    assert (status, out) == (2, "")
    assert said in err.splitlines()[-1]
    if file != "asking.json":
        assert said in run("compare", tmp_path / "whole", tmp_path / "out")[2]


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": 3}', '"x"', "null"])
def test_a_report_of_wrong_types_is_named(tiny_directory, task, tmp_path, run, content):
    command = ["eval", "--model", tiny_directory, "--benchmark", task, "--limit", 2, "--out", tmp_path / "out"]
    assert run(*command)[0] == 0
    (tmp_path / "out/report.json").write_text(content)
    status, _, err = run("compare", tmp_path / "out", tmp_path / "out")
    assert (status, "report.json is no report of k2mini eval" in err) == (2, True)


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_a_model_that_is_not_finite_is_not_evaluated(broken, task, tmp_path, run, scoring):
    out = tmp_path / "out"
    common = ["eval", "--benchmark", task, "--scoring", scoring, "--out", out]
    status, printed, err = run(*common, "--model", broken / "head")
    assert (status, printed) == (2, "")
    assert "the logits are not finite; lm_head.weight holds NaN" in err.splitlines()[-1]
    assert not (out / "report.json").exists()
    assert "model.layers.2.mlp.up_proj.weight holds NaN" in run(*common[:-1], out / "b", "--model", broken / "layer")[2]
    large = run(*common[:-1], tmp_path / "large", "--model", broken / "large", "--dtype", "float16")
    assert large[0] == 2
    assert "all weights are finite, so activations overflow in torch.float16; try --dtype float32" in large[2]


def test_perplexity_and_open_tasks_of_a_model_that_is_not_finite(broken, tmp_path, run):
    text, npee, empty = tmp_path / "text.txt", tmp_path / "npee.json", {"question": [], "answer": []}
    text.write_text("granite is made of quartz. " * 30)
    noun = {"question": ["What is granite?"], "answer": ["a rock"]}
    npee.write_text(json.dumps({"choice": empty, "tf": empty, "noun": noun}))
    for options in (["--perplexity", text], ["--benchmark", npee, "--tasks", "npee/noun"]):
        status, out, err = run("eval", "--model", broken / "head", *options)
        assert (status, out) == (2, "")
        assert "lm_head.weight holds NaN" in err.splitlines()[-1]


def test_options_that_are_not_utf8(tiny_directory, task, run):
    status, out, err = run("eval", "--model", tiny_directory, "--benchmark", task, "--answer-prefix", "a\udcff")
    assert (status, out) == (2, "")
    assert "argument --answer-prefix: 'a\\udcff' is not UTF-8" in err


def test_a_loss_beyond_all_numbers_is_named():
    from k2mini.evaluation.perplexity import from_loss

    assert from_loss(1.0) == math.exp(1.0)
    with pytest.raises(ValueError, match="the mean loss is 1e\\+04 nats"):
        from_loss(1e4)


def test_two_evals_at_once(tiny_directory, task, tmp_path, forks):
    """Of two that start together in one folder one ends well; the other is refused, or finds all done."""
    out = tmp_path / "out"
    words = ["eval", "--model", str(tiny_directory), "--benchmark", str(task), "--out", str(out)]
    both = [forks.start(Request([words], str(tmp_path), limit=120)) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 2], [0, 0])
    assert codes == [0, 0] or any("is being written by process" in text for text in said)
    assert len((out / "results.jsonl").read_text().splitlines()) == 12
    assert not (tmp_path / ".out.lock").exists()
    with output(out, mark=("asking.json",)):  # another process has it for certain
        third = forks.start(Request([[*words, "--limit", "2"]], str(tmp_path), limit=120))
        assert "is being written by process" in third.communicate()[1]
        assert third.returncode == 2
