import csv
import random
from collections import Counter
from pathlib import Path

import pytest

from k2mini.config import FinetuneConfig
from k2mini.config_file import load_config
from k2mini.demo.phrases import ANSWER, GENERAL, GEOSCIENCE, HELD_OUT_QUESTIONS
from k2mini.demo.sources import with_demo_files
from k2mini.demo.world import TABLES, choice_questions, documents, instructions, read_facts, world_files
from k2mini.evaluation.benchmarks import read_benchmark
from tests.conftest import ROOT

SIZES = {"copies": 2, "general": 50, "expert": 60, "questions": 20}


@pytest.mark.parametrize(("domain", "tables"), [("geoscience", GEOSCIENCE), ("general", GENERAL)])
def test_tables_are_clean(domain, tables):
    names = []
    for table, (_, properties) in tables.items():
        with (TABLES / domain / f"{table}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert set(rows[0]) == {"name", *properties}
        for row in rows:
            assert all(value and value == value.strip() and value.isascii() for value in row.values()), row
        names += [row["name"] for row in rows]
        for column in properties:
            values = Counter(row[column] for row in rows)
            assert len(values) >= 4, f"{table}.{column} has too few values for a four-way question"
            assert values.most_common(1)[0][1] <= 0.5 * len(rows), f"{table}.{column}"
    assert len(names) == len(set(names))


def test_the_seed_changes_the_split_and_the_order_not_the_facts():
    one, same, other = (world_files(seed, SIZES) for seed in (0, 0, 1))
    assert one == same
    assert one["corpus.jsonl"] != other["corpus.jsonl"]
    assert one["expert.json"] != other["expert.json"]
    facts = read_facts("geoscience")
    assert len(facts) > 440
    assert len({(fact.name, fact.key) for fact in facts}) == len(facts)


def test_stage_two_meets_half_of_the_entities_and_the_unseen_questions_are_on_the_rest():
    files = world_files(0, SIZES)
    facts = read_facts("geoscience")

    def entities(texts):
        text = " ".join(texts).lower()
        return {fact.name for fact in facts if f" {fact.name.lower()}" in f" {text}"}

    def stems(name):
        return [entry["question"]["stem"] for entry in files[f"questions_ap_{name}.json"]]

    asked = Counter()
    for record in world_files(0, {**SIZES, "expert": 3000})["expert.json"]:
        asked.update(entities([record["instruction"] + " " + record["input"]]))
    unseen = [max(entities([stem]), key=len) for stem in stems("unseen")]
    seen = [max(entities([stem]), key=len) for stem in stems("seen")]
    assert not any(name in {n for n, count in asked.items() if count > 0} for name in unseen if name.count(" ") == 0)
    assert all(asked[name] for name in seen)


def test_held_out_phrasings_stay_out_of_training():
    files = world_files(0, {**SIZES, "copies": 4, "expert": 2000})
    trained = {entry["text"] for entry in files["corpus.jsonl"]}
    assert not trained & {entry["text"] for entry in files["heldout_documents.jsonl"]}
    instructions_seen = {record["instruction"] for record in files["expert.json"] + files["general.json"]}
    for name in ("seen", "unseen"):
        assert not instructions_seen & {entry["question"]["stem"] for entry in files[f"questions_ap_{name}.json"]}


def test_questions_have_one_right_answer_and_fair_wrong_ones():
    facts = read_facts("geoscience")
    questions = choice_questions(facts, facts, len(facts), random.Random(0))
    assert len({question.stem for question in questions}) == len(facts)
    asked = {fact.say(frame): fact for fact in facts for frame in HELD_OUT_QUESTIONS}
    values = {}
    for fact in facts:
        values.setdefault(fact.key, set()).add(fact.value)
    for question in questions:
        assert len(set(question.options)) == 4
        fact = asked[question.stem]
        assert question.options[question.answer] == fact.value
        assert set(question.options) <= values[fact.key]
    # Somebody who always takes the commonest value of the property must not do much better than chance.
    counts = {}
    for fact in facts:
        counts.setdefault(fact.key, Counter())[fact.value] += 1
    correct = 0
    for question in questions:
        group = next(c for c in counts.values() if set(question.options) <= set(c))
        best = max(question.options, key=lambda option: (group[option], option))
        correct += best == question.options[question.answer]
    assert correct / len(questions) < 0.36


def test_layouts_are_geobenchs(tmp_path):
    import json

    from k2mini.evaluation.benchmarks import load_geobench

    asked = {fact.say(frame): fact.value for fact in read_facts("geoscience") for frame in HELD_OUT_QUESTIONS}
    for name, content in world_files(0, SIZES).items():
        if name.startswith("questions"):
            (tmp_path / name).write_text(json.dumps(content))
            questions = load_geobench(tmp_path / name)
            assert len(questions) == 20
            for question in questions:
                right = question.texts[question.labels.index(question.answer)]
                assert len(question.texts) == 4
                assert asked[question.stem] == right


def test_documents_and_instructions_state_facts():
    facts = read_facts("general")[:30]
    by_name = {}
    for fact in facts:
        by_name.setdefault(fact.name, []).append(fact.value)
    for text in documents(facts, 3, random.Random(0)) + documents(facts, 1, random.Random(0), held_out=True):
        name = next(n for n in by_name if n in text.lower())
        assert all(value in text for value in by_name[name])
    records = instructions(facts, 70, random.Random(0))
    assert len(records) == 70
    assert {record["output"] for record in records} == {ANSWER + fact.value for fact in facts}
    assert any(record["input"] for record in records)


def test_a_shipped_configuration_asks_the_demos_questions(tmp_path):
    path, overrides = ROOT / "configs/tiny_stage2.yaml", [f"run.dir={tmp_path}"]
    config = with_demo_files(load_config(FinetuneConfig, path, overrides))
    assert config.eval.every
    assert [len(read_benchmark(Path(file))) for file in config.eval.benchmark] == [100, 100]
    wrong = load_config(FinetuneConfig, path, [*overrides, "eval.benchmark=[demo:none.json]"])
    with pytest.raises(ValueError, match=r"demo:none\.json: the demo has base, corpus\.jsonl"):
        with_demo_files(wrong)
