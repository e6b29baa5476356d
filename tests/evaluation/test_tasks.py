"""Tasks by layout, by the names of fields, and by YAML; whether open answers are right; decontamination."""

import csv
import json
import math
import random
import re
from collections import Counter
from dataclasses import fields

import pytest

from k2mini.config_file import load_config
from k2mini.evaluation.benchmarks import load_geobench, load_subjective, read_benchmark
from k2mini.evaluation.measures import last_number, same_number, same_words
from k2mini.evaluation.scores import read_answers, read_scores
from k2mini.evaluation.tasks import FOLDER, TaskConfig, listed, parse_map, read_task
from tests.conftest import ROOT, asset

STEM, TEXTS = "Which is a rock?", ["basalt", "oak", "rain", "wool"]


def written(path, content):
    """A file of a text, of JSON, or, of tuples, of CSV."""
    if isinstance(content, list) and isinstance(content[0], tuple):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def asked(task):
    return [(each.task, each.stem, each.labels, each.texts, each.answer) for each in task.questions]


def test_arc_as_three_files_have_it(tmp_path):
    """AI2's own with numbers for labels, the hub's, and the instruction data's: one question, the same in all."""
    ai2 = [{"text": text, "label": str(place)} for place, text in enumerate(TEXTS, 1)]
    lines = "\n" + "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", TEXTS, strict=True))
    hub = {"text": TEXTS, "label": [*"ABCD"]}
    records = [
        {"id": "M1", "question": {"stem": STEM, "choices": ai2}, "answerKey": "3"},
        {"id": "M1", "question": STEM, "choices": hub, "answerKey": "C"},
        {"instruction": f"{STEM} \nChoose from: ", "input": f"{lines}\nThe answer is: ", "output": "C"},
    ]
    for record in records:
        path = written(tmp_path / "arc.jsonl", record)
        assert asked(read_task(path, "arc")) == [("arc", STEM, tuple("ABCD"), tuple(TEXTS), "C")]


def test_k2s_instruction_data_hold_arc(tmp_path):
    """Read by another program's rules: each record's lines, split by hand."""
    records = json.loads((path := asset("data", "instructions", "arc_sft.json")).read_text())
    task = read_task(path, "arc")
    assert len(task.questions) == len(records) == 7787
    for question, record in zip(task.questions, records, strict=True):
        lines = record["input"].split("\n")[1:-1]
        assert question.texts == tuple(line[3:] for line in lines)
        assert lines["ABCDE".index(question.answer)].startswith(record["output"] + ". ")
        assert record["instruction"].startswith(question.stem)
        assert "Choose" not in question.stem[-15:]


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [
        ("a.jsonl", {"stem": STEM, "options": TEXTS, "key": "A"}, "question=stem,choices=options,answer=key"),
        ("a.json", [{"q": {"text": STEM}, "o": TEXTS, "k": {"n": 0}}], "question=q.text, choices=o ,answer=k.n"),
        (
            "a.json",
            [{"q.x": STEM, "o": dict(zip("WXYZ", TEXTS, strict=True)), "k": "W"}],
            "question=q.x,choices=o,answer=k",
        ),
        (
            "a.json",
            {"Q": STEM, **dict(zip("ABCDE", [*TEXTS, None], strict=True)), "k": 0},
            "question=Q,choices=A+B+C+D+E,answer=k",
        ),
        ("a.csv", [(STEM, *TEXTS, "A")], "question=0,choices=1+2+3+4,answer=5"),
        ("a.csv", [("Q", *"ABCD", "key"), (STEM, *TEXTS, "A")], "question=Q,choices=A+B+C+D,answer=key"),
        ("a.csv", [("Q", *"ABCDE", "key"), (STEM, *TEXTS, "", "0")], "question=Q,choices=A+B+C+D+E,answer=key"),
        (
            "a.TSV",
            "Q\tA\tB\tC\tD\tkey\n" + "\t".join([STEM, *TEXTS, "basalt"]),
            "question=Q,choices=A+B+C+D,answer=key",
        ),
    ],
)
def test_fields_by_their_names(tmp_path, name, content, fields):
    path = written(tmp_path / name, content)
    assert asked(read_task(path, None, parse_map(fields))) == [("a", STEM, tuple("ABCD"), tuple(TEXTS), "A")]


