"""Which files of k2mini a command enters: python -m tests.roads, with commands and files as JSON in and out.

A file counts when one of its functions is called, so that a module that is imported for a constant or a dataclass does
not. What an import runs does not count either. Each command runs in a fork of one process that has imported everything:
none finds another's caches filled.
"""

import json
import multiprocessing
import pkgutil
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import k2mini
from k2mini.cli import main

PACKAGE = Path(k2mini.__path__[0])
OPTIMIZED = 1  # the flag of a function's code; class bodies and modules have it not


class Recorder:
    """A profile function that notes the files entered, all of them and those within the functions named `core`.

    Nothing is noted after the function `until` has returned for the first time.
    """

    def __init__(self, core: list[str], until: str | None) -> None:
        self.files: dict[str, None] = {}  # in the order of their first call
        self.core_files: dict[str, None] = {}
        self._core, self._until = set(core), until
        self._depth, self._done = 0, False

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if self._done or event not in ("call", "return") or not code.co_flags & OPTIMIZED:
            return
        if not code.co_filename.startswith(f"{PACKAGE}/"):
            return
        if event == "return":
            self._depth -= code.co_name in self._core
            self._done = code.co_name == self._until
            return
        if _importing(frame):
            return
        self._depth += code.co_name in self._core
        name = Path(code.co_filename).relative_to(PACKAGE).as_posix()
        self.files[name] = None
        if self._depth:
            self.core_files[name] = None


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def measure(command: dict[str, Any]) -> dict[str, Any]:
    """Run `arguments` of a command line. Returns its exit status, what it said, and the files entered."""
    recorder, said = Recorder(command["core"], command["until"]), StringIO()
    status: Any = None
    sys.setprofile(recorder)
    threading.setprofile(recorder)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main(command["arguments"])
    except SystemExit as end:
        status = end.code
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {"status": status, "said": said.getvalue(), "files": list(recorder.files), "core": list(recorder.core_files)}


if __name__ == "__main__":
    commands = json.load(sys.stdin)
    for module in pkgutil.walk_packages(k2mini.__path__, "k2mini."):
        if module.name != "k2mini.__main__":
            import_module(module.name)
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(measure, commands, chunksize=1)))
