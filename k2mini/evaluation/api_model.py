"""A model behind OpenAI's API as one that `eval` can score: text goes there, tokens and their scores come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from k2mini.data.tokenizer import Tokenizer
from k2mini.errors import short
from k2mini.evaluation.endpoint import Endpoint, TooLongError, at_a_time
from k2mini.evaluation.score import OtherConfig, Request, boundary
from k2mini.inference.decoding import Decoding

NO_LIMIT = 10**9  # the endpoint says itself what is too long


class Characters(Tokenizer):
    """Text as its characters' numbers in Unicode, for a model whose own tokens are known to its server alone."""

    special_tokens: dict[str, int] = {}  # noqa: RUF012
    added_tokens: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, endpoint: Endpoint) -> None:
        self.path, self.vocab_size, self.adds_space = Path(endpoint.url), 0, False
        self.bos_id, self.eos_id, self.unk_id, self.stop_ids = None, -1, None, (-1,)

    def encode(self, text: str, *, bos: bool, eos: bool, special: bool = False) -> list[int]:
        """The characters; BOS is put before them by the server. Raises ValueError for what text can't say."""
        return [self.piece(self.eos_id)] if eos or special else [*map(ord, text)]

    def piece(self, token: int) -> Any:
        raise ValueError("an API scores plain text, without --score-end and in a template for instructions (alpaca)")

    def fingerprint(self) -> str:
        return "characters"


class ApiModel:
    """What `Endpoint` gives, in the place of a model.

    Context and option are sent as one text and tokenised there. The rule is that of `split_jointly`: an option is what
    comes after the tokens that the context, and it with each option, begin with. Requests are in `Characters`.

    Attributes:
        lengths: of each request that was scored, how many of the server's tokens its options have.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.path = endpoint, Path(endpoint.url)
        self.config = OtherConfig(NO_LIMIT, {"url": endpoint.url, "model": endpoint.model})
        self.dtype: torch.dtype | None = None
        self.lengths: dict[Request, list[int]] = {}

    def require_tokenizer(self) -> Tokenizer:
        """One that keeps text as it is."""
        return Characters(self.endpoint)

    def fingerprint(self) -> str:
        """Its name and address, for its weights can't be seen."""
        return f"{self.endpoint.model} at {self.endpoint.url}"

    def score(
        self, requests: Sequence[Request], batch_size: int, mine: Callable[[Sequence[int]], bool]
    ) -> Iterator[tuple[int, list[float]]]:
        """See `OtherModel`; `batch_size` requests at a time, each for itself.

        Raises ValueError as `Endpoint.tokens` does, and where a context has no token before an option's first.
        """
        own = [place for place in range(len(requests)) if mine([place])]
        yield from zip(own, at_a_time(batch_size, self._scores, [requests[place] for place in own]), strict=True)

    def _scores(self, request: Request) -> list[float]:
        context = _text(request.prefix)
        whole = [context, *(context + _text(option) for option in request.options)]
        with _naming(context):
            before, *joint = [[(token.text, token.logprob) for token in self.endpoint.tokens(text)] for text in whole]
        names = [[name for name, _ in tokens] for tokens in (before, *joint)]
        common = boundary(names[0], names[1:])
        found = [[logprob for _, logprob in tokens[common:]] for tokens in joint]
        if not common:
            raise ValueError(f"{self.endpoint.url} gives no token of {short(context)} that an option could go on from")
        self.lengths[request] = [len(logprobs) for logprobs in found]
        return [sum(logprob for logprob in logprobs if logprob is not None) for logprobs in found]

    def answers(self, prompts: list[list[int]], decoding: Decoding, stop_ids: Sequence[int]) -> Iterator[str]:
        """See `OtherModel`; greedy. What ends an answer, but for `decoding.stop`, is the server's to know."""
        yield from at_a_time(decoding.batch_size, partial(self._answer, decoding), prompts)

    def _answer(self, decoding: Decoding, prompt: list[int]) -> str:
        asked: dict[str, Any] = {"prompt": _text(prompt), "max_tokens": decoding.max_new_tokens, "temperature": 0}
        with _naming(asked["prompt"]):
            answer = self.endpoint.post("completions", asked | ({"stop": list(decoding.stop)} if decoding.stop else {}))
        try:
            text = answer["choices"][0]["text"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f"{self.endpoint.url} answers {short(answer)}, no completion")
        return text


@contextmanager
def _naming(text: str) -> Iterator[None]:
    """Let an endpoint that finds a text too long say which: the question is at its end."""
    try:
        yield
    except TooLongError as error:
        raise ValueError(f"{error}; the text ends {text[-200:]!r}") from None


def _text(characters: Sequence[int]) -> str:
    return "".join(map(chr, characters))
