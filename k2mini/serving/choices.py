"""An answer as it is made: from what the engine delivers to text, token by token, and to OpenAI's JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from k2mini.data.tokenizer import TextStream, Tokenizer
from k2mini.inference.request import End, Prompt, Step


@dataclass(frozen=True)
class Token:
    """A token of an answer, and the place of its first character in the answer's text."""

    id: int
    place: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


@dataclass
class Part:
    """What is new of an answer; `end` is there with the last part."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None


Put = Callable[[Part], None]


def prompt_part(tokenizer: Tokenizer, ids: Sequence[int], scores: Prompt | None) -> Part:
    """A prompt as the beginning of the text (`echo`), with its tokens where there are scores of them."""
    text, stream = tokenizer.decode(ids), tokenizer.stream()
    if scores is None:
        return Part(text)
    pieces = [stream.push(token) for token in ids]
    place = len(text) - len("".join(pieces) + stream.flush())  # -1 where the text lost the space put before it
    tokens = []
    for token, piece, logprob, top in zip(ids, pieces, scores.logprobs, scores.top, strict=True):
        tokens.append(Token(token, max(place, 0), logprob, top))
        place += len(piece)
    return Part(text, tokens)


class Choice:
    """One answer. The engine's thread calls `deliver`; each part goes to `put`, which must not block.

    A token is given out with the text that it begins, so none of a stop string's is. EOS ends the answer here, not in
    the engine, which would not say how likely it was.

    Args:
        prompt: its ids, where the text begins with it.
        scored: whether the engine will deliver the prompt's scores.
        with_eos: EOS is one of the tokens: lm-evaluation-harness leaves out the last one, which must be a new one.

    Attributes:
        made: how many tokens the engine made, those of a stop string too.
        end: of the answer, once it is there.
        started, first, last: seconds, when it was asked for and when its first and its newest token came.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        put: Put,
        prompt: Sequence[int] | None,
        *,
        scored: bool,
        with_eos: bool,
    ) -> None:
        self._tokenizer, self._put, self._prompt, self._with_eos = tokenizer, put, prompt, with_eos
        self._text, self._all = TextStream(tokenizer, stop), tokenizer.stream()
        self._before = self._place = 0  # characters of the prompt, and of all text so far
        self._held: list[Token] = []
        self._eos = False  # has come
        self.made = 0
        self.end: End | None = None
        self.started, self.first, self.last = time.perf_counter(), 0.0, 0.0
        if prompt is not None and not scored:
            self._echo(None)

    def deliver(self, event: Prompt | Step | End) -> bool:
        """Take what the engine delivers. Returns whether the answer ends here."""
        if self.end is None:
            try:
                self._take(event)
            except ValueError as error:  # a damaged tokenizer
                self.end = End("error", str(error))
                self._put(Part(end=self.end))
        return self._eos or self._text.stopped or self.end is not None

    def _echo(self, scores: Prompt | None) -> None:
        part = prompt_part(self._tokenizer, self._prompt or (), scores)
        self._before = self._place = len(part.text)
        self._put(part)

    def _take(self, event: Prompt | Step | End) -> None:
        if isinstance(event, Prompt):
            return self._echo(event)
        part = Part()
        if isinstance(event, Step):
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self._eos = event.token == self._tokenizer.eos_id
            if self._eos and not self._with_eos:
                return None
            self.made += not self._eos
            self._held.append(Token(event.token, self._place, event.logprob, event.top))
            self._place += len(self._all.push(event.token))
            part.text = self._text.push(event.token)
        else:
            part.text = self._text.flush()
            reason = "eos" if self._eos else "stop" if self._text.stopped else event.reason
            part.end = self.end = replace(event, reason=reason)
        given = self._before + len(self._text.text)
        ready = len(self._held)
        if part.end is None or self._text.stopped:
            ready = sum(token.place < given for token in self._held)  # their places only grow
        part.tokens, self._held = self._held[:ready], self._held[ready:]
        if part.text or part.tokens or part.end:
            self._put(part)
        return None


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """How a token is written where it stands alone: no two are alike, so bytes are 'bytes:\\x0a' and EOS '</s>'."""
    kind = tokenizer.kind(token)
    if kind == "byte":
        return f"bytes:\\x{tokenizer.piece_bytes(token).hex()}"
    piece = tokenizer.piece(token)
    return piece.replace("▁", " ") if kind == "normal" else piece


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of /v1/completions, where the likeliest tokens are an object, the chosen one always among them."""
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        top: dict[str, float] = {}
        for name, logprob in [*token.top, (token.id, token.logprob)]:
            key = token_text(tokenizer, name)
            top[key] = logprob  # type: ignore[assignment]
        tops.append(top if token.logprob is not None else None)
    return {
        "tokens": [token_text(tokenizer, token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": [token.place for token in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text, content = token_text(tokenizer, token), list(tokenizer.piece_bytes(token))
        return {"token": text, "logprob": logprob, "bytes": content}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}
