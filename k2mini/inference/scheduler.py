"""One step after another for many requests: continuous batching (Yu et al. 2022, "Orca", section 3).

Each step takes one token of every row that decodes and at most one chunk of one prompt through the model, so a new
request waits for no other to end. In float32 on a CPU a request's tokens and log-probabilities are, bit for bit, those
that it gets alone: no product has a single row (it would take another kernel), prompts are cut at multiples of `CHUNK`
wherever they begin, and attention is written out (`nn/slots.py`). It takes widths that fill whole vector registers:
intermediate_dim a multiple of 32, head_dim of 64. On a GPU libraries choose kernels by the number of rows, so the last
bits depend on the company there.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from k2mini.data.prompts import room
from k2mini.inference.generate import Step, not_finite, step_details
from k2mini.inference.request import Counts, End, Prompt, Request
from k2mini.inference.rows import Row, Slot, choose
from k2mini.inference.sampling import uniforms
from k2mini.nn.llama import Llama
from k2mini.nn.lora import Adapter, stack_adapters
from k2mini.nn.slots import Chunk, SlotBatch, Slots

log = logging.getLogger(__name__)

CHUNK = 128  # tokens of a prompt in one step


class Scheduler:
    """Requests in slots, and the steps that answer them. It knows no threads.

    Args:
        model: to be used by nobody else while it steps; its linear layers get the adapters beside them.
        slots: requests answered at a time.
        capacity: tokens of each, prompt and answer together.
        vocab_size: ids from here on are never chosen.
        adapters: by name, as `weights.adapter.load_adapters` reads them. Rows of different adapters share a step.
    """

    def __init__(
        self,
        model: Llama,
        *,
        slots: int,
        capacity: int,
        vocab_size: int | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
        self.model, self.capacity = model, min(capacity, model.config.max_seq_len)
        self.adapters, self.counts = list(adapters or {}), Counts()
        self.slots = [Slot(number) for number in range(slots)]
        self._vocab_size, self._admitted = vocab_size, 0
        self._adapted = stack_adapters(model, list((adapters or {}).values()))
        self._cache = Slots(model.config, slots, self.capacity, dtype=model.dtype, device=model.device)

    @property
    def free(self) -> int:
        """How many slots nobody uses."""
        return sum(slot.row is None for slot in self.slots)

    def adapter(self, name: str | None) -> int:
        """The number of an adapter; of the base, None, it is -1. Raises ValueError where there is no such adapter."""
        if name is not None and name not in self.adapters:
            raise ValueError(f"there is no adapter {name!r}; there are {', '.join(self.adapters) or 'none'}")
        return -1 if name is None else self.adapters.index(name)

    def alone(self, adapter: str | None) -> None:
        """Let the model, called between two steps, answer with an adapter, or as the base."""
        for layer in self._adapted:
            layer.parts = [(self.adapter(adapter), slice(None))]

    def tell(self, request: Request, event: Prompt | Step | End) -> bool:
        """Deliver an event. Returns whether the answer is to end: what `deliver` says, or that it has failed."""
        try:
            return bool(request.deliver(event))
        except Exception:
            log.exception("a request could not be told; it ends")
            return True

    def cancel(self, requests: Collection[Request]) -> None:
        """End these, if they are in slots."""
        for slot in self.slots:
            if slot.row is not None and slot.row.request in requests:
                self._end(slot, "cancelled")

    def fail(self, error: str) -> None:
        """End all requests in slots, and trust nothing in the cache."""
        for slot in self.slots:
            self._end(slot, "error", error, keep=False)

    @torch.inference_mode()
    def step(self) -> bool:
        """One step. Returns whether there was anything to do."""
        busy = [(slot, slot.row) for slot in self.slots if slot.row is not None]
        if not busy:
            return False
        singles = sorted((pair for pair in busy if pair[1].decodes), key=lambda pair: pair[1].adapter)
        prompts = [pair for pair in busy if not pair[1].decodes]
        reading = min(prompts, key=lambda pair: pair[1].number) if prompts else None
        chunk = None if reading is None else self._chunk(*reading)
        batch = SlotBatch(self._cache, [(slot.number, row.length) for slot, row in singles], chunk)
        tokens = [row.new[-1] for _, row in singles]
        if reading is not None and chunk is not None:
            tokens += reading[1].prompt[chunk.start : chunk.end]
        self._route([row for _, row in singles], reading[1] if reading else None, len(tokens))
        tokens += [0] * batch.padded
        hidden = self.model.hidden(torch.tensor([tokens], device=self.model.device), cache=batch)[0]  # (N, D)
        self.counts.steps += 1
        wanted = [*singles]
        places = list(range(len(singles)))
        for _, row in singles:
            row.length += 1
        if reading is not None and chunk is not None and self._read(*reading, chunk, hidden[len(singles) :]):
            wanted.append(reading)
            places.append(len(singles) + chunk.end - chunk.start - 1)
        if wanted:
            self._choose(wanted, self._logits(hidden[places]))
        return True

    def admit(self, request: Request) -> None:
        """Give a request the free slot that holds most of its prompt, or else the one unused for longest."""
        decoding, prompt = request.decoding, request.tokens
        most = 0 if request.score_only else room(len(prompt), decoding.max_new_tokens, self.capacity)
        row = Row(request, self._admitted, most, self.adapter(request.adapter))
        if decoding.sampling.temperature and most:
            row.draws = uniforms([decoding.seed], most)[0]
        free = [slot for slot in self.slots if slot.row is None]
        slot = max(free, key=lambda slot: (self._common(row, slot), -slot.used))
        slot.row, row.length = row, self._common(row, slot)
        row.reused = row.length
        slot.tokens = slot.tokens[: row.length]
        slot.scores = Prompt(slot.scores.logprobs[: row.length + 1], slot.scores.top[: row.length + 1])
        if request.prompt_logprobs is None or not row.length:
            slot.num_top = -1
        slot.adapter = row.adapter
        self._admitted += 1
        self.counts.prompt_tokens += len(prompt)

    def _common(self, row: Row, slot: Slot) -> int:
        """How many tokens, in whole chunks, a row can take from a slot, which may be its own or another's."""
        if slot.adapter != row.adapter:
            return 0
        wanted = row.request.prompt_logprobs
        both = min(len(slot.tokens), len(row.prompt) - 1)  # at least one token is left, whose logits are wanted
        if wanted is not None:  # of each token taken, and of the one after them
            both = min(both, len(slot.scores.logprobs)) if slot.num_top >= wanted else 0
        same = next((i for i in range(both) if slot.tokens[i] != row.prompt[i]), both)
        if wanted is not None and same:
            same -= 1
        return same // CHUNK * CHUNK

    def _chunk(self, slot: Slot, row: Row) -> Chunk:
        """A row's next chunk, once it has taken what another slot holds of its prompt by now."""
        source = max(self.slots, key=lambda other: self._common(row, other))
        found = self._common(row, source)
        if row.length % CHUNK == 0 and found > row.length:
            self._cache.copy(source.number, slot.number, found)
            slot.tokens = row.prompt[:found]
            if row.request.prompt_logprobs is not None:
                slot.scores = Prompt(source.scores.logprobs[: found + 1], source.scores.top[: found + 1])
                slot.num_top = source.num_top
            row.reused += found - row.length
            row.length = found
        end = min((row.length // CHUNK + 1) * CHUNK, len(row.prompt))
        return Chunk(slot.number, row.length, end)

    def _route(self, singles: Sequence[Row], reading: Row | None, number: int) -> None:
        """Tell the adapted layers which tokens are whose: those of one adapter stand together."""
        if not self._adapted:
            return
        starts = [place for place, row in enumerate(singles) if not place or row.adapter != singles[place - 1].adapter]
        bounds = [*starts, len(singles)]
        parts = [(singles[a].adapter, slice(a, b)) for a, b in zip(starts, bounds[1:], strict=True)]
        if reading is not None:
            parts.append((reading.adapter, slice(len(singles), number)))
        for layer in self._adapted:
            layer.parts = parts

    def _logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V), from two rows on."""
        doubled = hidden if len(hidden) > 1 else hidden.expand(2, -1)
        return self.model.logits(doubled)[: len(hidden), : self._vocab_size]

    def _read(self, slot: Slot, row: Row, chunk: Chunk, hidden: Tensor) -> bool:
        """Note a chunk that has been read. Returns whether the row's first token is to be chosen now."""
        row.length = chunk.end
        if chunk.end % CHUNK == 0:
            slot.tokens = row.prompt[: chunk.end]
        if (wanted := row.request.prompt_logprobs) is not None:
            self._score(slot, row, chunk, hidden, wanted)
        if not row.decodes:
            return False
        if wanted is not None and self.tell(
            row.request, Prompt(list(slot.scores.logprobs), [top[:wanted] for top in slot.scores.top])
        ):
            self._end(slot, "stop")
        elif not row.most:
            self._end(slot, "length")
        return slot.row is not None

    def _score(self, slot: Slot, row: Row, chunk: Chunk, hidden: Tensor, num_top: int) -> None:
        """The log-probabilities of the tokens after each one of a chunk."""
        if not chunk.start:
            slot.scores, slot.num_top = Prompt([None], [[]]), num_top
        targets = row.prompt[chunk.start + 1 : chunk.end + 1]
        if not targets:
            return
        kept = max(num_top, slot.num_top)  # as many as of the tokens before
        found = step_details(self._logits(hidden[: len(targets)]), targets, kept)
        slot.scores.logprobs.extend(step.logprob for step in found)
        slot.scores.top.extend(list(step.top) for step in found)

    def _choose(self, wanted: Sequence[tuple[Slot, Row]], logits: Tensor) -> None:
        """Give each row its next token, of logits (N, V)."""
        for (slot, row), step in zip(wanted, choose([row for _, row in wanted], logits), strict=True):
            if step is None:
                self._end(slot, "error", str(not_finite(self.model)), keep=False)
            elif step.token in row.request.stop_ids:
                self._end(slot, "eos")
            else:
                row.new.append(step.token)
                self.counts.new_tokens += 1
                if self.tell(row.request, step):
                    self._end(slot, "stop")
                elif len(row.new) == row.most:
                    self._end(slot, "length")

    def _end(self, slot: Slot, reason: str, error: str = "", *, keep: bool = True) -> None:
        """Free a slot; its whole chunks stay for requests that begin alike, unless they may be wrong."""
        row, slot.row, slot.used = slot.row, None, self.counts.steps
        if not keep:
            slot.tokens, slot.num_top = [], -1
            self._cache.clear(slot.number)
        if row is not None:
            self.counts.reused_tokens += row.reused
            self.counts.cancelled += reason == "cancelled"
            self.tell(row.request, End(reason, error, row.reused))
