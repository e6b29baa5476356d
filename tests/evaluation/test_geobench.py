import json
from collections import Counter

import pytest

from k2mini.evaluation.geobench import load_geobench
from k2mini.text.prompts import get_template


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
    assert ap.asked("letter") == (
        "A long, narrow, upper atmosphere current of fast moving air is known as a\nChoose from:\n"
        "A. jet stream\nB. thermophile\nC. contrail\nD. gust of wind\nE. typhoon",
        ("A", "B", "C", "D", "E"),
    )
    assert ap.asked("text") == (ap.stem, ("jet stream", "thermophile", "contrail", "gust of wind", "typhoon"))
    tf = next(question for question in load_geobench(geobench["npee"]) if question.task == "npee/tf")
    assert tf.asked("text") == tf.asked("letter") == ("True or false?\nMinerals all have cleavage", ("True", "False"))
    context = tf.context(get_template("alpaca_short"), "letter", "The answer is: ")
    assert context.endswith("### Response:\nThe answer is: ")


@pytest.mark.parametrize(
    "content",
    [
        {"a": 1},
        {"choice": {"question": ["x"], "answer": []}, "tf": {"question": [], "answer": []}},
        {"choice": {"question": ["no options"], "answer": ["A"]}, "tf": {"question": [], "answer": []}},
        {"choice": {"question": [], "answer": []}},
        [],
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
    with pytest.raises(ValueError, match="there is no benchmark file"):
        load_geobench(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_geobench(tmp_path / "bad.json")
