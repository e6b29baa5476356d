"""One step after another for many requests: continuous batching (Yu et al. 2022, "Orca", section 3).

Each step takes one token of every row that decodes, and some of the prompts that wait, through the model, so a new
request waits for no other to end. In float32 on a CPU, where nothing is compiled, a request's tokens and
log-probabilities are, bit for bit, those that it gets alone: no product has a single row (it would take another
kernel), prompts are cut at multiples of `CHUNK` wherever they begin, and attention is written out (`nn/slots.py`). It
takes widths that fill whole vector registers: intermediate_dim a multiple of 32, head_dim of 64. On a GPU libraries
choose kernels by the number of rows, so the last bits depend on the company there.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from k2mini.data.prompts import room
from k2mini.inference.compile import compiled_rows
from k2mini.inference.decoding import Step, can_replay, not_finite, step_details
from k2mini.inference.replay import SlotGraphs
from k2mini.inference.request import Counts, End, Prompt, Request
from k2mini.inference.rows import Row, Slot, choose, described
from k2mini.inference.sampling import uniforms
from k2mini.nn.decode_ops import LONGEST_SUM
from k2mini.nn.llama import Llama
from k2mini.nn.lora import Adapter, stack_adapters
from k2mini.nn.slots import Chunk, SlotBatch, Slots

CHUNK = 128  # where prompts are cut, and how much of them one step reads; on a GPU up to
READ = (2048, 8192)  # tokens, with answers going on and without


class Scheduler:
    """Requests in slots, and the steps that answer them. It knows no threads.

    Args:
        model: to be used by nobody else while it steps; its linear layers get the adapters beside them.
        slots: requests answered at a time.
        capacity: tokens of each, prompt and answer together.
        reserve: as many as there is room for at once; None: all. More is made as it is needed.
        vocab_size: ids from here on are never chosen.
        adapters: by name, as `weights.adapter.load_adapters` reads them. Rows of different adapters share a step.
        keep_answers: prompts that go on from an answer reuse it too. So it always is on a GPU; on a CPU the last bits
            then depend on what was asked before.

    Attributes:
        cache: the slots' keys and values.
    """

    def __init__(
        self,
        model: Llama,
        *,
        slots: int,
        capacity: int,
        reserve: int | None = None,
        vocab_size: int | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        keep_answers: bool = False,
    ) -> None:
        self.model, self.capacity = model, min(capacity, model.config.max_seq_len)
        self.adapters, self.counts = list(adapters or {}), Counts()
        self.slots = [Slot(number) for number in range(slots)]
        self.vocab_size, self._admitted = vocab_size, 0
        self._adapted = stack_adapters(model, list(adapters.values())) if adapters else []
        self._on_cpu = model.device.type == "cpu"
        self._grain = CHUNK if self._on_cpu and not keep_answers else 1
        self.cache = Slots(model.config, slots, reserve or self.capacity, dtype=model.dtype, device=model.device)
        self._graphs: SlotGraphs | None = None
        self._drafts = model.speculation(self) if model.speculation is not None else None

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
            layer.parts, layer.route = [(self.adapter(adapter), slice(None))], None

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
        prompts = sorted((pair for pair in busy if not pair[1].decodes), key=lambda pair: pair[1].number)
        self.counts.steps += 1
        drafted = singles if self._drafts is None else self._drafts(singles)
        if not prompts and len(drafted) == len(singles) and can_replay(self.model):
            self._replay(singles)
        else:
            self._run(drafted, self._chunks(prompts, READ[not singles]))
        return True

    def admit(self, request: Request) -> None:
        """Give a request the free slot of which it takes most, or else the one unused for longest."""
        decoding, prompt = request.decoding, request.tokens
        most = 0 if request.score_only else room(len(prompt), decoding.max_new_tokens, self.capacity)
        row = Row(request, self._admitted, most, self.adapter(request.adapter))
        if decoding.sampling.temperature and most:
            row.draws = uniforms([decoding.seed], most)[0]
        if len(prompt) + most > self.cache.spare:  # by doubling: code is compiled, or captured, for each size
            self.cache.reserve(min(self.capacity, max(len(prompt) + most, 2 * self.cache.spare)))
        free = [slot for slot in self.slots if slot.row is None]
        slot = max(free, key=lambda slot: slot.common(row, self._grain))
        if 2 * slot.common(row, self._grain) < len(slot.tokens):  # most of it would be lost; what is shared is copied
            slot = min(free, key=lambda slot: slot.used)
        slot.row, row.length = row, slot.common(row, self._grain)
        row.reused = row.length
        slot.tokens = slot.tokens[: row.length]
        slot.scores = Prompt(slot.scores.logprobs[: row.length + 1], slot.scores.top[: row.length + 1])
        if request.prompt_logprobs is None or not row.length:
            slot.num_top = -1
        slot.adapter = row.adapter
        self._admitted += 1
        self.counts.prompt_tokens += len(prompt)

    def _chunks(self, prompts: Sequence[tuple[Slot, Row]], left: int) -> list[tuple[Slot, Row, Chunk]]:
        """What of prompts is read in this step, the oldest first, of `left` tokens on a GPU."""
        found: list[tuple[Slot, Row, Chunk]] = []
        left = CHUNK if self._on_cpu else left
        for slot, row in prompts:
            if left <= 0:
                break
            self._reuse(slot, row)
            if any(row.waits_for(other, chunk.end, CHUNK) for _, other, chunk in found):
                continue
            until = row.length // CHUNK * CHUNK + (CHUNK if self._on_cpu else max(left, CHUNK))
            chunk = Chunk(slot.number, row.length, min(until, len(row.prompt)))
            left -= chunk.end - chunk.start
            if found and left < 0:
                break
            found.append((slot, row, chunk))
        return found

    def _reuse(self, slot: Slot, row: Row) -> None:
        """Give a row what another slot holds of its prompt by now."""
        source = max(self.slots, key=lambda other: other.common(row, self._grain))
        found = source.common(row, self._grain)
        if row.length % self._grain == 0 and found > row.length:
            self.cache.copy(source.number, slot.number, found)
            slot.tokens = row.prompt[:found]
            if row.request.prompt_logprobs is not None:
                slot.scores = Prompt(source.scores.logprobs[: found + 1], source.scores.top[: found + 1])
                slot.num_top = source.num_top
            row.reused += found - row.length
            row.length = found

    def _route(self, adapters: Sequence[int], tensor: Tensor | None) -> None:
        """Tell the adapted layers which tokens have which adapter; `tensor`: for compiled code, the same."""
        starts = [place for place, each in enumerate(adapters) if not place or each != adapters[place - 1]]
        parts = [(adapters[a], slice(a, b)) for a, b in itertools.pairwise([*starts, len(adapters)])]
        for layer in self._adapted:
            layer.parts, layer.route = parts, tensor

    def _run(self, singles: list[tuple[Slot, Row]], chunks: Sequence[tuple[Slot, Row, Chunk]]) -> None:
        """A step of one token of each row that decodes, and of what is read of prompts."""
        can_compile = self._on_cpu and not chunks and self.model.model.decode_blocks is not None
        can_compile = can_compile and all(row is slot.row and row.length < LONGEST_SUM for slot, row in singles)
        compiled = compiled_rows(self.model, len(singles)) if can_compile else 0
        again = singles[-1:] * (compiled - len(singles))  # once more, and not looked at
        tokens = [row.new[-1] for _, row in [*singles, *again]]
        adapters = [row.adapter for _, row in [*singles, *again]]
        for _, row, chunk in chunks:
            tokens += row.prompt[chunk.start : chunk.end]
            adapters += [row.adapter] * (chunk.end - chunk.start)
        if self._adapted:
            self._route(adapters, torch.tensor(adapters) if compiled else None)
        places = [(slot.number, row.length) for slot, row in [*singles, *again]]
        pad = self._on_cpu and not compiled
        batch = SlotBatch(self.cache, places, [chunk for *_, chunk in chunks], pad=pad, fixed=bool(compiled))
        sent = torch.tensor([tokens + [0] * batch.padded]).to(self.model.device, non_blocking=True)
        hidden = self.model.hidden(sent, cache=batch)[0]  # (N, D)
        wanted, ends, begin = [*singles], list(range(len(singles))), len(singles)
        for _, row in singles:
            row.length += 1
        for slot, row, chunk in chunks:
            end = begin + chunk.end - chunk.start
            if self._note(slot, row, chunk, hidden[begin:end]):
                wanted.append((slot, row))
                ends.append(end - 1)
            begin = end
        if compiled and self.model.decode_logits is not None:
            logits = self.model.decode_logits(self.model, hidden)[: len(singles), : self.vocab_size]
        elif wanted:
            logits = self._logits(hidden[torch.tensor(ends).to(hidden.device, non_blocking=True)])
        if wanted:
            self._take(wanted, choose([row for _, row in wanted], logits))

    def _replay(self, singles: Sequence[tuple[Slot, Row]]) -> None:
        """A step of one token of each row, on a GPU."""
        rows = [row for _, row in singles]
        settings = {row.request.decoding.sampling for row in rows}
        self._graphs = self._graphs or SlotGraphs(self.model, self.cache, self.vocab_size)
        self._route([], self._graphs.adapters)
        logits, chosen = self._graphs(singles, settings.pop() if len(settings) == 1 else None)
        for row in rows:
            row.length += 1
        places = [slot.number for slot, _ in singles]
        if chosen is None or any(row.request.decoding.top_logprobs is not None for row in rows):
            logits = logits[torch.tensor(places).to(logits.device, non_blocking=True)]
        if chosen is None:
            self._take(singles, choose(rows, logits))
        else:
            tokens, finite = chosen.tolist()  # a GPU is waited for here, once a step
            each = [tokens[place] for place in places], [finite[place] for place in places]
            self._take(singles, described(rows, logits, *each))

    def _logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V), from two rows on."""
        doubled = hidden.expand(2, -1) if self._on_cpu and len(hidden) == 1 else hidden
        return self.model.logits(doubled)[: len(hidden), : self.vocab_size]

    def _note(self, slot: Slot, row: Row, chunk: Chunk, hidden: Tensor) -> bool:
        """Note a chunk that has been read. Returns whether the row's first token is to be chosen now."""
        row.length = chunk.end
        slot.tokens = row.prompt[: chunk.end // self._grain * self._grain]
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
        kept = max(num_top, slot.num_top)  # as many as of the tokens before
        for begin in range(0, len(targets), CHUNK):  # the logits of all of them might not fit
            own = targets[begin : begin + CHUNK]
            found = step_details(self._logits(hidden[begin : begin + len(own)]), own, kept)
            slot.scores.logprobs.extend(step.logprob for step in found)
            slot.scores.top.extend(list(step.top) for step in found)

    def _take(self, wanted: Sequence[tuple[Slot, Row]], steps: Sequence[Step | None]) -> None:
        """Give each row its next token."""
        for (slot, row), step in zip(wanted, steps, strict=True):
            if (own := slot.row) is not row:  # as it would be after a draft, which must be what came
                if own is None or own.new != row.new:
                    continue
                own.length, row = row.length, own
                self.counts.drafted_tokens += 1
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
        """Free a slot; what it holds stays for requests that begin alike, unless it may be wrong."""
        row, slot.row, slot.used = slot.row, None, self.counts.steps
        if not keep:
            slot.tokens, slot.num_top = [], -1
            self.cache.clear(slot.number)
        elif row is not None and self._grain == 1:
            slot.tokens = (row.prompt + row.new)[: row.length]
        if row is not None:
            self.counts.reused_tokens += row.reused
            self.counts.cancelled += reason == "cancelled"
            row.request.deliver(End(reason, error, row.reused))
