"""Instructions out of documents and tables: each answer is looked up again, by other code, where its record says."""

import csv
import hashlib
import json
import re
import shutil
import tracemalloc
from collections import Counter

import pytest

from k2mini.corpus.document import Document
from k2mini.corpus.shards import FORMAT, MANIFEST, read_corpus
from k2mini.corpus.signals import DROPPED, TASKS, Settings, Signals, is_held_out
from k2mini.corpus.signals_texts import stated
from k2mini.data.instructions import read_records
from k2mini.demo.world import TABLES, world_files
from k2mini.evaluation.benchmarks import check_keys, read_benchmark

BASALT = """# Basalt of the ridge

## Abstract

We describe lava that rose at a ridge.

## 1 Introduction

Basalt is a dark rock that forms where lava cools at the surface. This is a claim that nobody disputes. Peridotite was
mapped by others (Hess, 1962), who saw it in dredges. The sea floor spreads, and what rises there is young; what lies
far from the ridge is old, as the age of the sediment above it shows at every site that has been drilled so far.

```
# no heading in a program
```

## Results
As Fig. 1 shows, lava thins away from the ridge, with the exception of Figure 12 and its seamount.

Figure 1: Thickness of lava along the profile.

Table 2 lists the ages of the samples.

## References

- Hess (1962) History of ocean basins. Gabbro is a rock that is cited.
"""


def paper(number=0, text=BASALT, **known):
    given = {
        "title": "Basalt of the ridge",
        "source": f"papers/{number}.xml",
        "abstract": "We describe lava that rose at a ridge.",
        "keywords": ["basalt", "mid-ocean ridge"],
        "figures": [
            {"label": "Figure 1", "caption": "Thickness of lava along the profile."},
            {"label": "Figure 9", "caption": "Nobody refers to it."},
            {"label": "Table 2", "caption": "Ages of the samples."},
        ],
        "citations": [
            {"sentence": "Peridotite was\nmapped by others (Hess, 1962), who saw it in dredges.",
             "title": "History of ocean basins"},
            *({"sentence": "Two works are cited here.", "title": title} for title in ("One work", "Another")),
            {"sentence": "One work is named by this sentence.", "title": "One work"},
        ],
    }  # fmt: skip
    return Document(text, **given | known)


def write_corpus(folder, documents, shards=2):
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"documents-{number:05}.jsonl" for number in range(shards)]
    for number, name in enumerate(names):
        records = [document.record() for document in documents[number::shards]]
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    found = [{"name": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()} for name in names]
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "shards": found, "fingerprint": "0" * 64}))
    return folder


