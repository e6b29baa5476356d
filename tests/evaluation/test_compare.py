"""`compare` over every kind of score: paired tests, their correction, and the page."""

import html
import json
import re

import pytest

from k2mini.evaluation.agreement import holm
from k2mini.evaluation.report import Result
from k2mini.evaluation.scores import OpenAnswer, Score, write_answers, write_scores

NASTY = "</script><img src=x onerror=alert(1)> & \"'"
MEASURES = ["accuracy", "rouge_l", "gptscore/correctness"]


def write_run(folder, right, quality, *, topics=True):
    """A run of 30 questions of multiple choice and 20 open ones, which a judge has scored."""
    folder.mkdir()
    lines = ""
    for place in range(30):
        said = "B" if right(place) else "A"
        what = {"question": f"Which rock {place}? {NASTY}", "labels": ["A", "B"], "choices": ["ice", f"rock {NASTY}"]}
        topic = ("petrology", "hydrology")[place % 2] if topics else ""
        lines += Result(
            "rocks", place, "B", said, [-1.0, -2.0], [[1], [2]], digest=f"d{place}", topic=topic, **what
        ).line()
        lines += "\n"
    (folder / "results.jsonl").write_text(lines)
    answers = [
        OpenAnswer("npee/noun", place, f"Term {place}", "Reference.", f"{folder.name} {place} {NASTY}",
                   {"rouge_l": quality(place)})
        for place in range(20)
    ]  # fmt: skip
    write_answers(folder, "npee/noun", answers)
    judged = [Score("npee/noun", a.index, a.digest, "gptscore/correctness", -quality(a.index)) for a in answers]
    write_scores(folder, "judge", judged)
    (folder / "report.json").write_text(json.dumps({"model": f"the model of {folder.name}", "tasks": []}))
    return folder


@pytest.fixture
def runs(tmp_path):
    one = write_run(tmp_path / "one", lambda place: place % 2, lambda place: place / 40)
    two = write_run(tmp_path / "two", lambda place: place % 2 or place < 20, lambda place: place / 40 + 0.1)
    three = write_run(tmp_path / "three", lambda place: place % 3, lambda place: place / 40)
    return one, two, three


def test_all_kinds_of_scores_of_three_runs(runs, run):
    status, out, err = run("compare", *runs, "--json")
    assert status == 0, err
    found = json.loads(out)
    tasks = ["rocks", "npee/noun", "npee/noun"]
    assert [(task["task"], task["measure"]) for task in found] == list(zip(tasks, MEASURES, strict=True))
    assert [task["n"] for task in found] == [30, 20, 20]
    rocks, rouge, judged = ([entry.get("difference") for entry in task["runs"]] for task in found)
    assert rocks == [None, pytest.approx(1 / 3), pytest.approx(1 / 6)]
    assert rouge == [None, pytest.approx(0.1), 0]
    assert judged == [None, pytest.approx(-0.1), 0]
    two, three = found[0]["runs"][1:]
    assert (two["better"], two["worse"], two["p"]) == (10, 0, 2 / 2**10)
    assert (three["better"], three["worse"]) == (10, 5)
    two, three = found[1]["runs"][1:]
    assert (two["better"], two["worse"], three["better"], three["p"]) == (20, 0, 0, 1)
    assert two["p"] < 0.001
    assert two["difference_low"] is two["difference_high"] is None, "every difference is 0.1"
    assert found[1]["runs"][0]["mean"] == pytest.approx(9.5 / 40)
    tested = [entry for task in found for entry in task["runs"][1:]]
    assert [entry["p_holm"] for entry in tested] == holm([entry["p"] for entry in tested])
    out = run("compare", *runs)[1]
    assert "npee/noun, gptscore/correctness (20 questions)" in out
    assert "0 better, 20 worse than the first, p = " in out
    assert out.endswith("p is corrected for all 6 comparisons by Holm's method\n")


def test_swapping_two_runs_changes_the_sign_alone(runs, run):
    there, back = (json.loads(run("compare", *pair, "--json")[1]) for pair in (runs[:2], runs[1::-1]))
    for one, two in zip(there, back, strict=True):
        one, two = one["runs"][1], two["runs"][1]
        assert (one["better"], one["worse"]) == (two["worse"], two["better"])
        assert one["difference"] == pytest.approx(-two["difference"])
        assert one["p"] == pytest.approx(two["p"], abs=1e-3)


def test_a_run_that_nobody_judged(runs, run):
    (runs[1] / "scores_judge.jsonl").unlink()
    status, out, err = run("compare", *runs)
    assert (status, "gptscore" in out) == (0, False)
    assert "npee/noun, gptscore/correctness, is left out: no question of it" in err


def test_open_tasks_alone_have_no_chart(runs, tmp_path, run):
    pytest.importorskip("matplotlib")
    for folder in runs:
        (folder / "results.jsonl").unlink()
    status, _, err = run("compare", *runs, "--chart", tmp_path / "chart.png")
    assert (status, "have no accuracy in common to draw; --html shows other scores" in err) == (2, True)
    assert not (tmp_path / "chart.png").exists()


