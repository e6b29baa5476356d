"""What ends a command, a signal or an extra that is not installed, and how an error is said."""

from __future__ import annotations

import codecs
import json
import re
import reprlib
import signal
import sys
from contextlib import suppress
from pathlib import Path

# Each extra of pyproject.toml that a command may need, and what it is for.
EXTRAS = {
    "plot": "a picture of losses or accuracies",
    "gguf": "GGUF, the format of llama.cpp,",
    "tensorboard": "run.tensorboard",
    "wandb": "run.wandb",
    "serve": "k2mini serve",
    "tokenizers": "tokenizer.json, which this model's text needs,",
    "chat": "a model's own chat template",
    "corpus": "k2mini corpus",
    "reference": "--backend transformers",
    "hub": "a model, adapter or file named by its id on the Hugging Face hub",
}
REINSTALL = "in the folder of k2mini's clone, pip install -c constraints.txt -e . installs what was tested"


class StoppedBySignalError(Exception):
    """Work was stopped by a signal, after saving what was done; the program ends with 128 + the signal's number."""

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}, start again to go on")
        self.number = number


# What ends a command although nothing is wrong. Broken pipe: the reader of our output has gone, as with `| head`.
STOPPED = (KeyboardInterrupt, StoppedBySignalError, BrokenPipeError)


def need_extra(name: str) -> ValueError:
    """The error to raise where the extra `name` is not installed; it says what the extra is for and how to install it.

    `except ImportError: raise need_extra("plot") from None`
    """
    how = f"pip install -c constraints.txt -e '.[{name}]'"
    return ValueError(f"{EXTRAS[name]} needs the extra '{name}'; in the folder of k2mini's clone: {how}")


def check_picture(path: Path) -> None:
    """Raise ValueError where no picture of this name can be drawn, or the extra is not installed."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise need_extra("plot") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"{path}: a picture's name ends in one of {', '.join(f'.{name}' for name in known)}")


def short(value: object) -> str:
    """A value for an error: the beginning, should it be long or deep, or alias itself many times over."""
    return reprlib.repr(value)[:200]


def some(names: list[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def end(error: BaseException) -> int | None:
    """Say on standard error what ended a command. Returns its exit status; None for a fault of the program's own."""
    if isinstance(error, BrokenPipeError):
        said, status = "", 141
    elif isinstance(error, KeyboardInterrupt):
        said, status = "\nk2mini: interrupted\n", 130
    elif isinstance(error, StoppedBySignalError):
        said, status = f"k2mini: {error}\n", 128 + error.number
    elif isinstance(error, Exception) and (words := sentence(error)) is not None:
        said, status = f"k2mini: {words if len(words) < 1400 else words[:1400] + '…'}\n", 2
    else:
        return None
    with suppress(OSError):
        sys.stderr.write(said)
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = None  # or the interpreter complains once more when it flushes
    return status


def sentence(error: Exception) -> str | None:
    """What a user reads of an error that can be mended, the system's own without their number; None for any other."""
    if isinstance(error, OSError):
        words = error.strerror or " ".join(map(str, error.args)) or type(error).__name__
        return f"{error.filename}: {words}" if error.filename else words
    notes = getattr(error, "__notes__", [])  # a training run's, of its own settings
    if isinstance(error, RuntimeError) and (full := _NO_DEVICE_MEMORY.search(str(error))):
        wanted, number, total, free = full.groups()
        remedy = notes[-1] if notes else "a smaller batch, shorter answers or int8 weights take less"
        return f"GPU {number} is out of memory: {wanted} more were wanted, {free} of its {total} are free; {remedy}"
    if isinstance(error, RuntimeError) and "no kernel image is available" in str(error):
        return "the installed PyTorch has no code for this GPU; install a version that has, or use --device cpu"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        words = next(iter(str(error).splitlines()), "")
        remedy = notes[-1] if notes else "use a smaller batch, less context or a smaller model"
        return f"not enough memory{words and f' ({words})'}; {remedy}"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from "):  # pathlib's, before Python 3.13
        return f"{str(error).removeprefix('Symlink loop from ')} is a link to itself"
    if isinstance(error, RecursionError):
        return "something that was read is nested too deeply"
    if isinstance(error, OverflowError):
        return f"a number is too large ({error})"
    return str(error) if isinstance(error, ValueError) else None


# What PyTorch, which has no type for all of them, says on a CPU, on a GPU, and of a size that is beyond 64 bits.
_NO_DEVICE_MEMORY = re.compile(
    r"Tried to allocate (\S+ \S+)\. GPU (\d+) has a total capacity of (\S+ \S+) of which (\S+ \S+) is free"
)
_NO_MEMORY = re.compile(r"allocate memory|out of memory|(calculation|multiplication) overflow")

# How standard output writes what its encoding lacks: as JSON does, so that JSON stays JSON.
ESCAPE = "k2mini.escape"
codecs.register_error(ESCAPE, lambda error: (json.dumps(error.object[error.start : error.end])[1:-1], error.end))  # type: ignore[attr-defined]