def write_tables(folder):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TABLES / "geoscience" / "minerals.csv", folder)
    (folder / "sites.csv").write_text(
        "Entity,property,value,note\n" + "".join(f'site {n},rock age,"{n % 7} Ma, or so",x\n' for n in range(28))
    )
    (folder / "terms.tsv").write_text(
        "term\tdefinition\tsynonym\tbroader\n"
        "fault\tA fracture along which rock has moved.\t rupture; break | slip plane\tstructure\n"
        "till\tSediment that ice laid down, till it melted.\t\tsediment\n"
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    return [write_corpus(folder / "corpus", [paper()]), write_tables(folder / "tables")]


def look_up(record, documents):
    """The text at a record's evidence, read with csv and the documents alone."""
    evidence, source = record["evidence"], record["source"]
    if source in documents:
        value = documents[source]
        for part in evidence["where"].split("."):
            value = value[int(part) if part.isdigit() else part]
        value = "; ".join(value) if isinstance(value, list) else value
    else:
        path, line = source.split(", line ")
        with open(path, newline="") as file:  # noqa: PTH123
            rows = list(csv.reader(file, delimiter="\t" if path.endswith("tsv") else ","))
        value = rows[int(line) - 1][rows[0].index(evidence["where"])].strip()
    assert 0 <= evidence["start"] < evidence["end"] <= len(value)
    return value[evidence["start"] : evidence["end"]]


def options(record):
    return dict(re.findall(r"^([A-D])\. (.*)$", record["instruction"].split("Choose from:\n\n")[1], re.MULTILINE))


def test_every_answer_stands_in_its_source(folders):
    signals = Signals(folders, Settings(held_out=0, most_per_document=99))
    found = Counter(record["task"] for record in signals.records)
    assert set(found) == set(TASKS)
    documents = {"papers/0.xml": paper().record()}
    for record in signals.records:
        assert list(record) == ["instruction", "input", "output", "task", "source", "evidence"]
        stands = look_up(record, documents)
        if record["task"] == "choice":
            assert options(record)[record["output"]] == stands
        elif record["task"] == "true_false":
            said = record["instruction"].removeprefix("True or false?\n")
            noun = record["evidence"]["where"].replace("_", " ").replace("value", "rock age")
            assert noun in said
            assert record["output"] == str(said.endswith((f" is {stands}.", f" {noun} {stands}."))), record
        else:
            assert record["output"] == stands
    by_task = {task: [r for r in signals.records if r["task"] == task] for task in TASKS}
    assert [r["output"] for r in by_task["title"]] == ["Basalt of the ridge"]
    assert [r["output"] for r in by_task["keywords"]] == ["basalt; mid-ocean ridge"]
    assert [r["output"] for r in by_task["citation"]] == ["History of ocean basins"]
    assert {r["output"] for r in by_task["synonym"]} == {"rupture", "break", "slip plane"}
    assert {r["output"] for r in by_task["broader"]} == {"structure", "sediment"}
    assert {r["output"] for r in by_task["term"]} == {"Basalt", "fault"}  # till's definition names it
    assert {r["output"] for r in by_task["definition"]} == {
        "Basalt is a dark rock that forms where lava cools at the surface.",
        "A fracture along which rock has moved.",
        "Sediment that ice laid down, till it melted.",
    }
    assert {(r["input"], r["output"]) for r in by_task["figure"]} == {
        (
            f"Figure 1: {paper().figures[0]['caption']}",
            BASALT[BASALT.index("As Fig. 1") : BASALT.index("\n\nFigure 1:")],
        ),
        ("Table 2: Ages of the samples.", "Table 2 lists the ages of the samples."),
    }
    assert all(r["input"].split(":")[0] in r["instruction"] for r in by_task["figure"])
    assert {(r["output"], r["input"]) for r in by_task["caption"]} == {
        (r["input"].split(": ", 1)[1], r["output"]) for r in by_task["figure"]
    }
    (section,) = by_task["section"]  # the others are short
    assert section["input"] == "Basalt of the ridge: 1 Introduction"
    assert section["output"].startswith("Basalt is a dark rock")
    assert section["output"].endswith("# no heading in a program\n```")


def test_facts_are_asked_for_as_the_tables_state_them(folders):
    records = Signals(folders, Settings(("fact",), held_out=0, phrasings=4)).records
    with (folders[1] / "minerals.csv").open(newline="") as file:
        minerals = {row["name"]: row for row in csv.DictReader(file)}
    asked = Counter()
    for record in records:
        if "minerals" in record["source"]:
            (name,) = [
                n
                for n in minerals
                if f" {n.casefold()} " in re.sub(r"\W", " ", f" {record['instruction']} {record['input']} ").casefold()
            ]
            noun = record["evidence"]["where"]
            assert noun.replace("_", " ") in record["instruction"]
            assert minerals[name][noun] == record["output"]
            asked[name, noun] += 1
        else:
            assert re.search(r"rock age", record["instruction"])
            number = int(re.search(r"ite (\d+)", record["instruction"] + record["input"])[1])
            assert record["output"] == f"{number % 7} Ma, or so"
    assert set(asked) == {(name, noun) for name in minerals for noun in next(iter(minerals.values())) if noun != "name"}
    assert max(asked.values()) <= 4
    assert sum(asked.values()) > 2 * len(asked)
    assert len({record["instruction"].split(" ")[0] for record in records}) >= 4


def test_the_seed_decides_and_the_order_of_documents_does_not(tmp_path):
    documents = [paper(n, BASALT.replace("young", f"young {n}"), title=f"Basalt, part {n}") for n in range(12)]
    folders = [write_corpus(tmp_path / "a", documents), write_tables(tmp_path / "tables")]
    other = [write_corpus(tmp_path / "b", documents[::-1], 3), folders[1]]
    caps = {"most_per_task": 5, "most_per_document": 3}
    one, same, mixed = (Signals(given, Settings(**caps)) for given in (folders, folders, other))
    assert json.dumps(one.records) == json.dumps(same.records)
    key = ("instruction", "input", "output")
    assert [[r[k] for k in key] for r in one.records] == [[r[k] for k in key] for r in mixed.records]
    assert one.records != Signals(folders, Settings(seed=1, **caps)).records
    assert one.questions("seen") == same.questions("seen") != Signals(folders, Settings(seed=1)).questions("seen")


def test_caps_hold_and_what_they_drop_is_counted(tmp_path):
    documents = [paper(n, BASALT.replace("young", f"young {n}"), title=f"Basalt, part {n}") for n in range(12)]
    folders = [write_corpus(tmp_path / "a", documents), write_tables(tmp_path / "tables")]
    free = Signals(folders, Settings(held_out=0, most_per_document=99))
    found = Counter(record["task"] for record in free.records)
    capped = Signals(folders, Settings(held_out=0, most_per_task=7, most_per_document=4))
    kept = Counter(record["task"] for record in capped.records)
    assert max(kept.values()) == 7
    assert kept["choice"] == 4
    assert kept["true_false"] == 6
    alone = write_corpus(tmp_path / "alone", documents[:1])  # each task in turn
    one_each = [record["task"] for record in Signals([alone], Settings(most_per_document=9)).records]
    assert sorted(one_each) == sorted(TASKS[:9])
    for_each = Counter(r["source"] for r in capped.records if r["source"].startswith("papers"))
    assert max(for_each.values()) <= 4
    for task, counts in capped.counts.items():
        every = free.counts[task]
        lost = counts["over the caps"] + counts["alike"] + counts["no distractors"]
        assert kept[task] + lost == found[task] + every["alike"] + every["no distractors"], task


def test_no_two_records_are_alike(tmp_path):
    text = BASALT.replace("young", "new")
    write_corpus(tmp_path / "a", [paper(0), paper(1), paper(2, text)])
    for name in ("one", "two"):
        write_tables(tmp_path / name)
    with (tmp_path / "two" / "minerals.csv").open("a") as file:
        file.write("Quartz,SiO2,7,trigonal,glassy\nQUARTZ,SiO2,7,trigonal,greasy\n")
    signals = Signals([tmp_path / "a", tmp_path / "one", tmp_path / "two"], Settings(held_out=0, phrasings=6))
    texts = [(r["instruction"], r["input"], r["output"]) for r in signals.records]
    assert len(set(texts)) == len(texts)
    assert len({tuple(part.casefold() for part in text) for text in texts}) >= len(texts) - 3  # Quartz, QUARTZ
    assert signals.counts["abstract"] == dict.fromkeys(DROPPED, 0) | {"alike": 2}
    # Quartz has three lustres: none of them is a wrong option for it, none is said of it to be false.
    for record in signals.records:
        if "uartz " in record["instruction"] and "lustre" in record["instruction"]:
            if record["task"] == "choice":
                wrong = {text for letter, text in options(record).items() if letter != record["output"]}
                assert not wrong & {"vitreous", "glassy", "greasy"}
            if record["output"] == "False":
                assert not re.search("vitreous|glassy|greasy", record["instruction"])


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_entities_are_in_no_record(tmp_path, seed):
    with (TABLES / "geoscience" / "minerals.csv").open(newline="") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    held = {name for name in names if is_held_out(name, 30, seed)}
    assert 0.15 * len(names) < len(held) < 0.45 * len(names)
    assert all(is_held_out(f" {name.upper()} ", 30, seed) for name in held)
    assert held <= {name for name in names if is_held_out(name, 60, seed)}
    sentences = [
        f"{name.upper()}  is a mineral that we\nfind, as is {name}-like matter of kind {n}."
        for n, name in enumerate(names)
    ]
    documents = [
        paper(n, f"## Minerals\n\n{sentence} {'It grows. ' * 30}", abstract=sentence, title=f"On stone {n}")
        for n, sentence in enumerate(sentences)
    ]
    folders = [write_corpus(tmp_path / "corpus", documents), TABLES / "geoscience"]
    signals = Signals(folders, Settings(held_out=30, seed=seed))
    everywhere = {row["name"] for path in (TABLES / "geoscience").glob("*.csv")
                  for row in csv.DictReader(path.open(newline="")) if is_held_out(row["name"], 30, seed)}  # fmt: skip
    found = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, everywhere))})(?!\w)", re.IGNORECASE)
    for record in signals.records:
        assert not any(found.search(record[field]) for field in ("instruction", "input", "output")), record
    told = " ".join(record["input"] for record in signals.records if record["task"] == "title").casefold()
    assert all(
        (name.casefold() in told) == (name not in everywhere) for name in ("quartz", "calcite", "topaz", "galena")
    )
    assert signals.counts["title"]["held out"] >= len(held)
    assert {fact.name for fact in signals.unseen} == everywhere
    for name, part in (("seen", signals.seen), ("unseen", signals.unseen)):
        asked = signals.questions(name)
        own = {fact.name.casefold() for fact in part}
        for text in asked["choice"]["question"] + asked["tf"]["question"]:
            assert any(word in text.split("\n")[0].casefold() for word in own)
            assert name == "unseen" or not found.search(text)


