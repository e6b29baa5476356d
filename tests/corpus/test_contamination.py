"""Benchmarks in documents: what is found, what is cut, what is no find; GeoBench's own questions, all of them."""

import json
import pickle
import random
import re

import pytest

from k2mini.corpus.contamination import Benchmarks
from k2mini.corpus.document import Document
from k2mini.corpus.ngrams import hash_ngrams, hash_words, words
from tests.conftest import asset

LONG = "Which of the layers of the atmosphere that lie above the ground holds most of its ozone and why?"
MIDDLE = "Name the layer that holds the ozone"
SHORT = "Ozone holds on tightly"
TERM = "Clark value"
ANSWER = "It is the layer between ten and fifty kilometres, since sunlight makes it there out of oxygen."
BEFORE = "The first paragraph says something else, and it has a good many more words than a cell of a table has."
AFTER = "So does the last one of them, which is as long as a sentence of a paper mostly is, or longer."


@pytest.fixture
def benchmarks(tmp_path):
    entries = [{"question": text, "answer": ANSWER if text == LONG else "B"} for text in (LONG, MIDDLE, SHORT, TERM)]
    (tmp_path / "ozone.json").write_text(json.dumps(entries))
    return Benchmarks([tmp_path / "ozone.json"])


def test_words_and_their_hashes():
    assert words("Straße, U-SHAPED_valley: 3.5\u00a0µm ﬁne so\u00adft ①") == (
        ["strasse", "u", "shaped", "valley", "3", "5", "μm", "fine", "soft", "1"]
    )
    found = [f"w{n % 7}" for n in range(20)]
    hashes, runs = hash_ngrams(hash_words(found), 3), [tuple(found[n : n + 3]) for n in range(18)]
    assert [hashes.tolist().index(one) for one in hashes] == [runs.index(run) for run in runs]
    assert hash_ngrams(hash_words(["granite", "basalt"]), 2).tolist() == [3870447646112263441], "pinned"
    assert (len(hash_ngrams(hash_words([]), 13)), len(hash_ngrams(hash_words(["a"]), 2))) == (0, 0)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f"Text. {LONG} Text.", "0/question: 'which of the layers of the atmosphere that lie above the ground holds'"),
        (
            "all the ATMOSPHERE that  lie above\nthe ground — holds most of its ozone, and why",
            "0/question: 'the atmosphere that lie above the",
        ),
        (
            "atmosphere that lie above\n\nthe ground holds most of its ozone and why",
            "0/question: 'atmosphere that lie above the ground",
        ),
        (
            f"He wrote: {ANSWER[3:]}",
            "0/answer: 'is the layer between ten and fifty kilometres since sunlight makes it there'",
        ),
        (f"Say: {MIDDLE.upper()} in the sky", "1/question: 'name the layer that holds the ozone'"),
        (f"{BEFORE} {SHORT}. {AFTER}", "2/question: 'ozone holds on tightly'"),
        (f"{BEFORE}\n\n{SHORT}\n\n{AFTER}", "2/question: 'ozone holds on tightly'"),
        (f"{BEFORE}\n\nCLARK  value:\n\n{AFTER}", "3/question: 'clark value'"),
    ],
)
def test_what_is_found(benchmarks, text, place):
    found = pickle.loads(pickle.dumps(benchmarks)).clean(document := Document(text), cut=False)
    assert len(found) == 1
    assert found[0].startswith(f"ozone.json, {place}")
    assert (document == Document(text)) == ("'clark value'" not in found[0])  # a term is cut


@pytest.mark.parametrize(
    "text",
    [
        "",
        BEFORE,
        "all that lie above the ground holds most of its ozone and why",  # twelve words of a longer question
        "Name the layer that holds",
        "They name the layers that hold the ozone.",
        "As ozone holds on tightly here, it stays.",
        "The Clark value is a mean. A Clark value. Clark value.",
        "## Clark value\n\nis a mean",
        "Name\n\nClark value\n\nMean",
        "- Clark value\n- mean\n\n- Clark value\n\n| Clark value |\n\n# Ozone holds on tightly",
        "B",
    ],
)
def test_what_is_not(benchmarks, text):
    assert benchmarks.clean(Document(text), cut=False) == []


