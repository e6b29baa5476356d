"""`k2mini judge`: GPTScore and preferences by a model here or an endpoint, kept in the runs that are judged."""

import json
import shutil

import pytest
import torch

import k2mini.evaluation.judge
from k2mini.evaluation.endpoint import Endpoint
from k2mini.evaluation.judge import ASPECTS, JUDGED, LIKELY, judge, read_runs, verdict
from k2mini.evaluation.report import sealed
from k2mini.evaluation.scores import OpenAnswer, read_scores, write_answers
from k2mini.weights.model_directory import ModelDirectory
from tests.helpers import make_chat_model
from tests.serving.conftest import Server

TASKS = {"npee/noun": ["granite", "basalt", "quartz"], "npee/discussion": ["the crust"]}


def make_run(folder, text, more=()):
    """A run of eval with open answers; `text` says what it answers about a thing."""
    folder.mkdir()
    (folder / "asking.json").write_text("{}")
    (folder / "report.json").write_text('{"model": "m"}')
    for task, things in TASKS.items():
        things = [*things, *more]
        answers = [
            OpenAnswer(task, place, f"What is {thing}?", f"{thing} is a rock", text(thing), {"rouge_l": 0.5})
            for place, thing in enumerate(things)
        ]
        write_answers(folder, task, answers)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two runs that answer the same questions; one answer is empty, one question stands twice."""
    one = make_run(tmp_path / "one", lambda thing: f"A {thing} is made of quartz.", ["granite"])
    two = make_run(tmp_path / "two", lambda thing: "" if thing == "quartz" else f"{thing}\nof the mantle", ["granite"])
    return [one, two]


def judged(run, *arguments):
    status, out, err = run("judge", *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize("evaluator", ["tiny_directory", pytest.param("real_model", marks=pytest.mark.slow)])
def test_gptscore_is_that_of_a_plain_loop_over_transformers(evaluator, runs, run, request):
    from transformers import AutoModelForCausalLM

    evaluator = request.getfixturevalue(evaluator)
    report = judged(run, *runs, "--evaluator", evaluator)
    model = AutoModelForCausalLM.from_pretrained(evaluator, dtype=torch.float32)
    tokenizer = ModelDirectory(evaluator).require_tokenizer()

    def gptscore(question, definition, answer):
        prompt = LIKELY.format(definition=definition, question=question)
        before = tokenizer.encode(prompt, bos=True, eos=False)
        ids = tokenizer.encode(f"{prompt} {answer}", bos=True, eos=False)
        assert ids[: len(before)] == before
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        picked = [logprobs[place - 1, ids[place]].item() for place in range(len(before), len(ids))]
        return sum(picked) / len(picked)

    assert {row["task"]: row["n"] for row in report["tasks"]} == {"npee/noun": 4, "npee/discussion": 2}
    for folder in runs:
        found = {key: {**values} for key, values in read_scores(folder).items() if "@" in key[1]}
        for row in report["tasks"]:
            lines = (folder / f"open_{row['task'].replace('/', '_')}.jsonl").read_text().splitlines()
            answers = [json.loads(line) for line in lines]
            own = next(entry for entry in row["runs"] if entry["run"] == str(folder))
            for aspect, definition in ASPECTS.items():
                values = found[row["task"], f"gptscore_{aspect}@{report['name']}"]
                expected = [
                    gptscore(answer["question"], definition, answer["answer"]) for answer in answers if answer["answer"]
                ]
                assert [*values.values()] == pytest.approx(expected, abs=1e-4)
                assert own[f"gptscore_{aspect}"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
            assert own["left_out"] == sum(not answer["answer"] for answer in answers)


def test_the_order_of_runs_changes_nothing_but_their_order(tiny_directory, runs, tmp_path, run):
    files = {}
    for name, order in (("ahead", [0, 1]), ("back", [1, 0])):
        folder = tmp_path / name
        for path in runs:
            shutil.copytree(path, folder / path.name)
        report = judged(run, *(folder / runs[place].name for place in order), "--evaluator", tiny_directory)
        for row in report["tasks"]:
            row["runs"] = sorted([entry | {"run": entry["run"].split("/")[-1]} for entry in row["runs"]], key=str)
        files[name] = [report] + [
            [(folder / path.name / file).read_text() for file in (f"scores_judge_{report['name']}.jsonl", JUDGED)]
            for path in runs
        ]
    assert files["ahead"] == files["back"]
    for row in files["ahead"][0]["tasks"]:
        assert sum(entry["preference"] for entry in row["runs"]) == 1


@pytest.mark.parametrize("copied", [False, True])
def test_a_run_against_itself_is_half(tiny_directory, runs, run, copied, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "copy") if copied else runs[0]
    report = judged(run, runs[0], other, "--evaluator", tiny_directory, "--only", "preference")
    for row in report["tasks"]:
        assert [entry["preference"] for entry in row["runs"]] == [0.5, 0.5]
        orders = row["orders"]
        assert orders["consistent"] + orders["always_first"] + orders["always_second"] == 1
    status, table, _ = run("judge", runs[0], other, "--evaluator", tiny_directory, "--only", "preference")
    assert status == 0
    assert table.count("0.5000") == 4
    assert "for whichever came first" in table


def reply(prompt):
    """A judge that prefers the answer with more letters, and where they have the same the first."""
    first, second = prompt.split("\n\nAnswer A: ")[1].split("\n\nReply")[0].split("\n\nAnswer B: ")
    return "A" if len(first) >= len(second) else "B"


@pytest.fixture
def endpoint(monkeypatch):
    """An endpoint that prefers longer answers, and what it was asked."""
    asked = []

    def post(self, path, payload):
        assert (self.url, self.model, path) == ("http://judge/v1", "gpt", "chat/completions")
        asked.append(payload["messages"][0]["content"])
        return {"choices": [{"message": {"content": f"I compared them.\n\n**{reply(asked[-1])}**\n"}}]}

    monkeypatch.setattr(Endpoint, "post", post)
    return asked


THERE = ["--evaluator", "gpt", "--evaluator-url", "http://judge/v1"]


def test_preferences_of_three_runs_by_an_endpoint(runs, tmp_path, run, endpoint):
    """One prefers the longer of two answers; of two that are the same, the first."""
    three = make_run(tmp_path / "three", lambda thing: f"A {thing} is made of quartz.", ["granite"])
    report = judged(run, *runs, three, *THERE, "--only", "preference")
    # One and three say the same: a tie. Two's answers are shorter: it loses to both.
    for row in report["tasks"]:
        assert [entry["preference"] for entry in row["runs"]] == [0.75, 0, 0.75]
        assert row["orders"] == {
            "consistent": pytest.approx(2 / 3),
            "always_first": pytest.approx(1 / 3),
            "always_second": 0,
            "compared": 3 * row["n"],
            "unclear": 0,
        }
    measures = {measure for _, measure in read_scores(runs[0]) if "@" in measure}
    assert len(measures) == 1
    assert measures == {measure for _, measure in read_scores(three) if "@" in measure}
    judged(run, runs[0], runs[1], *THERE, "--only", "preference")
    both = {measure for _, measure in read_scores(runs[1]) if "@" in measure}
    assert len(both) == 2, "what was compared with others has another name"
    assert measures < both


def test_what_was_judged_is_not_asked_again(runs, run, endpoint):
    command = [*runs, *THERE, "--only", "preference"]
    whole = judged(run, *command)
    first = [*endpoint]
    assert len({*first}) == len(first) == 8, "a question that stands twice is asked once in each order"
    scores = f"scores_judge_{whole['name']}.jsonl"
    before = [(path / scores).read_bytes() for path in runs]
    for path in runs:  # as a kill leaves them
        lines = (path / JUDGED).read_text().splitlines(keepends=True)
        (path / JUDGED).write_text("".join(lines[:4]) + lines[4][:30])
        (path / scores).unlink()
    endpoint.clear()
    assert judged(run, *command) == whole
    assert endpoint == first[4:]
    assert [(path / scores).read_bytes() for path in runs] == before
    endpoint.clear()
    assert judged(run, runs[1], runs[0], *command[2:])["tasks"][0]["orders"] == whole["tasks"][0]["orders"]
    assert not endpoint


def test_an_interrupted_judge_says_where_its_judgements_are(runs, run, endpoint, monkeypatch):
    there = k2mini.evaluation.judge.judge_there

    def interrupted(*arguments, **options):
        yield next(there(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(k2mini.evaluation.judge, "judge_there", interrupted)
    status, out, err = run("judge", *runs, *THERE, "--only", "preference")
    assert (status, out) == (130, "")
    assert f"the results so far are in {runs[0] / JUDGED}" in err


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("**C**", "C"),
        ("[[B]]", "B"),
        ("Answer: A\n", "A"),
        ("A is wrong about the mantle.\nB is right.\n\nAnswer: B", "B"),
        ("A\nNo, wait.\nB", "B"),
        ("A better answer is B", "?"),
        ("", "?"),
        ("D", "?"),
    ],
)
def test_the_verdict_of_a_reply(reply, letter):
    assert verdict(reply) == letter


def test_by_a_server_as_by_the_model_here(tiny_directory, runs, tmp_path, run, monkeypatch):
    """GPTScore through prompt log-probabilities; a random model's replies have no verdict, and count as ties."""
    here = judged(run, *runs, "--evaluator", tiny_directory, "--only", "gptscore")
    monkeypatch.setitem(TASKS, "npee/noun", [])
    few = [make_run(tmp_path / name, lambda thing, name=name: name) for name in ("few", "fewer")]
    server = Server(tiny_directory)
    there = ["--evaluator", "tiny", "--evaluator-url", f"{server.url}/v1"]
    try:
        scores = judged(run, *runs, *there, "--only", "gptscore")
        preferences = judged(run, *few, *there, "--only", "preference")["tasks"]
    finally:
        server.stop()
    for ours, theirs in zip(here["tasks"], scores["tasks"], strict=True):
        for one, two in zip(ours["runs"], theirs["runs"], strict=True):
            assert {**two} == {
                key: value if key == "run" else pytest.approx(value, abs=1e-4) for key, value in one.items()
            }
    assert [entry["preference"] for entry in preferences[0]["runs"]] == [0.5, 0.5]
    assert preferences[0]["orders"] == {
        "consistent": 0,
        "always_first": 0,
        "always_second": 0,
        "compared": 1,
        "unclear": 2,
    }


