"""Rating by people: the page, blind and in Chromium; its key; and what raters' files come to."""

import csv
import json
import random
import shutil

import pytest

from k2mini.evaluation.rate import make_page, write_ratings
from k2mini.evaluation.scores import OpenAnswer, read_scores, write_answers

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "</script><img src=x onerror='window.hacked = 1'> & \"<!--"
ASPECTS = ("scientificity", "correctness", "coherence")


def write_run(folder, texts, model="secret/zebra-7b", task="npee/noun"):
    folder.mkdir(exist_ok=True)
    answers = [
        OpenAnswer(task, place, f"What is rock {place}?", f"Rock {place}. {NASTY}", text, {"rouge_l": place / 10})
        for place, text in enumerate(texts)
    ]
    write_answers(folder, task, answers)
    (folder / "report.json").write_text(json.dumps({"model": model, "tasks": []}))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two runs of eight questions; to the last one both answer the same."""
    one, two = ([f"{name} {place} {NASTY}" for place in range(7)] + ["the same"] for name in ("granite", "basalt"))
    return write_run(tmp_path / "run-zebra", one), write_run(tmp_path / "run-yak", two, "secret/yak-7b")


@pytest.fixture
def made(runs, tmp_path, run, monkeypatch):
    """The page, and its key as it is read; the orders of answers are the same in each test."""
    monkeypatch.setattr("secrets.SystemRandom", lambda: random.Random(1))
    status, out, err = run("rate", "make", *runs, "--out", tmp_path / "page.html")
    assert (status, out) == (0, f"{tmp_path / 'page.html'}\n"), err
    assert "page.key.json says whose answer is whose" in err
    return tmp_path / "page.html", json.loads((tmp_path / "page.key.json").read_text())


def write_csv(path, key, rater, value, items=None):
    """A rater's file: of each item and aspect what `value` says."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["page", "rater", "item", "aspect", "value"])
        for item in items or key["items"]:
            rows.writerows([key["page"], rater, item, aspect, value(item, aspect)] for aspect in ASPECTS)
    return path


def data_of(page):
    return json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])


def test_the_page_is_blind_and_the_key_says_whose_answer_is_whose(made, runs):
    page, key = made
    text = page.read_text()
    assert not [word for word in ("zebra", "yak", "secret", "run-") if word in text]
    data = data_of(page)
    assert [aspect["name"] for aspect in data["aspects"]] == [*ASPECTS]
    assert sorted(question["question"] for question in data["questions"]) == [f"What is rock {n}?" for n in range(8)]
    first = []
    for question in data["questions"]:
        answers = {answer["id"]: answer["text"] for answer in question["answers"]}
        owners = [key["items"][name]["runs"] for name in answers]
        for name, said in answers.items():
            assert key["items"][name]["answer"] == said
            if said == "the same":
                assert key["items"][name]["runs"] == [0, 1], "one answer of both is rated once"
            else:
                assert key["runs"][key["items"][name]["runs"][0]] == ("run-zebra" if "granite" in said else "run-yak")
        first += owners[:1] if len(owners) > 1 else []
    assert len(first) == 7
    assert [0] in first
    assert [1] in first


def test_a_seed_says_which_questions_and_not_whose_answer_is_whose(runs, tmp_path, run):
    """The seed, which is public or easily guessed, draws no order of answers: the same command makes other pages."""
    asked, owners = [], set()
    for number, more in enumerate([[]] * 12 + [["--seed", 1], ["--sample", 3]]):
        assert run("rate", "make", *runs, "--out", tmp_path / f"{number}.html", *more)[0] == 0
        data, key = data_of(tmp_path / f"{number}.html"), json.loads((tmp_path / f"{number}.key.json").read_text())
        asked.append([question["question"] for question in data["questions"]])
        owners |= {str([item["runs"] for item in key["items"].values()])} if not more else set()
        assert key["page"][0] == "p", "no spreadsheet takes it for a number"
    assert asked[0] == asked[1] != asked[-2]
    assert asked[-1] == asked[0][:3]
    assert len(owners) > 1


