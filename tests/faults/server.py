"""Commands in processes that start in milliseconds: torch is loaded once, and each case is a fork of that process.

`Forks` starts `python -m tests.faults.server`, which imports all of k2mini, computes nothing (so it has one thread and
may fork), and runs each request in a child: command lines one after the other, with streams, environment and a file
event at which to die as the request says.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import pkgutil
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

MEMORY = 12 * 2**30  # of address space, for a child: who asks for more gets an error and does not stop the machine
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "shutil.rmtree", "fsync")


@dataclass
class Request:
    """What a child runs: command lines in `folder`, until one fails.

    Attributes:
        kill: the file event, from 1, at which it kills itself; 0: none.
        after: seconds to wait first.
        closed: of 'stdin', 'stdout', 'stderr'.
        encoding: of the three streams.
        call: what takes the words of a line, as module:function.
        stdin, stdout: what is read ('' is an empty file), and where output goes in place of a file (/dev/full).
    """

    lines: list[list[str]]
    folder: str
    kill: int = 0
    after: float = 0.0
    closed: list[str] = field(default_factory=list)
    encoding: str = "utf-8"
    stdin: str = ""
    stdout: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    limit: float = 20.0
    call: str = "k2mini.cli:main"


@dataclass
class End:
    """How a child ended: its status (negative: a signal; None: running after `limit`), and what it said."""

    status: int | None
    out: str
    err: str
    events: int
    seconds: float

    @property
    def last(self) -> str:
        """The last line on standard error."""
        return self.err.strip().split("\n")[-1]

    @property
    def is_sentence(self) -> bool:
        """Whether it ended as a mistake of the user's does: status 2, one sentence, no traceback."""
        return self.status == 2 and self.last.startswith("k2mini: ") and "Traceback" not in self.err


class Forks:
    """The process that forks. Use as a context manager."""

    def __enter__(self) -> Forks:
        root, environment = Path(__file__).parents[2], {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._sent, self._pids, self._ends = 0, {}, {}
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, request: Request) -> Child:
        """Begin a request; the process that runs it leads a session of its own."""
        number, self._sent = self._sent, self._sent + 1
        print(json.dumps([number, asdict(request)]), file=self._process.stdin, flush=True)
        while number not in self._pids:
            self._read()
        return Child(self, number, self._pids.pop(number))

    def _read(self) -> None:
        """Note the next child that began, or ended."""
        number, *found = json.loads(self._process.stdout.readline())
        if len(found) == 1:
            self._pids[number] = found[0]
        else:
            self._ends[number] = End(*found)

    def run(self, requests: Iterable[Request], at_once: int = 2) -> Iterator[tuple[int, End]]:
        """(Place of a request, how it ended), in the order in which they end; requests are drawn as there is room."""
        waiting, running = enumerate(requests), {}  # the number of a request -> its place
        while True:
            while len(running) < at_once and (drawn := next(waiting, None)) is not None:
                running[self.start(drawn[1]).number] = drawn[0]
            if not running:
                return
            while not (ended := running.keys() & self._ends.keys()):
                self._read()
            for number in ended:
                yield running.pop(number), self._ends.pop(number)

    def start_ranks(self, size: int, request: Request) -> list[Child]:
        """Begin a request in each of `size` ranks, which are told of each other as torchrun does; one is alone."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
        ranks = [{**there, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)] if size > 1 else [{}]
        return [self.start(replace(request, environment={**request.environment, **rank})) for rank in ranks]

    def one(self, folder: Path, *lines: str, **settings: Any) -> End:
        """Run one request."""
        ((_, end),) = self.run([Request([line.split() for line in lines], str(folder), **settings)])
        return end


class Child:
    """A request under way, in the process `pid`."""

    def __init__(self, forks: Forks, number: int, pid: int):
        self._forks, self.number, self.pid, self._end = forks, number, pid, None

    def wait(self) -> End:
        while self._end is None and not (end := self._forks._ends.pop(self.number, None)):
            self._forks._read()
        self._end = self._end or end
        return self._end

    # As a subprocess.Popen has them.

    @property
    def returncode(self) -> int | None:
        return self.wait().status

    def poll(self) -> int | None:
        return None if Path(f"/proc/{self.pid}").exists() else self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it said, once it has ended, at its own limit at the latest."""
        end = self.wait()
        return end.out, end.err


