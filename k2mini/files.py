"""Files and directories that appear whole or not at all, whether they fit, and the line that shows their progress.

A file is written beside its place, synced, then renamed; so is a directory. Meanwhile there may be, beside NAME:
    .NAME.PID.tmp   being filled; its process holds a lock on it, so one that nobody holds was left by a killed process
    .NAME.new       complete, and about to take the name of a directory that exists
    .NAME.old       the directory that had the name until now
A directory cannot be renamed over another: with `force` the old one is renamed aside, then the new one renamed in, then
the old one removed. So at every moment a complete directory stands under one of these names.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)


def read_json(path: Path) -> Any:
    """The parsed file. Raises ValueError naming the file where it is not JSON, OSError where it can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def sync_path(path: Path) -> None:
    """Wait until a file's or directory's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file; a reader sees the old one or the new one, never a part.

    Raises OSError where the folder is missing or not writable; nothing is left behind then.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        sync_path(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_path(path.parent)


def check_file(path: Path) -> None:
    """Raise ValueError where `path` is a folder or lies in none: before the long work whose result it is to hold."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")


def make_writable(directory: Path) -> None:
    """Make `directory` if it is missing.

    Raises OSError, naming it, where files can't be written there, ValueError where it is a file.
    """
    if directory.is_file():
        raise ValueError(f"{directory} is a file; name a folder")
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".{os.getpid()}.tmp"
    probe.touch()
    probe.unlink()


def check_new(path: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Raise ValueError unless `path` can be filled by `new_directory`.

    Args:
        force: a directory that exists may be replaced.
        inputs: directories that are read meanwhile; the target may be none of them, nor in one, nor around one.
    """
    for source in inputs:
        ours, theirs = path.resolve(), source.resolve()
        if ours == theirs:
            raise ValueError(f"{path} is itself an input; name another place for the output")
        if theirs in ours.parents:
            raise ValueError(f"{path} is inside {source}, which is an input; name a place outside it")
        if ours in theirs.parents:
            raise ValueError(f"{source}, an input, is inside {path}; name another place for the output")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{above} is a file, so nothing can be written below it")
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; name the directory itself")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} exists already and is a file; name a directory")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise ValueError(f"{path} exists already; name another place, remove it, or replace it with --force")


def check_space(path: Path, needed: int) -> None:
    """Raise ValueError where the disk of `path`, which may not exist yet, has less than `needed` bytes free."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{path} would take {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on its disk")


def free_memory() -> int | None:
    """Bytes of main memory that are free (elsewhere than on Linux: all), or None where the system does not tell."""
    try:
        fields = Path("/proc/meminfo").read_text().split()
        return int(fields[fields.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # neither Linux nor another Unix
        return None


@contextmanager
def new_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a fresh directory beside `path` that takes its name once the block is through.

    Files get the modes that the umask gives (safetensors writes 0600). After an exception nothing is left, and what
    stood at `path` still stands.

    Args:
        force: replace a directory that exists.

    Raises ValueError as `check_new` does.
    """
    path = path.absolute()
    recover(path)
    check_new(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.mkdir()
    lock = os.open(beside, os.O_RDONLY)
    try:
        _lock(lock)
        yield beside
        mode = 0o666 & ~_umask()
        for file in beside.iterdir():
            file.chmod(mode)
            sync_path(file)
        sync_path(beside)
        if path.is_dir() and any(path.iterdir()):
            _swap(beside, path)
        else:
            beside.rename(path)
    except OSError as error:
        if error.filename is None:  # a full disk does not say whose it is
            error.filename = str(path)
        raise
    finally:
        os.close(lock)
        shutil.rmtree(beside, ignore_errors=True)
    sync_path(path.parent)


def _swap(complete: Path, path: Path) -> None:
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    complete.rename(new)
    sync_path(path.parent)
    path.rename(old)
    new.rename(path)
    sync_path(path.parent)
    shutil.rmtree(old)


def recover(path: Path) -> None:
    """Finish or undo what a killed process left beside `path`, and say so. What a living process fills is left alone.

    Raises OSError where the leftovers can't be renamed.
    """
    path = path.absolute()
    if not path.parent.is_dir():
        return
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if not path.exists() and new.is_dir() and old.is_dir():
        _rename(new, path)
        log.warning("%s was about to be replaced when a process was killed; it is the new one now", path)
    elif not path.exists() and old.is_dir():
        _rename(old, path)
        log.warning("%s was about to be replaced when a process was killed; it is the old one again", path)
    if path.exists() and new.is_dir():
        shutil.rmtree(new, ignore_errors=True)
        log.warning("%s was about to be replaced when a process was killed; it is still the old one", path)
    if path.exists() and old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        log.warning("%s was replaced by a process that was then killed; removed what it replaced", path)
    for partial in path.parent.glob(f".{_literal(path.name)}.*.tmp"):
        if partial.is_dir() and _abandoned(partial):
            shutil.rmtree(partial, ignore_errors=True)
            log.warning("removed %s, which a killed process left unfinished", partial)


def _rename(source: Path, target: Path) -> None:
    with suppress(FileNotFoundError):  # of several processes that start at once, one is the first
        source.rename(target)


def _literal(name: str) -> str:
    """`name` as a glob pattern that matches itself alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _lock(descriptor: int) -> None:
    """Lock a directory until it is closed. Where a file system knows no locks, a partial one is never cleaned up."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        log.info("this file system has no locks; an output that is killed half way must be removed by hand")


def _abandoned(partial: Path) -> bool:
    try:
        descriptor = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:  # somebody holds it, or there are no locks here
        return False
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def progress_bar(total: int, label: str, unit: str, initial: int = 0, *, shown: bool = True) -> Any:
    """A tqdm bar: live in a terminal, a line every ten seconds or so in a log file."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=f" {unit}",
        file=sys.stderr,
        mininterval=0.2 if live else 10,
        dynamic_ncols=live,
        disable=not shown,
        unit_scale=unit == "B",
    )