def test_spaces_tell_nothing_and_copies_are_rated_once(tmp_path):
    """An answer's ends are not shown; of a question that stands there twice one is drawn, and its first answer."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for place, folder in enumerate(runs):
        write_run(folder, [" Granite.\n" if place else "Granite."])
        again = [OpenAnswer("npee/noun", n, "What?", "This.", f"{folder.name} {n}\n", {}) for n in range(4)]
        write_answers(folder, "more", again)
    key = make_page(runs, tmp_path / "page.html", sample=50)
    assert sorted(item["answer"] for item in key["items"].values()) == ["Granite.", "one 0", "two 0"]
    ratings = {(item, "coherence"): {"anna": 2} for item in key["items"]}
    write_ratings(tmp_path, key, ratings)
    (own,) = (values for (_, measure), values in read_scores(runs[0]).items() if measure.startswith("people/"))
    assert sorted((copy, value) for (_, copy), value in own.items()) == [(0, 2.0), (0, 2.0)]


def test_pages_are_not_mixed(tmp_path, run):
    """One page rates the first run and the second, strictly; another the first and the third, mildly."""
    runs = [write_run(tmp_path / name, [f"{name} {n}" for n in range(8)]) for name in ("one", "two", "three")]
    for name, value, pair in (("strict", 1, runs[:2]), ("mild", 3, runs[::2])):
        key = make_page(pair, tmp_path / f"{name}.html", sample=8)
        file = write_csv(tmp_path / f"{name}.csv", key, name, lambda *_, value=value: value)
        status, _, err = run("rate", "read", file, "--key", tmp_path / f"{name}.key.json")
        assert status == 0, err
    for pair, measures in ((runs[:2], 3), (runs[::2], 3), (runs[1:], 0)):
        found = json.loads(run("compare", *pair, "--json")[1])
        people = [task for task in found if task["measure"].startswith("people/")]
        assert [task["n"] for task in people] == [8] * measures
        assert all(task["runs"][1]["difference"] == 0 for task in people)


def test_what_raters_gave(made, runs, tmp_path, run):
    """Means, alpha and disagreements by hand; kept in the runs, where `compare` finds them."""
    _, key = made
    ours = {name: 0 in item["runs"] for name, item in key["items"].items()}
    odd = next(name for name in key["items"] if key["items"][name]["runs"] == [1])
    files = [
        write_csv(tmp_path / "anna.csv", key, 'Anna, "A."', lambda item, _: 3 if ours[item] else 2),
        write_csv(tmp_path / "ben.csv", key, "ben", lambda item, a: 1 if (item, a) == (odd, "coherence") else 3),
        write_csv(tmp_path / "cy.csv", key, "cy", lambda item, _: 3, items=[odd]),
    ]
    status, out, err = run("rate", "read", *files, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["raters"] == ['Anna, "A."', "ben", "cy"]
    assert found["given"] == pytest.approx((15 + 15 + 1) / 45)
    science, _, coherence = found["aspects"]
    assert [entry["run"] for entry in science["runs"]] == ["run-zebra", "run-yak"]
    # Seven answers of the second run: 2 and 3, once 2, 3, 3; and the shared one, 3 and 3.
    second = (6 * 2.5 + 8 / 3 + 3) / 8
    assert [(entry["n"], entry["mean"]) for entry in science["runs"]] == [(8, 3), (8, pytest.approx(second))]
    assert science["runs"][1]["low"] is None, "six of eight are the same, which shows no interval"
    assert coherence["runs"][1]["mean"] == pytest.approx((6 * 2.5 + 2 + 3) / 8)
    # Values: 8 items (3, 3), 6 items (2, 3), one (2, 3, 3): sevens twos, 24 threes; within 6 · 2 + 2 · 2 / 2.
    assert science["alpha"] == pytest.approx(1 - 30 * 14 / 2 / (7 * 24))
    (apart,) = found["disagreements"]
    assert (apart["item"], apart["aspect"]) == (odd, "coherence")
    assert apart["values"] == {'Anna, "A."': 2, "ben": 1, "cy": 3}
    scores = read_scores(runs[1])
    at = f"@{key['page'][:6]}"
    assert {measure for _, measure in scores} == {"rouge_l", *(f"people/{aspect}{at}" for aspect in ASPECTS)}
    assert sum(scores["npee/noun", f"people/scientificity{at}"].values()) == pytest.approx(8 * second)
    status, out, _ = run("rate", "read", *files)
    assert f'{odd} coherence: Anna, "A." 2, ben 1, cy 3  What is rock' in out
    status, out, err = run("compare", *runs)
    assert (status, f"npee/noun, people/coherence{at} (8 questions)" in out) == (0, True), err


def test_a_spreadsheet_may_have_saved_a_file(made, tmp_path, run):
    """With a byte order mark, semicolons and empty lines, and in another folder than the key, which --key names."""
    _, key = made
    (tmp_path / "far").mkdir()
    file = write_csv(tmp_path / "far/anna.csv", key, "anna", lambda *_: 2)
    file.write_text("\ufeff" + file.read_text().replace(",", ";") + "\n;;;;\n\n")
    status, _, err = run("rate", "read", file)
    assert (status, "whose key (NAME.key.json) is not in" in err) == (2, True)
    status, out, err = run("rate", "read", file, "--key", tmp_path / "page.key.json")
    assert (status, "raters: anna; 100 %" in out) == (0, True), err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("page,rater", "pages,rater", "line 1: it is no file of ratings, whose columns are page, rater, item"),
        ("PAGE,anna", "0123456789ab,anna", "whose key (NAME.key.json) is not in"),
        ("PAGE,ben", "0123456789ab,ben", "line 2 rates another page, '0123456789ab'; the key is"),
        (",1A,", ",99A,", "the page has no item '99A'"),
        ("coherence,2", "coherence,4", "value is '4', not a number from 1 to 3"),
        ("coherence,2", "coherence,2,3", "it is no file of ratings"),
        ("ben", "anna", "anna has rated item 1A already; give one file a rater"),
        ("ben", " ", "rater is empty"),
        ("ben", "=1+1", "rater '=1+1' begins as a spreadsheet's formula does"),
        ("ben,1A,scientificity", '"ben,1A,scientificity', "line 4: it is no file of ratings: unexpected end of data"),
    ],
)
def test_files_that_are_no_ratings_of_the_page(made, runs, tmp_path, run, old, new, said):
    _, key = made
    files = [write_csv(tmp_path / f"{rater}.csv", key, rater, lambda *_: 2, items=["1A"]) for rater in ("anna", "ben")]
    for file in files:
        file.write_text(file.read_text().replace(old.replace("PAGE", key["page"]), new))
    status, out, err = run("rate", "read", *files)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not [*runs[0].glob("scores_*")]


def test_runs_that_cannot_be_rated(made, runs, tmp_path, run):
    other = write_run(tmp_path / "other", ["x"], task="npee/qa")
    page, key = made
    for command, said in [
        (["make", runs[0], other, "--out", tmp_path / "new.html"], "have no answer to an open question in common"),
        (["make", *runs, "--tasks", "npee/qa", "--out", tmp_path / "new.html"], "in common (--tasks)"),
        (["make", *runs, "--out", tmp_path / "new.htm", "--sample", 0], "--sample must be at least 1"),
        (["make", *runs, "--out", tmp_path / "new.txt"], "a page's name ends in .html"),
        (["make", *runs, "--out", runs[0] / "new.html"], "which is an input"),
        (["make", *runs, "--out", page], "exists already"),
    ]:
        status, out, err = run("rate", *command)
        assert (status, out) == (2, "")
        assert said in err
        assert not [*tmp_path.glob("new*")]
    file = write_csv(tmp_path / "anna.csv", key, "anna", lambda *_: 2)
    write_run(runs[1], ["evaluated anew"] * 8)
    status, _, err = run("rate", "read", file)
    assert (status, f"{runs[1]} no longer has the answer that item" in err) == (2, True)
    assert not [*runs[0].glob("scores_*")], "none is written where one can't be"
    file.write_text("page,rater,item,aspect,value\r\n")
    assert "there is no rating in them" in run("rate", "read", file)[2]
    file.write_text('page,rater,item,aspect,value\r\n"a"b\r\n')
    assert "is no file of ratings: ',' expected after" in run("rate", "read", file)[2]
    file.write_text("")
    assert "line 1: it is no file of ratings" in run("rate", "read", file)[2]
    write_csv(file, key, "anna", lambda *_: 2)
    whole = (tmp_path / "page.key.json").read_text()
    for content in ("[]", "", whole[:-9], whole.replace('"runs": [0]', '"runs": [1]', 1), whole + whole):
        (tmp_path / "page.key.json").write_text(content)
        status, _, err = run("rate", "read", file, "--key", tmp_path / "page.key.json")
        assert (status, "is no key of k2mini rate make, or not as it was written" in err) == (2, True)
    assert "whose key (NAME.key.json) is not in" in run("rate", "read", file)[2]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Call to open a page without network; what the console says, and what is asked of elsewhere, fails the test."""
    said, contexts = [], []

    def visit(file, **settings):
        context = browser.new_context(offline=True, **settings)
        contexts.append(context)
        context.set_default_timeout(8000)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or said.append(asked.url))
        page.goto(file.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []


def test_one_file_under_two_names_is_pointed_out(made, tmp_path, run):
    files = [
        write_csv(tmp_path / f"{name}.csv", made[1], name, lambda item, _, value=value: value if item == "1A" else 2)
        for name, value in (("anna", 3), ("ben", 3), ("cy", 1))
    ]
    status, _, err = run("rate", "read", *files)
    assert (status, err.count("gave the same to everything")) == (0, 1)
    assert "anna and ben gave the same to everything: are they one person, or one a copy?" in err


def name(page, rater="anna"):
    page.locator("#rater").fill(rater)
    page.keyboard.press("Enter")


def pressed(page):
    return page.locator("#answers button[aria-pressed=true]").evaluate_all("all => all.map((b) => b.innerText[0])")


def test_a_rater_with_a_keyboard(made, visit, tmp_path, run):
    """All questions by keys alone, over a reload; the exported file is what `rate read` takes."""
    file, key = made
    page = visit(file, accept_downloads=True)
    number = len(data_of(file)["questions"][0]["answers"]) * 3
    for odd in ("", "  ", "=1+1", " @x"):
        name(page, odd)
        assert not page.locator("#asked").is_visible(), "no question before a name"
    page.keyboard.press("Control+a")
    page.keyboard.type('12 "Ärger", r')  # into the field, which has the focus
    page.locator("#begin").click()
    page.keyboard.type("21")
    assert pressed(page) == ["2", "1"]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("0")  # takes the second back
    assert pressed(page) == ["2"]
    page.keyboard.press("r")
    assert page.locator("#reference .said").inner_text().startswith("Rock ")
    page.reload()
    assert pressed(page) == ["2"], "it survives a reload"
    page.keyboard.type("3" * (number - 1))
    page.keyboard.press("Enter")  # the button to the next question has the focus
    assert page.locator("#where").inner_text() == "Question 2 of 8 · npee/noun"
    assert page.locator("#count").inner_text() == "1 of 8 questions rated"
    for _ in range(7):
        for _ in range(6):
            if page.locator(".row:has(button):not(:has([aria-pressed=true]))").count():
                page.keyboard.press("1")
        page.keyboard.press("ArrowRight")
    assert "All questions are rated" in page.locator("#said").inner_text()
    with page.expect_download() as download:
        page.locator("#export").click()
    download.value.save_as(tmp_path / "export.csv")
    assert download.value.suggested_filename == f"ratings_{key['page']}_12-Ärger-r.csv"
    status, out, err = run("rate", "read", tmp_path / "export.csv", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["raters"], found["given"]) == (['12 "Ärger", r'], 1)
    counts = [entry["n"] for aspect in found["aspects"] for entry in aspect["runs"]]
    assert counts == [8] * 6
    with (tmp_path / "export.csv").open(newline="") as rows:
        values = [row["value"] for row in csv.DictReader(rows)]
    assert values == ["2"] + ["3"] * (number - 1) + ["1"] * (45 - number)


def test_the_page_is_inert_and_fits(made, visit):
    """Markup in answers is text; nothing is wider than a narrow screen; letters are larger than a fingertip's error."""
    for scheme in ("light", "dark"):
        page = visit(made[0], color_scheme=scheme, viewport={"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        name(page, "A rather long name of 42 letters and spaces")
        assert NASTY in page.locator(".answer .said").first.inner_text()
        assert page.evaluate("[window.hacked ?? 0, document.documentElement.scrollWidth]") == [0, 360]
        assert page.locator(".row button").first.bounding_box()["height"] >= 44
        assert page.locator(".row", has_text="Scientificity").first.is_visible()
        page.locator("#map button").nth(4).click()
        assert page.locator("#where").inner_text().startswith("Question 5 of 8")


def test_ratings_in_another_tab_are_kept(made, visit):
    page = visit(made[0])
    name(page)
    other = page.context.new_page()
    other.goto(made[0].as_uri())
    name(other)
    other.keyboard.press("1")
    page.locator("#answers button[aria-pressed=true]").first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("2")
    page.reload()
    assert pressed(page) == ["1", "2"]


def test_two_raters_in_one_browser(made, visit):
    """Neither sees what the other gave, in one tab or in another; both go on where they stopped."""
    page = visit(made[0])
    name(page)
    page.keyboard.type("123")
    page.locator("#begin").click()
    assert not page.locator("#answers").is_visible()
    page.keyboard.type("3")  # into the field
    name(page, "ben")
    assert pressed(page) == []
    page.keyboard.press("2")
    page.keyboard.press("ArrowRight")
    page.reload()
    assert page.locator("#rater").input_value() == "ben"
    assert page.locator("#where").inner_text().startswith("Question 2 of 8")
    other = page.context.new_page()
    other.goto(made[0].as_uri())
    assert not other.locator("#answers").is_visible()
    name(other)
    assert pressed(other) == ["1", "2", "3"]
