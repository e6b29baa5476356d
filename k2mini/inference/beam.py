"""Beam search, as transformers defines it since 4.36 (generation/utils.py, `_beam_search`).

A hypothesis' score is the sum of its tokens' log-probabilities (of a banned token -inf, without renormalising), divided
by (number of new tokens, EOS included) ** length_penalty. Each step keeps the best (1 + stop ids) * beams continuations
of all beams of a prompt; those of the first `beams` that end are candidates for the result, and the best that do not
end go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from k2mini.data.prompts import rooms, shared_prefix
from k2mini.inference.decoding import Completion, Decoding, can_replay, not_finite
from k2mini.inference.replay import Replayed
from k2mini.inference.sampling import as_history, constrain
from k2mini.nn.kv_cache import KVCache, extend
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama

SHARED_AT_LEAST = 8  # tokens: a common prefix of at least this length is computed once
LOW = -1e9  # what transformers takes for a score that can't win


@dataclass(frozen=True)
class Beams:
    """How many hypotheses a beam search keeps, and how it ranks them.

    Args:
        num_beams: hypotheses a prompt.
        length_penalty: above 0, longer hypotheses gain; below, shorter ones.
        early_stopping: True ends a prompt's search as soon as `num_beams` hypotheses have ended; False when the best
            open one, at its present length, can't beat the worst of them; 'never' when it can't at any length.
        num_return_sequences: hypotheses returned of each prompt.

    Raises ValueError where a value is out of range.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"--num-beams must be at least 1, not {self.num_beams}")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ValueError(f"num_return_sequences must be 1 to num_beams ({self.num_beams})")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping must be true, false or 'never', not {self.early_stopping!r}")


@torch.inference_mode()
def beam_search(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stop_ids: Sequence[int],
    vocab_size: int | None = None,
) -> list[list[Completion]]:
    """Search the likeliest continuations of a batch of prompts, of any lengths; one does not depend on the others.

    Args:
        decoding: has `beams`. Of its sampling, the constraints hold (repetition, n-grams, forbidden tokens);
            temperature, top-k and top-p do not.
        stop_ids: a hypothesis ends with any of these.
        vocab_size: ids from here on are never chosen.

    Returns: of each prompt its `num_return_sequences` best, best first, with their scores.

    Raises ValueError: an empty prompt, or one too long for the model's context; penalties that a search has not.
    """
    assert isinstance(decoding.beams, Beams)
    if decoding.sampling.counts_new:
        raise ValueError("a beam search has no presence or frequency penalty; take the repetition penalty")
    new = rooms(prompts, decoding.max_new_tokens, model.config.max_seq_len)
    if len(set(new)) > 1:  # the context cuts some of them shorter: one by one, as each would be searched alone
        search = partial(beam_search, model, decoding=decoding, stop_ids=stop_ids, vocab_size=vocab_size)
        return [found for prompt in prompts for found in search([prompt])]
    beams, longest = decoding.beams, max(map(len, prompts))
    capacity = longest + new[0]
    cache, logits = prefill(model, prompts, capacity=capacity)
    spread = torch.arange(len(prompts), device=model.device).repeat_interleave(beams.num_beams)
    cache = cache.select(spread)
    first_new = min(map(len, prompts))  # before this slot, all beams of a prompt hold the same
    state = _State(prompts, decoding, new[0], stop_ids, model)

    def advance() -> None:
        _reorder(cache, state.parents.flatten(), first_new, capacity if replayed else None)
        state.choose(model(state.tokens, cache=cache)[:, -1], vocab_size)

    replayed = Replayed(advance) if can_replay(model) else None
    state.choose(logits[spread], vocab_size)
    for length in range(new[0]):
        if length:
            (replayed or advance)()
        goes_on, finite = state.flags.tolist()  # a GPU is waited for here, once a step
        if not finite:
            raise not_finite(model)
        if not goes_on:
            break
    return state.results(beams.num_return_sequences, stop_ids)