def serve() -> None:
    """Run requests, one a line of standard input, until it ends."""
    _load()
    scratch = Path(tempfile.mkdtemp(prefix="faults"))
    running: dict[int, tuple[int, float, float]] = {}
    rest = b""
    while True:
        if select.select([0], [], [], 0.002 if running else None)[0]:
            if not (content := os.read(0, 1 << 16)):
                break
            *lines, rest = (rest + content).split(b"\n")
            for line in lines:
                number, raw = json.loads(line)
                request = Request(**raw)
                if not (pid := os.fork()):
                    _child(request, scratch / str(number))
                print(json.dumps([number, pid]), flush=True)
                running[pid] = (number, time.monotonic(), time.monotonic() + request.limit)
        for pid, (number, start, limit) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            code: int | None = os.waitstatus_to_exitcode(status) if done else None
            if not done and time.monotonic() < limit:
                continue
            if not done:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del running[pid]
            found = [(scratch / f"{number}.{name}") for name in ("out", "err", "events")]
            out, err, events = (path.read_text(errors="replace") if path.exists() else "" for path in found)
            for path in found:
                path.unlink(missing_ok=True)
            print(json.dumps([number, code, out, err, len(events), time.monotonic() - start]), flush=True)
    scratch.rmdir()


def _load() -> None:
    """Import all that a command may import, without starting a thread."""
    import k2mini

    names = [entry.name for entry in pkgutil.walk_packages(k2mini.__path__, "k2mini.") if "__main__" not in entry.name]
    others = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "matplotlib.figure", "gguf",
              "matplotlib.backends.backend_agg", "torch.optim", "torch.testing", "encodings.latin_1",
              "tests.conftest")  # fmt: skip
    for name in (*names, *others):
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"not loaded: {name}", file=sys.stderr)
    import gc

    gc.freeze()


def _child(request: Request, scratch: Path) -> None:
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background,
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup
        torch = importlib.import_module("torch")
        torch.set_num_threads(torch.get_num_threads())  # or the first two threads race to replace the parent's pool
        os.chdir(request.folder)
        os.environ.update(request.environment)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        _streams(request, scratch)
        time.sleep(request.after)
        _watch(request, scratch.with_suffix(".events"))
        module, _, name = request.call.partition(":")
        call = getattr(importlib.import_module(module), name)
        for line in request.lines:
            try:
                call(line)
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if status:
                break
    except BaseException:
        status = 1
        if sys.stderr is not None:
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            status = status or 120  # as the interpreter does
    os._exit(status)


def _streams(request: Request, scratch: Path) -> None:
    """Descriptors 0 to 2, and Python's files over them, as an interpreter that starts so would have them."""
    scratch.with_suffix(".in").write_text(request.stdin)
    read = os.open(scratch.with_suffix(".in"), os.O_RDONLY)
    scratch.with_suffix(".in").unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    written = os.open(request.stdout or scratch.with_suffix(".out"), flags, 0o600)
    said = os.open(scratch.with_suffix(".err"), flags, 0o600)
    for place, (name, descriptor) in enumerate({"stdin": read, "stdout": written, "stderr": said}.items()):
        os.dup2(descriptor, place)
        os.close(descriptor)
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = io.TextIOWrapper(open(place, "wb" if place else "rb", closefd=False), request.encoding, errors)  # noqa: SIM115
        setattr(sys, name, stream)
    for name in request.closed:
        os.close(("stdin", "stdout", "stderr").index(name))
        setattr(sys, name, None)


def _watch(request: Request, counted: Path) -> None:
    """Note each event that changes files below the folder, and die at the chosen one, before it takes place."""
    descriptor = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    places = itertools.count(1)  # a checkpoint is written in a thread

    def event(name: str, arguments: Sequence[Any]) -> None:
        if name == "open":
            if not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif name not in WRITES:
            return
        place = arguments[0] if arguments else ""
        if isinstance(place, (str, bytes, os.PathLike)):
            text = os.fsdecode(place)
            if text.startswith("/") and not text.startswith(request.folder):
                return
        os.write(descriptor, b".")
        if next(places) == request.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    real = os.fsync

    def fsync(descriptor: int) -> None:
        event("fsync", ())
        real(descriptor)

    os.fsync = fsync
    sys.addaudithook(event)


if __name__ == "__main__":
    serve()
