"""What ends a command other than a mistake of the user's."""

from __future__ import annotations

import signal


class StoppedBySignalError(Exception):
    """Work was stopped by a signal, after saving what was done; the program ends with 128 + the signal's number."""

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}, start again to go on")
        self.number = number
