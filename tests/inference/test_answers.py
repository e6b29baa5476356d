"""`k2mini generate` over lists, with beams, stop strings and int8; what a user can get wrong."""

import contextlib
import io
import json
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from k2mini.build import load_model
from k2mini.cli import main
from k2mini.data.prompts import get_template
from k2mini.demo.report import commands
from k2mini.evaluation.subjective import run_subjective
from k2mini.inference.answers import answers, read_questions
from k2mini.inference.beam import Beams, beam_search
from k2mini.inference.compile import compile_decoding
from k2mini.inference.decoding import Decoding
from k2mini.inference.generate import AHEAD, completions, generate
from tests.conftest import ROOT, asset
from tests.faults.server import Request
from tests.helpers import copy_model, fill_adapters

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
    assert [entry["prompt"] for entry in found[0]] == QUESTIONS
    assert set(found[0][0]) == {"prompt", "answer", "tokens", "finish"}
    assert run(*common, "--input", tmp_path / "list.txt", "--out", tmp_path / "answers.json")[0] == 0
    assert json.loads((tmp_path / "answers.json").read_text()) == found[0]
    for entry in found[0]:
        alone = json.loads(run(*common, "--prompt", entry["prompt"], "--json")[1])[0]
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
    for seed in (0, 7):
        assert "--seed: no effect without --temperature" in run(*common, "--seed", seed)[2]
        assert "--seed: no effect with --num-beams 2" in run(*common, "--seed", seed, "--num-beams", 2)[2]
        assert "no effect" not in run(*common, "--seed", seed, "--temperature", 1)[2]
    for option in (["--length-penalty", 2], ["--early-stopping"]):
        assert f"k2mini: {option[0]}: no effect without --num-beams" in run(*common, *option)[2]
        assert "no effect" not in run(*common, *option, "--num-beams", 2)[2]


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


def test_a_quantised_head(tiny_directory):
    quantised, _ = load_model(tiny_directory, quantize="int8", quantize_head=True)
    full, _ = load_model(tiny_directory)
    rows = torch.arange(3, 33).view(2, 15)
    with torch.inference_mode():
        assert 1e-4 < (quantised(rows) - full(rows)).std() / full(rows).std() < 0.05
        hidden = full.hidden(rows)
        assert 1e-4 < (quantised.logits(hidden) - full.logits(hidden)).std() / full.logits(hidden).std() < 0.05
    with pytest.raises(ValueError, match="--quantize-head needs --quantize int8"):
        load_model(tiny_directory, quantize_head=True)


def test_a_merged_adapter_answers_as_the_unmerged_one(tiny_directory, tmp_path, run):
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
    # Asked in the template of the run that it is of.
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"template": "alpaca_short"}}))
    command = ["generate", "--model", tiny_directory, "--adapter", tmp_path / "adapter", "--prompt", "granite"]
    here = run(*command)
    assert "the template is alpaca_short, as the run beside the adapter notes" in here[2]
    assert here[1] == run(*command, "--template", "alpaca_short")[1] != run(*command, "--template", "alpaca")[1]


@pytest.mark.parametrize("quantize", [None, *(pytest.param(how, marks=pytest.mark.slow) for how in ("int8", "nf4"))])
def test_compiled_decoding_gives_the_same_tokens(tiny_directory, wide_directory, quantize):
    directory = wide_directory if quantize == "nf4" else tiny_directory
    eager, tokenizer = load_model(directory, quantize=quantize)
    compiled, _ = load_model(directory, quantize=quantize)
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
    "long": (None, ["--prompt", "granite " * 2000], "no room for an answer in the model's context of 1024"),
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


