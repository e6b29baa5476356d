import gzip
import json
from dataclasses import replace

import pytest
import torch

from k2mini.config import IGNORE_INDEX, InstructionSection
from k2mini.data.batches import Blocks, shuffled
from k2mini.data.corpus import Documents
from k2mini.data.documents import list_files, read_documents
from k2mini.data.instructions import encode_examples, read_examples, read_records
from k2mini.data.packing import Example, Examples
from k2mini.data.prompts import get_template

DOCUMENTS = [[1, 10, 11, 12, 2], [1, 20, 2], [1, 30, 31, 32, 33, 34, 2]]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 16, 17, 100, 257])
def test_every_epoch_is_another_permutation(number):
    epochs = [[shuffled(epoch * number + i, number, seed=3) for i in range(number)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(number)) for epoch in epochs)
    if number > 10:
        assert epochs[0] != epochs[1] != list(range(number))
        assert [shuffled(i, number, seed=4) for i in range(number)] != epochs[0]
    assert [shuffled(i, number, seed=None) for i in range(2 * number)] == list(range(number)) * 2


def test_blocks_keep_documents_apart():
    batch = Blocks(Documents(DOCUMENTS), 7, document_mask=True, seed=None).batch(0, 2)
    assert batch.tokens.tolist() == [[1, 10, 11, 12, 2, 1, 20], [2, 1, 30, 31, 32, 33, 34]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 0, 1, 2, 3, 4, 5]]
    # The last token of a document does not predict the next one's first; a block predicts the next block's first.
    assert batch.labels.tolist() == [[10, 11, 12, 2, IGNORE_INDEX, 20, 2], [IGNORE_INDEX, 30, 31, 32, 33, 34, 2]]


def test_k2s_scheme_runs_across_documents():
    batch = Blocks(Documents(DOCUMENTS), 7, document_mask=False, seed=None).batch(0, 1)
    assert batch.positions is None
    assert batch.labels.tolist() == [[10, 11, 12, 2, 1, 20, 2]]


def test_a_batch_is_a_function_of_seed_and_position():
    def data(seed=1):
        return Blocks(Documents(DOCUMENTS * 9), 5, document_mask=True, seed=seed)

    whole = data().batch(0, 50).tokens  # several epochs
    assert torch.equal(whole, torch.cat([data().batch(i, 5).tokens for i in range(0, 50, 5)]))
    assert not torch.equal(whole, data(2).batch(0, 50).tokens)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="15 tokens do not fill one block of 15"):
        Blocks(Documents(DOCUMENTS), 15, document_mask=True, seed=None)


def test_examples_are_padded_and_masked():
    data = Examples([Example([1, 5, 6, 7, 2], 3), Example([1, 8, 2], 0)], seed=None)
    batch = data.batch(0, 2)
    assert batch.tokens.tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    assert batch.labels.tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 7, 2], [8, 2, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.num_supervised() == 4


RECORD = {"instruction": "Name a rock.", "input": "", "output": "granite"}


def test_all_of_the_answer_and_its_end_is_supervised(tiny_tokenizer, llama_tokenizer):
    asked = [{"role": "user", "content": "Name a rock."}, {"role": "assistant", "content": "granite"}]
    for tokenizer in (tiny_tokenizer, llama_tokenizer):
        for name in ("alpaca", "alpaca_legacy", "none"):
            template = get_template(name)
            ((example, length),) = encode_examples(asked, tokenizer, template, InstructionSection(""))
            prompt = template.prompt(RECORD["instruction"])
            supervised = tokenizer.decode(example.tokens[example.unsupervised :]).lstrip()
            assert length == len(example.tokens)
            assert example.tokens[-1] == tokenizer.eos_id
            assert tokenizer.decode(example.tokens) == prompt + "granite"
            # Where the tokenizer joins the prompt's last letters with the answer's first, both are supervised.
            assert supervised.endswith("granite")
            assert len(supervised) <= len("granite") + 2
    section = InstructionSection("", train_on_inputs=True)
    ((example, _),) = encode_examples(asked, tokenizer, template, section)
    assert example.unsupervised == 0


def test_what_is_cut_is_counted(tiny_tokenizer, tmp_path, caplog):
    path = tmp_path / "data.json"
    long = {**RECORD, "output": "granite " * 40}
    path.write_text(json.dumps([RECORD, long, {**RECORD, "instruction": "rock " * 100}]))
    template, section = get_template("none"), InstructionSection(str(path), max_seq_len=40)
    examples = read_examples(path, tiny_tokenizer, template, section)
    assert [len(example.tokens) <= 40 for example in examples] == [True, True]
    assert "1 examples lose the end of their answer and 1 their whole answer" in caplog.text
    bos_eos = {"bos": True, "eos": True}
    longest = max(
        len(tiny_tokenizer.encode(text, **bos_eos))
        for text in ("Name a rock." + "granite " * 40, "rock " * 100 + "granite")
    )
    assert f"2 are used; 99 % of all would be whole with {longest}, all with {longest}" in caplog.text
    assert read_examples(path, tiny_tokenizer, template, replace(section, max_seq_len=longest))
    assert len(caplog.records) == 1
    path.write_text(json.dumps([{**RECORD, "instruction": "rock " * 100}]))
    with pytest.raises(ValueError, match="no example has any of its answer"):
        read_examples(path, tiny_tokenizer, template, section)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", "a.json is empty"),
        ("a.json", "{", "line 1 is not valid JSON"),
        ("a.json", '[{"instruction": "x"}]', "record 0 has no `output`"),
        ("a.json", '[{"instruction": "x", "output": 3}]', "record 0: `output` must be text, not 3"),
        ("a.json", '[{"instruction": "x", "output": " "}]', "record 0: `output` is empty"),
        ("a.json", "[3]", "record 0 must be a JSON object, not int"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{"x"', "line 2 is not valid JSON"),
        ("a.jsonl", '{"output": "y"}\n', "line 1 has no `instruction`"),
        ("a.jsonl.json", '{"instruction": "x", "output": "y"}\n{"output": "y"}\n', "line 2 has no `instruction`"),
        ("a.JSONL", '[{"output": "y"}]', "record 0 has no `instruction`"),
    ],
)
def test_instruction_files_of_another_form_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"text": "x"}\n{"txt": "y"}\n', "line 2: `text` must be text that is not empty"),
        ('{"text": " "}\n', "line 1: `text` must be text"),
        ("3\n", "line 1: must be a JSON object, not int"),
        ("[1]\n", "record 0: must be a JSON object, not int"),
        ('[{"text": "x"}', "corpus.jsonl is not valid JSON"),
        ("plain text\n", "line 1 is not valid JSON"),
    ],
)
def test_corpora_of_another_form_are_refused(tiny_tokenizer, tmp_path, content, message):
    path = tmp_path / "corpus.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(path, tiny_tokenizer, eos=True)
    with pytest.raises(ValueError, match="there is no file or folder"):
        read_documents(tmp_path / "none.jsonl", tiny_tokenizer, eos=True)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.json", "A.JSON", "A.JSONL.GZ"])
