"""Corpora: every document of the input is kept or listed, and the bytes are the same whatever happens on the way."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from html import escape
from pathlib import Path

import pytest

from k2mini.corpus import build as building
from k2mini.corpus import merge as merging
from k2mini.corpus import workers
from k2mini.corpus.build import build
from k2mini.corpus.clean import choose
from k2mini.corpus.group import Group, Settings, read_group
from k2mini.corpus.merge import merge
from k2mini.corpus.report import page
from k2mini.corpus.shards import corpora_of, read_corpus, read_manifest
from k2mini.data.documents import list_files
from k2mini.data.prepare import prepare
from k2mini.files import sha256
from tests.conftest import ROOT
from tests.helpers import one_step

WORDS = (
    "granite basalt quartz feldspar mica olivine the of and is made plates crust mantle volcano lava erodes river "
    "delta sediment fault fold strike dip magma ridge trench glacier moraine till karst cave limestone marble schist "
    "to be that have with zircon isotope age strata fossil ammonite trilobite reef shale siltstone breccia"
)
QUESTION = "Which of these rocks is formed when limestone is heated and pressed deep in the crust?"
NASTY = "</pre><script>alert(1)</script><img src=x onerror=alert(1)> & \"'"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SETTINGS = Settings(choose([], ["language", "mojibake"]))  # whose packages take a second to load


def prose(seed):
    """150 random words in sentences, a paragraph each 50."""
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(WORDS.split(), k=10)).capitalize() + "." for _ in range(15)]
    return "\n\n".join(" ".join(sentences[start : start + 5]) for start in (0, 5, 10))


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_inputs(folder, number=40):
    """Markdown, JSONL and what nobody can read: equal texts, near ones, short ones, a question of a benchmark."""
    (folder / "below").mkdir(parents=True)
    for n in range(number):
        (folder / f"{n:04}.md").write_text(f"# Rock {n}\n\n{prose(n)}", encoding="utf-8")
    records = [{"text": prose(n), "year": 1990 + n % 4, "licence": "CC BY"} for n in range(1000, 1010)]
    records += [{"text": f"# Rock {n}\n\n{prose(n)}"} for n in (3, 5)]  # as they stand in files
    records += [{"text": f"# Rock {n}\n\n{prose(n)}".replace("the", "some", 1) + " More."} for n in (7, 8)]  # longer
    records += [{"text": "too short"}, {"texts": "no text"}]
    write_jsonl(folder / "below/a.jsonl", records)
    (folder / "below/latin.txt").write_bytes(b"caf\xe9 " * 100)
    (folder / "below/junk.pdf").write_bytes(b"no PDF")
    (folder / "zz.txt").write_text(f"{prose('asked')}\n\n{QUESTION} {prose('answer')}")
    (folder / "left.docx").write_text("passed over")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    write_inputs(folder := tmp_path_factory.mktemp("inputs") / "papers")
    return folder


@pytest.fixture(scope="module")
def corpus(inputs, tmp_path_factory):
    """By one worker."""
    build([inputs], out := tmp_path_factory.mktemp("corpus") / "out", SETTINGS)
    return out


@pytest.fixture
def here(monkeypatch):
    """Groups are read in this process, which starts no others."""

    def read_groups(groups, _workers, *arguments):
        for group in groups:
            read_group(group, *arguments, lambda _: None)

    monkeypatch.setattr(building, "read_groups", read_groups)


def digests(folder):
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def rejected(corpus):
    return [json.loads(line) for line in (corpus / "rejected.jsonl").read_text().splitlines()]


def test_everything_is_kept_or_listed(inputs, corpus):
    records, dropped, manifest = list(read_corpus(corpus)), rejected(corpus), read_manifest(corpus)
    sources = [record["source"] for record in [*records, *dropped]]
    lines = {f"{inputs}/below/a.jsonl, line {n}" for n in range(1, 17)}
    files = {str(path) for path in inputs.rglob("*") if path.suffix in (".md", ".txt", ".pdf")}
    assert Counter(sources) == Counter(lines | files)
    assert all(record["sha256"] == hashlib.sha256(record["text"].encode()).hexdigest() for record in records)
    expected = {f"# Rock {n}\n\n{prose(n)}" for n in range(40) if n not in (7, 8)} | {
        prose(n) for n in range(1000, 1010)
    }
    assert {r["text"] for r in records if not r["source"].endswith(("13", "14", "zz.txt"))} == expected
    fates = {record["source"].removeprefix(f"{inputs}/"): record for record in dropped}
    assert {source: record["filter"] for source, record in fates.items()} == {
        "0007.md": "near duplicates",  # the longer copy is kept, the first of equal ones
        "0008.md": "near duplicates",
        "below/a.jsonl, line 11": "exact duplicates",
        "below/a.jsonl, line 12": "exact duplicates",
        "below/a.jsonl, line 15": "quality",
        "below/a.jsonl, line 16": "reading",
        "below/junk.pdf": "reading",
        "below/latin.txt": "reading",
    }
    assert fates["0007.md"]["of"] == f"{inputs}/below/a.jsonl, line 13"
    assert fates["below/a.jsonl, line 12"]["of"] == f"{inputs}/0005.md"
    assert fates["0008.md"]["beginning"] == f"# Rock 8\n\n{prose(8)}"[:500]
    assert manifest["documents"] == len(records) == 51
    assert manifest["words"] == sum(len(record["text"].split()) for record in records)
    assert manifest["inputs"]["files"] == 44
    assert manifest["licences"] == {"": 41, "CC BY": 10}
    assert manifest["years"] == {"": 41, "1990": 3, "1991": 3, "1992": 2, "1993": 2}
    assert sum(manifest["lengths"].values()) == 51


def test_the_funnel_adds_up(corpus):
    manifest, steps = read_manifest(corpus), read_manifest(corpus)["counts"]
    assert [step["filter"] for step in steps] == [
        "reading", *SETTINGS.filters, "exact duplicates", "near duplicates"
    ]  # fmt: skip
    after = [step["in"] for step in steps[1:]] + [manifest["documents"]]
    assert [step["in"] - step["dropped"] for step in steps] == after
    counted = Counter(record["filter"] for record in rejected(corpus))
    assert {step["filter"]: step["dropped"] for step in steps if step["dropped"]} == counted
    hashes = [shard["sha256"] for shard in manifest["shards"]]
    assert hashes == [sha256(corpus / shard["name"]) for shard in manifest["shards"]]
    assert manifest["fingerprint"] == hashlib.sha256("".join(hashes).encode()).hexdigest()
    assert {"numpy", "lxml"} < set(manifest["versions"])
    assert manifest["filters"]["words"]["minimum"] == 50


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_bytes_for_any_number_of_workers(inputs, corpus, tmp_path, number):
    build([inputs], tmp_path / "out", SETTINGS, workers=number)
    assert digests(tmp_path / "out") == digests(corpus)
    assert not list(tmp_path.glob(".*"))


def test_the_same_bytes_for_parts(inputs, corpus, here, tmp_path):
    for k in (1, 2, 3):
        build([inputs], tmp_path / f"part{k}", SETTINGS, part=(k, 3))
    merge([tmp_path / f"part{k}" for k in (3, 1, 2)], tmp_path / "merged")
    assert digests(tmp_path / "merged") == digests(corpus)
    assert not list(tmp_path.glob(".*"))


def test_small_groups_and_shards(inputs, corpus, here, tmp_path, monkeypatch):
    """The documents are the same, in the same order."""
    monkeypatch.setattr(building, "GROUP_BYTES", 1)
    monkeypatch.setattr(merging, "SHARD_BYTES", 5000)
    monkeypatch.setattr(merging, "CHUNK", 3)
    manifest = build([inputs], tmp_path / "out", SETTINGS)
    assert list(read_corpus(tmp_path / "out")) == list(read_corpus(corpus))
    assert (tmp_path / "out/rejected.jsonl").read_bytes() == (corpus / "rejected.jsonl").read_bytes()
    assert len(manifest["shards"]) > 9
    assert all(shard["bytes"] <= 5000 for shard in manifest["shards"])


def test_contaminated_documents_are_dropped_or_cut(inputs, corpus, here, tmp_path):
    write_jsonl(tmp_path / "bench.jsonl", [{"question": QUESTION, "answer": "marble"}])
    for how in ("drop", "cut"):
        settings = Settings(SETTINGS.filters, decontaminate=(tmp_path / "bench.jsonl",), contaminated=how)
        manifest = build([inputs], tmp_path / how, settings)
        assert manifest["decontaminate"] == [{"file": "bench.jsonl", "sha256": sha256(tmp_path / "bench.jsonl")}]
        (found,) = [record for record in rejected(tmp_path / how) if "contamination" in record["filter"]]
        assert found["source"] == f"{inputs}/zz.txt"
        assert found["reason"].startswith("bench.jsonl")
        (step,) = [step for step in manifest["counts"] if step["filter"] == "contamination"]
        assert (step["dropped"], step["changed"]) == ((1, 0) if how == "drop" else (0, 1))
    kept = {record["source"]: record["text"] for record in read_corpus(corpus)}
    cut = {record["source"]: record["text"] for record in read_corpus(tmp_path / "cut")}
    assert prose("asked") in cut[f"{inputs}/zz.txt"]
    assert "Which of these rocks" not in cut[f"{inputs}/zz.txt"]
    assert kept.keys() == cut.keys()
    assert kept.keys() - {record["source"] for record in read_corpus(tmp_path / "drop")} == {f"{inputs}/zz.txt"}


def test_what_is_left_of_a_document_that_was_cut_is_counted_again(here, tmp_path):
    write_jsonl(tmp_path / "bench.jsonl", [{"question": QUESTION}])
    text = "# Rocks\n\n" + " ".join(prose(0).split()) + f" {QUESTION}\n\nThat is all."
    write_jsonl(tmp_path / "in.jsonl", [{"text": text}, {"text": prose(1)}])
    settings = Settings(SETTINGS.filters, decontaminate=(tmp_path / "bench.jsonl",), contaminated="cut")
    build([tmp_path / "in.jsonl"], tmp_path / "out", settings)
    (found,) = rejected(tmp_path / "out")
    assert found["filter"] == "contamination"
    assert found["reason"].endswith("; without it 3 words (least: 50)")


STAND_IN = """
import os, signal, time
from k2mini.corpus import readers
real = readers.read_file
def read_file(path, *rest, **more):
    if "crash" in path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in path.name:
        time.sleep(600)
    if "odd" in path.name:
        raise KeyError("odd")
    yield from real(path, *rest, **more)
