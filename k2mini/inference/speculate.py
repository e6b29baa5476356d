"""Speculation: tokens that may come are drafted, and one pass through the model looks at all of them.

A pass reads the weights once, however few rows it has, so several tokens in one cost little more than one. At the place
of each drafted token the answer's next one is chosen as ever, by the same settings and with the row's own draw; the
draft holds as far as it is what was chosen. So answers are those that there are without, drawn ones too, whatever was
drafted: to the bit where a token does not depend on its company (see `scheduler`), elsewhere but for near ties, whose
last bits the number of rows decides.

It is speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1) of drafts that are certain (q = 1): a
drafted x is taken with probability p(x), by a draw in its share of [0, 1); any other draw gives a token of the rest.

Drafts continue an earlier place where the last tokens stood (Saxena 2023, "Prompt Lookup Decoding"), or are those of a
smaller model, which draws with the same numbers and so often the same. A draft is as long as pays, by what drafts were
worth so far.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from k2mini.data.tokenizer import Tokenizer
from k2mini.inference.decoding import Step, can_replay
from k2mini.inference.rows import Row, Slot, choose
from k2mini.nn.llama import Llama
from k2mini.nn.slots import Chunk, SlotBatch, Slots

if TYPE_CHECKING:
    from k2mini.inference.scheduler import Scheduler

Pair = tuple[Slot, Row]

MOST = 15  # tokens of a draft
NGRAM = 4  # the most tokens that are looked for
PRIOR = (0.7, 0.4, 0.6, 0.8, 0.9)  # how likely a drafted token is right, before any was: of a model; by n-gram
WEIGHT = 6.0  # of it, in tokens
FORGET = 0.9  # of what earlier drafts say, with each draft
ROW = {"cpu": 0.04}  # what another row of a pass costs, in passes of one (of 135M, measured); next to nothing on a GPU
FASTER = 3.0  # times as fast are passes without drafts, where these are compiled or replayed
READ = 128  # tokens of a prompt that a draft model reads in a step, so that other rows need not wait long


class Costs(NamedTuple):
    """What things cost, in passes of one row: another row of a pass, a drafted token, a pass with drafts."""

    row: float
    token: float = 0.0
    drafted: float = 1.0


def speculate(model: Llama, draft: Llama | None = None) -> Llama | None:
    """Let a model's answers be drafted: by a smaller model of the same tokenizer, or (None) from what stands before.

    It holds for every `Scheduler` made from now on; beams are not drafted. Answers are the same to the bit where a
    row's are whatever runs beside it: on a CPU in float32, with head_dim a multiple of 64 and intermediate_dim of 32.

    Returns: the draft model.
    """
    model.speculation = lambda scheduler: Drafts(scheduler, draft)
    return draft


def check_vocabulary(tokenizer: Tokenizer, other: Tokenizer, name: str) -> None:
    """Raise ValueError where a draft model's tokens, of the directory called `name`, are not the model's."""
    if (number := other.vocab_size) != tokenizer.vocab_size:
        raise ValueError(f"{name} has {number} tokens, and the model {tokenizer.vocab_size}: it can't draft for it")
    if odd := [token for token in range(number) if tokenizer.piece(token) != other.piece(token)]:
        named = [repr(each.piece(odd[0])) for each in (other, tokenizer)]
        raise ValueError(f"{name}: token {odd[0]} is {named[0]}, the model's {named[1]}: it can't draft for it")


@dataclass
class _Known:
    """What is known of a row.

    Attributes:
        places: the place after the last occurrence of each n-gram that a token follows.
        read: tokens whose n-grams are there.
        draft, base, kind: the last draft, the length of the answer before it, and what it rests on (see `PRIOR`).
        right, tried: drafted tokens, by kind; those after a wrong one are not counted.
        held: tokens that the draft model has in its cache.
    """

    row: Row
    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    read: int = 0
    draft: list[int] = field(default_factory=list)
    base: int = 0
    kind: int = 0
    right: list[float] = field(default_factory=lambda: [WEIGHT * prior for prior in PRIOR])
    tried: list[float] = field(default_factory=lambda: [WEIGHT for _ in PRIOR])
    held: int = 0

    def learn(self) -> list[int]:
        """See what became of the last draft. Returns the row's tokens."""
        row, draft, kind = self.row, self.draft, self.kind
        if draft:
            came = row.new[self.base :]
            right = next((i for i, token in enumerate(draft) if came[i : i + 1] != [token]), len(draft))
            self.right[kind] = FORGET * self.right[kind] + right
            self.tried[kind] = FORGET * self.tried[kind] + min(right + 1, len(draft))
            self.held = min(self.held, len(row.prompt) + self.base + right)
        self.draft, self.base = [], len(row.new)
        return row.prompt + row.new

    def length(self, most: int, rows: int, costs: Costs) -> int:
        """How many tokens to draft, of a pass of so many rows: as many as give the most tokens for the time."""
        rate = self.right[self.kind] / self.tried[self.kind]
        best, length, expected, reached = 0.0, 0, 0.0, 1.0
        for number in range(most + 1):
            expected += reached  # tokens, one more than are right
            reached *= rate
            cost = 1 + costs.row * (rows * (number + 1) - 1)
            value = expected / (cost * (costs.drafted if number else 1) + costs.token * number)
            if value > best:
                best, length = value, number
        return length

    def look_up(self, tokens: Sequence[int], most: int, rows: int, costs: Costs) -> list[int]:
        """What followed the last tokens where they stood before; at the end, it goes on with itself."""
        for end in range(self.read, len(tokens) - 1):
            for size in range(1, min(NGRAM, end + 1) + 1):
                self.places[tuple(tokens[end + 1 - size : end + 1])] = end + 1
        self.read = max(self.read, len(tokens) - 1)
        for size in range(min(NGRAM, len(tokens)), 0, -1):
            if (start := self.places.get(tuple(tokens[-size:]))) is not None:
                self.kind = size
                found = [*tokens[start : start + MOST]]
                while len(found) < most:
                    found += found[: most - len(found)]
                return found[: self.length(most, rows, costs)]
        return []