ROWS = [("What is granite?", ""), ('the "Alps", and\nthe Andes?', "They rise."), ("quartz", "")]
ALPS = '"the ""Alps"", and\nthe Andes?"'
TABLES = {
    "q.csv": f"id,question,input\n1,What is granite?,\n2,{ALPS},They rise.\n\n3,quartz,\n",
    "Q.CSV": f'"input", "id", "prompt"\r\n"","1","What is granite?"\r\nThey rise.,2,{ALPS}\r\n,3,quartz',
    "q.tsv": f"instruction\tinput\tid\nWhat is granite?\t\t1\n{ALPS}\tThey rise.\t2\nquartz\t\t3\n",
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "mark"])
@pytest.mark.parametrize("name", TABLES)
def test_questions_of_a_table(tmp_path, caplog, name, mark):
    """A name that does not say what it holds is enough, too: so is standard input read."""
    content = (mark + TABLES[name]).encode()
    (tmp_path / name).write_bytes(content)
    with caplog.at_level("INFO"):
        assert read_questions(tmp_path / name) == ROWS
        assert f"{name}: columns that are not used: id" in caplog.text
        assert read_questions(Path("standard input"), content) == ROWS
    one = tmp_path / "one.csv"
    one.write_text(f"{mark}question\nWhat is granite, or basalt?\n".replace("granite,", "granite"))
    assert read_questions(one) == [("What is granite or basalt?", "")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("id,text\n1,quartz\n", r"q.csv must have one column `question` or .*; its columns are \['id', 'text'\]"),
        ("id;question\n1;quartz\n", r"its columns are \['id;question'\]"),
        ("question,question\na,b\n", "q.csv must have one column"),
        ("question,prompt\na,\nb,c\n", "q.csv, line 3 has both `question` and `prompt`"),
        ("id,question\n1,\n", "q.csv, line 2 is neither a question nor"),
        ("id,question\n1,What is granite, or basalt?\n", "q.csv, line 2 has more cells than the header"),
        ('id,question\n1,"granite\n', "q.csv, line 2 is not valid CSV: unexpected end of data"),
        ("id,question\n", "q.csv holds no question"),
        ("", "q.csv must have one column"),
        ("question\n\xff", "q.csv is not UTF-8"),
    ],
)
def test_tables_that_are_refused(tmp_path, content, said):
    (tmp_path / "q.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        read_questions(tmp_path / "q.csv")


def test_columns_may_have_any_names(tmp_path):
    (tmp_path / "q.csv").write_text("question,more\nWhat is granite?,x\nquartz\n")
    assert read_questions(tmp_path / "q.csv") == [("What is granite?", ""), ("quartz", "")]


def test_a_table_on_standard_input_is_never_asked_line_by_line():
    for text in ("id;question\n1;What is granite?\n", "Question,Answer\nWhat is granite?,A rock\n"):
        with pytest.raises(ValueError, match="standard input must have one column"):
            read_questions(Path("standard input"), text.encode())


def test_text_that_is_no_table(tmp_path):
    for text in ("Ask one question, then wait\nquartz\n", "question\nquartz\n", "granite, quartz\nquestion, answer"):
        assert len(read_questions(Path("standard input"), text.encode())) == 2


def test_a_prompt_of_standard_input_is_checked_before_the_model_is_loaded(tiny_directory, run, monkeypatch):
    common = ["generate", "--model", tiny_directory, "--max-new-tokens", 2]
    with monkeypatch.context() as patch:
        patch.setattr("k2mini.build.open_model", lambda *_, **__: pytest.fail("the model was loaded"))
        for content, said in ((b"granite \xff", "standard input is not UTF-8 (at the end of 'granite \\udcff')"),
                              (b"\xef\xbb\xbf \n", "the prompt is empty")):  # fmt: skip
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
            status, out, err = run(*common, "--prompt", "-")
            assert (status, out, err) == (2, "", f"k2mini: {said}\n")
        assert run(*common, "--prompt", " ")[2] == "k2mini: the prompt is empty\n"
    found = []
    for content in (b"granite", b"\xef\xbb\xbfgranite"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        found.append(run(*common, "--prompt", "-", "--json")[1])
    assert found[0] == found[1]
    assert json.loads(found[0])[0]["prompt"] == "granite"


def test_an_answer_ends_where_the_context_does(tiny_directory, tmp_path, run):
    """The model's context is 1,024 tokens."""
    tokenizer = load_model(tiny_directory)[1]
    words = ["granite " * n for n in (1, 250, 251)]
    while len(tokenizer.encode(words[2], bos=True, eos=False)) < 1000:
        words = [words[0], words[1] + "a", words[2] + "a"]
    room = [1024 - len(tokenizer.encode(text, bos=True, eos=False)) for text in words]
    assert 0 < room[2] < room[1] < 50 < room[0]
    (tmp_path / "q.json").write_text(json.dumps(words))
    common = ["generate", "--model", tiny_directory, "--template", "none", "--max-new-tokens", 50]
    status, out, err = run(*common, "--input", tmp_path / "q.json")
    assert status == 0, err
    entries = json.loads(out)
    assert [(len(e["tokens"]), e["finish"]) for e in entries[1:]] == [(n, "length") for n in room[1:]]
    said = f"2 of 3 answers end after {room[2]} to {room[1]} tokens, with the model's context of 1024"
    assert err.count("context") == err.count(said) == 1
    status, out, err = run(*common, "--prompt", words[2])
    assert (status, out) == (0, entries[2]["answer"] + "\n")
    assert f"stopped after {room[2]} tokens: the model's context of 1024 ends" in err
    status, beams, err = run(*common, "--prompt", words[2], "--num-beams", 2, "--json")
    assert (status, len(json.loads(beams)[0]["tokens"])) == (0, room[2])
    assert f"1 of 1 answers end after {room[2]} tokens" in err
    (tmp_path / "long.json").write_text(json.dumps(["granite", words[2] * 2]))
    status, out, err = run(*common, "--input", tmp_path / "long.json")
    assert (status, out) == (2, "")
    assert "long.json, question 1: a prompt of" in err.splitlines()[-1]
    assert "leaves no room for an answer in the model's context of 1024; shorten it by" in err.splitlines()[-1]


def test_the_demos_report_prints_a_generate_that_runs(run):
    """Its model has a context of 256 tokens, which is no more than the default of --max-new-tokens."""
    (line,) = [
        line
        for line in commands(Path("demo"), control=False, lora=False).splitlines()
        if line.startswith("k2mini generate ")
    ]
    words = shlex.split(line)[1:]
    words[words.index("--model") + 1] = ROOT / "k2mini" / "demo" / "base"
    assert "--max-new-tokens" not in words
    status, out, err = run(*words)
    assert status == 0, err
    assert out.strip()


def test_open_tasks_too(tiny_directory):
    """Only a question that leaves no room is left out."""
    model, tokenizer = load_model(tiny_directory)
    pairs = [("What is granite?", "rock"), ("granite " * 2000, "rock")]
    decoding = Decoding(2000, stop=("a", "e", "i", "o", "u", " "))
    found = run_subjective(model, tokenizer, pairs, decoding, task="npee/qa", template=get_template("none"))
    assert (found["n"], found["left_out"]) == (1, 1)


MANY = [{"prompt": f"rock {n}", "input": "it is – hard"} if n % 3 else f"rock {n}" for n in range(23)]
DRAWN = ["--temperature", "1", "--seed", "5", "--batch-size", "4", "--max-new-tokens", "30", "--template", "none"]


@pytest.fixture(scope="module")
def kept(tiny_directory, tmp_path_factory):
    """A command, and the file of answers that it leaves when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "q.json").write_text(json.dumps(MANY))
    command = ["generate", "--model", str(tiny_directory), "--input", str(folder / "q.json"), *DRAWN]
    with pytest.raises(SystemExit) as end:
        main([*command, "--out", str(folder / "whole.jsonl")])
    assert end.value.code == 0
    return command, (folder / "whole.jsonl").read_bytes()


def test_answers_by_line_are_those_of_the_list(kept, tmp_path, run):
    command, whole = kept
    assert run(*command, "--out", tmp_path / "a.json")[:2] == (0, f"{tmp_path}/a.json\n")
    entries = json.loads((tmp_path / "a.json").read_text())
    assert [{k: v for k, v in json.loads(line).items() if k != "sha256"} for line in whole.splitlines()] == entries
    assert json.loads(run(*command)[1]) == entries
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_file_that_was_cut_anywhere_is_completed(kept, tmp_path, run, name):
    command, whole = kept
    lines = whole.splitlines(keepends=True)
    part = tmp_path / (name if name == "a.jsonl" else "a.json.part")
    expected = whole
    if name == "a.json":
        run(*command, "--out", tmp_path / name)
        expected = (tmp_path / name).read_bytes()
    ends = [0, 1, 13, len(lines[0]) - 1, len(lines[0]), sum(map(len, lines[:9])) + 50, sum(map(len, lines[:12])),
            len(whole) - 1, len(whole)]  # fmt: skip
    for end in ends:
        part.write_bytes(whole[:end])
        (tmp_path / name).unlink() if name == "a.json" else None
        status, out, err = run(*command, "--out", tmp_path / name)
        assert (status, out) == (0, f"{tmp_path / name}\n"), err
        assert (tmp_path / name).read_bytes() == expected
        number = whole[:end].count(b"\n")
        assert (f"{part} has {number} of 23 answers already" in err) == (number > 0)
        assert ("0.2 M parameters" in err) == (end < len(whole))  # what is complete needs no model
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_list_that_grew_is_gone_on_with(kept, tmp_path, run):
    command, whole = kept
    few, at = tmp_path / "few.json", command.index("--input") + 1
    few.write_text(json.dumps(MANY[:6]))
    assert run(*command[:at], few, *command[at + 1 :], "--out", tmp_path / "a.jsonl")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == b"".join(whole.splitlines(keepends=True)[:6])
    assert run(*command, "--out", tmp_path / "a.jsonl")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    status, _, err = run(*command[:at], few, *command[at + 1 :], "--out", tmp_path / "a.jsonl")
    assert (status, "a.jsonl, line 7 is not asked for; name another place" in err) == (2, True)


def test_answers_in_another_template_of_the_models_own_are_others(chat_directory, tmp_path, run):
    model = copy_model(chat_directory, tmp_path / "model")
    command = [
        "generate",
        "--model",
        model,
        "--prompt",
        "granite",
        "--max-new-tokens",
        3,
        "--out",
        tmp_path / "a.jsonl",
    ]
    assert run(*command)[0] == 0
    assert "has 1 of 1 answers already" in run(*command)[2]
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] += " "
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    status, out, err = run(*command)
    assert (status, out) == (2, "")
    assert "line 1 is not this model's answer, with these settings" in err


def test_a_question_that_the_template_refuses_is_named(chat_directory, tmp_path, run):
    (tmp_path / "q.json").write_text(json.dumps(["granite", "What is <|im_end|>?"]))
    status, out, err = run("generate", "--model", chat_directory, "--input", tmp_path / "q.json")
    assert (status, out) == (2, "")
    assert "q.json, question 1: messages[0] has '<|im_end|>' in its text" in err.splitlines()[-1]


def test_answers_of_another_kind_are_refused_by_name(kept, tmp_path, tiny_directory, run):
    command, whole = kept
    lines, out = whole.splitlines(keepends=True), tmp_path / "a.jsonl"
    other = tmp_path / "model"
    shutil.copytree(tiny_directory, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    as_before = "is not this model's answer, with these settings, to 'rock "
    for options in (["--temperature", "2"], ["--seed", "6"], ["--batch-size", "8"], ["--max-new-tokens", "31"],
                    ["--template", "alpaca"], ["--model", str(other)]):  # fmt: skip
        out.write_bytes(whole)
        at = command.index(options[0])
        changed = [*command[:at], *options, *command[at + 2 :]]
        status, printed, err = run(*changed, "--out", out)
        assert (status, printed) == (2, "")
        assert f"a.jsonl, line 1 {as_before}0'; name another place, or replace it with --force" in err
        assert out.read_bytes() == whole
    for extra in (["--dtype", "bfloat16"], ["--quantize", "int8"], ["--stop", "a"]):
        assert as_before in run(*command, *extra, "--out", out)[2]
    for content, said in (
        (b"mine", f"a.jsonl, line 1 {as_before}0'"),
        (b"[\n", f"a.jsonl, line 1 {as_before}0'"),
        (b'{"text": "mine"}\n', f"line 1 {as_before}0'"),
        (b'["mine"]\n', f"line 1 {as_before}0'"),
        (b'{"prompt": "rock', None),
        (b'{"prompt": "rock 0", "input"', f"line 1 {as_before}0'"),
        (lines[0][:-3] + b"\n", f"line 1 {as_before}0'"),
        (lines[0] + lines[2], f"line 2 {as_before}1'"),
        (lines[0].replace(b"rock", b"ROCK", 1), f"line 1 {as_before}0'"),
        (lines[0] + lines[1].replace(b"length", b"eos"), f"line 2 {as_before}1'"),
        (whole + b"{", "line 24 is not asked for"),
    ):
        out.write_bytes(content)
        status, _, err = run(*command, "--out", out)
        assert (status == 0) == (said is None), err
        assert said is None or (said in err and out.read_bytes() == content)
    status, _, err = run(*command, "--force", "--out", out)
    assert (status, out.read_bytes()) == (0, whole)
    out.unlink()
    out.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "b.json.part").symlink_to(tmp_path / "elsewhere")
    for name in ("a.jsonl", "b.json"):
        status, _, err = run(*command, "--out", tmp_path / name)
        assert (status, "is a symbolic link" in err) == (2, True)


def test_an_interrupt_before_the_first_answer_speaks_of_no_others(kept, tmp_path, run, monkeypatch):
    """With --force over answers of another kind, which stay until there is one."""
    command, whole = kept
    assert run(*command, "--stop", "q", "--out", tmp_path / "a.jsonl")[0] == 0
    before = (tmp_path / "a.jsonl").read_bytes()

    def interrupted(*_arguments, **_named):
        raise KeyboardInterrupt

    monkeypatch.setattr("k2mini.inference.answers.answers", interrupted)
    status, _, err = run(*command, "--out", tmp_path / "a.jsonl", "--force")
    assert (status, "answers are in" in err) == (130, False)
    assert (tmp_path / "a.jsonl").read_bytes() == before != whole


def test_json_is_printed_where_it_is_asked_for(kept, tmp_path, run):
    command, _ = kept
    status, out, err = run(*command, "--out", tmp_path / "a.json", "--json")
    assert (status, json.loads(out)) == (0, json.loads((tmp_path / "a.json").read_text()))
    assert f"the answers are in {tmp_path / 'a.json'}" in err


def test_a_model_that_lacks_a_tensor_is_said_before_answers_are_kept(tiny_directory, tmp_path, run):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_directory, tmp_path / "broken")
    (broken / "manifest.json").unlink()
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, broken / "model.safetensors")
    status, _, err = run("generate", "--model", broken, "--prompt", "a", "--out", tmp_path / "a.json")
    assert (status, "lacks model.embed_tokens.weight" in err) == (2, True), err


@pytest.mark.parametrize(
    ("name", "number"), [("a.jsonl", signal.SIGINT), ("a.json", signal.SIGINT), ("a.jsonl", signal.SIGKILL)]
)
def test_a_signal_keeps_the_answers(kept, tmp_path, run, forks, name, number):
    """The same command ends with the same file as one that nothing disturbed."""
    command, _ = kept
    many = [json.dumps(f"{entry} {n}") for n in range(25) for entry in QUESTIONS]
    (tmp_path / "q.jsonl").write_text("\n".join(many))
    at = command.index("--input") + 1
    command = [*command[:at], str(tmp_path / "q.jsonl"), *command[at + 1 :], "--out", str(tmp_path / name)]
    part = tmp_path / (name if name == "a.jsonl" else "a.json.part")
    program = forks.start(Request([[*map(str, command)]], str(tmp_path), limit=300))
    while program.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.002)
    program.send_signal(number)
    _, err = program.communicate()
    left = part.read_bytes().count(b"\n")
    assert 0 < left < len(many)
    if number == signal.SIGINT:
        assert program.returncode == 130
        said = f"stopped by SIGINT; {left} of {len(many)} answers are in {part}, start again to go on"
        assert err.splitlines()[-1] == f"k2mini: {said}"
    status, out, err = run(*command)
    assert (status, out) == (0, f"{tmp_path / name}\n")
    assert f"{part} has {left // 4 * 4} of {len(many)} answers already" in err or left < 4
    command[-1] = str(tmp_path / f"undisturbed{part.suffix if name == 'a.jsonl' else '.json'}")
    assert run(*command)[0] == 0
    assert (tmp_path / name).read_bytes() == Path(command[-1]).read_bytes()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted([".jsonl", *[Path(name).suffix] * 2])


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
        def __init__(self, total, label, unit, initial, **_):
            super().__init__(self)
            self.total, self.initial, self.moved, self.unit, self.said = total, initial, [], unit, ""
            bars.append(self)

        def update(self, tokens):
            self.moved.append(tokens)

        def set_postfix_str(self, text, refresh):
            self.said = text

    monkeypatch.setattr("k2mini.inference.answers.progress_bar", Bar)
    model, tokenizer = load_model(tiny_directory)
    prompts = [[1] + [7] * (length - 1) for length in (2, 30, 5)]
    list(answers(model, tokenizer, prompts, Decoding(4, batch_size=2), "answering"))
    list(answers(model, tokenizer, prompts, Decoding(4, batch_size=2), "answering", first=2))
    found = [(bar.total, bar.initial, bar.moved, bar.unit, bar.said) for bar in bars]
    assert found == [(49, 0, [6, 34, 9], "tokens", "3/3 answers"), (49, 40, [9], "tokens", "3/3 answers")]


def test_a_search_that_goes_on_is_the_undisturbed_one(tiny_directory):
    """Scores too, to the last bit: its batches stay as they were."""
    model, tokenizer = load_model(tiny_directory)
    prompts = [tokenizer.encode("rock " * number, bos=True, eos=False) for number in (1, 4, 2, 7, 3, 5, 6)]
    decoding = Decoding(6, beams=Beams(2), batch_size=3)
    whole = list(answers(model, tokenizer, prompts, decoding))
    for first in (1, 2, 4):
        assert list(answers(model, tokenizer, prompts, decoding, first=first)) == whole[first:]


def test_few_answers_wait_for_a_long_one(tiny_directory):
    """What is done and not given yet would be lost with the process."""
    model, tokenizer = load_model(tiny_directory)
    begun = set()

    def stopping_criteria(row, _token):
        begun.add(row)
        return row > 0

    decoding = Decoding(200, batch_size=2)
    how = {"stop_ids": [], "vocab_size": tokenizer.vocab_size, "stopping_criteria": stopping_criteria}
    next(completions(model, [[1, 5 + row] for row in range(60)], decoding, **how))
    assert len(begun) == AHEAD * 2
