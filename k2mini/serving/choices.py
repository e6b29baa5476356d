"""An answer as it is made: from what the engine delivers to text, token by token, and to OpenAI's JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from k2mini.data.tokenizer import Tokenizer
from k2mini.inference.decoding import Step, TextStream
from k2mini.inference.request import End, Prompt, Request
from k2mini.serving.asked import Asked


@dataclass(frozen=True)
class Token:
    """A token of an answer, and the place of its first character in the answer's text."""

    id: int
    place: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


@dataclass
class Part:
    """What is new of the answer with the number `index`; `end` comes with the last part."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None


class Choice:
    """One answer. Its request's `deliver` runs in the engine's thread; parts go to `put`, which must not block.

    A token is given out with the text that it begins, so none of a stop string's is. EOS ends the answer here, not in
    the engine, which would not say how likely it was: scored completions have it as a token. (lm-evaluation-harness
    leaves out the last token as the new one, and would miss one of the text.)

    Attributes:
        made: how many tokens the engine made, those of a stop string too.
        mean: of the log-probabilities of its tokens, where those are known.
        end: of the answer, once it is there.
        times: seconds, when it was asked for and when each of its tokens came.
    """

    def __init__(self, index: int, asked: Asked, tokenizer: Tokenizer, put: Callable[[Part], None]) -> None:
        self.index, self._tokenizer, self._put = index, tokenizer, put
        place, number = divmod(index, asked.best_of)
        prompt, new, top = asked.prompts[place], asked.new[place], asked.logprobs
        decoding = replace(asked.decoding, max_new_tokens=max(new, 1), seed=asked.decoding.seed + number)
        scored = top if asked.echo else None
        self.request = Request(prompt, decoding, (), self.deliver, asked.adapter, scored, score_only=not new)
        self._text, self._all = TextStream(tokenizer, decoding.stop), tokenizer.stream()
        self._before = self._place = 0  # characters of the prompt, and of all text so far
        self._held: list[Token] = []
        self._stop_ids = asked.stop_ids
        self._keep_eos, self._eos = not asked.chat and top is not None, False
        self.made, self.mean = 0, 0.0
        self.end: End | None = None
        self.times = [time.perf_counter()]
        if asked.echo and scored is None:
            self._echo(None)

    def deliver(self, event: Prompt | Step | End) -> bool:
        """Take what the engine delivers. Returns whether the answer ends here."""
        try:
            if isinstance(event, Prompt):
                self._echo(event)
            elif self.end is None:
                self._take(event)
        except ValueError as error:  # a damaged tokenizer
            self.end = End("error", str(error))
            self._put(Part(self.index, end=self.end))
        return self._eos or self._text.stopped or self.end is not None

    def _echo(self, scores: Prompt | None) -> None:
        """Begin the text with the prompt, and its tokens where they are scored."""
        ids, stream = self.request.tokens, self._tokenizer.stream()
        part = Part(self.index, self._tokenizer.decode(ids))
        self._before = self._place = len(part.text)
        if scores is not None:
            pieces = [stream.push(token) for token in ids]
            place = len(part.text) - len("".join(pieces) + stream.flush())  # -1 where the first lost its space
            for token, piece, logprob, top in zip(ids, pieces, scores.logprobs, scores.top, strict=True):
                part.tokens.append(Token(token, max(place, 0), logprob, top))
                place += len(piece)
        self._put(part)

    def _take(self, event: Step | End) -> None:
        part = Part(self.index)
        if isinstance(event, Step):
            self.times.append(time.perf_counter())
            self.mean += ((event.logprob or 0.0) - self.mean) / (len(self.times) - 1)
            self._eos = event.token in self._stop_ids
            self.made += not self._eos
            if not self._eos or self._keep_eos:
                self._held.append(Token(event.token, self._place, event.logprob, event.top))
            if not self._eos:  # whose text, if it has any, is none of the answer's
                self._place += len(self._all.push(event.token))
                part.text = self._text.push(event.token)
        else:
            part.text = self._text.flush()
            reason = "eos" if self._eos else "stop" if self._text.stopped else event.reason
            part.end = self.end = replace(event, reason=reason)
        ready = len(self._held)
        if part.end is None or self._text.stopped:
            given = self._before + len(self._text.text)
            ready = sum(token.place < given for token in self._held)  # their places only grow
        part.tokens, self._held = self._held[:ready], self._held[ready:]
        if part.text or part.tokens or part.end:
            self._put(part)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """How a token is written where it stands alone: no two are alike, so bytes are 'bytes:\\x0a' and EOS '</s>'."""
    kind, content = tokenizer.kind(token), tokenizer.piece_bytes(token)
    if kind not in ("normal", "byte"):
        return tokenizer.piece(token)
    text = content.decode(errors="replace")
    whole = kind == "normal" and text.encode() == content  # or, in byte-level BPE, a part of a character
    return text if whole else "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of /v1/completions, where the likeliest tokens are an object, the chosen one always among them."""
    tops = [[*token.top, (token.id, token.logprob)] if token.logprob is not None else None for token in tokens]
    return {
        "tokens": [token_text(tokenizer, token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [top and {token_text(tokenizer, token): logprob for token, logprob in top} for top in tops],
        "text_offset": [token.place for token in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text, content = token_text(tokenizer, token), list(tokenizer.piece_bytes(token))
        return {"token": text, "logprob": logprob, "bytes": content}

    tops = [[entry(*likely) for likely in token.top] for token in tokens]
    content = [{**entry(t.id, t.logprob), "top_logprobs": top} for t, top in zip(tokens, tops, strict=True)]
    return {"content": content, "refusal": None}