@pytest.mark.parametrize("listed", [True, False])
def test_json_is_read_by_what_it_holds(tiny_tokenizer, tmp_path, name, listed):
    texts = ["granite", "basalt"]
    entries = [json.dumps({"text": text}) for text in texts]
    content = ("[" + ",\n".join(entries) + "]" if listed else "\n".join(entries)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".GZ") else content)
    expected = [tiny_tokenizer.encode(text, bos=True, eos=False) for text in texts]
    assert read_documents(tmp_path / name, tiny_tokenizer, eos=False) == expected


def test_one_object_is_one_document_and_folders_pass_json_over(tiny_tokenizer, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "granite"}, indent=1))
    expected = [tiny_tokenizer.encode("granite", bos=True, eos=False)]
    assert read_documents(tmp_path / "a.json", tiny_tokenizer, eos=False) == expected
    (tmp_path / "b.txt").write_text("basalt")
    assert list_files([tmp_path]) == [tmp_path / "b.txt"]


def test_suffixes_in_capitals(tiny_tokenizer, tmp_path):
    (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress(b"granite"))
    (tmp_path / "B.Md").write_text("basalt")
    found = [read_documents(file, tiny_tokenizer, eos=False) for file in list_files([tmp_path])]
    assert found == [[tiny_tokenizer.encode(text, bos=True, eos=False)] for text in ("granite", "basalt")]


BAD = [
    ('{"instruction": "x", "output": ""}', "line 2: `output` is empty, so there is nothing to learn"),
    ('{"instruction": "x"}', "line 2 has no `output`"),
    ("3", "line 2 must be a JSON object, not int"),
    ('{"instr', "line 2 is not valid JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_record_ends_a_run_or_is_skipped(tiny_tokenizer, tmp_path, caplog, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps(RECORD), line, json.dumps(RECORD)]))
    template, section = get_template("none"), InstructionSection(str(path))
    with pytest.raises(ValueError, match=f"{message}.*; data.on_error=skip leaves such records out and counts them"):
        read_examples(path, tiny_tokenizer, template, section)
    examples = read_examples(path, tiny_tokenizer, template, replace(section, on_error="skip"))
    assert len(examples) == 2
    assert f"skipped: {path}, {message}" in caplog.text
    assert "1 records are skipped (data.on_error is skip), 2 are left" in caplog.text
    path.write_text(line + "\n" + line)
    with pytest.raises(ValueError, match="every record was skipped"):
        read_examples(path, tiny_tokenizer, template, replace(section, on_error="skip"))


def test_documents_begin_with_bos_and_end_as_asked(tiny_tokenizer, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "granite"}\n\n{"text": "basalt"}\n')
    bos, eos = tiny_tokenizer.bos_id, tiny_tokenizer.eos_id
    with_eos = read_documents(path, tiny_tokenizer, eos=True)
    assert [(ids[0], ids[-1]) for ids in with_eos] == [(bos, eos)] * 2
    assert read_documents(path, tiny_tokenizer, eos=False) == [ids[:-1] for ids in with_eos]
