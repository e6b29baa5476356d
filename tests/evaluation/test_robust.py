"""Other orders and words (`--robust`), calibration (`--chart`) and the prior-corrected score (`--scoring pmi`)."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from k2mini.build import load_model
from k2mini.data.chats import open_template
from k2mini.data.prompts import get_template
from k2mini.evaluation.benchmarks import Question, read_benchmark
from k2mini.evaluation.evaluate import evaluate
from k2mini.evaluation.instances import EvalConfig, Wording
from k2mini.evaluation.report import Result, calibration, summarise, table
from k2mini.evaluation.robust import WORDINGS, reordered
from k2mini.weights.model_directory import ModelDirectory

WORDS = ["granite", "basalt", "quartz", "rock", "mineral", "crust"]


def rocks(number=6, options=4):
    labels = tuple("ABCDEF"[:options])
    turned = [tuple(WORDS[place:] + WORDS[:place])[:options] for place in range(len(WORDS))]
    return [
        Question("rocks", i, f"Which erodes {i} times?", labels, turned[i % 6], labels[i % options])
        for i in range(number)
    ]


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "rocks.jsonl"
    rows = [{"question": q.stem, "choices": list(q.texts), "answer": q.answer} for q in rocks()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logprob(model, tokenizer, context, text):
    """log p(text | context), token by token, with nothing shared."""
    first = tokenizer.encode(context, bos=True, eos=False)
    ids = tokenizer.encode(context + text, bos=True, eos=False)
    start = next((i for i, (a, b) in enumerate(zip(first, ids, strict=False)) if a != b), min(len(first), len(ids)))
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids]))[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])
    return logprobs[start - 1 :].sum().item()


@pytest.mark.parametrize(
    ("name", "prefix", "premise"),
    [("none", "The answer is: ", "The answer is: "), ("none", "", ""), ("alpaca_short", "", "\n\n### Response:\n")],
)
def test_pmi_is_the_text_less_what_it_gets_without_the_question(tiny_directory, name, prefix, premise):
    """By a plain loop; without premise it is lm-evaluation-harness' acc_mutual_info: log p(c | ctx) - log p(c)."""
    model, tokenizer = load_model(tiny_directory)
    config = EvalConfig("pmi", get_template(name), prefix)
    assert config.premise == premise
    results = evaluate(model, tokenizer, questions := rocks(), config)
    changed = 0
    for question, result in zip(questions, results, strict=True):
        of_text = [
            logprob(model, tokenizer, config.template.prompt(question.stem) + prefix, text) for text in question.texts
        ]
        priors = [logprob(model, tokenizer, premise, text) for text in question.texts]
        assert result.logprobs == pytest.approx(of_text, abs=1e-4)
        assert result.priors == pytest.approx(priors, abs=1e-4)
        ratios = [text - prior for text, prior in zip(of_text, priors, strict=True)]
        assert result.prediction == question.labels[ratios.index(max(ratios))]
        shares = torch.tensor(ratios).softmax(0)
        assert result.confidence == pytest.approx(shares.max().item(), abs=1e-4)
        changed += result.prediction != question.labels[of_text.index(max(of_text))]
    assert changed, "priors change nothing here"
    plain = evaluate(model, tokenizer, questions, replace(config, scoring="text", normalize="none"))
    for with_prior, without in zip(results, plain, strict=True):
        assert without.logprobs == pytest.approx(with_prior.logprobs, abs=1e-5)
    assert "priors" not in plain[0].line()


def ten_lines(confidences, right, bins=10):
    """ECE as the paper defines it: I_m is ((m - 1) / M, m / M]."""
    total = 0.0
    for m in range(1, bins + 1):
        held = [i for i, c in enumerate(confidences) if (m - 1) / bins < c <= m / bins]
        if held:
            accuracy = sum(right[i] for i in held) / len(held)
            confidence = sum(confidences[i] for i in held) / len(held)
            total += len(held) / len(right) * abs(accuracy - confidence)
    return total


def test_the_calibration_error_is_the_papers():
    generator, results, confidences, right = torch.Generator().manual_seed(3), [], [], []
    for place in range(300):
        logprobs = (4 * torch.randn(4, generator=generator)).tolist()
        if place == 7:
            logprobs = [0.0, -math.inf, -math.inf, -math.inf]  # all of it: the last bin's upper end
        given = logprobs.index(max(logprobs))
        answer = "ABCD"[given] if torch.rand(1, generator=generator) < 0.6 else "E"
        results.append(Result("t", place, answer, "ABCD"[given], [*logprobs, None], [], labels=list("ABCDE")))
        confidences.append(torch.tensor(logprobs, dtype=torch.float64).softmax(0).max().item())
        right.append(answer == "ABCD"[given])
    found = calibration([*results, Result("t", 300, "A", "H", [-1.0], [], labels=["A"])])  # a letter without option
    assert found["n"] == 300
    assert found["ece"] == pytest.approx(ten_lines(confidences, right), abs=1e-12)
    assert found["confidence"] == pytest.approx(sum(confidences) / 300)
    assert sum(each["n"] for each in found["bins"]) == 300
    assert calibration([]) == {"n": 0, "ece": None, "confidence": None, "bins": []}
    # Byte-normalised, the longer option may be chosen though all of the probability is another's.
    assert Result("t", 0, "A", "B", [-10.0, -2000.0], [], labels=["A", "B"]).confidence == 0.0


