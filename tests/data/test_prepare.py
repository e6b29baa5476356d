"""Prepared corpora: the same bytes whatever happens on the way."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from k2mini.data.corpus import Corpus, Documents, fingerprint, read_corpus_manifest
from k2mini.data.documents import list_files, raise_error, read_documents, read_entries, read_texts
from k2mini.data.prepare import Settings, prepare
from k2mini.data.tokenizer import Tokenizer
from k2mini.files import sha256
from tests.faults.server import Request
from tests.json_tokenizer import ADDED, write_json_tokenizer

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


def test_killed_and_started_again(folder, tiny_tokenizer, tmp_path, forks, run):
    """It goes on with the files that were done, and the bytes are the same."""
    big = "".join(json.dumps({"text": text(n)}) + "\n" for n in range(300, 12000))
    (folder / "z.jsonl").write_text(big)
    out = tmp_path / "killed"
    command = ["prepare", str(folder), "--tokenizer", str(tiny_tokenizer.path), "--out", str(out)]
    process = forks.start(Request([[*command, "--workers", "2"]], str(tmp_path), limit=120))
    while not list(tmp_path.glob(".killed.parts/*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    status, _, err = run(*command)
    assert status == 0, err
    assert "going on with what an earlier start left" in err
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


def test_equal_files_of_a_folder_may_be_links_to_one(tmp_path):
    """As the hub's cache has them."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "blob").write_text("granite is made of quartz")
    for name in ("a.txt", "b.txt"):
        (tmp_path / "docs" / name).symlink_to(tmp_path / "blob")
    assert [file.name for file in list_files([tmp_path / "docs"])] == ["a.txt", "b.txt"]


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
    fails("no .jsonl, .txt, .md", tmp_path / "nothing")


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


def big(folder, number=3):
    for name in range(number):
        lines = [json.dumps({"text": f"{name} {text(n)}"}) + "\n" for n in range(4000)]
        (folder / f"big{name}.jsonl").write_text("".join(lines))