def test_by_transformers_as_by_the_model_here(tiny_directory, runs, run):
    pytest.importorskip("transformers")
    command = [*runs, "--evaluator", tiny_directory]
    ours, theirs = (judged(run, *command, *more)["tasks"] for more in ([], ["--backend", "transformers"]))
    for one, two in zip(ours, theirs, strict=True):
        for values, others in zip(one["runs"], two["runs"], strict=True):
            assert others == {
                key: value if key == "run" else pytest.approx(value, abs=1e-4) for key, value in values.items()
            }


def test_evaluators_and_aspects_have_names_of_their_own(tiny_directory, runs, tmp_path, run):
    """Scores of another evaluator, or by another definition, are never taken for these."""
    (tmp_path / "aspects.json").write_text('{"correctness": "The answer is right.", "depth": "It goes deep."}')
    command = [runs[0], "--evaluator", tiny_directory, "--only", "gptscore"]
    reports = [judged(run, *command, *more) for more in ([], ["--aspects", tmp_path / "aspects.json"])]
    reports.append(judged(run, *command, "--quantize", "int8"))
    assert len({report["name"] for report in reports}) == 3
    measures = [measure for _, measure in read_scores(runs[0]) if "@" in measure]
    assert {measure.split("@")[0] for measure in measures} == {f"gptscore_{aspect}" for aspect in (*ASPECTS, "depth")}
    assert {measure.split("@")[1] for measure in measures} == {report["name"] for report in reports}
    assert reports[1]["aspects"] == {"correctness": "The answer is right.", "depth": "It goes deep."}
    assert "preference" not in reports[0]["tasks"][0]["runs"][0]