def test_options_whose_right_one_has_a_field_of_its_own(tmp_path):
    """SciQ's: every place is the right one's about as often as others, and always the same of a question."""
    names = ["correct_answer", "distractor1", "distractor2", "distractor3"]
    records = [{"question": f"Q{n}?", **{name: f"{name} {n}" for name in names}} for n in range(400)]
    mapped = parse_map(f"question=question,choices={'+'.join(names)},answer=correct_answer")
    questions = read_task(written(tmp_path / "sciq.json", records), None, mapped).questions
    assert all(q.texts["ABCD".index(q.answer)] == f"correct_answer {n}" for n, q in enumerate(questions))
    counts = Counter(question.answer for question in questions)
    assert all(70 < counts[letter] < 130 for letter in "ABCD"), counts
    random.Random(0).shuffle(records)
    again = read_task(written(tmp_path / "sciq.json", records), None, mapped).questions
    assert {(q.stem, q.texts, q.answer) for q in again} == {(q.stem, q.texts, q.answer) for q in questions}


def test_a_letter_that_is_also_an_options_text(tmp_path):
    """A letter is a column's name, or without names its place; in a list it may be either, and is refused."""
    row = ("Which is carbon?", "C", "N", "O", "He", "C")
    path = written(tmp_path / "a.csv", [row])
    (question,) = read_task(path, None, parse_map("question=0,choices=1+2+3+4,answer=5")).questions
    assert question.answer == "C"
    (question,) = read_task(
        written(path, [("Q", *"CBAD", "key"), row]), None, parse_map("question=Q,choices=C+B+A+D,answer=key")
    ).questions
    assert question.answer == "A"
    record = {"question": row[0], "choices": row[1:5], "answer": "C"}
    with pytest.raises(ValueError, match="may mean A and C of the options"):
        read_task(
            written(tmp_path / "a.jsonl", record), None, parse_map("question=question,choices=choices,answer=answer")
        )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quesion=stem,answer=key", "'quesion' is none of question, choices, answer, topic"),
        ("question=stem,answer=", "'answer' is none of question, choices, answer, topic, or has not one value"),
        ("question=a,question=b,answer=c", "'question' is none of"),
        ("question=stem,choices=x", "does not say what the file calls answer"),
        ("", "'' is none of question"),
    ],
)
def test_maps_that_are_refused(text, said):
    with pytest.raises(ValueError, match=f"--map .*{said}"):
        parse_map(text)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", [{"q": "x", "o": TEXTS}], r"record 0: there is no field 'a'; there are q, o; --map"),
        ("a.json", [[1]], "record 0: this is no JSON object with q, but"),
        ("a.json", [{"q": " ", "o": TEXTS, "a": "A"}], "record 0: q is empty"),
        ("a.json", [{"q": 3, "o": TEXTS, "a": "A"}], "record 0: q is 3, not text"),
        ("a.json", [{"q": "x", "o": TEXTS, "a": "E"}], "record 0: answer 'E' is none of the options"),
        ("a.json", [{"q": "x", "o": "oak", "a": "A"}], "record 0: choices must be a list of at least two texts"),
        ("a.json", [{"q": "x", "o": [{"text": "oak"}], "a": "A"}], "record 0: there is no field 'label'"),
        (
            "a.csv",
            [("q", "o", "a"), ("x", "A. 1\nB. 2\nC. 0", "1")],
            "line 2: answer 1 may be the place of an option or another",
        ),
        ("a.csv", [("q", "a"), ("x", "y")], "line 2: there is no field 'o'; there are q, a"),
        ("a.csv", "", "must have a header of columns"),
        ("none.csv", None, "there is no data file"),
        ("none.json", None, "there is no data file"),
    ],
)
def test_records_that_are_refused(tmp_path, name, content, said):
    path = tmp_path / name if content is None else written(tmp_path / name, content)
    with pytest.raises(ValueError, match=said) as error:
        read_task(path, None, parse_map("question=q,choices=o,answer=a"))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2.65 g/cm3", 2.65),
        ("about 1,395 m, or 1,395.5 m", 1395.5),
        ("between 10-20 km", 20),
        ("−273.15 °C", -273.15),
        ("-.5", -0.5),
        ("4.6e9 years", 4.6e9),
        ("4.6 × 10^9 a", 4.6e9),
        ("1.2x10⁻³ m²", 1.2e-3),
        ("SiO2 has 2 of O", 2),
        ("1,2,3", 3),
        ("see Fig.5", None),
        ("none", None),
        ("1e999", None),
        ("", None),
    ],
)
def test_numbers_as_people_write_them(text, number):
    assert last_number(text) == (number if number is None else pytest.approx(number, rel=1e-12))


