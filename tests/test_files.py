"""What a killed process leaves beside a target, in every state that the protocol has."""

import os
import re

import pytest

from k2mini.files import check_new, new_directory, recover
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
        ({"out": "old", ".out.new": "new"}, "old", "it is still the old one"),
        ({".out.old": "old", ".out.new": "new"}, "new", "it is the new one now"),
        ({".out.old": "old"}, "old", "it is the old one again"),
        ({"out": "new", ".out.old": "old"}, "new", "removed what it replaced"),
        ({"out": "old", ".out.99.tmp": "part"}, "old", "which a killed process left unfinished"),
    ],
)
def test_a_killed_swap_is_finished_or_undone(tmp_path, caplog, standing, kept, said):
    for name, content in standing.items():
        make(tmp_path / name, content)
    recover(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == kept
    assert re.search(said, caplog.text)
    caplog.clear()
    recover(tmp_path / "out")
    assert caplog.text == ""


def test_a_reader_puts_it_right_too(tmp_path):
    make(tmp_path / ".out.old", "old")
    assert (model_directory(tmp_path / "out") / "file").read_text() == "old"


def test_what_is_being_filled_is_left_alone(tmp_path):
    with new_directory(tmp_path / "out") as beside:
        (beside / "file").write_text("mine")
        recover(tmp_path / "out")
        assert beside.is_dir()
    assert (tmp_path / "out" / "file").read_text() == "mine"


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
            check_new(tmp_path / name, force=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        fill(tmp_path / "closed" / "out", "one")


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        fill(tmp_path / "out", "one")
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == 0o640