def test_seen_questions_ask_for_what_a_record_states(tmp_path):
    (tmp_path / "t.csv").write_text("name,a\n" + "".join(f"m{n},{n % 7}\n" for n in range(400)))
    for task in ("fact", "choice", "true_false"):
        signals = Signals([tmp_path], Settings((task,), held_out=0, most_per_task=60))
        records = [r for r in signals.records if r["output"] != "False"]
        told = {re.search(r"[mM]\d+", r["instruction"] + r["input"])[0].casefold() for r in records}
        assert {fact.name for fact in signals.seen} == told
        asked = [re.search(r"[mM]\d+", text)[0] for text in signals.questions("seen")["choice"]["question"]]
        assert {name.casefold() for name in asked} <= told


def test_names_are_found_between_word_boundaries_only(tmp_path):
    from k2mini.corpus.signals import mentions

    said = mentions(["Mauna Loa", "opal", "(Fe,Mg)-spinel", "K'iche'"])
    yes = ["OPAL", "an opal.", "opal-like", "at mauna\n  loa", "x (fe,mg)-spinel y", "the K'iche' say", "Opal's"]
    no = ["opaline", "copal", "Mauna Kea", "mauna loam", "fe,mg", "K'iche", "opal_2", ""]
    assert [text for text in yes if not said(text)] == []
    assert [text for text in no if said(text)] == []
    assert not mentions([])("anything")
    said = mentions(["\u00d6r\u00e6faj\u00f6kull volcano", "opal", "mid-ocean ridge"])
    yes = ["O\u0308r\u00e6fajo\u0308kull\u00a0volcano", "two \u00d6r\u00e6faj\u00f6kull volcanoes", "Opals", "opal's"]
    yes += ["Mid\u2010Ocean Ridge", "mid\u2011ocean ridges", "MID\u2013OCEAN RIDGE", "mid-oce\u00adan ridge"]
    no = ["opalses", "opales-", "opalsx", "mid-ocean ridged"]
    assert [text for text in yes if not said(text)] == []
    assert [text for text in no if said(text)] == ["opales-"]
    assert is_held_out("\u00d6r\u00e6fa", 50, 3) == is_held_out("O\u0308r\u00e6fa", 50, 3)


