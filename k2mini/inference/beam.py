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

from k2mini.data.prompts import rooms
from k2mini.inference.generate import Completion, Decoding, check_finite, prefill
from k2mini.inference.sampling import Sampling, as_history, constrain
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama

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

    Raises ValueError: an empty prompt, or one too long for the model's context.
    """
    assert isinstance(decoding.beams, Beams)
    new = rooms(prompts, decoding.max_new_tokens, model.config.max_seq_len)
    if len(set(new)) > 1:  # the context cuts some of them shorter: one by one, as each would be searched alone
        search = partial(beam_search, model, decoding=decoding, stop_ids=stop_ids, vocab_size=vocab_size)
        return [found for prompt in prompts for found in search([prompt])]
    beams, max_new_tokens = decoding.beams, new[0]
    width, batch, device = beams.num_beams, len(prompts), model.device
    cache, logits = prefill(model, prompts, capacity=max(map(len, prompts)) + max_new_tokens)
    spread = torch.arange(batch, device=device).repeat_interleave(width)
    cache, logits = cache.select(spread), logits[spread]
    first_new = min(map(len, prompts))  # before this slot, all beams of a prompt hold the same
    state = _State(batch, width, max_new_tokens, device)
    stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    for length in range(max_new_tokens):
        check_finite(model, logits)
        scores = _next_scores(logits, state, prompts, decoding.sampling, length, vocab_size)
        state.choose(scores, stop, length, last=length + 1 == max_new_tokens, beams=beams)
        if not bool((state.improvable & ~state.full(beams)).any()) or length + 1 == max_new_tokens:
            break
        offsets = torch.arange(batch, device=device)[:, None] * width
        _reorder(cache, (state.parents + offsets).flatten(), first_new)
        logits = model(state.running[:, :, length].reshape(-1, 1), cache=cache)[:, -1]
    return state.results(beams.num_return_sequences, stop_ids)


def _reorder(cache: KVCache, rows: Tensor, since: int) -> None:
    """Replace row i of a cache by row `rows[i]`. Only rows that change are copied, from slot `since` on.

    Args:
        rows: (B,) int64.
        since: the tokens before this position are the same in all rows that change places.
    """
    moved = (rows != torch.arange(cache.batch_size, device=rows.device)).nonzero().flatten()
    if not len(moved):
        return
    sources = rows[moved]
    cache.lengths = cache.lengths[rows]
    for held in (*cache.keys, *cache.values):
        held[moved, :, since : cache.length] = held[sources, :, since : cache.length]


def _next_scores(
    logits: Tensor,
    state: _State,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    length: int,
    vocab_size: int | None,
) -> Tensor:
    """Every continuation's score so far. (B, W * V)"""
    logprobs = log_softmax(logits)[:, :vocab_size]
    history = None
    if sampling.looks_back:
        made = state.running[:, :, :length].tolist()
        rows = [[*prompt, *row] for prompt, rows in zip(prompts, made, strict=True) for row in rows]
        history = as_history(rows, 0, logits.device)
    logprobs = constrain(logprobs, sampling, history)
    batch, width = state.scores.shape
    return (logprobs.view(batch, width, -1) + state.scores[:, :, None]).flatten(1)


class _State:
    """Of each prompt (B) the open hypotheses (W), and the best that have ended.

    Attributes:
        running: (B, W, max_new_tokens) tokens of the open ones; scores: (B, W), their sums.
        parents: (B, W), which hypothesis of the step before each open one continues.
        ended: (B, W, max_new_tokens) tokens of the ended ones; lengths and ranks: (B, W), theirs.
        improvable: (B,), whether an open one may still win.
    """

    def __init__(self, batch: int, width: int, max_new_tokens: int, device: torch.device) -> None:
        self.running = torch.zeros(batch, width, max_new_tokens, dtype=torch.int64, device=device)
        self.scores = torch.full((batch, width), LOW, device=device)
        self.scores[:, 0] = 0  # all are the prompt: the first one's continuations are enough
        self.parents = torch.zeros(batch, width, dtype=torch.int64, device=device)
        self.ended = torch.zeros_like(self.running)
        self.ranks = torch.full((batch, width), LOW, device=device)
        self.lengths = torch.zeros_like(self.parents)
        self.is_ended = torch.zeros(batch, width, dtype=torch.bool, device=device)
        self.improvable = torch.ones(batch, dtype=torch.bool, device=device)

    def full(self, beams: Beams) -> Tensor:
        """Which prompts have all the hypotheses that `early_stopping` wants. (B,)"""
        return self.is_ended.all(dim=1) & (beams.early_stopping is True)

    def choose(self, scores: Tensor, stop: Tensor, length: int, *, last: bool, beams: Beams) -> None:
        """One step: from all continuations to the next open hypotheses and the best ended ones.

        Args:
            scores: (B, W * V).
            length: tokens that the open ones have so far.
            last: no more tokens may follow.
        """
        width = self.scores.shape[1]
        vocab = scores.shape[1] // width
        values, places = scores.topk(max(2, 1 + len(stop)) * width, dim=1)  # (B, C)
        parents, tokens = places // vocab, places % vocab
        candidates = self._rows(self.running, parents)
        candidates[:, :, length] = tokens
        ends = torch.isin(tokens, stop) | last
        # Those that go on.
        open_values = values + ends.to(values.dtype) * LOW
        chosen = open_values.topk(width, dim=1).indices  # (B, W)
        before = self.improvable & ~self.full(beams)
        self.running = self._rows(candidates, chosen)
        self.scores = open_values.gather(1, chosen)
        self.parents = parents.gather(1, chosen)
        # Those that have ended, of the first `width`.
        counts = ends & (torch.arange(ends.shape[1], device=ends.device) < width)
        ranks = values / (length + 1) ** beams.length_penalty
        ranks = ranks + (~before[:, None]).to(ranks.dtype) * LOW + (~counts).to(ranks.dtype) * LOW
        all_ranks = torch.cat([self.ranks, ranks], dim=1)
        best = all_ranks.topk(width, dim=1).indices
        self.ended = self._rows(torch.cat([self.ended, candidates], dim=1), best)
        self.lengths = torch.cat([self.lengths, torch.full_like(places, length + 1)], dim=1).gather(1, best)
        self.is_ended = torch.cat([self.is_ended, counts], dim=1).gather(1, best)
        self.ranks = all_ranks.gather(1, best)
        # Whether the best open one, as long as it may get, beats the worst that has ended.
        horizon = length + 1
        if beams.early_stopping == "never" and beams.length_penalty > 0:
            horizon = self.running.shape[2]
        hoped = self.scores[:, :1] / horizon**beams.length_penalty
        worst = torch.where(self.is_ended, self.ranks.amin(dim=1, keepdim=True), LOW)
        self.improvable = self.improvable & (hoped > worst).any(dim=1)

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
