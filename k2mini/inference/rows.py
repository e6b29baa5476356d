"""The rows of the engine: who is in which slot, and the choice of their next tokens."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from k2mini.inference.decoding import Step, step_details
from k2mini.inference.request import Prompt, Request
from k2mini.inference.sampling import Sampling, as_history, sample


@dataclass
class Row:
    """A request in its slot.

    Attributes:
        number: of requests before it.
        most: tokens that it may get.
        adapter: its number; -1 is the base.
        length: tokens in the cache.
        reused: those of them that stood in the cache already.
        new: the answer so far.
        draws: (most,) float64, one a token.
        noted: how many of its tokens a GPU has in its history.
    """

    request: Request
    number: int
    most: int
    adapter: int
    length: int = 0
    reused: int = 0
    new: list[int] = field(default_factory=list)
    draws: Tensor | None = None
    noted: int = 0

    @property
    def prompt(self) -> list[int]:
        """The prompt's tokens."""
        return self.request.tokens

    @property
    def decodes(self) -> bool:
        """Whether the whole prompt has been read."""
        return self.length >= len(self.prompt)

    def waits_for(self, other: Row, end: int, chunk: int) -> bool:
        """Whether another, which is read up to `end` now, will have this one's next whole chunk, to be copied."""
        next_end = (self.length // chunk + 1) * chunk
        same = next_end <= min(end, len(self.prompt) - 1) and self.adapter == other.adapter
        return same and self.prompt[:next_end] == other.prompt[:next_end]


@dataclass
class Slot:
    """A row of the cache: who uses it, and what stays in it for requests that begin alike.

    Attributes:
        tokens: of a prompt, from its first on, and perhaps its answer, made with `adapter`.
        scores: their log-probabilities and the one after them, where they were asked for, with `num_top` likeliest
            tokens each; otherwise num_top is -1.
        used: the step in which its last request ended.
    """

    number: int
    row: Row | None = None
    tokens: list[int] = field(default_factory=list)
    adapter: int = -1
    scores: Prompt = field(default_factory=lambda: Prompt([], []))
    num_top: int = -1
    used: int = 0

    def common(self, row: Row, grain: int) -> int:
        """How many tokens a row, in this slot or another, can take from here: a multiple of `grain`."""
        if self.adapter != row.adapter:
            return 0
        wanted = row.request.prompt_logprobs
        both = min(len(self.tokens), len(row.prompt) - 1)  # at least one token is left, whose logits are wanted
        if wanted is not None:  # of each token taken, and of the one after them
            both = min(both, len(self.scores.logprobs)) if self.num_top >= wanted else 0
        same, step = 0, 128  # tokens at a time, then one by one
        while same < both and self.tokens[same : same + step] == row.prompt[same : same + step]:
            same += step
        same = next((i for i in range(same, both) if self.tokens[i] != row.prompt[i]), both)
        if wanted is not None and same:
            same -= 1
        return same // grain * grain


def choose(rows: Sequence[Row], logits: Tensor) -> list[Step | None]:
    """Each row's next token; None where its logits are not finite. logits: (N, V). A GPU is waited for once."""
    finite = logits.amax(dim=-1).isfinite()
    places, parts = [], [finite.long()]
    for sampling, group in _groups([row.request.decoding.sampling for row in rows]):
        parts.append(_sample([rows[place] for place in group], _part(logits, group), sampling))
        places += group
    values = torch.cat(parts).tolist()
    good, picked = values[: len(rows)], values[len(rows) :]
    tokens = [token for _, token in sorted(zip(places, picked, strict=True))]
    return described(rows, logits, tokens, good)


def described(rows: Sequence[Row], logits: Tensor, tokens: Sequence[int], good: Sequence[int]) -> list[Step | None]:
    """Rows' tokens as steps, with the log-probabilities that they want; None where logits (N, V) were not finite."""
    steps = [Step(token) for token in tokens]
    for number, group in _groups([row.request.decoding.top_logprobs for row in rows]):
        if number is not None:
            own = [tokens[place] for place in group]
            for place, step in zip(group, step_details(_part(logits, group), own, number), strict=True):
                steps[place] = step
    return [step if good[place] else None for place, step in enumerate(steps)]


def _groups(keys: Sequence[Hashable]) -> Iterator[tuple[Any, list[int]]]:
    """The places of equal keys."""
    for key in dict.fromkeys(keys):
        yield key, [place for place, other in enumerate(keys) if other == key]


def _part(logits: Tensor, group: list[int]) -> Tensor:
    """Some rows of logits."""
    return logits if len(group) == len(logits) else logits[torch.tensor(group).to(logits.device, non_blocking=True)]


def _sample(rows: Sequence[Row], logits: Tensor, sampling: Sampling) -> Tensor:
    """The next tokens of rows of the same settings, on the logits' device. (N, V) -> (N,) int64."""
    device, drawn = logits.device, None
    if sampling.temperature:
        drawn = torch.stack([row.draws[len(row.new)] for row in rows if row.draws is not None])
        drawn = drawn.to(device, non_blocking=True)
    history = as_history([row.prompt + row.new for row in rows], 0, device) if sampling.looks_back else None
    new = as_history([row.new for row in rows], 0, device) if sampling.counts_new else None
    return sample(logits, sampling, drawn, history, new)