def test_what_is_the_same():
    assert same_number("2.7", "2.65", 0.05)
    assert not same_number("2.71", "2.65", 0.05)
    assert same_number("1040", "1000", 0.0, 0.05)
    assert not same_number("1060", "1000", 1.0, 0.05)
    assert not same_number("many", "1000", math.inf)
    assert same_number("0.30000000000000004", "0.3")
    assert same_words("The  U-shaped valley.", "a u shaped valley")
    assert not same_words("valley", "U-shaped valley")
    assert not same_words("", "")
    assert not same_words("the", "a")


@pytest.mark.parametrize(
    ("settings", "reference", "right", "wrong"),
    [
        (
            {"match": "words"},
            ["basalt", "lava"],
            ["\n Basalt!\nor not", "the lava"],
            ["basalt rock", "", "It is\nbasalt"],
        ),
        (
            {"match": "words", "pattern": r"answer is:? (\w+)"},
            "basalt",
            ["So the answer is Basalt, I think", "answer is: basalt"],
            ["basalt", "the answer is granite"],
        ),
        ({"match": "number", "tolerance": 0.1}, 2.65, ["it is 2.6", "2.75"], ["2.65, or 3", "", "2.5"]),
        ({"match": "number", "pattern": r"density.*?\d\S*"}, "2.65", ["the density is 2.65, at 25 °C"], ["2.65"]),
        ({"match": "pattern", "pattern": r"(?i)\b{answer}\b"}, "C", ["it is c."], ["cc"]),
        ({"match": "pattern", "pattern": "^{answer}$"}, "a.c", ["a.c"], ["abc"]),
    ],
)
def test_right_and_wrong_answers(tmp_path, settings, reference, right, wrong):
    written(tmp_path / "a.json", [{"question": "x", "answer": reference}])
    raw = {
        "name": "a",
        "about": "",
        "file": str(tmp_path / "a.json"),
        "fields": {"question": "question", "answer": "answer"},
    }
    (question,) = read_task(written(tmp_path / "a.yaml", raw | settings)).pairs
    assert question.reference == str(reference[0] if isinstance(reference, list) else reference)
    assert [text for text in (*right, *wrong) if question.is_right(text)] == right


def test_the_939(geobench):
    pairs = load_subjective(geobench["npee"], "subjective")
    parts = [load_subjective(geobench["npee"], kind) for kind in ("noun", "completion", "discussion")]
    assert [*map(len, parts)] == [454, 150, 335]
    assert pairs == [pair for part in parts for pair in part]
    assert len(pairs) == 939
    task = read_task(FOLDER / "npee_subjective.yaml", folder=geobench["npee"].parent)
    assert [pair[:2] for pair in task.pairs] == pairs
    assert read_task(FOLDER / "ap.yaml", folder=geobench["npee"].parent).questions == load_geobench(geobench["ap"])


def test_the_tasks_of_the_repository(tmp_path):
    """All of them are listed; those of files that are not here are read from a file of that form."""
    found = {path.stem: load_config(TaskConfig, path) for path in FOLDER.glob("*.yaml")}
    assert len({config.name for config in found.values()}) == len(found) == 11
    text = listed()
    assert all(f"{config.name} " in text and config.about in text for config in found.values())
    sciq = {"question": STEM, "support": "", "correct_answer": "basalt"}
    sciq |= {f"distractor{n}": text for n, text in enumerate(TEXTS[1:], 1)}
    arc = {
        "question": {"stem": STEM, "choices": [{"text": text, "label": text[0]} for text in TEXTS]},
        "answerKey": "b",
    }
    written(tmp_path / "test.json", [sciq])
    for name in ("ARC-Challenge-Test.jsonl", "ARC-Easy-Test.jsonl"):
        written(tmp_path / name, arc)
    for name in ("high_school_geography_test.csv", "astronomy_test.csv"):
        written(tmp_path / name, [(STEM, *TEXTS, "A")])
    written(tmp_path / "GeoGPT-QA.csv", [("index", "question", "answer", "doi"), ("0", STEM, "basalt", "")])
    for name, config in found.items():
        if config.layout != "geobench" and name != "arc_sft":
            task = read_task(FOLDER / f"{name}.yaml", folder=tmp_path)
            assert len(task.questions) + len(task.pairs) == 1
            for question in task.questions:
                assert (question.task, question.stem) == (config.name, STEM)
                assert question.texts["ABCD".index(question.answer)] == "basalt"