def test_the_page_has_topics_and_the_questions_where_two_differ(runs, tmp_path, run):
    page = tmp_path / "page.html"
    status, _, err = run("compare", *runs, "--html", page)
    assert status == 0, err
    text = page.read_text()
    assert "<img" not in text
    assert not re.findall(r"https?://|@import|url\(|<script", text)
    plain = html.unescape(re.sub("<.*?>", "", text))
    assert "the model of two" in plain
    assert "+33.3 points (+14" in plain
    for topic in ("petrology", "hydrology"):
        (row,) = re.findall(rf"<tr><td>{topic}</td>(.*?)</tr>", text)
        assert re.findall(r"<td>(.*?)</td>", row)[0] == "15"
    assert re.findall(r"<td>(.*?)</td>", row)[1].startswith("1.000"), "the first run knows all of hydrology"
    ends = "(?=<details><summary><b>|<h3>|</section>|<p>)"
    folded = re.findall(rf"<details><summary>(.*?)</summary>(.*?)</details>{ends}", text, re.DOTALL)
    said = [html.unescape(re.sub("<.*?>", "", summary)) for summary, _ in folded]
    assert said[:3] == [
        "two is better than one: 10 questions",
        "three is better than one: 10 questions",
        "three is worse than one: 5 questions",
    ]
    questions = [int(n) for n in re.findall(r"Which rock (\d+)", folded[0][1])]
    assert questions == [*range(0, 20, 2)]
    assert folded[0][1].count("✓ key") == 10
    assert "two is better than one: 20 questions" in said
    assert "three and one do not differ in any question." in plain
    status, _, err = run("compare", *runs, "--html", page)
    assert (status, "exists already" in err) == (2, True)
    assert run("compare", *runs, "--html", page, "--force")[0] == 0
    assert "a page's name ends in .html" in run("compare", *runs, "--html", tmp_path / "page.pdf")[2]
    assert "which is an input" in run("compare", *runs, "--html", runs[0] / "page.html")[2]


def test_a_topic_of_a_users_question_is_kept(tiny_directory, tmp_path, run):
    rows = [
        {"question": f"Which rock {n}?", "choices": ["ice", "granite"], "answer": 1, "topic": "petrology"}
        for n in range(3)
    ]
    for name, shown in (("with", rows), ("without", [{**row, "topic": 3} for row in rows])):
        (tmp_path / name).mkdir()
        task = tmp_path / name / "rocks.jsonl"
        task.write_text("".join(json.dumps(row) + "\n" for row in shown))
        command = ("eval", "--model", tiny_directory, "--benchmark", task, "--out", tmp_path / f"{name}-out")
        assert run(*command)[0] == 0
    kept = [
        [json.loads(line) for line in (tmp_path / f"{name}-out/results.jsonl").open()] for name in ("with", "without")
    ]
    assert {row["topic"] for row in kept[0]} == {"petrology"}
    assert not any("topic" in row for row in kept[1]), "a line without a topic stays as it was"
    assert [row["logprobs"] for row in kept[0]] == [row["logprobs"] for row in kept[1]]
    page = tmp_path / "page.html"
    assert run("compare", tmp_path / "with-out", tmp_path / "without-out", "--html", page)[0] == 0
    assert "<tr><td>petrology</td>" in page.read_text()


def test_copies_of_a_question_count_once_but_in_accuracy(tmp_path, run):
    """Two runs with 8 questions, the first of them five times; p and n are those of 8."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for place, folder in enumerate(runs):
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps({"model": folder.name, "tasks": []}))
        asked = [0] * 5 + [*range(1, 8)]
        answers = [
            OpenAnswer("npee/noun", n, f"Term {q}", "Reference.", "Rock.", {"rouge_l": place * n / 10, "accuracy": 1.0})
            for n, q in enumerate(asked)
        ]
        write_answers(folder, "npee/noun", answers)
    rouge, right = json.loads(run("compare", *runs, "--json")[1])
    assert (rouge["measure"], rouge["n"], right["measure"], right["n"]) == ("rouge_l", 8, "accuracy", 12)
    two = rouge["runs"][1]
    # The first question's copies score 0, 0.1 … 0.4; then 0.5 … 1.1.
    assert two["mean"] == pytest.approx((0.2 + sum(n / 10 for n in range(5, 12))) / 8)
    assert (two["better"], two["left_out"]) == (8, 0)
    assert two["p"] >= 2 / 2**8
    out = run("compare", *runs, "--html", tmp_path / "page.html")[1]
    assert "npee/noun, rouge_l (8 questions)" in out
    said = "means over different questions, each counted once (report.json counts copies, and its likelihood is one"
    assert said in out
    assert said in (tmp_path / "page.html").read_text()
