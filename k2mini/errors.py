"""What ends a command, a signal or an extra that is not installed, and how an error is said."""

from __future__ import annotations

import signal

# Each extra of pyproject.toml that a command may need, and what it is for.
EXTRAS = {
    "plot": "a picture of losses or accuracies",
    "gguf": "GGUF, the format of llama.cpp,",
    "tensorboard": "run.tensorboard",
}


class StoppedBySignalError(Exception):
    """Work was stopped by a signal, after saving what was done; the program ends with 128 + the signal's number."""

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}, start again to go on")
        self.number = number


def need_extra(name: str) -> ValueError:
    """The error to raise where the extra `name` is not installed; it says what the extra is for and how to install it.

    `except ImportError: raise need_extra("plot") from None`
    """
    return ValueError(f"{EXTRAS[name]} needs the extra '{name}': pip install -c constraints.txt -e '.[{name}]'")


def some(names: list[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def sentence(error: Exception) -> str:
    """What a user reads of an error; the system's own errors without their number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
