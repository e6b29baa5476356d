"""log p(option | context): the scorer that multiple choice rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from k2mini.inference.generate import pad_right
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.llama import Llama
from k2mini.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Scores:
    """Of each option, in the order given: the ids that were scored, and the sum of their log-probabilities (nats)."""

    token_ids: list[list[int]]
    logprobs: list[float]


def split_jointly(
    tokenizer: Tokenizer, context: str, options: Sequence[str], *, eos: bool = False
) -> tuple[list[int], list[list[int]]]:
    """Tokenise context and option together, as the text really is, and find where the options begin.

    The context is what the encoded context and all joint encodings have in common from the left; what follows it
    belongs to the option. So white space that ends a context is scored with the option where the tokenizer joins
    the two ("The answer is: " + "A" ends in '▁A').

    Args:
        eos: the options end with EOS.

    Returns: the context's ids, BOS first, and each option's.

    Raises ValueError where an option is empty.
    """
    joint = []
    for option in options:
        if not option:
            raise ValueError("an option is empty")
        joint.append(tokenizer.encode(context + option, bos=True, eos=eos))
    first = tokenizer.encode(context, bos=True, eos=False)
    common = min(len(first), *(len(ids) - 1 for ids in joint))  # an option keeps at least one token
    for ids in joint:
        common = next((i for i in range(common) if ids[i] != first[i]), common)
    return first[:common], [ids[common:] for ids in joint]


@torch.inference_mode()
def score_options(
    model: Llama, tokenizer: Tokenizer, context: str, options: Sequence[str], *, eos: bool = False
) -> Scores:
    """Score continuations of one context: the context runs through the model once, all options in one batch after it.

    Raises ValueError where an option is empty, or where context and option do not fit the model's context.
    """
    prefix, token_ids = split_jointly(tokenizer, context, options, eos=eos)
    over = len(prefix) + max(map(len, token_ids)) - model.config.max_seq_len
    if over > 0:
        raise ValueError(f"context and option are {over} tokens more than the model's {model.config.max_seq_len}")
    cache = KVCache(model.config, 1, dtype=model.dtype, device=model.device, capacity=len(prefix))
    hidden = model.model(torch.tensor([prefix], device=model.device), cache=cache)  # (1, T, D)
    after_prefix = _log_softmax(model.logits(hidden[0, -1]))  # (V,)
    first = torch.tensor([ids[0] for ids in token_ids], device=model.device)
    logprobs = after_prefix[first]  # (N,)
    if any(len(ids) > 1 for ids in token_ids):
        logprobs = logprobs + _score_rest(model, cache, token_ids)
    return Scores(token_ids, logprobs.tolist())


def _score_rest(model: Llama, cache: KVCache, token_ids: list[list[int]]) -> Tensor:
    """The sum of log-probabilities of each option's tokens after its first. (N,)"""
    tokens, offsets = pad_right(token_ids, model.device)  # (N, T)
    rows = cache.select(torch.zeros(len(token_ids), dtype=torch.int64, device=model.device))
    # The last token of an option predicts nothing that is scored.
    inputs, targets, scored = tokens[:, :-1], tokens[:, 1:], offsets[:, 1:] >= 0
    positions = torch.where(scored, offsets[:, :-1] + cache.length, -1)
    logits = model(inputs, positions, rows)  # (N, T-1, V)
    picked = _log_softmax(logits).gather(-1, targets[..., None]).squeeze(-1)  # (N, T-1)
    return picked.masked_fill(~scored, 0.0).sum(dim=-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