def test_a_number_of_names_takes_no_square_of_it():
    """Names that share their first word: all of them for each text would take minutes."""
    from k2mini.corpus.signals import mentions

    found = mentions([f"site {n}" for n in range(30000)])
    assert sum(bool(found(f"at Site {n}.")) for n in range(60000)) == 30000


@pytest.mark.parametrize("domain", ["geoscience", "general"])
def test_choices_and_statements_give_nothing_away(domain):
    """Whoever takes the first option, the longest or the commonest for the answer does no better than chance."""
    folder = TABLES / domain
    values = {}
    for path in folder.glob("*.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for column, value in row.items():
                    values.setdefault(column, Counter())[value] += 1
    guesses = {
        "first": lambda texts: texts[0],
        "longest": lambda texts: max(texts, key=len),
        "longest, or the last of them": lambda texts: max(texts[::-1], key=len),
        "commonest": lambda texts: max(texts, key=lambda text: sum(count[text] for count in values.values())),
        "anything": lambda texts: min(texts, key=lambda text: hashlib.sha256(text.encode()).digest()),
    }
    for seed in range(3):
        signals = Signals([folder], Settings(("choice", "true_false"), seed=seed, held_out=40))
        for content in (signals.records, signals.questions("seen"), signals.questions("unseen")):
            if isinstance(content, list):
                asked = [(options(r), r["output"]) for r in content if r["task"] == "choice"]
                words = [(r["instruction"], r["output"]) for r in content if r["task"] == "true_false"]
            else:
                choice = content["choice"]
                asked = [
                    (options({"instruction": q}), a) for q, a in zip(choice["question"], choice["answer"], strict=True)
                ]
                words = list(zip(content["tf"]["question"], content["tf"]["answer"], strict=True))
            assert len(asked) > 60
            assert len({*Counter(label for _, label in asked).values()}) == 1  # each letter is right equally often
            assert [word for _, word in words].count("True") * 2 == len(words) > 60
            ends = Counter((text.rstrip(".").split()[-1], word) for text, word in words)
            if isinstance(content, list):  # where the value ends the sentence, it is as often true as false
                assert all(abs(ends[end, "True"] - ends[end, "False"]) <= 1 for end, _ in ends)
            assert all(len(set(given.values())) == 4 for given, _ in asked)
            for how, guess in guesses.items():  # not within 3 %, but exactly
                right = sum(guess(list(given.values())) == given[label] for given, label in asked)
                assert right * 4 == len(asked), how


def test_an_answer_that_most_facts_share_is_not_asked_more_often(tmp_path):
    rows = [f"rock {n},{'igneous' if n % 10 < 7 else f'kind {n % 13}'}" for n in range(400)]
    (tmp_path / "rocks.csv").write_text("name,class\n" + "\n".join(rows) + "\n")
    signals = Signals([tmp_path], Settings(("choice",), held_out=0))
    asked = [(options(record), options(record)[record["output"]]) for record in signals.records]
    having = [answer for given, answer in asked if "igneous" in given.values()]
    assert len(having) > 40
    assert having.count("igneous") * 4 == len(having)
    assert signals.counts["choice"]["no distractors"] == 400 - len(asked)


def test_finetune_and_eval_read_what_is_written(folders, tmp_path, run):
    out, asked = tmp_path / "geosignal.json", tmp_path / "asked.json"
    status, printed, err = run("signals", *folders, "--out", out, "--questions", asked, "--held-out", 30, "--json")
    assert status == 0, err
    records = json.loads(out.read_text())
    counts = json.loads(printed)
    assert [len(read_records(out)), sum(task["records"] for task in counts.values())] == [len(records)] * 2
    assert f"k2mini: choice: {counts['choice']['records']} records, " in err
    assert "held out" in err
    assert {*counts["title"]} == {"records", "over the caps", "held out", "alike", "several answers", "no distractors"}
    trained = {record["instruction"].split("\n")[0] for record in records} | {
        r["instruction"].split("\n")[-1] for r in records
    }
    for name in ("seen", "unseen"):
        questions = read_benchmark(tmp_path / f"asked_{name}.json")
        assert {question.task for question in questions} == {"npee/choice", "npee/tf"}
        for task in ("npee/choice", "npee/tf"):
            check = check_keys([question for question in questions if question.task == task])
            assert (check.surplus, check.conflicting, check.impossible) == ([], [], [])
        assert not {question.stem for question in questions} & trained
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = ("signals", *folders, "--out", out, "--questions", asked, "--held-out", 30)
    status, _, err = run(*again)
    assert (status, {path: path.read_bytes() for path in tmp_path.iterdir()}) == (2, before)
    assert "exists already" in err
    assert run(*again, "--force")[:2] == (0, f"{out}\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_answer_begins_as_eval_is_told(folders):
    signals = Signals(folders, Settings(answer_prefix="Answer: ", held_out=0))
    for record in signals.records:
        assert record["output"].startswith("Answer: ") == (record["task"] in ("fact", "true_false", "choice"))
        if record["task"] == "fact":
            assert look_up(record, {}) == record["output"].removeprefix("Answer: ")


@pytest.mark.parametrize(
    ("sentence", "term"),
    [
        ("Quartz is a mineral composed of silicon and oxygen.", "Quartz"),
        ("A moraine is a ridge of rock that a glacier leaves.", "moraine"),
        ("An oxbow lake is a lake that forms where a river leaves a bend.", "oxbow lake"),
        ("Mount Etna is a volcano in Sicily that erupts often.", "Mount Etna"),
        ("Basalt is a dark rock that forms at approx. 1200 degrees in the crust.", None),
        ("Moho is a boundary that was found by A. Mohorovicic in 1909.", None),
        ("Andesite is a volcanic rock that is described by Gill et al. Andes have much.", None),
        ("Crater Lake is a lake in the U.S. state of Oregon.", None),
        ("Oil shale is a rock of which we know that St. Louis has much.", None),
        ("This is a mineral that we found in the north.", None),
        ("It is a mineral that we found in the north.", None),
        ("The rift is a valley that runs north for miles.", None),
        ("Our result is a map of the rocks in the north.", None),
        ("Erosion is a major problem of the farms in the valley.", None),
        ("Slope is a function, in our view, of rain and rock.", None),
        ("There is a mineral that contains lead in it.", None),
        ("Water is a thing.", None),
        ("The aim is a map that shows all faults of the region.", None),
        ("Another mineral is a silicate that contains iron.", None),
        ("Basalt is a basalt that cools at the surface quickly.", None),
        ("Lava is a melt that cools (see Section 2) at the surface.", None),
        ("then quartz is a mineral that is not at the sentence's start.", None),
        ("What remains is a crust of salt that dries in the sun.", None),
    ],
)
def test_sentences_that_define(sentence, term):
    text = f"Rocks last. {sentence} They are old."
    found = {one.task: one for one in stated({"text": text})}
    assert found.get("term", [None] * 3)[2] == term
    if term:
        assert found["definition"].output == sentence
        assert term not in found["term"].input


def test_sections_are_cut_at_a_sentence_and_lists_are_left_out():
    long = "Rock is hard, as a long sentence of this section says. " * 60
    text = f"Before.\n# A title\n\nIntro {'x ' * 200}\n\n## Long\n\n{long}\n\n## Short\n\nToo short.\n\n"
    text += f"## 7. REFERENCES\n\n{long}"
    found = [one for one in stated({"text": text, "title": "A title"}) if one.task == "section"]
    (section,) = found
    assert section.input == "A title: Long"
    assert 1900 < len(section.output) <= 2000
    assert section.output.endswith("says.")
    assert text[section.start :].startswith(section.output)
    assert list(stated({"text": ""})) == []


def test_sections_do_not_end_in_an_abbreviation():
    for last in ("as Gill et al. ", "as A. ", "as vs. ", "in approx. "):
        text = "## Long\n\n" + "Rock is hard and old, it is said. " * 58 + last * 200
        (section,) = [one for one in stated({"text": text}) if one.task == "section"]
        assert section.output.endswith("it is said."), last


def test_long_documents_take_no_square_of_their_length():
    """Spaces after a heading's mark, and many figures: looked at anew for each, they would take minutes."""

    def figures(number):
        text = "".join(f"## S{n}\n\nFigure {n} shows a thing. {'word ' * 40}\n\n" for n in range(number))
        known = [{"label": f"Figure {n}", "caption": f"cap {n}"} for n in range(number)]
        return stated({"text": text, "title": "t", "figures": known})

    assert [*stated({"text": f"# {' ' * 100_000}\nx", "title": "t"})] == []
    assert len({one.start for one in figures(1500) if one.task == "figure"}) == 1500


def test_only_entities_of_facts_are_held_out_and_the_commonest_is_named(tmp_path, run):
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "a.csv").write_text("term,definition\n" + "".join(f"t{n},A thing of kind {n}.\n" for n in range(99)))
    assert Signals([tables], Settings(held_out=50)).counts["definition"]["held out"] == 0
    (tables / "b.csv").write_text("name,age\nin,7\niron,8\n")
    seed = next(seed for seed in range(99) if [is_held_out(n, 20, seed) for n in ("in", "iron")] == [True, False])
    corpus = write_corpus(tmp_path / "corpus", [paper(n, title=f"T{n}", abstract=f"Ore in {n}.") for n in range(9)])
    given = ("--seed", seed, "--held-out", 20, "--tasks", "title", "fact", "--out", tmp_path / "g.json")
    assert "k2mini: held out: in alone keeps out 9 records" in run("signals", corpus, tables, *given)[2]


def test_columns_of_glossaries_have_exact_names(tmp_path):
    (tmp_path / "t.csv").write_text(
        "name,definition_source,synonyms_count,Synonyms,broader_term\nquartz,USGS,3;4,rock crystal;silex,silicate\n"
    )
    records = Signals([tmp_path], Settings(held_out=0)).records
    said = {(r["task"], r["evidence"]["where"], r["output"]) for r in records}
    assert said == {("fact", "definition_source", "USGS"), ("fact", "synonyms_count", "3;4"),
        ("synonym", "Synonyms", "rock crystal"), ("synonym", "Synonyms", "silex"),
        ("broader", "broader_term", "silicate")}  # fmt: skip


def test_equal_values_are_one(tmp_path):
    (tmp_path / "t.csv").write_text(
        "name,hardness\n" + "".join(f"m{n},{v}\n" for n, v in enumerate(["7", "7.0", "7.00", "6", "6.0", "5", "4"]))
        + "m0,7.0\nn1,\u00e9tage\nn2,e\u0301tage\n", encoding="utf-8"
    )  # fmt: skip
    signals = Signals([tmp_path], Settings(("choice", "true_false", "fact"), held_out=0))
    kept = [record for record in signals.records if record["task"] == "choice"]
    assert kept
    for record in kept:
        values = [re.sub(r"\.0+", "", value).replace("e\u0301", "\u00e9") for value in options(record).values()]
        assert len(set(values)) == 4, record
    assert sum(record["task"] == "fact" for record in signals.records) == 9  # m0's 7.0 is no other value


def test_a_damaged_corpus_is_named(tmp_path, run):
    folder = write_corpus(tmp_path / "corpus", [paper(0), paper(1, "Other.")])
    shard = folder / "documents-00001.jsonl"
    for damage in (b"", b'{"text": "Other."}\n', shard.read_bytes()[:-30]):
        shard.write_bytes(damage)
        status, _, err = run("signals", folder, "--out", tmp_path / "g.json")
        assert (status, err.count("\n")) == (2, 1), err
        assert f"{shard} is not as {folder / MANIFEST} says; make the corpus again" in err
        assert not (tmp_path / "g.json").exists()


def test_a_large_corpus_is_not_held(tmp_path):
    documents = [paper(n, BASALT.replace("young", f"young {n}"), title=f"Basalt, part {n}") for n in range(400)]

    def peak(number):
        folder = write_corpus(tmp_path / f"{number}", documents[:number])
        tracemalloc.start()
        Signals([folder], Settings(most_per_task=15))
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is loaded once
    assert peak(400) < 1.2 * peak(60)


ERRORS = {
    "nothing here gives": ({"a.csv": "name,hardness\nquartz,7\n"}, ["--tasks", "title", "choice"],
        "nothing in IN gives a record of title, choice"),
    "unknown task": ({"a.csv": "name,hardness\nquartz,7\n"}, ["--tasks", "fact", "poem"],
        "--tasks: there is no task 'poem'; tasks are title, abstract, keywords, "),
    "no entity": ({"a.csv": "mineral,hardness\nquartz,7\n"}, [],
        "IN/a.csv has no column of entities (entity, name, term, or --entity COLUMN); its columns are ['mineral', 'ha"),
    "column twice": ({"a.csv": "name,x,x\nquartz,7,7\n"}, [], "IN/a.csv has a column twice; its columns are"),
    "no header": ({"a.csv": ",name,x\n0,quartz,7\n"}, [],
        "IN/a.csv has a column without a name; its columns are ['', 'n"),
    "no property": ({"a.csv": "name,property,value\nquartz,hardness,7\nquartz,,7\n"}, [],
        "IN/a.csv, line 3: property, which says what the row is about, is empty"),
    "ragged": ({"a.csv": "name,x\nquartz,7\nopal\n"}, [],
        "IN/a.csv, line 3 has 1 cells, the header has 2: ['name', 'x']"),
    "no name": ({"b/a.tsv": "term\tx\n -\t7\n"}, [],
        "IN/b/a.tsv, line 2: term, which says what the row is about, is empty"),
    "quotes": ({"a.csv": 'name,x\n"a"b,7\n'}, [], "IN/a.csv, line 2 is not valid CSV: "),
    "bytes": ({"a.csv": b"name,x\n\xff,7\n"}, [], "IN/a.csv is not UTF-8 (byte 7)"),
    "empty": ({"a.csv": ""}, [], "IN/a.csv has no column of entities"),
    "neither": ({"a.txt": "text"}, [], "IN is no folder with a corpus (corpus.json) or tables (.csv, .tsv)"),
    "other format": ({"corpus.json": "{}"}, [], "corpus.json: the format is not 'k2mini corpus 1'"),
    "percent": ({"a.csv": "name,x\na,7\n"}, ["--held-out", "100"],
        "--held-out must be at least 0 and below 100 percent, not 100"),
    "cap": ({"a.csv": "name,x\na,7\n"}, ["--most-per-task", "0"], "--most-per-task must be at least 1, not 0"),
    "no questions": ({"a.csv": "name,x\na,7\nb,8\n"}, ["--questions", "OUT/q.json", "--held-out", "0"],
        "--questions: no property has 4 values among the facts of seen entities (2 facts)"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_one_sentence(case, tmp_path, run):
    files, more, message = ERRORS[case]
    given, out = tmp_path / "in", tmp_path / "out"
    out.mkdir()
    for name, content in files.items():
        (given / name).parent.mkdir(parents=True, exist_ok=True)
        (given / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    more = [word.replace("OUT", str(out)) for word in more]
    status, printed, err = run("signals", given, "--out", out / "g.json", *more)
    assert (status, printed) == (2, "")
    assert err.startswith("k2mini: ")
    assert err.count("\n") == 1
    assert message.replace("IN", str(given)) in err
    assert list(out.iterdir()) == []


def test_other_mistakes_of_places(folders, tmp_path, run):
    assert "is no folder with" in run("signals", tmp_path / "none", "--out", tmp_path / "g.json")[2]
    assert "is inside" in run("signals", folders[1], "--out", folders[1] / "g.json")[2]
    assert "folder; name a file" in run("signals", folders[1], "--out", tmp_path)[2]
    files = ("--out", tmp_path / "q_seen.json", "--questions", tmp_path / "q.json")
    assert "q_seen.json is one of the files of --questions" in run("signals", folders[1], *files)[2]
    (tmp_path / "a.csv").write_text("mineral,mohs hardness\nquartz,7\n")
    (record,) = Signals([tmp_path], Settings(("fact",), entity="Mineral", held_out=0)).records
    assert record["output"] == "7"
    assert "mohs hardness" in record["instruction"]


def test_the_demos_data_are_what_its_figures_were_measured_on():
    """All that the README says of the demo rests on these draws."""
    sizes = {"copies": 2, "general": 500, "expert": 600, "questions": 50}
    found = [hashlib.sha256(json.dumps(world_files(seed, sizes)).encode()).hexdigest()[:16] for seed in (0, 1, 2)]
    assert found == ["5dfb9ce1e2455b35", "1827ab134e3174ff", "f30e810564706006"]


def test_a_property_with_several_values_is_not_asked_for(tmp_path):
    (tmp_path / "a.csv").write_text("name,lustre,hardness\nquartz,vitreous,7\nquartz,greasy,7.0\nopal,waxy,6\n")
    signals = Signals([tmp_path], Settings(("fact",), held_out=0))
    assert {record["output"] for record in signals.records} <= {"7", "7.0", "waxy", "6"}
    assert signals.counts["fact"]["several answers"] == 2


def test_the_evidence_tells_documents_of_one_name_apart(folders):
    (document,) = read_corpus(folders[0])
    assert {record["evidence"]["sha256"] for record in Signals(folders[:1], Settings()).records} == {document["sha256"]}
