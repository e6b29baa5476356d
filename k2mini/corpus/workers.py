"""Processes that read groups of files. Where one dies or hangs over a document, that is passed over."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from k2mini.corpus.contamination import Benchmarks
from k2mini.corpus.group import Group, Settings, read_group
from k2mini.files import progress_bar

log = logging.getLogger(__name__)

PATIENCE = 600.0  # seconds that a document may take to be read, or to be judged


@dataclass
class _Worker:
    """A process, our end of its pipe, and what it does: which group, at which file and step, since when."""

    process: Any
    pipe: Connection
    group: Group
    at: tuple[Path, int] | None = None
    since: float = 0.0

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def read_groups(groups: list[Group], workers: int, *arguments: Any) -> None:
    """Have `read_group` read the groups, given the settings and benchmarks, several at a time.

    Raises what a worker could not get over, such as a full disk or a missing package.
    """
    waiting, busy, idle = deque(groups), list[_Worker](), list[_Worker]()
    with progress_bar(sum(len(group.files) for group in groups), "reading", "files") as progress:
        try:
            while waiting or busy:
                while waiting and len(busy) < workers:
                    alive = idle and idle[-1].process.is_alive()
                    worker = idle.pop() if alive else _start(waiting[0], arguments)
                    worker.group, worker.at, worker.since = waiting.popleft(), None, time.monotonic()
                    worker.pipe.send(worker.group)
                    busy.append(worker)
                ready = wait([worker.pipe for worker in busy], timeout=1)
                for worker in [each for each in busy if each.pipe in ready]:
                    try:
                        said = worker.pipe.recv()
                    except (EOFError, OSError):  # it died, maybe in the middle of a message
                        busy.remove(worker)
                        waiting.appendleft(_after_death(worker))
                        continue
                    if isinstance(said, Exception):
                        raise said
                    worker.at, worker.since = said, time.monotonic()
                    if said is None:  # the group is complete
                        busy.remove(worker)
                        idle.append(worker)
                        progress.update(len(worker.group.files))
                for worker in busy:
                    if worker.at is not None and time.monotonic() - worker.since > PATIENCE:
                        worker.process.kill()
        finally:
            for worker in busy + idle:
                worker.end()


def _start(group: Group, arguments: tuple[Any, ...]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()  # so that ours ends when the process does
    return _Worker(process, ours, group)


def _after_death(worker: _Worker) -> Group:
    """The group of a worker that died, to be read without the document at which it did.

    Raises ValueError where that says nothing of a document: the system kills processes as memory runs out.
    """
    worker.process.join()
    code, is_late = worker.process.exitcode, time.monotonic() - worker.since > PATIENCE
    worker.end()
    if worker.at is None:
        raise ValueError(f"a worker ended (exit code {code}) before it read a file; start again, with fewer --workers")
    file, step = worker.at
    if code == -signal.SIGKILL and not is_late:
        where = f"a worker was killed at document {step // 2 + 1:,} of {file}"
        raise ValueError(f"{where}, as is done where memory runs out; start again, with fewer --workers")
    why = f"no document came for {PATIENCE:.0f} s" if is_late else f"its reader died (exit code {code})"
    log.warning("%s, document %d, is left out: %s", file, step // 2 + 1, why)
    worker.group.skip.setdefault(file, {})[step] = why
    return worker.group


def _work(pipe: Connection, settings: Settings, benchmarks: Benchmarks | None) -> None:
    """Read the groups that come through the pipe; send each file and step and, after each group, None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            read_group(pipe.recv(), settings, benchmarks, pipe.send)
            pipe.send(None)
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    except Exception as error:
        pipe.send(error if isinstance(error, OSError | ValueError) else RuntimeError(traceback.format_exc()))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)
