"""How prompts are answered, and what comes of it: settings, steps, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor

from k2mini.data.tokenizer import Tokenizer
from k2mini.inference.sampling import Sampling
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama


@dataclass(frozen=True)
class Decoding:
    """How prompts are answered.

    Args:
        max_new_tokens: of each answer, at most; one also ends where the model's context does.
        seed: row i of a batch draws with seed + i.
        stop: strings that end an answer and are not part of it. Callers that make text look for them.
        beams: search for the likeliest answer instead of sampling one: `Beams` of beam.py, which imports this file.
        batch_size: prompts at a time.
        top_logprobs: None, or of how many of the likeliest tokens each step gives the log-probabilities.

    Raises ValueError where a value is out of range.
    """

    max_new_tokens: int = 256
    sampling: Sampling = Sampling()  # noqa: RUF009 (it is frozen)
    seed: int = 0
    stop: tuple[str, ...] = ()
    beams: Any = None
    batch_size: int = 8
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty")
        if (self.top_logprobs or 0) < 0:
            raise ValueError(f"top_logprobs must not be negative, it is {self.top_logprobs}")


@dataclass(frozen=True)
class Step:
    """One row's new token; with top_logprobs also its log-probability and those of the likeliest tokens."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """What one prompt was continued with.

    Attributes:
        tokens: the new tokens, without the EOS that ended them.
        finish: 'eos'; 'stop' where the caller ended it; or 'length' where no more might follow.
        logprobs: each token's log-probability in nats, before any transform of the logits. Only with top_logprobs.
        top: each step's likeliest tokens with their log-probabilities. Only with top_logprobs.
        score: of a beam, as `beam_search` ranks it.
    """

    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    score: float | None = None

    def add(self, step: Step) -> None:
        """One more token."""
        self.tokens.append(step.token)
        if step.logprob is not None:
            self.logprobs.append(step.logprob)
            self.top.append(list(step.top))


def step_details(logits: Tensor, chosen: Sequence[int], num_top: int) -> list[Step]:
    """Tokens with their log-probabilities and those of the likeliest, of logits (N, V)."""
    logprobs = log_softmax(logits)  # (N, V)
    own = torch.tensor(chosen).to(logits.device, non_blocking=True)[:, None]
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    scores = torch.cat([logprobs.gather(-1, own), values], dim=-1).tolist()
    return [
        Step(token, logprob, tuple(zip(names, each, strict=True)))
        for token, names, (logprob, *each) in zip(chosen, ids.tolist(), scores, strict=True)
    ]


def can_replay(model: Llama) -> bool:
    """Whether steps are replayed: on a GPU, where no hook of the audit or of sharding is called."""
    return model.device.type == "cuda" and "_hooks" not in model.__dict__ and model.gathered_dtype is None


def check_finite(model: Llama, logits: Tensor) -> None:
    """Raise `not_finite` where a row's largest of logits (…, V) is not finite."""
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise not_finite(model)


def not_finite(model: Llama) -> ValueError:
    """The error to raise where a model's logits are not finite; it names the cause."""
    from k2mini.weights.info import nonfinite_tensor  # takes time to import

    name = nonfinite_tensor(model)
    overflow = f"all weights are finite, so activations overflow in {model.dtype}; try --dtype float32 or bfloat16"
    return ValueError(f"the logits are not finite; {f'{name} holds NaN or infinity' if name else overflow}")


class TextStream:
    """The text of one continuation, token by token, which ends before the first of the stop strings.

    Text that may be the beginning of a stop string is held back until more tokens decide.

    Args:
        stop: strings; one may begin in one token and end in another.

    Attributes:
        text: all that was given out so far.
        stopped: whether a stop string has come.

    Raises ValueError where a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop string is empty")
        self._stream, self._stop = tokenizer.stream(), tuple(stop)
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Take one more token. Returns the text that is certain now to be part of the answer."""
        return "" if self.stopped else self._give(self._held + self._stream.push(token))

    def write(self, token: int, out: TextIO) -> bool:
        """Print what `push` returns, at once. Returns whether a stop string has come."""
        out.write(self.push(token))
        out.flush()
        return self.stopped

    def flush(self) -> str:
        """The text held back, once no more tokens come."""
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