def prefill(
    model: Llama, prompts: Sequence[Sequence[int]], *, capacity: int, chunk: int | None = None
) -> tuple[KVCache, Tensor]:
    """Run prompts through the model. A prefix that all of them share is computed once and copied to every row.

    Args:
        capacity: positions to make room for.

    Returns: the cache, and the logits after each prompt's last token, (B, V).
    """
    shared = shared_prefix(prompts) if len(prompts) > 1 else 0
    common = shared if shared >= SHARED_AT_LEAST else 0
    fixed = model.model.decode_blocks is not None or can_replay(model)  # single tokens are then compiled or replayed
    rows = 1 if common else len(prompts)
    cache = KVCache(model.config, rows, dtype=model.dtype, device=model.device, capacity=capacity, fixed=fixed)
    if common:
        extend(model.hidden, [prompts[0][:common]], cache, chunk)
        cache = cache.select(torch.zeros(len(prompts), dtype=torch.int64, device=model.device))
    return cache, model.logits(extend(model.hidden, [prompt[common:] for prompt in prompts], cache, chunk))


def _reorder(cache: KVCache, rows: Tensor, since: int, until: int | None) -> None:
    """Replace row i of a cache by row `rows[i]`, (B,) int64, from slot `since` on.

    Args:
        until: where the slots end, whatever the cache holds: all rows are copied, which is the same work each time and
            has no wait. None: what the cache holds, of the rows that change.
    """
    moved = torch.arange(cache.batch_size, device=rows.device)
    if until is None:
        moved, until = (rows != moved).nonzero().flatten(), cache.length
    for held in (*cache.keys, *cache.values):
        held[moved, :, since:until] = held[rows[moved], :, since:until]