def test_what_is_cut(benchmarks):
    document = Document(
        f"{BEFORE}\n\nText. {LONG}\n \n{AFTER}\n\nThat lies between ten and fifty kilometres,\n\n"
        f"since sunlight makes it there out of oxygen.\n\n{AFTER}",
        title="Ozone",
        abstract=f"We ask: {MIDDLE}",
        figures=[{"label": "Figure 1", "caption": MIDDLE}, {"label": "Figure 2", "caption": ""}],
        citations=[{"sentence": LONG, "title": "A"}, {"sentence": "Ozone is old.", "title": "B"}],
    )
    found = benchmarks.clean(document, cut=True)
    assert [one.split(":")[0] for one in found] == [
        f"ozone.json, {n}" for n in ("0/question", "0/answer", "1/question")
    ]
    assert document == Document(
        f"{BEFORE}\n\n{AFTER}\n\n{AFTER}",
        title="Ozone",
        figures=[{"label": "Figure 2", "caption": ""}],
        citations=[{"sentence": "Ozone is old.", "title": "B"}],
    )
    assert benchmarks.clean(document, cut=True) == []


def test_a_term_alone_costs_no_document(benchmarks):
    """It is cut, as `cut` would, unless something longer is found as well."""
    document = Document(f"{BEFORE}\n\n{TERM}\n\n{AFTER}")
    assert benchmarks.clean(document, cut=False) == ["ozone.json, 3/question: 'clark value'"]
    assert document.text == f"{BEFORE}\n\n{AFTER}"
    document = Document(text := f"{BEFORE}\n\n{TERM}\n\n{AFTER} {MIDDLE}")
    assert len(benchmarks.clean(document, cut=False)) == 2
    assert document.text == text


def test_terms_among_short_paragraphs(tmp_path):
    """What is left of a table may have two; a list of a benchmark's questions has more."""
    terms = ["rank", "layer", "Clark value", "fault"]
    (tmp_path / "terms.json").write_text(json.dumps(terms))
    benchmarks = Benchmarks([tmp_path / "terms.json"])
    for count, expected in ((2, 0), (3, 3), (4, 4)):
        text = "\n\n".join(["Name", *terms[:count], terms[0], "Place"])
        assert len(benchmarks.clean(Document(text), cut=False)) == expected
    assert len(benchmarks.clean(Document("Rank"), cut=False)) == 1
    assert benchmarks.clean(Document("A text.", title="Rank"), cut=False) == []


def test_a_document_is_searched_beside_its_text_too(benchmarks):
    for held in ({"abstract": MIDDLE}, {"title": MIDDLE}, {"figures": [{"label": "Figure 1", "caption": MIDDLE}]}):
        assert len(benchmarks.clean(Document("Text.", **held), cut=False)) == 1


def test_what_many_questions_have_in_common(tmp_path):
    """A run of 13 words in more than ten texts is nobody's; in ten it is."""
    head = "Identify the choice that best completes the statement or answers the question below"
    for count, expected in ((10, 1), (11, 0)):
        lines = [json.dumps({"question": f"{head} x{n} y{n} z{n}"}) for n in range(count)]
        (tmp_path / "many.jsonl").write_text("\n".join(lines) + "\n")
        benchmarks = Benchmarks([tmp_path / "many.jsonl"])
        assert len(benchmarks.clean(Document(f"{head}."), cut=False)) == expected
        assert benchmarks.clean(Document(f"{head} x3 y3 z3."), cut=False)[-1].startswith("many.jsonl, 3/question: ")


