"""Prepared corpora that are damaged: named on opening where that is cheap, and byte by byte by `verify` and a run."""

import json
import shutil

import numpy as np
import pytest

from k2mini.data.corpus import Corpus, read_corpus_manifest
from k2mini.data.prepare import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_tokenizer):
    """40 documents in two splits of several shards."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"granite is made of quartz {n} " * (n % 7 + 1)}) for n in range(40)]
    (folder / "few.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k2mini.data.prepare.SHARD_TOKENS", 500)
        prepare([folder / "few.jsonl"], tiny_tokenizer.path, folder / "corpus", val_percent=20)
    return folder / "corpus"


@pytest.fixture
def corpus(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "corpus")


def change(path, place, value, dtype):
    content = np.fromfile(path, dtype=dtype)
    content[place] = value
    content.tofile(path)


def test_ids_out_of_the_vocabulary_are_named_where_they_are_read(corpus):
    file = corpus / "train-00001.tokens"
    change(file, 30, 60_000, "uint16")
    opened = Corpus(corpus)
    first = read_corpus_manifest(corpus)["splits"]["train"]["shards"][0]["tokens"]
    opened.read(0, first + 30)
    with pytest.raises(ValueError, match=rf"{file} is damaged: token 30 is 60000, the vocabulary has 4\d\d"):
        opened.read(first - 10, first + 50)


@pytest.mark.parametrize(("place", "value"), [(0, 3), (2, 0), (-1, 10**6), (1, 2**63)])
def test_offsets_that_do_not_rise_are_named_on_opening(corpus, place, value):
    change(corpus / "train-00000.starts", place, value, "uint64")
    with pytest.raises(ValueError, match=r"train-00000.starts is damaged: its offsets do not rise from 0; prepare"):
        Corpus(corpus)


def edited(**fields):
    return lambda manifest: manifest | fields


def shard(**fields):
    def edit(manifest):
        manifest["splits"]["train"]["shards"][0] |= fields
        return manifest

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(vocab_size="400"), "manifest.json: vocab_size must be a whole number, not '400'"),
        (edited(tokenizer=None), "manifest.json: tokenizer must be text, not None"),
        (edited(eos=1), "manifest.json: eos must be true or false, not 1"),
        (edited(dtype="float32"), "manifest.json: dtype must be uint16 or uint32"),
        (edited(splits=[]), r"manifest.json: splits must be an object, not \[\]"),
        (edited(splits={"train": 3}), "manifest.json, train must be an object, not 3"),
        (edited(splits={"val": {}}), "splits have train"),
        (shard(tokens=-1), "manifest.json, train: tokens must be a whole number, not -1"),
        (shard(tokens=True), "manifest.json, train: tokens must be a whole number, not True"),
        (shard(sha256="ab"), "manifest.json, train: sha256 must be an object, not 'ab'"),
        (shard(name="../train-00000"), "is not one that prepare writes"),
        (shard(documents=0), "is not one that prepare writes"),
        (shard(tokens=10**9), r"manifest.json, train: tokens is \d+, its shards have \d+"),
        (lambda manifest: [manifest], "is not of the format"),
    ],
)
def test_wrong_manifests_are_named_by_field_and_value(corpus, edit, message):
    path = corpus / "manifest.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        Corpus(corpus)


def test_verify_checks_every_byte(corpus, run):
    status, out, err = run("verify", corpus)
    assert status == 0, err
    files = sorted(path for path in corpus.iterdir() if path.name != "manifest.json")
    assert out == f"{corpus}: {len(files)} files are as they were written\n"
    for file in files:
        content = bytearray(file.read_bytes())
        for place in (0, len(content) // 2, len(content) - 1):
            content[place] ^= 1
            file.write_bytes(content)
            status, out, err = run("verify", corpus)
            assert (status, out) == (2, "")
            assert f"{file} differs: its SHA-256 is not that of manifest.json" in err
            content[place] ^= 1
        file.write_bytes(content)
    files[0].unlink()
    assert f"{files[0]} is missing" in run("verify", corpus)[2]


def test_a_run_checks_the_hashes_before_its_first_step(corpus, tiny_directory, tmp_path, run):
    """Another token of the vocabulary at one place: nothing but the hash tells."""
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tiny_directory)},
        "data": {"path": str(corpus), "seq_len": 32},
        "train": {"lr": 1e-3, "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 2},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    content = np.fromfile(corpus / "train-00000.tokens", dtype="uint16")
    change(corpus / "train-00000.tokens", 40, content[40] ^ 1, "uint16")
    status, _, err = run("pretrain", tmp_path / "run.yaml")
    assert status == 2
    assert "train-00000.tokens is not what was saved (its SHA-256 differs); prepare it again" in err
    assert not (tmp_path / "run").exists()