def test_every_key_is_explained(tmp_path):
    """In configs/tasks/README.md, whose example is a task."""
    text = (ROOT / "configs" / "tasks" / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == [spec.name for spec in fields(TaskConfig)]
    written(tmp_path / "densities.csv", [("mineral", "density"), ("quartz", "2.65")])
    path = written(tmp_path / "task.yaml", re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    (question,) = read_task(path, folder=tmp_path).pairs
    assert question.question == "What is the density of quartz, in g/cm3? Answer with a number."
    assert [question.is_right(text) for text in ("2.7 g/cm3", "3")] == [True, False]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fieldz": {}}, "unknown key fieldz; did you mean fields"),
        ({"fields": {"question": "q", "answr": "a"}}, "fields must be {question, choices, answer, topic}"),
        ({"fields": {"question": "q"}}, "fields must name question and answer"),
        ({"layout": "arc", "fields": {"question": "q", "answer": "a"}}, "are for files without a layout"),
        ({"layout": "mmlu"}, "layout must be one of geobench, arc"),
        ({"match": "words"}, "match is for open questions; these have choices"),
        ({"prompt": "Answer:"}, "prompt must have {question}"),
        ({"pattern": "x"}, "pattern goes with match"),
        ({"tolerance": 1}, "tolerance and relative_tolerance go with match: number"),
        ({"layout": "geobench", "name": "npee/noun", "match": "pattern"}, "match: pattern needs one"),
        ({"layout": "geobench", "name": "npee/noun", "match": "pattern", "pattern": "("}, "no regular expression"),
        ({"about": None}, "about must be text"),
    ],
)
def test_yaml_that_is_refused(tmp_path, change, said):
    raw = {"name": "a", "about": "x", "file": "none.json"} | change
    path = written(tmp_path / "a.yaml", raw)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_task(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=re.escape(said)):
        listed(tmp_path)
    with pytest.raises(ValueError, match="`k2mini eval` alone reads tasks' YAML and tables"):
        read_benchmark(path)


def test_eval_of_tasks(tiny_directory, tmp_path, run):
    """Choices and a gap in one run: results kept, the gap's answers right or wrong, gone on with."""
    mmlu = written(tmp_path / "rocks.csv", [(STEM, *TEXTS, "A"), ("Which is a tree?", *TEXTS, "B")])
    gap = {"name": "rocks/gap", "about": "a gap", "file": "gap.jsonl", "match": "pattern", "pattern": "^"}
    gap["fields"] = {"question": "question", "answer": "answer"}
    written(tmp_path / "gap.jsonl", {"question": "Granite is a ().", "answer": "rock"})
    task, out = written(tmp_path / "gap.yaml", gap), tmp_path / "out"
    model = ["eval", "--model", tiny_directory, "--max-new-tokens", 4]
    open_only = [*model, "--benchmark", task, "--data", tmp_path, "--out", out]
    for _ in range(2):
        status, printed, err = run(*open_only)
        assert status == 0, err
        assert "rocks/gap: 100.0 % are right by pattern, pattern ^ (95 % interval 20.7 – 100.0 %)" in printed
    (answer,) = read_answers(out)["rocks/gap"]
    assert answer.scores["accuracy"] == 1
    assert read_scores(out)["rocks/gap", "accuracy"] == {(answer.digest, 0): 1}
    status, printed, err = run(*model, "--benchmark", mmlu, "--map", "question=0,choices=1+2+3+4,answer=5", "--json")
    assert status == 0, err
    assert [(row["task"], row["n"]) for row in json.loads(printed)["tasks"]] == [("rocks", 2)]
    for options, said in (
        (["--benchmark", mmlu], "there is no field 'question'"),
        (["--benchmark", mmlu, "--map", "stem=0"], "'stem' is none of question, choices, answer, topic"),
        (["--benchmark", task, "--map", "question=0,answer=1"], "says itself how its file is read"),
        (["--benchmark", task, task, "--data", tmp_path], "the same benchmark is named twice"),
        (["--benchmark", task, "--data", tmp_path, "--tasks", "x"], "no such task; they have rocks/gap"),
        (["--benchmark", task], "there is no data file gap.jsonl"),
    ):
        status, printed, err = run(*model, *options)
        assert (status, printed, said in err.splitlines()[-1]) == (2, "", True), err