def test_one_of_two_at_once_is_refused(folder, tiny_tokenizer, tmp_path, forks):
    big(folder)
    words = ["prepare", str(folder), "--tokenizer", str(tiny_tokenizer.path), "--out", str(tmp_path / "out")]
    first, second = (forks.start(Request([words], str(tmp_path), limit=120)) for _ in range(2))
    said = [first.communicate()[1], second.communicate()[1]]
    assert sorted((first.returncode, second.returncode)) == [0, 2], said
    refused = said[first.returncode == 0].splitlines()[-1]
    assert "out is being written by process" in refused or "out exists already" in refused
    prepare([folder], tiny_tokenizer.path, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_an_output_is_no_input_and_is_replaced_by_force_alone(folder, tiny_tokenizer, tmp_path):
    prepare([folder / "d.md"], tiny_tokenizer.path, folder / "corpus")
    before = digests(folder / "corpus")
    with pytest.raises(ValueError, match=r"exists already; .* --force"):
        prepare([folder], tiny_tokenizer.path, folder / "corpus")
    with pytest.raises(ValueError, match=r"a\.jsonl, an input, is inside .*source"):
        prepare([folder], tiny_tokenizer.path, folder, force=True)
    with pytest.raises(ValueError, match=r"d\.md is a file; name a folder"):
        prepare([folder / "d.md"], tiny_tokenizer.path, folder / "d.md", force=True)
    assert digests(folder / "corpus") == before
    prepare([folder], tiny_tokenizer.path, folder / "corpus", force=True)
    assert digests(folder / "corpus") != before


def stopped_when_encoded(monkeypatch, *arguments, **options):
    """`prepare`, with a kill between the passes."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("k2mini.data.prepare._write", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(*arguments, **options)


def test_parts_are_used_again_only_where_they_are_whole_and_of_this_corpus(
    folder, tiny_tokenizer, tmp_path, monkeypatch, caplog
):
    parts = tmp_path / ".out.parts"
    caplog.set_level("INFO")
    stopped_when_encoded(monkeypatch, [folder], tiny_tokenizer.path, tmp_path / "out", eos=False)
    stopped_when_encoded(monkeypatch, [folder], tiny_tokenizer.path, tmp_path / "out")
    assert "removed 15 files" in caplog.text  # three of each of five documents without EOS
    cut, flipped = sorted(parts.glob("*.tokens"), key=lambda path: -path.stat().st_size)[:2]
    cut.write_bytes(cut.read_bytes()[:-2])
    flipped.write_bytes(b"\xff" + flipped.read_bytes()[1:])
    (parts / "half-1234.tokens").touch()
    caplog.clear()
    (folder / "c.txt").write_text("Another file.")
    prepare([folder], tiny_tokenizer.path, tmp_path / "out")
    assert "going on with" in caplog.text
    assert "removed 10 files" in caplog.text  # cut, flipped, changed, and what a killed worker left
    prepare([folder], tiny_tokenizer.path, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    # Killed when all was there but the parts not yet removed: they go, though the start is refused.
    parts.mkdir()
    with pytest.raises(ValueError, match="exists already"):
        prepare([folder], tiny_tokenizer.path, tmp_path / "out")
    assert "removed" in caplog.text.splitlines()[-1]
    assert not parts.exists()
    with pytest.raises(ValueError, match="there are 0 documents"):
        prepare([folder / "empty.txt"], tiny_tokenizer.path, tmp_path / "none")
    assert [path.name for path in tmp_path.glob(".*")] == [".none.parts"]  # its one part is complete


def test_listing_is_linear_and_counts_what_it_passes_over(folder, monkeypatch):
    compared = []
    for number in range(300):
        (folder / f"{number}.TXT").write_text("x")
    (folder / "more.JSONL").write_text('{"text": "x"}')
    (folder / "x.PDF").touch()
    (folder / "notes.json").touch()
    (folder / "README").touch()
    equal = Path.__eq__
    monkeypatch.setattr(Path, "__eq__", lambda a, b: compared.append(1) or equal(a, b))
    passed_over = Counter()
    assert len(list_files([folder], passed_over)) == 306
    assert len(compared) < 1000
    assert passed_over == {".csv": 1, ".pdf": 1, ".json": 1, "no suffix": 1}
    other = folder.parent / "other"
    other.mkdir()
    for name in ("a.csv", "b.csv", "c.json"):
        (other / name).touch()
    with pytest.raises(
        ValueError, match=r"in .*other; there are (2 .csv, 1 .json|1 .json, 2 .csv); of .json, name each"
    ):
        list_files([other], Counter())


def test_a_folder_that_can_not_be_read_is_named(folder, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="below"):
        list_files([folder])


BAD_TEXT = [
    (b'{"text": "half \\ud800"}', "half of a surrogate pair"),
    (b'{"text": "byte \xff"}', "not UTF-8"),
    (b'{"text": "a", "text": "b"}', "the key 'text' stands twice"),
    (b'{"text": "a", "more": ' + b"[" * 100_000 + b"}", "nested too deeply"),
    (b'{"text": "a", "more": ' + b"1" * 5000 + b"}", "not valid JSON"),
]


@pytest.mark.parametrize(("line", "said"), BAD_TEXT)
def test_text_that_is_none_is_named_or_skipped(tmp_path, line, said):
    good = '{"text": "one\u2028line \\ud83c\\udf0b"}'.encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, line, good]))
    skipped = []
    assert list(read_texts(tmp_path / "a.jsonl", skipped.append)) == ["one\u2028line 🌋"] * 2
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{tmp_path}/a.jsonl, line 2 is ")
    assert said in skipped[0]
    if b"\xff" in line or b"ud800" in line:  # the rest of a list can't be told apart where it is no JSON
        (tmp_path / "b.json").write_bytes(b"[" + b",".join([good, line, good]) + b"]")
        assert list(read_texts(tmp_path / "b.json", skipped.append)) == ["one\u2028line 🌋"] * 2
        assert f"{tmp_path}/b.json, record 1: a text in it is not UTF-8, or has half" in skipped[1]
        with pytest.raises(ValueError, match="record 1: a text in it is not UTF-8"):
            read_entries(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl.gz", b'{"text": "x"}\n' + b"\0" * 10_000, "a.jsonl.gz, line 2 is longer than 1,000 bytes"),
        ("a.jsonl.gz", b"[" + b" " * 99 + b"\n" + b" \n" * 5000, "has more than 1,000 bytes in one piece"),
        ("a.txt.gz", b"x" * 10_000, "a.txt.gz has more than 1,000 bytes in one piece"),
        ("a.json.gz", b"x" * 10_000, "a.json.gz has more than 1,000 bytes in one piece"),
    ],
)
def test_what_a_small_file_may_hold_has_a_bound(tmp_path, monkeypatch, name, content, said):
    monkeypatch.setattr("k2mini.data.documents.MOST", 1000)
    (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=said):
        list(read_texts(tmp_path / name, print))
    (tmp_path / "long.jsonl").write_text('{"text": "x"}\n' * 1000)  # a line has a bound, not the file
    assert len(list(read_texts(tmp_path / "long.jsonl", print))) == 1000


def test_names_that_are_not_utf8(tiny_tokenizer, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    (folder / "a.txt").write_text("granite")
    (folder / "b.txt").write_bytes(b"\xff")
    prepare([folder], tiny_tokenizer.path, tmp_path / "out", on_error="skip")
    names = [source["file"] for source in read_corpus_manifest(tmp_path / "out")["sources"]]
    assert names == [f"{tmp_path}/\\udcff/a.txt", f"{tmp_path}/\\udcff/b.txt"]


def test_a_full_disk_is_named(folder, tiny_tokenizer, tmp_path):
    command = f"ulimit -f 1; exec {sys.executable} -m k2mini prepare {folder} --tokenizer {tiny_tokenizer.path}"
    big(folder, 1)
    done = subprocess.run(["bash", "-c", f"{command} --out {tmp_path}/out"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert ".out.parts: File too large" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_large_vocabulary_without_bos(folder, tmp_path, workers):
    """Tokens are stored in 32 bits, and documents are told apart by their places alone."""
    pieces = [f"<{n}>" for n in range(66_000)]
    path = write_json_tokenizer(tmp_path / "tokenizer", config={"eos_token": ADDED}, generation=None, pieces=pieces)
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, tokenizer.vocab_size - 1)
    manifest = prepare([folder], path, tmp_path / "out", workers=workers)
    assert (manifest["dtype"], manifest["vocab_size"]) == ("uint32", tokenizer.vocab_size)
    assert manifest["tokenizer"] == tokenizer.fingerprint()
    corpus = Corpus(tmp_path / "out")
    tokens, offsets = corpus.read(0, corpus.num_tokens)
    starts = np.flatnonzero(offsets == 0)
    assert len(starts) == corpus.num_documents > 200
    assert (tokens[starts[1:] - 1] == tokenizer.eos_id).all()
    assert (tokens == tokenizer.eos_id).sum() == corpus.num_documents
    assert tokenizer.eos_id > 2**16
    texts = [text for file in list_files([folder]) for text in read_texts(file, raise_error)]
    assert tokenizer.decode(tokens[: starts[1] - 1].tolist()) == texts[0]


def test_documents_without_bos_and_eos(tmp_path, caplog):
    """Nothing stands between them, which is said; and one of which nothing is left is named."""
    path = write_json_tokenizer(tmp_path / "tokenizer")
    content = json.loads(path.read_text())
    content["model"]["vocab"].pop("Z")
    path.write_text(json.dumps(content))
    (tmp_path / "text.jsonl").write_text('{"text": "granite"}\n{"text": "ZZ"}\n{"text": "basalt"}\n')
    with pytest.raises(ValueError, match=r"text.jsonl: a document has no token in .*tokenizer.json; --on-error skip"):
        prepare([tmp_path / "text.jsonl"], path, tmp_path / "out", eos=False)
    assert "tokenizer.json has no BOS: without EOS, nothing will stand between two documents" in caplog.text
    manifest = prepare([tmp_path / "text.jsonl"], path, tmp_path / "out", eos=False, on_error="skip")
    assert (manifest["skipped"], manifest["splits"]["train"]["documents"]) == (1, 2)
    tokens, offsets = Corpus(tmp_path / "out").read(0, manifest["splits"]["train"]["tokens"])
    assert Tokenizer(path).decode(tokens.tolist()) == "granitebasalt"
    assert (offsets == 0).sum() == 2
