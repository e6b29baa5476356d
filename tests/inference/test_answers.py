"""`k2mini generate` over lists, with beams, stop strings and int8; what a user can get wrong."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from k2mini.build import load_model
from k2mini.data.prompts import get_template
from k2mini.inference.answers import answers, read_questions
from k2mini.inference.beam import beam_search
from k2mini.inference.compile import compile_decoding
from k2mini.inference.generate import Decoding, generate
from k2mini.inference.sampling import Beams
from tests.conftest import asset
from tests.helpers import fill_adapters

QUESTIONS = ["What is granite?", "Which plates erode, and the mantle?", "quartz"]


def test_a_list_of_questions_gives_a_list_of_answers(tiny_directory, tmp_path, run):
    (tmp_path / "list.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    (tmp_path / "list.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    common = ["generate", "--model", tiny_directory, "--max-new-tokens", 8, "--batch-size", 2, "--template", "none"]
    found = []
    for name in ("list.json", "list.jsonl", "list.txt"):
        status, out, err = run(*common, "--input", tmp_path / name)
        assert status == 0, err
        found.append(json.loads(out))
    assert found[0] == found[1] == found[2]
    assert [entry["question"] for entry in found[0]] == QUESTIONS
    assert set(found[0][0]) == {"question", "answer", "tokens", "finish"}
    assert run(*common, "--input", tmp_path / "list.txt", "--out", tmp_path / "answers.json")[0] == 0
    assert json.loads((tmp_path / "answers.json").read_text()) == found[0]
    for entry in found[0]:
        alone = json.loads(run(*common, "--prompt", entry["question"], "--json")[1])[0]
        assert alone["tokens"] == entry["tokens"]


def test_k2s_own_list_of_questions():
    questions = read_questions(asset("data", "geobench", "generation_questions.json"))
    assert len(questions) > 20
    assert questions[0][0].startswith("How did Earth")


def test_beams_say_what_has_no_effect(tiny_directory, run):
    common = ["generate", "--model", tiny_directory, "--prompt", "granite", "--max-new-tokens", 6]
    k2 = ["--num-beams", 4, "--no-repeat-ngram-size", 2, "--temperature", 0.1, "--top-p", 0.75, "--top-k", 40]
    status, out, err = run(*common, *k2)
    assert status == 0
    assert "--temperature, --top-k, --top-p: no effect with --num-beams 4" in err
    assert run(*common, *k2[:4])[1] == out
    assert "--top-k: no effect without --temperature" in run(*common, "--top-k", 40)[2]


def test_stop_strings_in_a_batch(tiny_directory):
    model, tokenizer = load_model(tiny_directory)
    prompts = [tokenizer.encode(q, bos=True, eos=False) for q in QUESTIONS]
    whole = [text for text, _ in answers(model, tokenizer, prompts, Decoding(12))]
    stop = whole[1][4:7]
    cut = list(answers(model, tokenizer, prompts, Decoding(12, stop=(stop,))))
    for (text, completion), before in zip(cut, whole, strict=True):
        place = before.find(stop)
        assert text == (before if place < 0 else before[:place])
        assert (completion.finish == "stop") == (place >= 0)


def test_stop_strings_cut_what_beams_found(tiny_directory):
    model, tokenizer = load_model(tiny_directory)
    prompts = [tokenizer.encode(q, bos=True, eos=False) for q in QUESTIONS]
    beams = Beams(3)
    whole = list(answers(model, tokenizer, prompts, Decoding(12, beams=beams)))
    stop_ids, vocab_size = [tokenizer.eos_id], tokenizer.vocab_size
    searched = beam_search(model, prompts, Decoding(12, beams=beams), stop_ids=stop_ids, vocab_size=vocab_size)
    assert [completion for _, completion in whole] == [best for best, *_ in searched]
    stop = whole[1][0][4:7]
    cut = list(answers(model, tokenizer, prompts, Decoding(12, beams=beams, stop=(stop,))))
    for (text, completion), (before, best) in zip(cut, whole, strict=True):
        assert text == before.split(stop)[0]
        assert completion.tokens == best.tokens
    assert cut[1][0] != whole[1][0]


def test_int8_is_saved_and_loaded(tiny_directory, tmp_path, run):
    status, _, err = run("convert", tiny_directory, "--to", "hf", "--quantize", "int8", "--out", tmp_path / "int8")
    assert status == 0, err
    saved, _ = load_model(tmp_path / "int8")
    fresh, _ = load_model(tiny_directory, quantize="int8")
    for (name, a), b in zip(saved.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert run("verify", tmp_path / "int8")[0] == 0
    assert "int8" in run("info", tmp_path / "int8")[1]
    status, _, err = run("convert", tmp_path / "int8", "--to", "bin", "--out", tmp_path / "x")
    assert (status, "is quantised; convert the full-precision model" in err) == (2, True)


def test_w8a8_and_a_quantised_head(tiny_directory):
    """One row through PyTorch's dynamic product, several through the weight-only one."""
    plain, _ = load_model(tiny_directory, quantize="int8", quantize_head=True)
    dynamic, _ = load_model(tiny_directory, quantize="w8a8", quantize_head=True)
    row, rows = torch.tensor([[7]]), torch.arange(3, 33).view(2, 15)
    with torch.inference_mode():
        torch.testing.assert_close(dynamic(rows), plain(rows))
        error = (dynamic(row) - plain(row)).std() / plain(row).std()
        assert 1e-4 < error < 0.1
        full, _ = load_model(tiny_directory)
        assert (plain(rows) - full(rows)).std() / full(rows).std() < 0.05
    with pytest.raises(ValueError, match="--compile does not go with w8a8"):
        compile_decoding(dynamic)
    with pytest.raises(ValueError, match="--quantize-head needs --quantize int8 or w8a8, which says how"):
        load_model(tiny_directory, quantize_head=True)


