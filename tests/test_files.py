"""Outputs: what may be written, one writer at a time, what a killed process leaves; and readers of untrusted files."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from k2mini.files import check_output, new_directory, new_file, output, parse_json, read_json, read_text, write_text
from k2mini.weights.model_directory import model_directory


def make(path, content):
    path.mkdir()
    (path / "file").write_text(content)


def fill(path, content, **options):
    with new_directory(path, **options) as beside:
        (beside / "file").write_text(content)


@pytest.mark.parametrize(
    ("standing", "kept", "said"),
    [
        ({".out.old": "old", ".out.tmp": "new"}, "old", "it is the old one again"),
        ({".out.old": "old"}, "old", "it is the old one again"),
        ({"out": "new", ".out.old": "old"}, "new", "removed .*old, which a killed process left"),
        ({"out": "old", ".out.tmp": "part"}, "old", "removed .*tmp, which a killed process left"),
    ],
)
def test_a_killed_swap_is_undone(tmp_path, caplog, standing, kept, said):
    for name, content in standing.items():
        make(tmp_path / name, content)
    with output(tmp_path / "out", force=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == kept
    assert re.search(said, caplog.text)
    caplog.clear()
    with output(tmp_path / "out", force=True):
        pass
    assert caplog.text == ""


def test_leftovers_go_even_where_the_output_is_refused(tmp_path):
    make(tmp_path / "out", "done")
    make(tmp_path / ".out.tmp", "part")
    with pytest.raises(ValueError, match="exists already"):
        fill(tmp_path / "out", "again")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_reader_puts_it_right_too(tmp_path):
    make(tmp_path / ".out.old", "old")
    assert (model_directory(tmp_path / "out") / "file").read_text() == "old"


HOLD = """
import sys, time
from pathlib import Path
from k2mini.files import new_directory
with new_directory(Path(sys.argv[1])) as beside:
    (beside / "file").write_text("mine")
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that fills `out` until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_writer_is_refused(tmp_path, holder):
    with pytest.raises(ValueError, match=rf"out is being written by process {holder.pid} on .*; wait for its end"):
        fill(tmp_path / "out", "theirs")
    holder.communicate("\n", timeout=20)
    assert (tmp_path / "out" / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock", ".out.tmp"}
    fill(tmp_path / "out", "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "theirs"


def test_a_process_may_claim_what_it_holds(tmp_path):
    with output(tmp_path / "out"):
        fill(tmp_path / "out", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_many_take_turns(tmp_path):
    """Each of four processes adds one to a file, a hundred times, under its lock."""
    (tmp_path / "count").write_text("0")
    code = """
import sys, time
from pathlib import Path
from k2mini.files import output
path, done = Path(sys.argv[1]), 0
while done < 100:
    try:
        with output(path, file=True, force=True):
            path.write_text(str(int(path.read_text()) + 1))
        done += 1
    except ValueError as error:
        assert "is being written by" in str(error), error
"""
    command = [sys.executable, "-c", code, str(tmp_path / "count")]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "400"


def test_a_directory_that_is_gone_on_with(tmp_path):
    run = tmp_path / "run"
    with output(run, mark=("config.yaml", "file")):
        assert (tmp_path / ".run.lock").read_text().startswith(f"process {os.getpid()} on ")
        (run / "config.yaml").touch()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    with output(run, mark=("config.yaml", "file")):
        pass
    make(tmp_path / "other", "mine")
    check_output(tmp_path / "other", mark=("config.yaml", "model"))  # a log of the scheduler's, say
    with pytest.raises(ValueError, match=r"other holds something else: file, and no config.yaml"):
        check_output(tmp_path / "other", mark=("config.yaml", "file"))
    (tmp_path / "link").symlink_to(run)
    with output(tmp_path / "link", mark=("config.yaml",)):
        assert (tmp_path / ".run.lock").exists()
        with pytest.raises(ValueError, match="is a symbolic link"):
            check_output(tmp_path / "link")


HOLD_RUN = """
import sys
from pathlib import Path
from k2mini.files import output
with output(Path(sys.argv[1]), mark=("file",)):
    (Path(sys.argv[1]) / "file").write_text("mine")
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_commands_of_two_kinds_at_one_place(tmp_path):
    """An export, say, over a run that is going on; and a run where an export is being filled."""
    out = tmp_path / "out"
    for hold, ask in ((HOLD_RUN, lambda: fill(out, "x", force=True)), (HOLD, lambda: use(out))):
        command = [sys.executable, "-c", hold, str(out)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"out is being written by process {process.pid}"):
            ask()
        process.communicate("\n", timeout=20)
        assert process.returncode == 0
        assert (tmp_path / "out" / "file").read_text() == "mine"
        (tmp_path / "out" / "file").unlink()
        (tmp_path / "out").rmdir()


def use(path):
    with output(path, mark=("file",)):
        pass


def test_links_that_were_planted_are_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in (".file.tmp", ".file.lock", ".out.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), output(tmp_path / "file", file=True):
        pass
    (tmp_path / ".file.lock").unlink()
    write_text(tmp_path / "file", "text")
    assert not (tmp_path / "file").is_symlink()
    fill(tmp_path / "out", "one")
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_input_is_never_an_output(tmp_path):
    make(tmp_path / "model", "weights")
    weights = tmp_path / "model" / "file"
    (tmp_path / "again").hardlink_to(weights)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for path, said in (
        (tmp_path / "model", "is itself an input"),
        (weights, "is inside .*model, which is an input"),
        (tmp_path / "link" / "file", "is inside .*model, which is an input"),
        (tmp_path, "an input, is inside"),
    ):
        with pytest.raises(ValueError, match=said):
            check_output(path, file=path.is_file(), force=True, inputs=[tmp_path / "model"])
    for path in (weights, tmp_path / "again"):
        with pytest.raises(ValueError, match="is itself an input"):
            check_output(path, file=True, force=True, inputs=[weights])


def test_a_file_that_exists_needs_force(tmp_path):
    (tmp_path / "file").write_text("one")
    with pytest.raises(ValueError, match="exists already; name another place, remove it, or replace it with --force"):
        check_output(tmp_path / "file", file=True)
    check_output(tmp_path / "file", file=True, force=True)


def test_a_failed_file_leaves_nothing(tmp_path):
    def fail():
        with new_file(tmp_path / "file") as beside:
            beside.write_text("part")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice in an object"),
        (b"1" * 5000, "is not valid JSON: Exceeds the limit"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b'["\xff"]', r"is not UTF-8 \(byte 2\)"),
        (b"[1,", "is not valid JSON: "),
        (b"", "is not valid JSON: "),
    ],
)
def test_json_that_is_refused(tmp_path, content, said):
    (tmp_path / "file.json").write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"{tmp_path}/file.json .*{said}"):
        read_json(tmp_path / "file.json")
    assert time.monotonic() - start < 5


def test_json_that_is_read(tmp_path):
    for text in ('\ufeff{"a": 1}', '["\\ud83d\\ude00"]', '["\u2028"]', '["\\\\ud"]'):
        (tmp_path / "file.json").write_text(text, encoding="utf-8")
        assert read_json(tmp_path / "file.json") == json.loads(text.removeprefix("\ufeff"))
    assert parse_json(b"1", "line 1") == 1


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config.json is no regular file of at most"):
        read_json(tmp_path / "config.json")
    with pytest.raises(OSError, match="No such file"):
        read_text(tmp_path / "missing")


def test_replacing(tmp_path):
    fill(tmp_path / "out", "one")
    with pytest.raises(ValueError, match="exists already; name another place, remove it, or replace it with --force"):
        fill(tmp_path / "out", "two")
    fill(tmp_path / "out", "two", force=True)
    assert (tmp_path / "out" / "file").read_text() == "two"
    with pytest.raises(RuntimeError), new_directory(tmp_path / "out", force=True):
        raise RuntimeError
    assert (tmp_path / "out" / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_targets_that_are_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name, said in (("file", "is a file"), ("link", "is a symbolic link")):
        with pytest.raises(ValueError, match=said):
            check_output(tmp_path / name, force=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="there is no permission to write in"):
        fill(tmp_path / "closed" / "out", "one")


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        fill(tmp_path / "out", "one")
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == 0o640
