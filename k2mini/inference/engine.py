"""Answers to many requests at a time, of one model: continuous batching (Yu et al. 2022, "Orca", section 3).

Each step takes one token of every row that decodes and at most one chunk of one prompt through the model, so a new
request waits for no other to end. In float32 on a CPU a request's tokens and log-probabilities are, bit for bit, those
that it gets alone: no product has a single row (it would take another kernel), prompts are cut at multiples of `CHUNK`
wherever they begin, and attention is written out (`nn/slots.py`). On a GPU libraries choose kernels by the number of
rows, so the last bits depend on the company there.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch
from torch import Tensor

from k2mini.data.prompts import room
from k2mini.inference.generate import not_finite, step_details
from k2mini.inference.request import Counts, End, Prompt, QueueFullError, Request
from k2mini.inference.rows import Row, Slot, choose
from k2mini.inference.sampling import uniforms
from k2mini.nn.llama import Llama
from k2mini.nn.lora import Adapter, StackedLora, stack_adapters
from k2mini.nn.slots import Chunk, SlotBatch, Slots

log = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK = 128  # tokens of a prompt in one step


class Engine:
    """Answers requests with one model, which it has to itself, in the thread that calls `run`.

    Args:
        slots: requests answered at a time.
        capacity: tokens of each, prompt and answer together.
        vocab_size: ids from here on are never chosen.
        queue: requests that may wait.
        adapters: by name, as `build.load_adapters` reads them. Rows of different adapters share a step.
    """

    def __init__(
        self,
        model: Llama,
        *,
        slots: int,
        capacity: int,
        vocab_size: int | None = None,
        queue: int = 64,
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
        self.model, self.capacity = model, min(capacity, model.config.max_seq_len)
        self.slots, self.adapters, self.counts = slots, list(adapters or {}), Counts()
        self._vocab_size, self._queue = vocab_size, queue
        self._routed: list[StackedLora] = stack_adapters(model, list((adapters or {}).values()))
        self._cache = Slots(model.config, slots, self.capacity, dtype=model.dtype, device=model.device)
        self._slots = [Slot(number) for number in range(slots)]
        self._waiting: deque[Request] = deque()
        self._cancelled: set[Request] = set()
        self._work: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._open, self._drain = True, True
        self._admitted = 0

    def submit(self, request: Request) -> None:
        """Take a request in, from any thread.

        Raises ValueError where it is empty or too long or its adapter is unknown, QueueFullError where too many wait.
        """
        if request.adapter is not None and request.adapter not in self.adapters:
            raise ValueError(f"there is no adapter {request.adapter!r}; there are {', '.join(self.adapters) or 'none'}")
        if not (request.score_only and 0 < len(request.tokens) <= self.capacity):
            room(len(request.tokens), 1, self.capacity)
        with self._wake:
            if not self._open:
                raise QueueFullError("the server ends, and takes no more requests")
            free = sum(slot.row is None for slot in self._slots)
            if len(self._waiting) >= self._queue + free:
                raise QueueFullError(f"{len(self._waiting)} requests wait already; try again later")
            self._waiting.append(request)
            self.counts.requests += 1
            self.counts.waiting = len(self._waiting)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """End a request, from any thread; its slot is free before the next step."""
        with self._wake:
            self._cancelled.add(request)
            self._wake.notify()

    def between(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the engine's thread, between two steps; from any thread."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)

        with self._wake:
            if self._open:
                self._work.append(run)
                self._wake.notify()
            else:
                future.set_exception(RuntimeError("the server ends, and takes no more requests"))
        return future

    def alone(self, adapter: str | None) -> None:
        """Let the model, called within `between`, answer with an adapter, or as the base."""
        for module in self._routed:
            module.parts = [(self._adapter(adapter), slice(None))]

    def _adapter(self, name: str | None) -> int:
        return -1 if name is None else self.adapters.index(name)

    def stop(self, drain: bool = True) -> None:
        """Let `run` return: once all requests are answered, or, without `drain`, at once, cancelling them."""
        with self._wake:
            self._open, self._drain = False, drain and self._drain
            self._wake.notify()

    def run(self) -> None:
        """Answer requests until `stop`."""
        while True:
            if not self._drain:
                with self._wake:
                    rows = [slot.row.request for slot in self._slots if slot.row]
                    self._cancelled |= {*self._waiting, *rows}
            try:
                done = not self.step()
            except Exception as error:  # the next request may fare better: memory is free again
                log.exception("a step of the engine failed")
                for slot in self._slots:
                    self._end(slot, "error", f"{error}", keep=False)
                continue
            with self._wake:
                if not done or self._waiting or self._work or self._cancelled:
                    continue
                if not self._open:
                    return
                self._wake.wait()

    @torch.inference_mode()
    def step(self) -> bool:
        """Take what has come, then one step. Returns whether there was anything to do."""
        self._take()
        busy = [(slot, slot.row) for slot in self._slots if slot.row is not None]
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

    def _take(self) -> None:
        """What other threads have asked for: work, cancelled requests, new ones."""
        while True:
            with self._wake:
                work = self._work.popleft() if self._work else None
            if work is None:
                break
            work()
        with self._wake:
            cancelled, self._cancelled = self._cancelled, set()
            dropped = [request for request in self._waiting if request in cancelled]
            self._waiting = deque(request for request in self._waiting if request not in cancelled)
        for request in dropped:
            self.counts.cancelled += 1
            request.deliver(End("cancelled"))
        for slot in self._slots:
            if slot.row is not None and slot.row.request in cancelled:
                self._end(slot, "cancelled")
        while any(slot.row is None for slot in self._slots):
            with self._wake:
                if not self._waiting:
                    break
                request = self._waiting.popleft()
            self._admit(request)
        self.counts.waiting = len(self._waiting)
        self.counts.slots_busy = sum(slot.row is not None for slot in self._slots)

    def _admit(self, request: Request) -> None:
        """Give a request the free slot that holds most of its prompt, or else the one unused for longest."""
        decoding, prompt = request.decoding, request.tokens
        most = 0 if request.score_only else room(len(prompt), decoding.max_new_tokens, self.capacity)
        row = Row(request, self._admitted, most, self._adapter(request.adapter))
        if decoding.sampling.temperature and most:
            row.draws = uniforms([decoding.seed], most)[0]
        free = [slot for slot in self._slots if slot.row is None]
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
        source = max(self._slots, key=lambda other: self._common(row, other))
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
        if not self._routed:
            return
        starts = [place for place, row in enumerate(singles) if not place or row.adapter != singles[place - 1].adapter]
        bounds = [*starts, len(singles)]
        parts = [(singles[a].adapter, slice(a, b)) for a, b in zip(starts, bounds[1:], strict=True)]
        if reading is not None:
            parts.append((reading.adapter, slice(len(singles), number)))
        for module in self._routed:
            module.parts = parts

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
        if wanted is not None and row.request.deliver(
            Prompt(list(slot.scores.logprobs), [top[:wanted] for top in slot.scores.top])
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
        found = step_details(self._logits(hidden[: len(targets)]), targets, num_top)
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
                if row.request.deliver(step):
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
            row.request.deliver(End(reason, error, row.reused))
