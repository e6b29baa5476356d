"""Reading files that nobody vouches for, and writing files and directories that appear whole or not at all.

What is written stands beside its place until it is complete, is synced, then renamed. Beside NAME there may be:
    .NAME.tmp    a file or directory that is being filled
    .NAME.old    the directory that had the name, while another takes it (none can be renamed over another)
    .NAME.lock   whose process writes NAME (`.lock` in it where nothing can be written beside it)
The process holds a lock on the lock file, which ends when it does. So whoever gets the lock may remove the rest.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

MOST = 2**28  # bytes of a file that describes others: config.json, an index, a manifest
_held: set[Path] = set()  # the lock files that this process holds


def parse_json(content: bytes | str, where: str, *, halves: bool = False) -> Any:
    """JSON from anywhere, checked: UTF-8, no key twice in an object, no half of a surrogate pair (or `halves`).

    Raises ValueError beginning with `where` for anything else, and where it is nested too deeply.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_once)
        if not halves and "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: it is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not valid JSON: a text in it has half of a surrogate pair (\\ud…)") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return fields


def read_text(path: Path, most: int | None = MOST) -> str:
    """A file's text, without a byte order mark.

    Args:
        most: bytes that it may have, and it must be a regular file; None: a pipe will do.

    Raises ValueError naming the file where it is not UTF-8 or larger, OSError where it can't be read.
    """
    if most is not None and path.exists() and not (path.is_file() and path.stat().st_size <= most):
        raise ValueError(f"{path} is no regular file of at most {most:,} bytes")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """The parsed file, which describes other files. Raises as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), str(path))


def sync_path(path: Path) -> None:
    """Wait until a file's or directory's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits. Raises OSError where it is no file."""
    if path.is_fifo():  # which would be waited for
        raise OSError(errno.EINVAL, "is a pipe, not a file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(
    path: Path,
    *,
    file: bool = False,
    force: bool = False,
    mark: Sequence[str] | None = None,
    inputs: Sequence[str | Path] = (),
    size: int = 0,
) -> None:
    """Raise ValueError, saying why, where `path` may not be written. Every command asks this, before its work.

    Args:
        file: it is to be a file; else a directory.
        force: replace a file, or a directory with something in it.
        mark: go on with a directory that has an entry of the first name; without it, it has none of the others.
        inputs: what is read meanwhile; the output is none of them, nor what links in them stand for, lies in none and
            around none.
        size: bytes that it will take.
    """
    if path.exists() and not (path.is_file() if file else path.is_dir()):
        raise ValueError(f"{path} is a {'folder; name a file' if path.is_dir() else 'file; name a folder'}")
    ours = Path(os.path.realpath(path))  # other than resolve(), it bears links in a circle
    given = [Path(source) for source in inputs]
    links = [entry for source in given if source.is_dir() for entry in source.iterdir() if file or entry.is_symlink()]
    for source in (*given, *links):
        theirs = Path(os.path.realpath(source))
        if ours == theirs or (path.exists() and source.exists() and path.samefile(source)):
            raise ValueError(f"{path} is itself an input; name another place for the output")
        if theirs in ours.parents and source in given:
            raise ValueError(f"{path} is inside {source}, which is an input; name a place outside it")
        if ours in theirs.parents:
            raise ValueError(f"{source}, an input, is inside {path}; name another place for the output")
    above = next((parent for parent in path.absolute().parents if parent.exists()), path.absolute())
    if not above.is_dir():
        raise ValueError(f"{above} is a file, so nothing can be written below it")
    if file and not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if mark is None and path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; name what it stands for")
    if size > (free := shutil.disk_usage(above).free):
        raise ValueError(f"{path} would take {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on its disk")
    place = path if mark is not None and path.is_dir() else above
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: there is no permission to write in {place}")
    if mark is not None and not (path / mark[0]).exists():
        for name in mark[1:]:
            if (path / name).exists():
                raise ValueError(f"{path} holds something else: {name}, and no {mark[0]}; name another folder")
    if mark is None and not force and (path.exists() if file else path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} exists already; name another place, remove it, or replace it with --force")


@contextmanager
def output(
    path: Path | None, *, force: bool = False, mark: Sequence[str] | None = None, **wanted: Any
) -> Iterator[None]:
    """Keep an output for this process until the block ends, once `check_output` allows it, which takes the same.

    What a killed process left beside it is removed first. With `mark` the directory is made. None: no output. Raises
    ValueError as `check_output` does, and where another process writes it.
    """
    if path is None:
        yield
        return
    check_output(path, force=True, mark=mark, **wanted)
    path = path.absolute() if mark is None else Path(os.path.realpath(path))
    (path.parent if mark is None else path).mkdir(parents=True, exist_ok=True)
    with _lock(path):
        _clean(path)
        check_output(path, force=force, mark=mark, **wanted)
        yield


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    # Where nothing can be written beside it, nothing can replace it either.
    file = path.with_name(f".{path.name}.lock") if os.access(path.parent, os.W_OK) else path / ".lock"
    if file in _held:
        yield
        return
    for _ in range(100):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(f"{path} is being written by {owner}; wait for its end or name another place") from None
        except OSError:
            log.warning("%s: its file system has no locks, so another process could write there unnoticed", path)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        os.close(descriptor)  # its holder has removed it meanwhile
    else:
        raise ValueError(f"{file} does not stay as it is made, so {path} can't be kept from other processes")
    _held.add(file)
    try:
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        _held.remove(file)
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                file.unlink()
        os.close(descriptor)


def _clean(path: Path) -> None:
    """Undo what a killed process left beside an output that is locked, and say so."""
    old, partial = path.with_name(f".{path.name}.old"), path.with_name(f".{path.name}.tmp")
    if old.is_dir() and not path.exists():
        old.rename(path)
        log.warning("%s was about to be replaced when a process was killed; it is the old one again", path)
    for left in (old, partial):
        if os.path.lexists(left):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            log.warning("removed %s, which a killed process left", left)


def recover(path: Path) -> None:
    """Put right a directory that a killed process was replacing. Raises ValueError where a process is replacing it."""
    path = path.absolute()
    if path.with_name(f".{path.name}.old").is_dir() and not path.exists():
        with _lock(path):
            _clean(path)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which takes the name `path` once the block is through.

    Raises OSError where the folder is missing or not writable; nothing is left behind then.
    """
    beside = path.with_name(f".{path.name}.tmp")
    beside.unlink(missing_ok=True)  # it might be a link to another file
    try:
        yield beside
        sync_path(beside)
        beside.replace(path)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        beside.unlink(missing_ok=True)
    sync_path(path.absolute().parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file; a reader sees the old one or the new one, never a part. Raises as `new_file` does."""
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def new_directory(path: Path, **wanted: Any) -> Iterator[Path]:
    """Yield a fresh directory beside `path` that takes its name once the block is through.

    Files get the modes that the umask gives (safetensors writes 0600). After an exception what stood at `path` stands.
    Raises ValueError as `output` does, which takes the same.
    """
    path = path.absolute()
    beside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    with output(path, **wanted):
        try:
            beside.mkdir()
            os.umask(mask := os.umask(0))  # it can only be read by setting it
            yield beside
            for file in beside.iterdir():
                file.chmod(0o666 & ~mask)
                sync_path(file)
            sync_path(beside)
            if path.exists():
                path.rename(old)
            beside.rename(path)
            sync_path(path.parent)
        except OSError as error:
            _name(error, path)
            raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(old, ignore_errors=True)


def _name(error: OSError, path: Path) -> None:
    """A full disk does not say whose it is."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


def progress_bar(total: int, label: str, unit: str, initial: int = 0, *, shown: bool = True) -> Any:
    """A tqdm bar: live in a terminal, a line every ten seconds or so in a log file."""
    live = sys.stderr.isatty()
    said: dict[str, Any] = {"desc": label, "unit": f" {unit}", "unit_scale": unit == "B", "disable": not shown}
    pace: dict[str, Any] = {"mininterval": 0.2 if live else 10, "dynamic_ncols": live}
    return tqdm(total=total, initial=initial, file=sys.stderr, **said, **pace)
