"""From tokens to text: whole UTF-8 characters as they come, and stop strings that are never shown."""

from __future__ import annotations

from collections.abc import Sequence

from k2mini.data.tokenizer import Tokenizer


class TextStream:
    """The text of one continuation, token by token; it ends before the first of the stop strings.

    What may be the beginning of a stop string is held back until it is known not to be one.

    Args:
        stop: strings, which may reach over token boundaries.

    Attributes:
        text: all that was given out so far.
        stopped: a stop string has come.

    Raises ValueError where a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop string is empty")
        self._stream, self._stop = tokenizer.stream(), tuple(stop)
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        return "" if self.stopped else self._give(self._held + self._stream.push(token))

    def flush(self) -> str:
        """What is left at the end."""
        if self.stopped:
            return ""
        out = self._give(self._held + self._stream.flush())
        held, self._held = self._held, ""
        self.text += held
        return out + held

    def _give(self, text: str) -> str:
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            out = text[: min(places)]
        else:
            kept = max((_overlap(text, stop) for stop in self._stop), default=0)
            out, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