def test_options_change_places_and_the_key_goes_with_its_text():
    asked = rocks(60)
    orders = set()
    for question in asked:
        turned = reordered(question, 1, 0)
        assert turned == reordered(question, 1, 0)
        assert turned.labels == question.labels
        assert sorted(turned.texts) == sorted(question.texts)
        key = question.texts[question.labels.index(question.answer)]
        assert turned.texts[turned.labels.index(turned.answer)] == key
        orders.add(tuple(question.texts.index(text) for text in turned.texts))
    assert len(orders) > 15  # of 24
    assert (
        [reordered(q, 2, 0) for q in asked]
        != [reordered(q, 1, 0) for q in asked]
        != [reordered(q, 1, 1) for q in asked]
    )
    copy = replace(asked[0], index=99)
    assert reordered(copy, 1, 0).texts == reordered(asked[0], 1, 0).texts  # copies stay copies
    lost = replace(asked[0], answer="H")
    assert reordered(lost, 1, 0).answer == "H"
    for last in ("all of the above", "A and B", "Neither A nor C", "B, C and D", "none of these"):
        question = replace(asked[0], texts=("granite", "basalt", "quartz", last))
        assert {reordered(question, repeat, 0) for repeat in range(9)} == {question}, last
    true = Question("npee/tf", 0, "Granite is a rock.", ("True", "False"), ("True", "False"), "True")
    assert reordered(true, 1, 0) is true


def test_wordings_are_around_the_question(tiny_directory):
    question = rocks(1)[0]
    true = Question("npee/tf", 0, "Granite is a rock.", ("True", "False"), ("True", "False"), "True")
    for wording in WORDINGS:
        config = EvalConfig("letter", get_template("none"), "", wording=wording)
        assert config.prompt(question).startswith(f"{wording.question}{question.stem}\n{wording.options}\nA. granite\n")
        assert config.prompt(true) == f"{wording.true_false}\nGranite is a rock."
        assert replace(config, scoring="text").prompt(question) == wording.question + question.stem
        k2 = replace(config, template=get_template("k2"))
        assert k2.instruction(true) == f"{wording.true_false}\n{true.stem}"
        assert replace(k2, wording=Wording()).instruction(true) == true.stem  # as K2 asks


def test_robust_says_the_spread_and_how_many_choices_stay(tiny_directory, task, tmp_path, run):
    """Against the same questions written out by hand and asked one repeat at a time."""
    out, chart = tmp_path / "out", tmp_path / "reliability.png"
    common = ["eval", "--model", tiny_directory, "--benchmark", task, "--robust", 3, "--out", out]
    status, said, err = run(*common, "--chart", chart)
    assert status == 0, err
    assert chart.read_bytes().startswith(b"\x89PNG")
    (row,) = json.loads((out / "report.json").read_text())["tasks"]
    robust, questions = row["robust"], read_benchmark(task)
    model, tokenizer = load_model(tiny_directory)
    published = [
        q.texts[q.labels.index(r.prediction)]
        for q, r in zip(questions, evaluate(model, tokenizer, questions, EvalConfig()), strict=True)
    ]
    accuracies, kept = [], []
    for repeat in (1, 2, 3):
        asked = [reordered(question, repeat, 0) for question in questions]
        found = evaluate(model, tokenizer, asked, EvalConfig(wording=WORDINGS[repeat - 1]))
        texts = [q.texts[q.labels.index(r.prediction)] for q, r in zip(asked, found, strict=True)]
        right = [q.texts[q.labels.index(q.answer)] for q in questions]
        accuracies.append(sum(a == b for a, b in zip(texts, right, strict=True)) / 6)
        kept.append([a == b for a, b in zip(texts, published, strict=True)])
    assert robust["accuracies"] == accuracies
    assert (robust["lowest"], robust["highest"]) == (min(accuracies), max(accuracies))
    assert robust["stays"] == pytest.approx(sum(map(sum, kept)) / 18)
    assert robust["always"] == pytest.approx(sum(map(all, zip(*kept, strict=True))) / 6)
    assert robust["shuffled"] == 6
    assert f"rocks: options and wording changed 3 times: {100 * min(accuracies):.1f} – " in said
    assert "changed 3 times" in (out / "report.md").read_text()
    # The published order is asked as without --robust, and what is kept is gone on with.
    plain = tmp_path / "plain"
    assert run(*common[:-4], "--out", plain)[0] == 0
    assert (plain / "results.jsonl").read_bytes() == (out / "results.jsonl").read_bytes()
    before = (out / "report.json").read_text()
    third = (out / "robust_3.jsonl").read_text()
    (out / "robust_3.jsonl").write_text("".join(third.splitlines(keepends=True)[:4]) + third[:9])  # killed there
    assert run(*common)[0] == 0
    assert (out / "report.json").read_text() == before
    assert "exists already" in run(*common, "--chart", chart)[2]