def test_a_question_is_looked_for_however_often_it_stands_there(tmp_path):
    """In as many records, as MMLU's passages do, or within other questions."""
    for name, texts in (("same", [LONG] * 11), ("within", [LONG, *(f"{LONG} {n} {n} {n}" for n in range(11))])):
        (tmp_path / f"{name}.json").write_text(json.dumps(texts))
        benchmarks = Benchmarks([tmp_path / f"{name}.json"])
        assert benchmarks.clean(Document(f"Text. {LONG} Text."), cut=False)[0].startswith(f"{name}.json, 0: "), name


def test_layouts(tmp_path):
    """Lists, tables, fields within fields; what is asked is what a field of that name has."""
    contents = {
        "list.json": json.dumps([MIDDLE]),
        "deep.json": json.dumps({"part": [{"id": 1, "question": {"stem": MIDDLE, "choices": [{"text": "A"}]}}]}),
        "columns.json": json.dumps({"question": [MIDDLE, SHORT], "answer": ["it is the layer of air", 3, None]}),
        "table.csv": f'question,answer\n"{MIDDLE}",it is the layer of air\n"a, b",,surplus\n',
        "table.TSV": f"answer\tstem\nit is the layer of air\t{MIDDLE}\n",
        "lines.jsonl": json.dumps({"prompt": MIDDLE}) + "\n\n" + json.dumps({"prompt": SHORT}),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        benchmarks = Benchmarks([tmp_path / name])
        assert len(benchmarks.clean(Document(f"Say: {MIDDLE}."), cut=False)) == 1, name
        assert benchmarks.clean(Document("I think it is the layer of air."), cut=False) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("b.json", "{}", "b.json has no question: no text in a field named question, questions, stem"),
        ("b.json", '[{"text": "one"}]', "has no question"),
        ("b.json", "{", "b.json is not valid JSON"),
        ("b.jsonl", '{"question": "a"}\n{', "b.jsonl, line 2 is not valid JSON"),
        ("b.csv", "question\n" + "x" * 200_000, "b.csv: field larger than field limit"),
        ("b.txt", "one", "b.txt: benchmarks are read from .json, .jsonl, .csv and .tsv"),
    ],
)
def test_files_that_are_no_benchmarks(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        Benchmarks([tmp_path / name])


@pytest.fixture(scope="module")
def published(geobench):
    """GeoBench, and its questions that have a word: all of NPEE, and of AP."""
    npee, ap = (json.loads(path.read_text()) for path in geobench.values())
    stems = [entry["question"]["stem"] for entry in ap if words(entry["question"]["stem"])]
    return Benchmarks([*geobench.values()]), [text for task in npee.values() for text in task["question"]], stems


@pytest.fixture(scope="module")
def clean_texts():
    """What K2's instruction data ask and answer, record by record."""
    entries = json.loads(asset("data", "instructions", "arc_sft.json").read_text())
    return [" ".join(entry.values()) for entry in entries]


def test_every_planted_question_of_geobench_is_found(published, clean_texts):
    """As published within a paragraph, those of six words and more; with case and spaces changed as one."""
    benchmarks, npee, ap = published
    rng = random.Random(0)
    planted = npee + rng.sample(ap, 200)
    assert len(planted) == 1608
    for question in planted:
        before, after = rng.sample(clean_texts, 2)
        changed = "".join(rng.choice((one.upper(), one.lower())) for one in question)
        changed = re.sub(r"\s+", lambda _: rng.choice((" ", "  ", "\t", " \n", "\u00a0")), changed)
        assert benchmarks.clean(Document(f"{before}\n\n{changed}\n\n{after}"), cut=False), question
        if len(words(question)) >= 6:
            assert benchmarks.clean(Document(f"{before} {question} {after}"), cut=False), question


def test_clean_texts_are_not_found(published, clean_texts):
    """2,000 records of ARC, questions on science of another source."""
    benchmarks, _, _ = published
    checked = random.Random(0).sample(clean_texts, 2000)
    assert [text for text in checked if benchmarks.clean(Document(text), cut=False)] == []