def test_eval_lists_tasks(run, tmp_path, monkeypatch):
    assert run("eval", "--list")[:2] == (0, listed() + "\n")
    monkeypatch.setattr("k2mini.evaluation.tasks.FOLDER", tmp_path)
    status, out, err = run("eval", "--list")
    assert (status, out) == (2, "")
    assert err.startswith(f"k2mini: there is no task's YAML file in {tmp_path}")


def test_decontamination_is_reported(tiny_directory, tiny_tokenizer, tmp_path, run):
    """A corpus that was cleaned of the benchmark, one that was not, the text prepared of them, and a changed file."""
    pytest.importorskip("lxml")
    words = [f"{a}{b}" for a in ("granite", "basalt", "quartz", "crust") for b in ("", "s", "ic")]
    text = tmp_path / "text.txt"
    text.write_text(". ".join(" ".join(random.Random(n).sample(words, 9)).capitalize() for n in range(60)) + ".\n")
    rocks = [{"question": "Which of these is a rock that was molten once, long ago?", "choices": TEXTS, "answer": "A"}]
    benchmark = written(tmp_path / "rocks.json", rocks)
    make = ["corpus", text, "--without", "language", "quality", "repetition"]
    for name, more in (("clean", ["--decontaminate", benchmark]), ("plain", [])):
        status, _, err = run(*make, *more, "--out", tmp_path / name)
        assert status == 0, err
    prepare = ["prepare", "--tokenizer", tiny_tokenizer.path, "--out"]
    assert run(*prepare, tmp_path / "prepared", tmp_path / "clean")[0] == 0
    assert run(*prepare, tmp_path / "mixed", tmp_path / "clean", text)[0] == 0
    common = ["eval", "--model", tiny_directory, "--benchmark", benchmark, "--out"]

    def reported(*corpora):
        out = tmp_path / f"out-{'-'.join(corpora)}"
        status, printed, err = run(*common, out, "--corpus", *(tmp_path / name for name in corpora))
        assert status == 0, err
        (entry,) = json.loads((out / "report.json").read_text())["decontamination"]
        assert printed.splitlines()[-1] == entry["said"]
        assert entry["said"] in (out / "report.md").read_text()
        return entry

    for name in ("clean", "prepared"):
        entry = reported(name)
        assert entry["taken_out"]
        assert "rocks.json was taken out of the training text" in entry["said"]
        assert "documents that held its questions were dropped" in entry["said"]
    for names, said in (
        (["plain"], "plain (corpus "),
        (["clean", "plain"], "plain (corpus "),
        (["mixed"], "mixed holds text that k2mini corpus did not make"),
    ):
        entry = reported(*names)
        assert not entry["taken_out"]
        assert "rocks.json was NOT taken out of the training text" in entry["said"]
        assert said in entry["said"]
        assert "dropped" not in entry["said"]
    written(benchmark, [*rocks, {"question": "x", "choices": TEXTS, "answer": "A"}])
    entry = reported("clean", "prepared")
    assert "), where another file of that name was; " in entry["said"]
    for path, said in ((tmp_path, "has neither corpus.json nor manifest.json"), (benchmark, "is no manifest of")):
        status, printed, err = run(*common, tmp_path / "none", "--corpus", path)
        assert (status, printed, said in err.splitlines()[-1]) == (2, "", True), err
    assert not (tmp_path / "none").exists()
