import json
from collections import Counter

import pytest

from k2mini.data.prompts import get_template
from k2mini.evaluation.benchmarks import (
    SUBJECTIVE,
    check_keys,
    load_geobench,
    load_questions,
    load_subjective,
    read_benchmark,
)
from k2mini.evaluation.instances import EvalConfig


def test_every_published_question_is_there(geobench):
    questions = load_geobench(geobench["npee"]) + load_geobench(geobench["ap"])
    assert Counter(question.task for question in questions) == {"npee/choice": 182, "npee/tf": 134, "ap": 1395}
    for task in ("npee/choice", "npee/tf", "ap"):
        indices = [question.index for question in questions if question.task == task]
        assert indices == list(range(len(indices)))
    # The known faults of the files: one impossible key, twice; nothing else is out of the options.
    outside = [(q.task, q.index) for q in questions if q.answer not in q.labels]
    assert outside == [("npee/choice", 155), ("npee/choice", 175)]


def test_choice_questions_are_asked_as_published(geobench):
    published = json.loads(geobench["npee"].read_text())["choice"]["question"]
    questions = [question for question in load_geobench(geobench["npee"]) if question.task == "npee/choice"]
    assert [question.listed() for question in questions] == published


def test_ways_to_ask(geobench):
    ap = load_geobench(geobench["ap"])[1]
    short = get_template("alpaca_short")
    letter, text = EvalConfig("letter", short, "The answer is: "), EvalConfig("text", short)
    assert (letter.instruction(ap), letter.options(ap)) == (
        "A long, narrow, upper atmosphere current of fast moving air is known as a\nChoose from:\n"
        "A. jet stream\nB. thermophile\nC. contrail\nD. gust of wind\nE. typhoon",
        ("A", "B", "C", "D", "E"),
    )
    assert text.instruction(ap) == ap.stem
    assert text.options(ap) == ("jet stream", "thermophile", "contrail", "gust of wind", "typhoon")
    tf = next(question for question in load_geobench(geobench["npee"]) if question.task == "npee/tf")
    assert text.instruction(tf) == letter.instruction(tf) == "True or false?\nMinerals all have cleavage"
    assert text.options(tf) == letter.options(tf) == ("True", "False")
    assert letter.prompt(tf).endswith("### Response:\nThe answer is: ")


def test_the_known_faults_of_the_keys_are_found(geobench):
    questions = load_geobench(geobench["npee"])
    choice = [question for question in questions if question.task == "npee/choice"]
    found = check_keys(choice)
    assert (len(found.surplus), len(found.conflicting), found.impossible) == (53, 8, [155, 175])
    assert len({question.identity for question in choice}) == 129
    assert len(found.clean(choice)) == 129 - 8 - 1
    assert choice[155].identity == choice[175].identity
    assert choice[155].answer == "D"
    assert choice[155].labels == ("A", "B", "C")


def test_open_tasks(geobench):
    sizes = {kind: len(load_subjective(geobench["npee"], kind) or []) for kind in SUBJECTIVE}
    assert sizes == {"noun": 454, "qa": 153, "discussion": 335, "completion": 150}
    assert load_subjective(geobench["ap"], "noun") is None
    with pytest.raises(ValueError, match=r"expected is geobench_npee.json"):
        load_subjective(geobench["npee"], "poem")


