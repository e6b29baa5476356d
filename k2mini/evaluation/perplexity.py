"""Perplexity of whole documents."""

from __future__ import annotations

import math
from collections.abc import Sequence

from k2mini.nn.llama import Llama
from k2mini.text.batches import Example, Examples
from k2mini.training.loop import validation_loss


def perplexity(model: Llama, documents: Sequence[Sequence[int]], batch_size: int = 16) -> float:
    """exp of the mean loss over all tokens but each document's first (BOS). Documents see nothing of each other."""
    examples = Examples([Example(document, unsupervised=1) for document in documents], seed=None)
    return math.exp(validation_loss(model, examples, batch_size))