def test_a_merged_adapter_answers_as_the_unmerged_one(tiny_directory, tmp_path):
    from k2mini.config import LoraSection
    from k2mini.nn.lora import adapter_tensors, attach, init_adapters
    from k2mini.weights.adapter import save_adapter

    model, _ = load_model(tiny_directory)
    section = LoraSection(rank=2, alpha=4, target_modules=["q_proj", "down_proj"])
    attach(model, section)
    init_adapters(model, 0)
    fill_adapters(model, 0.2)
    save_adapter(adapter_tensors(model), section, tmp_path / "adapter", str(tiny_directory))
    beside, _ = load_model(tiny_directory, tmp_path / "adapter")
    merged, _ = load_model(tiny_directory, tmp_path / "adapter", merge=True)
    tokens = torch.arange(3, 23)[None]
    with torch.inference_mode():
        torch.testing.assert_close(merged(tokens), beside(tokens), rtol=0, atol=1e-4)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


@pytest.mark.parametrize("quantize", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_compiled_decoding_gives_the_same_tokens(tiny_directory, quantize):
    eager, tokenizer = load_model(tiny_directory, quantize=quantize)
    compiled, _ = load_model(tiny_directory, quantize=quantize)
    compile_decoding(compiled)
    prompts = [tokenizer.encode(q, bos=True, eos=False) for q in QUESTIONS]
    for batch in (prompts[:1], prompts):
        ours, theirs = (generate(m, batch, Decoding(20), stop_ids=[]) for m in (compiled, eager))
        assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    with torch.no_grad():
        compiled.lm_head.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"the logits are not finite; lm_head.weight holds NaN or infinity"):
        generate(compiled, prompts[:1], Decoding(20), stop_ids=[])


