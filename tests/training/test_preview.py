"""`k2mini preview`: the text that a run would take, and its tokens and labels, one a line."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from k2mini.data.prompts import get_template
from tests.json_tokenizer import write_json_tokenizer

LINE = re.compile(r"^ *(\d+) +(\d+)  ('.*?'|\".*?\") *(?: (\d+)  (?:'.*'|\".*\"))?$")


def parsed(lines):
    """(position, id, piece, id to predict or None) of each line of a sample."""
    rows = [LINE.match(line).groups() for line in lines]
    return [
        (int(place), int(token), ast.literal_eval(piece), label and int(label)) for place, token, piece, label in rows
    ]


@pytest.fixture
def preview(tiny_directory, tmp_path, run):
    """Preview a run over a file of such data, with such a `data` section."""

    def call(name, content, section, *arguments):
        (tmp_path / name).write_text(content)
        config = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": str(tiny_directory)},
            "data": {"path": str(tmp_path / name), **section},
            "train": {"lr": 1e-3, "global_batch_size": 1, "micro_batch_size": 1, "max_steps": 1},
        }
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        return run("preview", tmp_path / "config.yaml", *arguments)

    return call


RECORD = json.dumps([{"instruction": "granite is", "input": "", "output": "rock"}])


def test_instructions(tiny_tokenizer, preview):
    """The prompt is read; the answer, with EOS, is to be predicted."""
    status, out, err = preview("data.json", RECORD, {"template": "alpaca_short"})
    assert status == 0, err
    text, table = out.split("\n\nposition")
    head, *lines, last = f"position{table}".splitlines()
    prompt = "### Instruction:\n    granite is\n\n    ### Response:\n"
    assert text == f"sample 0 of 1\nnot supervised:\n    <s> {prompt}\nsupervised:\n    rock</s>"
    assert head.split() == ["position", "id", "piece", "supervised:", "the", "next", "token"]
    prompt = get_template("alpaca_short").prompt("granite is")
    start = len(tiny_tokenizer.encode(prompt, bos=True, eos=False))
    ids = tiny_tokenizer.encode(prompt + "rock", bos=True, eos=True)
    labels = [None] * (start - 1) + ids[start:]
    pieces = [tiny_tokenizer.piece(token) for token in ids]
    assert parsed(lines) == list(zip(range(len(labels)), ids, pieces, labels, strict=False))
    assert last == f"{len(labels)} tokens, {len(ids) - start} of them supervised"


def test_documents(tiny_tokenizer, preview):
    """Every token is to be predicted, but the first of a document, where positions begin anew."""
    texts = ["granite is a rock", "basalt is made of quartz"]
    first, second = (tiny_tokenizer.encode(text, bos=True, eos=True) for text in texts)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    status, out, err = preview("corpus.jsonl", content, {"seq_len": len(first) + len(second) - 1})
    assert status == 0, err
    text, table = out.split("\n\nposition")
    begins = "supervised, a document from its beginning:\n    <s>"
    assert text == f"sample 0 of 1\n{begins} {texts[0]}</s>\n{begins} {texts[1]}</s>"
    _, *lines, last = table.splitlines()
    ids, labels = [*first, *second[:-1]], [*first[1:], None, *second[1:]]
    places = [*range(len(first)), *range(len(second) - 1)]
    pieces = [tiny_tokenizer.piece(token) for token in ids]
    assert parsed(lines) == list(zip(places, ids, pieces, labels, strict=True))
    assert last == f"{len(ids)} tokens, {len(ids) - 1} of them supervised"


def test_where_all_is_supervised_and_where_a_document_goes_on(tiny_tokenizer, preview):
    out = preview("data.json", RECORD, {"template": "alpaca_short", "train_on_inputs": True})[1]
    assert "\nsupervised:\n    <s> ### Instruction:\n" in out
    assert "not supervised" not in out
    texts = ["granite is a rock", "basalt is made of quartz"]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    length = len(tiny_tokenizer.encode(texts[0], bos=True, eos=True)) - 2
    out = preview("corpus.jsonl", content, {"seq_len": length}, "run.seed=1", "--number", 9)[1]
    assert "\nsupervised, a document from its beginning:\n    <s> granite is a rock\n\n" in out
    assert "\nsupervised, a document goes on:\n" in out


def test_documents_without_bos(tiny_directory, tmp_path, preview):
    """One begins after another's EOS; where the row begins, it is not known."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory, directory, ignore=shutil.ignore_patterns("tokenizer*", "generation*", "manifest*"))
    write_json_tokenizer(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": 2, "bos_token_id": None}))
    content = '{"text": "granite is a rock"}\n{"text": "basalt"}\n'
    for more in ("data.document_mask=true", "data.document_mask=false"):
        status, out, err = preview("corpus.jsonl", content, {"seq_len": 6}, f"model.path={directory}", more)
        assert status == 0, err
        heading = "supervised, a document from its beginning:\n    basalt"
        assert out.startswith(f"sample 0 of 1\nsupervised:\n    granite is a rock<|im_end|>\n{heading}")


@pytest.mark.parametrize("template", ["own", "llama2", None])
def test_conversations(tiny_directory, tiny_tokenizer, preview, tmp_path, template):
    """In any template: special tokens by their pieces, each answer and its end to be predicted."""
    if template != "llama2":
        pytest.importorskip("jinja2")
    folder = tmp_path / "model"
    shutil.copytree(tiny_directory, folder)
    text = (Path(__file__).parents[1] / "data" / "templates" / "llama2.jinja").read_text()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": text}))
    turns = [
        ("system", "Be short."),
        ("user", "granite is"),
        ("assistant", "rock"),
        ("user", "and"),
        ("assistant", "x"),
    ]
    messages = json.dumps([{"messages": [{"role": role, "content": said} for role, said in turns]}])
    section = {"template": template, "max_seq_len": 200}
    status, out, err = preview("data.json", messages, section, f"model.path={folder}")
    assert status == 0, err
    assert ("the template is the model's own" in err) == (template is None)
    text, table = out.split("\n\nposition")
    assert text == (
        "sample 0 of 1\nnot supervised:\n    <s> [INST] <<SYS>>\n    Be short.\n    <</SYS>>\n\n"
        "    granite is [/INST]\n"
        "supervised:\n     rock </s>\nnot supervised:\n    <s> [INST] and [/INST]\nsupervised:\n     x </s>"
    )
    *_, last = table.splitlines()
    answers = [tiny_tokenizer.encode(text, bos=False, eos=True) for text in ("rock ", "x ")]
    assert last.endswith(f" tokens, {sum(map(len, answers))} of them supervised")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--number", 0], "--number must be at least 1, not 0"),
        (["data.path=none.json"], "none.json"),
        (["model.path=/nowhere"], "there is no directory /nowhere"),
    ],
)
def test_bad_input(preview, arguments, said):
    status, out, err = preview("data.json", RECORD, {}, *arguments)
    assert (status, out) == (2, "")
    assert said in err.splitlines()[-1]