class _State:
    """Of each prompt (B) the open hypotheses (W), and the best that have ended; all of it stays where it is.

    Attributes:
        running: (B, W, max_new_tokens) tokens of the open ones, -1 where there is none yet; scores: (B, W), their sums.
        parents: (B, W), the row of the cache, of B * W, that each open one continues; tokens: (B * W, 1), with what.
        ended: (B, W, max_new_tokens) tokens of the ended ones; lengths and ranks: (B, W), theirs.
        improvable: (B,), whether an open one may still win.
        flags: (2,) bool: whether the search may gain from more steps, and whether all logits were finite.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        model: Llama,
    ) -> None:
        self.beams, self.sampling = decoding.beams, decoding.sampling
        batch, width, device = len(prompts), self.beams.num_beams, model.device
        precise = torch.promote_types(model.dtype, torch.float32)
        self.running = torch.full((batch, width, max_new_tokens), -1, dtype=torch.int64, device=device)
        self.scores = torch.full((batch, width), LOW, dtype=precise, device=device)
        self.scores[:, 0] = 0  # all are the prompt: the first one's continuations are enough
        self.parents = torch.zeros(batch, width, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(batch * width, 1, dtype=torch.int64, device=device)
        self.ended = torch.zeros_like(self.running)
        self.ranks = torch.full_like(self.scores, LOW)
        self.lengths = torch.zeros_like(self.parents)
        self.is_ended = torch.zeros(batch, width, dtype=torch.bool, device=device)
        self.improvable = torch.ones(batch, dtype=torch.bool, device=device)
        self.flags = torch.ones(2, dtype=torch.bool, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)  # tokens that the open ones have
        self._stop = torch.tensor(list(stop_ids), dtype=torch.int64).to(device, non_blocking=True)
        # What sums are divided by to rank hypotheses, by their number of tokens less one.
        norms = [float(number**self.beams.length_penalty) for number in range(1, max_new_tokens + 1)]
        self._norms = torch.tensor(norms, dtype=torch.float64).to(device, non_blocking=True)
        self._history = None
        if self.sampling.looks_back:
            rows = [prompt for prompt in prompts for _ in range(width)]
            self._history = as_history(rows, max_new_tokens, device)
            new = torch.arange(max_new_tokens, device=device)
            self._new = (self._history >= 0).sum(dim=1, keepdim=True) + new  # where in the history running stands

    def _full(self) -> Tensor:
        """Which prompts have all the hypotheses that `early_stopping` wants. (B,)"""
        return self.is_ended.all(dim=1) & (self.beams.early_stopping is True)

    def choose(self, logits: Tensor, vocab_size: int | None) -> None:
        """One step: from logits (B * W, V) to the next open hypotheses and the best ended ones."""
        width, last = self.beams.num_beams, self._step + 1 == self.running.shape[2]
        if self._history is not None:
            self._history.scatter_(1, self._new, self.running.flatten(0, 1))
        logprobs = constrain(log_softmax(logits)[:, :vocab_size], self.sampling, self._history)
        scores = (logprobs.unflatten(0, self.scores.shape) + self.scores[:, :, None]).flatten(1)  # (B, W * V)
        values, places = scores.topk(max(2, 1 + len(self._stop)) * width, dim=1)  # (B, C)
        parents, tokens = places // logprobs.shape[1], places % logprobs.shape[1]
        candidates = self._rows(self.running, parents).index_copy_(2, self._step, tokens[:, :, None])
        ends = torch.isin(tokens, self._stop) | last
        # Those that go on.
        open_values = values + ends.to(values.dtype) * LOW
        chosen = open_values.topk(width, dim=1).indices  # (B, W)
        before = self.improvable & ~self._full()
        self.running.copy_(self._rows(candidates, chosen))
        self.scores.copy_(open_values.gather(1, chosen))
        first = torch.arange(0, self.parents.numel(), width, device=logits.device)[:, None]
        self.parents.copy_(parents.gather(1, chosen) + first)
        self.tokens.copy_(tokens.gather(1, chosen).view(-1, 1))
        # Those that have ended, of the first `width`.
        counts = ends & (torch.arange(ends.shape[1], device=ends.device) < width)
        norm = self._norms.index_select(0, self._step).squeeze(0)
        ranks = values / norm + (~before[:, None]).to(values.dtype) * LOW + (~counts).to(values.dtype) * LOW
        all_ranks = torch.cat([self.ranks, ranks], dim=1)
        best = all_ranks.topk(width, dim=1).indices
        self.ended.copy_(self._rows(torch.cat([self.ended, candidates], dim=1), best))
        self._step += 1
        self.lengths.copy_(torch.cat([self.lengths, self._step.expand_as(places)], dim=1).gather(1, best))
        self.is_ended.copy_(torch.cat([self.is_ended, counts], dim=1).gather(1, best))
        self.ranks.copy_(all_ranks.gather(1, best))
        # Whether the best open one, as long as it may get, beats the worst that has ended.
        if self.beams.early_stopping == "never" and self.beams.length_penalty > 0:
            norm = self._norms[-1]
        hoped = self.scores[:, :1] / norm
        worst = torch.where(self.is_ended, self.ranks.amin(dim=1, keepdim=True), LOW)
        self.improvable &= (hoped > worst).any(dim=1)
        goes_on = (self.improvable & ~self._full()).any()
        self.flags.copy_(torch.stack([goes_on, logits.amax(dim=-1).isfinite().all()]))

    @staticmethod
    def _rows(hypotheses: Tensor, which: Tensor) -> Tensor:
        """(B, W, T) and (B, N) -> (B, N, T)."""
        return hypotheses.gather(1, which[:, :, None].expand(-1, -1, hypotheses.shape[2]))

    def results(self, number: int, stop_ids: Sequence[int]) -> list[list[Completion]]:
        """The best of each prompt."""
        found = []
        for ended, lengths, ranks in zip(self.ended.tolist(), self.lengths.tolist(), self.ranks.tolist(), strict=True):
            found.append(
                [
                    _completion(tokens[:length], score, stop_ids)
                    for tokens, length, score in zip(ended[:number], lengths, ranks, strict=False)
                ]
            )
        return found


def _completion(tokens: list[int], score: float, stop_ids: Sequence[int]) -> Completion:
    if tokens and tokens[-1] in stop_ids:
        return Completion(tokens[:-1], "eos", score=score)
    return Completion(tokens, "length", score=score)