BAD = {
    "folder to write": (None, ["--prompt", "a", "--out", "."], ". is a folder; name a file"),
    "no folder to write in": (None, ["--prompt", "a", "--out", "no/a.json"], "no/a.json: there is no folder no"),
    "number": ('[{"instruction": 3}]', ["--input", "FILE.json"], "`question` or `prompt` or `instruction` is text"),
    "no adapter": (None, ["--prompt", "a", "--adapter", "nowhere"], "there is no directory nowhere"),
    "no question": ("[]", ["--input", "FILE.json"], "FILE.json is empty"),
    "no JSON": ("{", ["--input", "FILE.json"], "FILE.json, line 1 is not valid JSON"),
    "no list": ('{"a": 1}', ["--input", "FILE.json"], "line 1 is neither a question nor an object"),
    "no text": ('["a", 1]', ["--input", "FILE.json"], "record 1 is neither a question nor"),
    "no file": (None, ["--input", "FILE.json"], "No such file"),
    "top_p 0": (None, ["--prompt", "a", "--top-p", "0"], "--top-p must be above 0"),
    "no beams": (None, ["--prompt", "a", "--num-beams", "0"], "--num-beams must be at least 1, not 0"),
    "no rows": (None, ["--prompt", "a", "--batch-size", "0"], "--batch-size must be at least 1"),
    "long": (None, ["--prompt", "granite " * 2000], "more than the model's context of 1024"),
    "other input": (
        '[{"question": "a", "input": 1}]',
        ["--input", "FILE.json"],
        "record 0: `input` must be text, not 1",
    ),
    "two questions": (
        '["b", {"question": "a", "instruction": "b"}]',
        ["--input", "FILE.json"],
        "record 1 has both `question` and `instruction`",
    ),
    "context": ('["a"]', ["--input", "FILE.json", "--context", "b"], "--context goes with --prompt"),
    "empty stop": (None, ["--prompt", "a", "--stop", ""], "a stop string is empty"),
    "penalty": (None, ["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty must be a positive"),
}


@pytest.mark.parametrize(("content", "options", "said"), BAD.values(), ids=BAD)
def test_one_sentence(tiny_directory, tmp_path, run, content, options, said):
    if content is not None:
        Path(tmp_path / "FILE.json").write_text(content)
    options = [str(tmp_path / option) if option == "FILE.json" else option for option in options]
    status, out, err = run("generate", "--model", tiny_directory, *options)
    assert (status, out) == (2, "")
    assert said in err.strip().splitlines()[-1]


RECORDS = [
    {"instruction": "Name the rock.", "input": "It is made of quartz and feldspar."},
    {"instruction": "Name the rock.", "input": "It cooled from lava."},
    {"instruction": "Name the rock.", "input": None},
    {"question": "Name the rock.", "input": "It foams."},
]


@pytest.mark.parametrize("template", ["alpaca", "none"])
def test_the_input_of_a_record_reaches_the_template(tiny_directory, tmp_path, run, template):
    (tmp_path / "list.json").write_text(json.dumps(RECORDS))
    common = ["generate", "--model", tiny_directory, "--max-new-tokens", 6, "--template", template]
    status, out, err = run(*common, "--input", tmp_path / "list.json")
    assert status == 0, err
    entries = json.loads(out)
    assert [entry.get("input") for entry in entries] == [record["input"] for record in RECORDS]
    assert "input" not in entries[2]
    assert entries[0]["tokens"] != entries[1]["tokens"] != entries[2]["tokens"]
    for entry in entries:
        context = ["--context", entry["input"]] if "input" in entry else []
        (alone,) = json.loads(run(*common, "--prompt", "Name the rock.", *context, "--json")[1])
        assert (alone["tokens"], alone.get("input")) == (entry["tokens"], entry.get("input"))
    assert run(*common, "--prompt", "Name the rock.", *context)[1].strip() == alone["answer"].strip()


def test_two_records_that_differ_in_their_input_are_two_prompts(tmp_path):
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    questions = read_questions(tmp_path / "list.jsonl")
    assert len({get_template("alpaca").prompt(*question) for question in questions}) == 4


NAMES = ["list.json", "list.jsonl", "list.jsonl.json", "LIST.JSON", "LIST.JSONL", "list.txt", "list"]


@pytest.mark.parametrize("name", NAMES)
def test_questions_are_read_by_what_the_file_holds(tmp_path, name):
    path = tmp_path / name
    expected = [(question, "") for question in QUESTIONS]
    path.write_text(json.dumps(QUESTIONS, indent=1))
    assert read_questions(path) == expected
    path.write_text("\ufeff" + "".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    assert read_questions(path) == expected
    path.write_text('[{"question": "What is granite?"}, "quartz"')
    with pytest.raises(ValueError, match=f"{name} is not valid JSON"):
        read_questions(path)
    path.write_text("[see figure 1] What is granite?\n\nquartz\n")
    if "json" in name.lower():
        with pytest.raises(ValueError, match=f"{name} is not valid JSON"):
            read_questions(path)
    else:
        assert read_questions(path) == [("[see figure 1] What is granite?", ""), ("quartz", "")]


def test_lines_end_where_they_end(tmp_path):
    path = tmp_path / "list"
    path.write_bytes("one\u2028line\r\ntwo\x0blines\x85?\n\r\nthree\rfour".encode())
    assert [question for question, _ in read_questions(path)] == ["one\u2028line", "two\x0blines\x85?", "three\rfour"]
    path.write_text(json.dumps({"question": "one\u2028line"}, ensure_ascii=False) + "\n")
    assert read_questions(path) == [("one\u2028line", "")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'["a", "b \xff"]', "record 1: a text in it is not UTF-8, or has half of a surrogate pair"),
        (b'["a", "b \\ud800"]', "record 1: a text in it is not UTF-8, or has half of a surrogate pair"),
        (
            b'{"question": "a"}\n{"question": "\\ud800"}',
            "line 2 is not valid JSON: a text in it has half of a surrogate",
        ),
        (b"a\nb\xff", r"is not UTF-8 \(byte 3\)"),
        (b"[[" * 50_000, "is nested too deeply"),
        (b'[{"question": "a", "question": "b"}]', "'question' stands twice"),
        (
            b'["a", {"question": "a", "input": [' + b"1," * 5000 + b"1]}]",
            r"`input` must be text, not \[1, 1, 1, 1, 1, 1, ...",
        ),
    ],
)
def test_questions_that_can_not_be_trusted(tmp_path, content, said):
    path = tmp_path / "list"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        read_questions(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_standard_input_too(tiny_directory, run, monkeypatch):
    common = ["generate", "--model", tiny_directory, "--max-new-tokens", 2, "--input", "-"]
    found = []
    for content in ("\n".join(QUESTIONS), json.dumps(QUESTIONS)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        found.append(json.loads(run(*common)[1]))
    assert found[0] == found[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"question": "a"}\n{"question": ')))
    status, _, err = run(*common)
    assert (status, "standard input, line 2 is not valid JSON" in err) == (2, True)


def test_progress_counts_tokens(tiny_directory, monkeypatch):
    """Of prompts of 2, 30 and 5 tokens, each answer moves the bar by what it may take at most."""
    bars = []

    class Bar(contextlib.nullcontext):
        def __init__(self, total, label, unit, **_):
            super().__init__(self)
            self.total, self.moved, self.unit, self.said = total, [], unit, ""
            bars.append(self)

        def update(self, tokens):
            self.moved.append(tokens)

        def set_postfix_str(self, text, refresh):
            self.said = text

    monkeypatch.setattr("k2mini.inference.answers.progress_bar", Bar)
    model, tokenizer = load_model(tiny_directory)
    prompts = [[1] + [7] * (length - 1) for length in (2, 30, 5)]
    list(answers(model, tokenizer, prompts, Decoding(4, batch_size=2), "answering"))
    (bar,) = bars
    assert (bar.total, bar.moved, bar.unit, bar.said) == (49, [6, 34, 9], "tokens", "3/3 answers")