def test_a_users_own_task(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [("x", ["a", "b"], "B"), ("y", ["a", "b", "c"], 2), ("z", ["no", "yes"], "no")]
    path.write_text("".join(json.dumps({"question": q, "choices": c, "answer": a}) + "\n" for q, c, a in rows))
    questions = load_questions(path)
    assert [(q.task, q.index, q.answer) for q in questions] == [("mine", 0, "B"), ("mine", 1, "C"), ("mine", 2, "A")]
    assert questions[1].listed() == "y\nChoose from:\nA. a\nB. b\nC. c"


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json", "mine.jsonl.json", "mine.JSON", "mine.JSONL"])
def test_a_benchmark_is_read_by_what_the_file_holds(tmp_path, geobench, name):
    path = tmp_path / name
    rows = [
        {"question": "x", "choices": ["a", "b"], "answer": "B"},
        {"question": "y", "choices": ["no", "yes"], "answer": 1},
    ]
    for content in ("".join(json.dumps(row) + "\n" for row in rows), json.dumps(rows, indent=1)):
        path.write_text(content)
        questions = read_benchmark(path)
        assert [(q.task, q.index, q.answer) for q in questions] == [("mine", 0, "B"), ("mine", 1, "B")]
    path.write_text(json.dumps(rows[0]))
    assert read_benchmark(path) == questions[:1]
    for published in geobench.values():
        path.write_bytes(published.read_bytes())
        assert read_benchmark(path) == load_geobench(published)
    path.write_text('[{"question": ')
    with pytest.raises(ValueError, match=f"{name} is not valid JSON"):
        read_benchmark(path)


def test_options_that_are_letters_themselves(tmp_path):
    """Of a figure's parts, say: they are options like others, and the letter of one may be the text of another."""
    path = tmp_path / "mine.jsonl"
    rows = [(["A", "B", "C"], "B"), (["C", "B", "A"], 0), (["C", "B", "A"], "B")]
    path.write_text("".join(json.dumps({"question": "x", "choices": c, "answer": a}) + "\n" for c, a in rows))
    questions = load_questions(path)
    assert [question.answer for question in questions] == ["B", "A", "B"]
    assert not any(question.is_true_false for question in questions)
    assert EvalConfig("letter").instruction(questions[0]) == "x\nChoose from:\nA. A\nB. B\nC. C"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"question": "x", "choices": ["B", "A"], "answer": "A"}',
            "line 1: answer 'A' may mean A and B of the options",
        ),
        (
            '{"question": "x", "choices": ["a", "a"], "answer": "a"}',
            "line 1: answer 'a' may mean A and B of the options",
        ),
        ('{"question": "x", "choices": ["a", "b"], "answer": "D"}', "line 1: answer 'D' is none of the options"),
        ('{"question": "x", "choices": ["a", "b"], "answer": 2}', "line 1: answer 2 is none of the options"),
        ('{"question": "x", "choices": ["a", " "], "answer": "A"}', "line 1: option 1 of choices is empty"),
        ('{"question": "x", "choices": ["a"], "answer": "A"}', "a list of at least two texts"),
        ('{"question": "", "choices": ["a", "b"], "answer": "A"}', "question is empty"),
        ('{"question": "x", "choices": ["a", "b"]}', "there is no 'answer'"),
        ("[1]", "this is no JSON object"),
        ("{", "line 1 is not valid JSON"),
        ("", "mine.jsonl is empty"),
    ],
)
def test_a_task_that_is_refused(tmp_path, line, said):
    (tmp_path / "mine.jsonl").write_text(line)
    with pytest.raises(ValueError, match=said) as caught:
        load_questions(tmp_path / "mine.jsonl")
    assert "mine.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"a": 1},
        {"choice": {"question": ["x"], "answer": []}, "tf": {"question": [], "answer": []}},
        {"choice": {"question": ["no options"], "answer": ["A"]}, "tf": {"question": [], "answer": []}},
        {"choice": {"question": [], "answer": []}},
        [{"instruction": "x", "output": "y"}],
        [{"question": {"stem": "x", "choices": [{"text": 1, "label": "A"}] * 2}, "answerKey": "A"}],
        [1],
        "text",
    ],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a GeoBench file") as caught:
        load_geobench(path)
    assert str(path) in str(caught.value)


def test_no_file_and_no_json(tmp_path):
    how = "hf download daven3/geobench --repo-type dataset --local-dir geobench"
    with pytest.raises(ValueError, match=f"there is no benchmark file.* geobench_npee.json .*{how}"):
        load_geobench(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad.json, line 1 is not valid JSON"):
        load_geobench(tmp_path / "bad.json")