@pytest.mark.parametrize(
    ("scoring", "shuffled", "said"),
    [
        ("letter", 5, "options (of 5 questions) and wording changed 2 times"),
        ("text", 0, "rocks: wording changed 2 times"),
    ],
)
def test_robust_says_how_many_questions_options_changed(tiny_directory, tmp_path, run, scoring, shuffled, said):
    """One has an option that speaks of others; texts that are scored are not listed."""
    rows = [{"question": q.stem, "choices": [*q.texts[:3], "all of the above"][-4:], "answer": "A"} for q in rocks(1)]
    rows += [{"question": q.stem, "choices": list(q.texts), "answer": q.answer} for q in rocks(6)[1:]]
    (tmp_path / "rocks.json").write_text(json.dumps(rows))
    ask = ["eval", "--model", tiny_directory, "--benchmark", tmp_path / "rocks.json", "--robust", 2]
    status, out, err = run(*ask, "--scoring", scoring, "--out", tmp_path / "out")
    assert (status, said in out) == (0, True), out + err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tasks"][0]["robust"]["shuffled"] == shuffled
    assert report["wordings"] == [asdict(wording) for wording in WORDINGS[:2]]
    # Of log-probabilities divided by lengths there is no confidence.
    assert (report["tasks"][0]["calibration"]["n"], "no calibration error (ECE)" in out) == (
        6 if shuffled else 0,
        not shuffled,
    )


def test_what_robust_and_chart_want(tiny_directory, task, tmp_path, run):
    common = ["eval", "--model", tiny_directory, "--benchmark", task]
    text = tmp_path / "text.txt"
    text.write_text("granite is made of quartz. " * 9)
    for asked, said in (
        ([*common, "--robust", 0], "--robust must be at least 1, not 0"),
        ([*common, "--chart", tmp_path / "chart.doc"], "a picture's name ends in one of"),
        ([*common[:3], "--perplexity", text, "--robust", 2], "are of multiple-choice questions, and there are none"),
    ):
        status, out, err = run(*asked)
        assert (status, out, said in err) == (2, "", True), err


def test_the_table_says_the_calibration_error():
    questions = rocks(2)
    results = [
        Result("rocks", q.index, q.answer, "A", [0.0, *[-math.inf] * 3], [], labels=list(q.labels)) for q in questions
    ]
    said = table(summarise(questions, results, {"scoring": "letter"}))
    assert "rocks: calibration error (ECE) 50.0 %, at a mean confidence of 100.0 %" in said
    by_byte = summarise(questions, results, {"scoring": "text", "normalize": "byte"})
    assert by_byte[0]["calibration"]["ece"] is None
    assert "no calibration error (ECE): log-probabilities by byte decide" in table(by_byte)
    true = [replace(q, labels=("True", "False"), texts=("True", "False"), answer="True") for q in questions]
    given = [replace(r, labels=["True", "False"], logprobs=[0.0, -9.0], prediction="True") for r in results]
    assert summarise(true, given, {"scoring": "text", "normalize": "byte"})[0]["calibration"]["n"] == 2


def test_the_premise_of_a_chat_is_what_opens_the_answer(chat_directory, task, run):
    status, out, err = run("eval", "--model", chat_directory, "--benchmark", task, "--scoring", "pmi", "--json")
    assert status == 0, err
    (row,) = json.loads(out)["tasks"]
    assert (row["scoring"], row["score_end"]) == ("pmi", False)
    template = open_template("own", chat_directory, ModelDirectory(chat_directory).require_tokenizer())
    assert EvalConfig("pmi", template).premise == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_pmi_is_that_of_lm_evaluation_harness(smollm2_json, geobench):
    """Given the token that an empty context is here, EOS where the tokenizer writes no BOS; theirs is any named BOS."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load_model(smollm2_json)
    asked = [q for q in read_benchmark(geobench["npee"]) if q.task == "npee/choice"][:12]
    asked = [replace(question, texts=tuple(f" {text}" for text in question.texts)) for question in asked]
    results = evaluate(model, tokenizer, asked, EvalConfig("pmi", get_template("none")))
    peer = HFLM(
        AutoModelForCausalLM.from_pretrained(smollm2_json),
        tokenizer=AutoTokenizer.from_pretrained(smollm2_json),
        prefix_token_id=tokenizer.eos_id,
        device="cpu",
    )
    for question, result in zip(asked, results, strict=True):
        pairs = [(context, text) for context in (question.stem, "") for text in question.texts]
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        theirs = [logprob for logprob, _ in peer.loglikelihood(requests, disable_tqdm=True)]
        assert [*result.logprobs, *result.priors] == pytest.approx(theirs, abs=1e-3)
        number = len(question.texts)
        ratios = [theirs[place] - theirs[number + place] for place in range(number)]
        assert result.prediction == question.labels[ratios.index(max(ratios))]
