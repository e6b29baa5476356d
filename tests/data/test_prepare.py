"""Prepared corpora: the same bytes whatever happens on the way."""

import gzip
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from k2mini.data.corpus import Corpus, Documents, fingerprint, read_corpus_manifest
from k2mini.data.documents import list_files, read_documents
from k2mini.data.prepare import Settings, prepare
from k2mini.files import sha256

WORDS = ["granite", "basalt", "quartz", "is made of", "plates", "erodes", "### Instruction:"]


def text(number):
    return " ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(3 + number % 11)) + f" {number}"


@pytest.fixture
def folder(tmp_path):
    """Four files of four kinds, one in a folder below, with repeated documents."""
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text(n), "more": n}) + "\n" for n in range(200))
    (source / "a.jsonl").write_text(lines + "\n" + json.dumps({"text": text(3)}) + "\n")
    with gzip.open(source / "below/b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": text(n)}) + "\n" for n in range(190, 260)))
    (source / "c.txt").write_text("A whole file.\nIs one document.")
    (source / "d.md").write_text("# Rocks\n\nand minerals")
    (source / "left_alone.csv").write_text("x,y")
    (source / "empty.txt").write_text(" ")
    return source


def digests(out):
    return {path.name: sha256(path) for path in out.iterdir()}


def test_what_is_prepared_is_what_was_there(folder, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("k2mini.data.prepare.SHARD_TOKENS", 500)
    manifest = prepare([folder], tiny_tokenizer.path, tmp_path / "out")
    assert [file.name for file in list_files([folder])] == ["a.jsonl", "b.jsonl.gz", "c.txt", "d.md", "empty.txt"]
    texts = [*(text(n) for n in range(260)), "A whole file.\nIs one document.", "# Rocks\n\nand minerals"]
    expected = Documents([tiny_tokenizer.encode(t, bos=True, eos=True) for t in texts])
    corpus = Corpus(tmp_path / "out")
    assert manifest["duplicates"] == 11
    assert manifest["splits"]["train"]["documents"] == corpus.num_documents == 262
    assert len(manifest["splits"]["train"]["shards"]) > 5
    assert corpus.num_tokens == expected.num_tokens
    for start, stop in [(0, corpus.num_tokens), (0, 1), (490, 1203), (corpus.num_tokens - 3, corpus.num_tokens)]:
        for ours, theirs in zip(corpus.read(start, stop), expected.read(start, stop), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert np.fromfile(tmp_path / "out/train-00000.tokens", dtype="uint16")[0] == tiny_tokenizer.bos_id


def test_without_eos_and_with_a_large_vocabulary(folder, tiny_tokenizer, tmp_path):
    prepare([folder / "d.md"], tiny_tokenizer.path, tmp_path / "out", eos=False)
    tokens, offsets = Corpus(tmp_path / "out").read(0, Corpus(tmp_path / "out").num_tokens)
    assert tokens.tolist() == tiny_tokenizer.encode("# Rocks\n\nand minerals", bos=True, eos=False)
    assert offsets.tolist() == list(range(len(tokens)))
    assert [Settings("", size).dtype for size in (400, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_the_same_bytes_whatever_the_number_of_workers(folder, tiny_tokenizer, tmp_path):
    for workers in (1, 3):
        prepare([folder], tiny_tokenizer.path, tmp_path / str(workers), val_percent=10, workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "3")
    assert not list(tmp_path.glob(".*"))


def test_the_split_is_stable_when_the_corpus_grows(folder, tiny_tokenizer, tmp_path):
    def documents(out, split):
        tokens, offsets = (corpus := Corpus(out, split)).read(0, corpus.num_tokens)
        return {tuple(part.tolist()) for part in np.split(tokens, np.flatnonzero(offsets == 0)[1:])}

    prepare([folder / "a.jsonl"], tiny_tokenizer.path, tmp_path / "small", val_percent=20)
    prepare([folder], tiny_tokenizer.path, tmp_path / "large", val_percent=20)
    assert documents(tmp_path / "small", "val") < documents(tmp_path / "large", "val")
    assert documents(tmp_path / "small", "train") < documents(tmp_path / "large", "train")
    assert 20 <= len(documents(tmp_path / "small", "val")) <= 60
    assert fingerprint(tmp_path / "small") != fingerprint(tmp_path / "large")


def test_killed_and_started_again(folder, tiny_tokenizer, tmp_path):
    """It goes on with the files that were done, and the bytes are the same."""
    big = "".join(json.dumps({"text": text(n)}) + "\n" for n in range(300, 12000))
    (folder / "z.jsonl").write_text(big)
    command = [sys.executable, "-m", "k2mini", "prepare", str(folder), "--tokenizer", str(tiny_tokenizer.path)]
    out = tmp_path / "killed"
    process = subprocess.Popen([*command, "--out", str(out), "--workers", "2"], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".killed.parts/*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on with what an earlier start left" in done.stderr
    prepare([folder], tiny_tokenizer.path, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_malformed_lines_are_named_or_counted(folder, tiny_tokenizer, tmp_path):
    bad = folder / "bad.jsonl"
    bad.write_text('{"text": "quartz"}\n{"text": 3}\n{"te\n')
    (folder / "latin.txt").write_bytes(b"\xe9")
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"bad.jsonl, line 2: `text` must be text .*; --on-error skip"):
            prepare([folder], tiny_tokenizer.path, tmp_path / "out", workers=workers)
        assert not (tmp_path / "out").exists()
    manifest = prepare([folder], tiny_tokenizer.path, tmp_path / "out", on_error="skip")
    assert manifest["skipped"] == 3
    assert manifest["splits"]["train"]["documents"] == 263


def test_what_can_not_be_prepared(folder, tiny_tokenizer, tmp_path):
    def fails(match, *inputs, **options):
        with pytest.raises((ValueError, OSError), match=match):
            prepare(inputs, tiny_tokenizer.path, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    fails("there is no file or folder", tmp_path / "none")
    fails("documents are read from .jsonl, .json, .txt, .md", folder / "left_alone.csv")
    fails("a.jsonl is named twice", folder, folder / "a.jsonl")
    fails("there are 0 documents", folder / "empty.txt")
    fails("--val-percent must be", folder, val_percent=100)
    fails("--workers must be", folder, workers=0)
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes((folder / "below/b.jsonl.gz").read_bytes()[:-20])
    fails("damaged.jsonl.gz is damaged", damaged)
    (tmp_path / "nothing").mkdir()
    fails("no .jsonl, .json, .txt, .md", tmp_path / "nothing")


def test_what_is_not_a_prepared_corpus(folder, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="is not a prepared corpus"):
        Corpus(folder)
    prepare([folder], tiny_tokenizer.path, tmp_path / "out")
    with pytest.raises(ValueError, match="has no 'val' part"):
        Corpus(tmp_path / "out", "val")
    with (tmp_path / "out/train-00000.tokens").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"train-00000.tokens is \d+, the manifest makes it \d+ bytes"):
        Corpus(tmp_path / "out")
    manifest = read_corpus_manifest(tmp_path / "out")
    (tmp_path / "out/manifest.json").write_text(json.dumps({**manifest, "format": "other"}))
    with pytest.raises(ValueError, match="is not of the format"):
        Corpus(tmp_path / "out")
    with pytest.raises(ValueError, match="is empty"):
        read_documents(folder / "empty.txt", tiny_tokenizer, eos=True)
