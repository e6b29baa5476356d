"""Perplexity of whole documents, and of long texts under a sliding window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from k2mini.data.packing import Example, Examples
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import ALONE, World
from k2mini.evaluation.score import OtherModel, Request, score, split_jointly
from k2mini.inference.decoding import not_finite
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama
from k2mini.nn.uneven import uneven
from k2mini.training.validation import validation_loss


@dataclass(frozen=True)
class Perplexity:
    """How well text is predicted.

    Attributes:
        perplexity: exp of the mean negative log-probability of a token.
        bits_per_byte: the same in bits, over the text's bytes in UTF-8, so that tokenizers compare.
        tokens, num_bytes: what was predicted.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    num_bytes: int


def from_loss(loss: float) -> float:
    """The perplexity of a mean loss in nats. Raises ValueError where no number is large enough for it."""
    if loss > 700:
        raise ValueError(f"the mean loss is {loss:.3g} nats a token, which no model in order has; k2mini verify it")
    return math.exp(loss)


def perplexity(model: Llama, documents: Sequence[Sequence[int]], batch_size: int = 16) -> float:
    """exp of the mean loss over all tokens but each document's first (BOS). Documents see nothing of each other."""
    examples = Examples([Example(document, unsupervised=1) for document in documents], seed=None)
    return from_loss(validation_loss(model, examples, batch_size))


@torch.no_grad()
def text_perplexity(
    model: Llama | OtherModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    world: World = ALONE,
) -> Perplexity:
    """Token-weighted over texts of any length; every token but BOS is predicted once.

    Args:
        window: tokens that a prediction may rest on, BOS among them; None: the model's context.
        stride: tokens by which the window moves; a token then sees at least window - stride before it. None: half.
        world: its ranks divide the windows among themselves; all of them call this.

    Raises ValueError where there is no text, window and stride do not fit, or the logits are not finite.
    """
    device = model.device if isinstance(model, Llama) else "cpu"
    nats, tokens, num_bytes = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    number, own = 0, dict[int, Tensor]()  # of windows; the log-probability of each that is this rank's
    with uneven(model, world) if world.size > 1 else nullcontext():
        for text in texts:
            num_bytes += len(text.encode())
            # As lm-evaluation-harness has it where no BOS is named, which takes one that is, though no text begins so.
            before = [tokenizer.eos_id] if tokenizer.bos_id is None else []
            ids = before + tokenizer.encode(text, bos=True, eos=False)
            for row, new in _windows(model, ids, 1, window, stride):
                if number % world.size == world.rank:
                    own[number] = _summed(model, row, new)
                    nats = nats - own[number]
                number, tokens = number + 1, tokens + new.stop - new.start
            _finite(model, nats)  # a GPU is waited for here, once a text
    if world.size > 1:  # summed in one process's order
        parts = world.all_gather({place: total.item() for place, total in own.items()})
        totals = {place: total for part in parts for place, total in part.items()}
        nats = -torch.tensor(sum(totals[place] for place in range(number)), dtype=torch.float64)
    return _summary(_finite(model, nats), tokens, num_bytes)


@torch.inference_mode()
def score_text(
    model: Llama, tokenizer: Tokenizer, text: str, context: str = ""
) -> tuple[Perplexity, list[tuple[int, float, int]]]:
    """What `text_perplexity` sums, token by token. A context is tokenised with the text (`split_jointly`), not scored.

    Returns: the sum; and each token's id, log-probability in nats, and rank, where 0 is the likeliest.

    Raises ValueError where the text is empty, or the logits are not finite.
    """
    before, (ids,) = split_jointly(tokenizer, context, [text])
    nats, entries = torch.zeros((), dtype=torch.float64, device=model.device), list[tuple[float, int]]()
    for row, new in _windows(model, [*before, *ids], len(before)):
        own, logprobs = _predicted(model, row, new)
        nats = nats - own.sum()
        entries += zip(own[:, 0].tolist(), (logprobs > own).sum(dim=-1).tolist(), strict=True)
    found = _summary(_finite(model, nats), len(ids), len(text.encode()))
    return found, [(token, *entry) for token, entry in zip(ids, entries, strict=True)]


def _windows(
    model: Llama | OtherModel, ids: list[int], scored: int, window: int | None = None, stride: int | None = None
) -> Iterator[tuple[list[int], slice]]:
    """Windows in which all tokens but the first `scored` are predicted: a window's tokens, and of which to which.

    A prediction's place is that of the token before.
    """
    window = model.config.max_seq_len if window is None else min(window, model.config.max_seq_len)
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"--stride must be at least 1 and below the window of {window} tokens, not {stride}")
    for start in range(0, len(ids), stride):
        row = ids[start : start + window]
        if scored < start + len(row):
            yield row, slice(max(0, scored - start - 1), len(row) - 1)
            scored = start + len(row)


def _predicted(model: Llama, ids: list[int], new: slice) -> tuple[Tensor, Tensor]:
    """Of a window's predictions: the log-probabilities (T, 1), and those of their rows (T, V)."""
    row = torch.tensor(ids).to(model.device, non_blocking=True)
    hidden = model.hidden(row[None, :-1])[0, new]  # (T, D)
    logprobs = log_softmax(model.logits(hidden))
    return logprobs.gather(-1, row[1:][new, None]), logprobs


def _summed(model: Llama | OtherModel, ids: list[int], new: slice) -> Tensor:
    """The log-probability of all that a window predicts."""
    if isinstance(model, Llama):
        return _predicted(model, ids, new)[0].sum()
    request = Request(tuple(ids[: new.start + 1]), (tuple(ids[new.start + 1 :]),))
    ((_, (total,)),) = score(model, [request])
    return torch.tensor(total)


def _finite(model: Llama | OtherModel, total: Tensor) -> float:
    number = total.item()
    if isinstance(model, Llama) and not math.isfinite(number):  # others say it themselves
        raise not_finite(model)
    return number


def _summary(total: float, tokens: int, num_bytes: int) -> Perplexity:
    if not tokens:
        raise ValueError("there is no text to predict")
    return Perplexity(from_loss(total / tokens), total / math.log(2) / num_bytes, tokens, num_bytes)
