"""Perplexity of whole documents, and of long texts under a sliding window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from k2mini.data.packing import Example, Examples
from k2mini.data.tokenizer import Tokenizer
from k2mini.inference.generate import check_finite
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama
from k2mini.training.loop import validation_loss


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


@torch.inference_mode()
def text_perplexity(
    model: Llama, tokenizer: Tokenizer, texts: Sequence[str], *, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """Token-weighted over texts of any length; every token but BOS is predicted once.

    Args:
        window: tokens that a prediction may rest on, BOS among them; None: the model's context.
        stride: tokens by which the window moves; a token then sees at least window - stride before it. None: half.

    Raises ValueError where there is no text, window and stride do not fit, or the logits are not finite.
    """
    window = model.config.max_seq_len if window is None else min(window, model.config.max_seq_len)
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride must be at least 1 and below the window of {window} tokens, not {stride}")
    total, tokens, num_bytes = 0.0, 0, 0
    for text in texts:
        ids = tokenizer.encode(text, bos=True, eos=False)
        num_bytes += len(text.encode())
        scored = 1  # how many tokens are predicted already; BOS is not
        for start in range(0, len(ids), stride):
            if scored >= len(ids):
                break
            row = torch.tensor(ids[start : start + window], device=model.device)
            new = slice(max(0, scored - start - 1), len(row) - 1)
            hidden = model.model(row[None, :-1])[0, new]  # (T, D)
            logprobs = log_softmax(model.logits(hidden))
            own = logprobs.gather(-1, row[1:][new, None])  # (T, 1)
            check_finite(model, own)
            total -= own.sum().item()
            tokens += len(hidden)
            scored = start + len(row)
    if not tokens:
        raise ValueError("there is no text to predict")
    return Perplexity(from_loss(total / tokens), total / math.log(2) / num_bytes, tokens, num_bytes)