class Drafts:
    """Drafts the answers of a scheduler's slots."""

    def __init__(self, scheduler: Scheduler, draft: Llama | None) -> None:
        self._scheduler, self._draft = weakref.proxy(scheduler), draft  # which has this, and frees its cache at its end
        self._known: dict[int, _Known] = {}
        model = scheduler.model
        faster = model.model.decode_blocks is not None or can_replay(model)
        self._costs = Costs(ROW.get(model.device.type, 0.0), drafted=FASTER if faster else 1.0)
        if draft is not None:
            number, held = len(scheduler.slots), min(scheduler.cache.spare, draft.config.max_seq_len)
            self._cache = Slots(draft.config, number, held, dtype=draft.dtype, device=draft.device)
            self._costs = self._costs._replace(token=draft.config.num_parameters() / model.config.num_parameters())

    def __call__(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Rows; then, row by row, the same as they will be after the first drafted token, after two, and so on."""
        out = [*pairs]
        for (slot, row), known in zip(pairs, self._drafted(pairs), strict=True):
            for number in range(1, len(known.draft) + 1):
                out.append((slot, replace(row, length=row.length + number, new=row.new + known.draft[:number])))
        return out

    def _drafted(self, pairs: Sequence[Pair]) -> list[_Known]:
        """What is known of each row, with its draft."""
        found, asked = [], list[tuple[int, _Known, int]]()
        for slot, row in pairs:
            known = self._known.get(slot.number)
            if known is None or known.row is not row:
                known = self._known[slot.number] = _Known(row)
            tokens, most = known.learn(), min(MOST, row.most - len(row.new) - 1)
            found.append(known)
            if self._draft is None:
                draft = known.look_up(tokens, most, len(pairs), self._costs)
                ends = (place for place, token in enumerate(draft) if token in row.request.stop_ids)
                known.draft = draft[: next(ends, None)]
            else:
                most = min(most, self._draft.config.max_seq_len - len(tokens))
                asked.append((slot.number, known, known.length(most, len(pairs), self._costs)))
        if asked:
            self._continue(asked)
        return found

    def _continue(self, asked: Sequence[tuple[int, _Known, int]]) -> None:
        """Let the draft model go on: (slot, what is known, length of the draft)."""
        assert self._draft is not None
        self._cache.reserve(min(self._scheduler.cache.spare, self._draft.config.max_seq_len))
        ready = []
        for slot, known, length in (each for each in asked if each[2]):
            tokens = known.row.prompt + known.row.new
            if len(tokens) - known.held > READ:  # nothing is drafted before all is read
                self._read([(tokens, Chunk(slot, known.held, known.held + READ))])
                known.held += READ
            else:
                ready.append((slot, known, length))
        while asked := [each for each in ready if len(each[1].draft) < each[2]]:
            rows = [replace(known.row, new=known.row.new + known.draft) for _, known, _ in asked]
            parts = []
            for (slot, known, _), row in zip(asked, rows, strict=True):
                tokens = row.prompt + row.new
                parts.append((tokens, Chunk(slot, known.held, len(tokens))))
                known.held = len(tokens)
            steps = choose(rows, self._read(parts))
            ready = [each for each, step in zip(asked, steps, strict=True) if self._goes_on(each[1], step)]

    def _read(self, parts: Sequence[tuple[list[int], Chunk]]) -> Tensor:
        """Run chunks of rows' tokens through the draft model. Returns the logits after each, (N, V)."""
        assert self._draft is not None
        tokens = [token for own, (_, start, end) in parts for token in own[start:end]]
        batch = SlotBatch(self._cache, [], [chunk for _, chunk in parts])
        hidden = self._draft.hidden(torch.tensor([tokens], device=self._draft.device), cache=batch)[0]  # (tokens, D)
        ends = torch.tensor([end - start for _, (_, start, end) in parts]).cumsum(0) - 1
        return self._draft.logits(hidden[ends.to(hidden.device)])[:, : self._scheduler.vocab_size]

    def _goes_on(self, known: _Known, step: Step | None) -> bool:
        """Add a token to a draft. Returns whether another may follow."""
        if step is None or step.token in known.row.request.stop_ids:
            return False
        known.draft.append(step.token)
        return True