def test_answers_that_an_evaluator_can_not_hold_are_left_out(runs, tmp_path, run):
    """By a chat model, whose letters come after its own template."""
    for package in ("tokenizers", "jinja2"):
        pytest.importorskip(package)
    evaluator = make_chat_model(tmp_path / "judge")  # of 512 tokens
    long = make_run(tmp_path / "long", lambda thing: "crust " * 600 if thing == "basalt" else "a rock", ["granite"])
    report = judged(run, runs[0], long, "--evaluator", evaluator)
    assert report["evaluator"]["template"].startswith("own@")
    discussion, noun = report["tasks"]
    assert [entry["left_out"] for entry in (*noun["runs"], *discussion["runs"])] == [1, 1, 0, 0]
    measure = next(measure for _, measure in read_scores(long) if measure.startswith("preference@"))
    assert len(read_scores(long)["npee/noun", measure]) == 3
    assert '"value": null' not in (long / JUDGED).read_text(), "an evaluator of more context would be asked again"
    status, table, _ = run("judge", runs[0], long, "--evaluator", evaluator)
    assert status == 0
    assert [line.split()[-1] for line in table.splitlines() if line.startswith(("one", "long"))] == ["0", "0", "1", "1"]


def test_only_the_questions_of_all_runs_are_judged(runs, tmp_path, run, endpoint):
    few = make_run(tmp_path / "few", lambda thing: "a rock")
    report = judged(run, runs[0], few, *THERE, "--only", "preference")
    assert [row["n"] for row in report["tasks"]] == [1, 3]


