"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from k2mini.inference.decoding import Decoding, Step


@dataclass(frozen=True)
class Prompt:
    """The log-probabilities of a prompt's tokens, in nats, and at each place the likeliest tokens with theirs.

    Nothing is known of the first: None, and no tokens.
    """

    logprobs: list[float | None]
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class End:
    """A request's last word.

    Attributes:
        reason: 'eos'; 'length' where no more might follow; 'stop' where `deliver` returned True; 'cancelled'; 'error'.
        error: what went wrong.
        reused: tokens of the prompt that stood in the cache already.
    """

    reason: str
    error: str = ""
    reused: int = 0


@dataclass(eq=False)
class Request:
    """A prompt to be continued.

    Args:
        tokens: the prompt, BOS included where there is to be one.
        decoding: of it max_new_tokens, sampling, seed and top_logprobs.
        stop_ids: the answer ends with the first of these, which is not delivered.
        deliver: called in the engine's thread with the Prompt, if asked for, each Step, and the End; it must not block.
            Where it returns True the answer ends.
        adapter: the name of one of the engine's; None: the base.
        prompt_logprobs: None, or of how many of the likeliest tokens at each place of the prompt the log-probabilities
            are wanted, beside those of its own tokens.
        score_only: no token is made.
    """

    tokens: list[int]
    decoding: Decoding
    stop_ids: tuple[int, ...]
    deliver: Callable[[Prompt | Step | End], bool | None]
    adapter: str | None = None
    prompt_logprobs: int | None = None
    score_only: bool = False


class QueueFullError(ValueError):
    """As many requests wait as may."""


@dataclass
class Counts:
    """What an engine has done, and does: numbers since its start, but for the first two."""

    slots_busy: int = 0
    waiting: int = 0
    requests: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0  # of the new ones, with `speculate`
    steps: int = 0