readers.read_file = read_file
"""


def test_files_that_end_or_hold_up_their_reader_are_listed(tmp_path, monkeypatch):
    """As a C++ library may, at a PDF. Workers take the stand-in from their PYTHONPATH."""
    (tmp_path / "in").mkdir()
    for n, name in enumerate(("a", "crash", "d", "hang", "odd", "z")):
        (tmp_path / f"in/{name}.md").write_text(prose(n))
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(building.__file__).parents[2]}")
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    build([tmp_path / "in"], tmp_path / "out", SETTINGS)
    assert [Path(record["source"]).stem for record in read_corpus(tmp_path / "out")] == ["a", "d", "z"]
    assert {
        Path(record["source"]).stem: (record["filter"], record["reason"]) for record in rejected(tmp_path / "out")
    } == {
        "crash": ("reading", "its reader died (exit code -11)"),
        "hang": ("reading", "no document came for 1 s"),
        "odd": ("reading", "KeyError: 'odd'"),
    }


FILTER = """
import os, signal
from k2mini.corpus import clean
real = clean.FILTERS["words"]
def words(document, **more):
    if "CRASH" in document.text:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "KILLED" in document.text:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(document, **more)
clean.FILTERS["words"] = words
"""


def test_one_document_costs_no_other_of_its_file(tmp_path, monkeypatch):
    """And a worker that the system kills says nothing of a document."""
    write_jsonl(tmp_path / "in.jsonl", [{"text": f"{prose(n)} {'CRASH' * (n in (1, 3))}"} for n in range(5)])
    (tmp_path / "sitecustomize.py").write_text(FILTER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(building.__file__).parents[2]}")
    build([tmp_path / "in.jsonl"], tmp_path / "out", SETTINGS)
    lines = [f"{tmp_path}/in.jsonl, line {n}" for n in range(1, 6)]
    assert [record["source"] for record in read_corpus(tmp_path / "out")] == lines[::2]
    died = ("reading", "its reader died (exit code -11)")
    found = {record["source"]: (record["filter"], record["reason"]) for record in rejected(tmp_path / "out")}
    assert found == {lines[1]: died, lines[3]: died}
    write_jsonl(tmp_path / "in.jsonl", [{"text": prose(0)}, {"text": f"{prose(1)} KILLED"}])
    with pytest.raises(ValueError, match=r"killed at document 2 of .*in.jsonl, as is done where memory runs out"):
        build([tmp_path / "in.jsonl"], tmp_path / "killed", SETTINGS)
    assert not (tmp_path / "killed").exists()


def test_a_file_that_ends_its_reader_keeps_what_was_read(here, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"text": prose(n)} for n in range(5)])
    group, said = Group([tmp_path / "in.jsonl"], tmp_path / "part", {tmp_path / "in.jsonl": {4: "died"}}), []
    read_group(group, SETTINGS, None, said.append)
    assert [step for _, step in said] == [*range(5)]
    lines = [json.loads(line) for line in (tmp_path / "part.jsonl").read_text().splitlines()]
    assert [line.get("reason") for line in lines] == [None, None, "after 2 documents, died"]


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(here, tmp_path, kills):
    """And started again: it goes on from the groups that are complete, and the bytes are the same."""
    write_inputs(tmp_path / "in", 40 if kills == 1 else 1500)
    command = [sys.executable, "-m", "k2mini", "corpus", tmp_path / "in", "--workers", "2", "--without", "mojibake"]
    command += ["language", "--out"]
    start = time.monotonic()
    build([tmp_path / "in"], tmp_path / "whole", SETTINGS)
    long, draw = time.monotonic() - start, random.Random(kills)
    for k in range(kills):
        process = subprocess.Popen([*command, tmp_path / "out"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while k == 0 and not list(tmp_path.glob(".out.parts/*.json")) and process.poll() is None:
            time.sleep(0.005)  # the first kill comes when something is complete
        time.sleep(draw.uniform(0.5, 1 + long) if k else 0)  # starting takes half a second
        process.kill()
        process.wait()
    done = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0 or "exists already" in done.stderr, done.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not [path.name for path in tmp_path.glob(".*")]


def test_settings_that_change_between_starts(inputs, corpus, here, tmp_path, monkeypatch, caplog):
    """What was read with others is not used."""
    monkeypatch.setattr(building, "merge", lambda *_, **__: 1 / 0)
    for words in ("9", "8"):
        with pytest.raises(ZeroDivisionError):
            build([inputs], tmp_path / "out", Settings(choose([f"words.minimum={words}"], ["language", "mojibake"])))
    assert "of other settings or inputs" in caplog.text
    monkeypatch.setattr(building, "merge", merge)
    build([inputs], tmp_path / "out", SETTINGS)
    assert digests(tmp_path / "out") == digests(corpus)


def test_forgetting_force_when_going_on_costs_nothing(inputs, corpus, here, tmp_path, monkeypatch):
    """What a killed run left stays where it was to replace the corpus; where the corpus was made of it, it goes."""
    shutil.copytree(corpus, out := tmp_path / "out", copy_function=shutil.copy2)
    settings = Settings(choose(["words.minimum=9"], ["language", "mojibake"]))
    with monkeypatch.context() as patch:
        patch.setattr(building, "merge", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build([inputs], out, settings, force=True)
    left = digests(parts := tmp_path / ".out.parts")
    with pytest.raises(ValueError, match="exists already"):
        build([inputs], out, settings)
    assert digests(parts) == left
    (out / "corpus.json").touch()
    with pytest.raises(ValueError, match="exists already"):
        build([inputs], out, settings)
    assert not parts.exists()


def test_pdfs_go_to_a_grobid(inputs, here, tmp_path, monkeypatch):
    """What it makes is read under the name of the PDF; what it can't is listed; the rest is read as ever."""
    (tmp_path / "in").mkdir()
    for name in ("a.pdf", "b.pdf", "c.md"):
        (tmp_path / "in" / name).write_text(prose(name))

    def process(pdfs, url, folder, *, on_error):
        assert (url, [pdf.name for pdf in pdfs]) == ("http://127.0.0.1:1", ["a.pdf", "b.pdf"])
        folder.mkdir()
        (folder / "tei.md").write_text(prose("made"))
        on_error(str(pdfs[1]), "it has no text")
        return {pdfs[0]: folder / "tei.md"}

    monkeypatch.setattr("k2mini.corpus.grobid.process", process)
    build([tmp_path / "in"], tmp_path / "out", Settings(SETTINGS.filters, grobid="http://127.0.0.1:1"))
    records = {record["source"]: record["text"] for record in read_corpus(tmp_path / "out")}
    assert records == {f"{tmp_path}/in/a.pdf": prose("made"), f"{tmp_path}/in/c.md": prose("c.md")}
    (listed,) = rejected(tmp_path / "out")
    assert (listed["source"], listed["reason"]) == (f"{tmp_path}/in/b.pdf", "it has no text")


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "a.md").write_text(prose(1))
    (tmp_path / f"part-{os.getpid()}.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        read_group(Group([tmp_path / "a.md"], tmp_path / "part"), SETTINGS, None, lambda _: None)
    assert raised.value.filename == str(tmp_path)
    assert not (tmp_path / "part.json").exists()


def test_the_slurm_script(tmp_path):
    """Each job of the array makes the part of its number."""
    (tmp_path / "k2mini").write_text('#!/bin/bash\nprintf "%s\\n" "$@"')
    (tmp_path / "k2mini").chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_CPUS_PER_TASK": "8"}
    command = ["bash", ROOT / "configs/slurm_corpus.sh", "a folder", "out", "--marks", "k2"]
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = ["corpus", "a folder", "--out", "out.part2", "--part", "2/16", "--workers", "8", "--marks", "k2"]
    assert done.stdout.splitlines() == expected


def test_without_the_extra(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lxml", None)
    with pytest.raises(ValueError, match="k2mini corpus needs the extra 'corpus'"):
        build([inputs], tmp_path / "out", SETTINGS)
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_built(inputs, corpus, here, tmp_path, run):
    def fails(said, *arguments):
        status, out, err = run("corpus", *arguments)
        assert (status, out) == (2, "")
        assert said in err
        assert "Traceback" not in err

    out = ("--out", tmp_path / "out")
    fails("there is no file or folder", tmp_path / "none", *out)
    fails("name files or folders to read", *out)
    fails("exists already", inputs, "--out", corpus)
    fails("is inside", inputs, "--out", inputs / "corpus")
    fails("there is no filter 'c5'", inputs, *out, "--without", "c5")
    fails("sets no threshold", inputs, *out, "--set", "words.least=3")
    fails("--near-duplicates must be above 0", inputs, *out, "--near-duplicates", 0)
    fails("--workers must be at least 1", inputs, *out, "--workers", 0)
    fails("--part must be K/N with K from 1 to N, such as 2/16, not '4/3'", inputs, *out, "--part", "4/3")
    said = f"no document is left: reading dropped 1, the first, {inputs}/below/junk.pdf, since: not a PDF"
    fails(said, inputs / "below/junk.pdf", *out)
    (tmp_path / "empty.jsonl").write_text("")
    fails("no document is left: the files have none", tmp_path / "empty.jsonl", *out)
    fails("is no corpus: it has no corpus.json", "--report", inputs, "--out", tmp_path / "page.html")
    fails("a page's name ends in .html", "--report", corpus, "--out", tmp_path / "page")
    assert not (tmp_path / "out").exists()
    few, less = inputs / "below", ("--without", "language", "mojibake")  # which take a second to load
    for name, *more in (("1", "1/3"), ("2", "2/3"), ("2of4", "2/4"), ("other", "2/3", "--set", "words.minimum=3")):
        status, said, err = run("corpus", few, "--out", tmp_path / name, *less, "--part", *more)
        assert status == 0, err
        assert said.startswith(f"part {more[0].replace('/', ' of ')}")
    one, two = tmp_path / "1", tmp_path / "2"
    fails("merge needs parts", "merge", *out)
    fails("of 3 parts 3 is missing", "merge", one, two, *out)
    fails(f"{two} and {two} are the same part, 2", "merge", one, two, two, *out)
    fails("other was made with other filters than", "merge", one, tmp_path / "other", *out)
    fails(f"{tmp_path}/2of4 is one of 4 parts, {one} is one of 3", "merge", one, tmp_path / "2of4", *out)
    fails(f"{corpus} is no part of a corpus", "merge", one, corpus, *out)
    (tmp_path / "odd").mkdir()
    for note in ([1], {"format": "k2mini corpus part 1"}):
        (tmp_path / "odd/part.json").write_text(json.dumps(note))
        fails("odd is no part of a corpus", "merge", tmp_path / "odd", *out)
    lacking = {key: value for key, value in read_manifest(corpus).items() if key != "years"}
    (tmp_path / "odd/corpus.json").write_text(json.dumps(lacking))
    shutil.copy(corpus / "documents-00000.jsonl", tmp_path / "odd")
    fails("corpus.json is damaged: it has no years", "--report", tmp_path / "odd", "--out", tmp_path / "page.html")
    fails(f"{corpus} is a corpus already; to clean it again, name its documents-*.jsonl", corpus.parent, *out)
    with pytest.raises(ValueError, match="1 is a part of a corpus; `k2mini corpus merge` makes a corpus of all parts"):
        list_files([one])
    for option in (("--set", "words.minimum=3"), ("--near-duplicates", 0.9)):
        fails(f"{option[0]} is for making a corpus or its parts", "merge", one, two, *out, *option)
    assert run("corpus", few, "--out", tmp_path / "3", *less, "--part", "3/3")[0] == 0
    status, said, _ = run("corpus", "merge", one, two, tmp_path / "3", *out, "--json")
    assert status == 0
    assert json.loads(said) == read_manifest(tmp_path / "out")
    with next(one.glob("*.jsonl")).open("a") as file:
        file.write("{}")
    fails("is damaged; make the part again", "merge", one, two, tmp_path / "3", "--out", tmp_path / "again")


def test_prepare_takes_the_shards_alone(corpus, tiny_tokenizer, tiny_directory, tmp_path, run):
    """A run's checkpoint carries on what the corpus is known by."""
    (tmp_path / "more").mkdir()
    shutil.copytree(corpus, tmp_path / "more/corpus")
    (tmp_path / "more/other.txt").write_text("Granite is a rock.")
    known = [{"fingerprint": read_manifest(corpus)["fingerprint"], "decontaminate": [], "contaminated": "drop"}]
    for path, number in ((corpus, 51), (tmp_path / "more", 52)):
        made = tmp_path / f"prepared{number}"
        manifest = prepare([path], tiny_tokenizer.path, made)
        assert manifest["splits"]["train"]["documents"] == number
        assert manifest["corpora"] == known
    assert "corpora" not in prepare([tmp_path / "more/other.txt"], tiny_tokenizer.path, tmp_path / "plain")
    for path in (tmp_path / "prepared51", corpus):
        file = one_step(tmp_path, tiny_directory, path=str(path), seq_len=32)
        assert run("pretrain", file, f"run.dir={tmp_path}/{path.name}-run")[0] == 0
        state = json.loads(next((tmp_path / f"{path.name}-run/checkpoints").glob("*/state.json")).read_text())
        assert state["identity"]["data"]["corpora"] == known
    shard = tmp_path / "more/corpus/documents-00000.jsonl"
    shard.write_text(shard.read_text().replace("granite", "basalt", 1))
    with pytest.raises(ValueError, match=r"documents-00000.jsonl is not as .*corpus.json says; make the corpus again"):
        corpora_of([shard])
    shard.unlink()
    with pytest.raises(ValueError, match=r"lacks documents-00000.jsonl"):
        prepare([tmp_path / "more"], tiny_tokenizer.path, tmp_path / "gone")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["dark", pytest.param("light", marks=pytest.mark.slow)])
def test_the_page(corpus, tmp_path, run, scheme):
    """It has documents of each fate, loads nothing and says nothing on the console."""
    odd = shutil.copytree(corpus, tmp_path / "corpus")
    with (odd / "rejected.jsonl").open("a") as file:
        file.write(
            json.dumps({"source": "x", "filter": NASTY, "reason": NASTY, "of": NASTY, "beginning": NASTY}) + "\n"
        )
    status, out, err = run("corpus", "--report", odd, "--out", tmp_path / "page.html")
    assert (status, out) == (0, f"{tmp_path}/page.html\n"), err
    text = (tmp_path / "page.html").read_text()
    assert text == page(odd)
    folded = re.findall(r"<summary>([^<]*)</summary>(.*?)</details>", text, re.DOTALL)
    assert {name: body.count("<h3>") for name, body in folded} == {
        "kept: 51": 10, "quality: 1": 1, "reading: 3": 3, "exact duplicates: 2": 2, "near duplicates: 2": 2,
        f"{escape(NASTY)}: 1": 1,
    }  # fmt: skip
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,2000"]
    command += [f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert not re.findall(r"https?://|@import|url\(|<script", text)
    assert (tmp_path / "page.png").stat().st_size > 10_000