def test_copies_of_a_question_are_paired_by_their_number_scored_or_not(tmp_path):
    """One run left the first copy empty: its answer to the second is not compared with another's to the first."""
    runs = []
    for name, texts in (("one", ["", "good"]), ("two", ["bad", "good"])):
        runs.append(tmp_path / name)
        runs[-1].mkdir()
        write_answers(runs[-1], "rocks", [OpenAnswer("rocks", n, "?", "ref", text, {}) for n, text in enumerate(texts)])

    def asked(items):
        yield from ((item, -1.0 if item[1] == "good" else -9.0) for item in items)

    judge(runs, read_runs(runs), asked, {"evaluator": "e"}, "judge", {"aspect": "It is good."}, pairs=False)
    one, two = (next(iter(read_scores(run).values())) for run in runs)
    assert {copy: value for (_, copy), value in one.items()} == {1: -1}
    assert {copy: value for (_, copy), value in two.items()} == {0: -9, 1: -1}


def test_an_earlier_judges_scores_stay(runs, tmp_path, run, endpoint):
    """Judged beside another run that answered less, or for another thing, no score of before is lost."""
    few = make_run(tmp_path / "few", lambda thing: "a rock")
    first = judged(run, *runs, *THERE, "--only", "preference")
    before, file = read_scores(runs[0]), runs[0] / f"judge_{first['name']}.json"
    kept = json.loads(file.read_text())
    second = judged(run, runs[0], few, *THERE, "--only", "preference")
    after = read_scores(runs[0])
    assert second["name"] == first["name"]
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + 2, "two tasks' preferences"
    told = json.loads(file.read_text())
    assert told.keys() == {"name", "evaluator", "prompts", "aspects", "own", "compared"}
    assert told["evaluator"] == {"evaluator": "gpt at http://judge/v1"}
    assert len(told["compared"]) == 2
    assert told["compared"].items() > kept["compared"].items()
    assert first["tasks"] in told["compared"].values()
    status, table, _ = run("compare", *runs)
    assert status == 0
    assert table.count("the same verdict in both orders 100.0 %, for whichever came first 0.0 %, second 0.0 %") == 2
    assert run("compare", *runs, "--html", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text().count("the same verdict in both orders 100.0 %") == 2
    file.write_text("[]")
    assert f"{file} is not as k2mini judge writes it" in run("compare", *runs)[2]


def test_gptscores_of_fewer_questions_take_nothing_away(tiny_directory, runs, tmp_path, run):
    few = make_run(tmp_path / "few", lambda thing: "a rock")
    first = judged(run, *runs, "--evaluator", tiny_directory)
    before, file = read_scores(runs[0]), runs[0] / f"judge_{first['name']}.json"
    kept = file.read_text()
    judged(run, runs[0], few, "--evaluator", tiny_directory, "--only", "gptscore")
    assert read_scores(runs[0]) == before
    assert file.read_text() == kept


def test_a_model_that_judges_its_own_answers_is_said(tiny_directory, runs, run):
    own = ModelDirectory(tiny_directory).fingerprint()
    (runs[1] / "report.json").write_text(json.dumps({"model": "m", "fingerprint": own}))
    command = ["judge", *runs, "--evaluator", tiny_directory, "--only", "gptscore"]
    status, out, err = run(*command)
    assert status == 0
    said = f"{runs[1]}: the evaluator judges answers of its own weights, which models favour"
    assert said in err
    assert out.startswith(said)
    report = judged(run, *command[1:])
    assert report["own"] == [str(runs[1])]
    told = [json.loads((folder / f"judge_{report['name']}.json").read_text()) for folder in runs]
    assert [each["own"] for each in told] == [False, True]
    assert told[0]["evaluator"]["evaluator"] == own
    assert told[0]["prompts"][0] == LIKELY


def test_help_says_what_scores_are_worth(run):
    said = " ".join(run("judge", "--help")[1].split())
    for part in ("none of those that answered", "with prompts of k2mini's", "moves the 7th digit of scores"):
        assert part in said


def test_a_verdict_is_a_line_of_its_own():
    assert verdict("\n\nx") == "?"
    assert verdict("\n\nA\n\n") == "A"


def test_mistakes(tiny_directory, runs, tmp_path, run, monkeypatch):
    def refused(*arguments):
        status, out, err = run("judge", *arguments)
        assert (status, out) == (2, ""), err
        return err.split("k2mini: ")[-1]

    here = ["--evaluator", tiny_directory]
    bare = shutil.copytree(tiny_directory, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    assert "bare has no tokenizer.model" in refused(*runs, "--evaluator", bare)
    (tmp_path / "empty").mkdir()
    assert "empty has no open answers" in refused(tmp_path / "empty", *here)
    assert "none has no open answers" in refused(runs[0], tmp_path / "none", *here)
    assert not (tmp_path / "none").exists()
    monkeypatch.setitem(TASKS, "npee/noun", ["coal"])
    monkeypatch.setitem(TASKS, "npee/discussion", [])
    other = make_run(tmp_path / "other", lambda thing: "a rock")
    assert "answered other questions" in refused(runs[0], other, *here)
    assert "name two, or more" in refused(runs[0], *here, "--only", "preference")
    assert "--batch-size must be at least 1" in refused(runs[0], *here, "--batch-size", 0)
    assert "--adapter is for an evaluator here" in refused(*runs, *THERE, "--adapter", "a")
    assert "--backend is for an evaluator here" in refused(*runs, *THERE, "--backend", "transformers")
    assert "do not go with --backend transformers" in refused(
        *runs, *here, "--backend", "transformers", "--adapter", "a"
    )
    for content, said in (
        ("[]", "must hold a JSON object of aspects"),
        ('{"depth": ""}', "depth must have a sentence that defines it"),
        ('{"a b": "It is liked."}', "'a b' is no name of an aspect"),
    ):
        (tmp_path / "aspects.json").write_text(content)
        assert said in refused(*runs, *here, "--aspects", tmp_path / "aspects.json")
    monkeypatch.setattr(Endpoint, "post", lambda *_: {"choices": [{"text": "granite"}]})
    assert "gives no log-probabilities of the prompt" in refused(*runs, *THERE)
    assert "which has no message" in refused(*runs, *THERE, "--only", "preference")
    (runs[0] / JUDGED).write_text(sealed({"key": "a", "value": -1.0}).replace("-1.0", "-2.0") + "\n")
    assert f"{JUDGED} is not as it was written; remove it" in refused(*runs, *here)
