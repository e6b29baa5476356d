"""Continuing prompts. The engine knows token ids only; text is its callers' business."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from k2mini.data.prompts import rooms
from k2mini.inference.decoding import Completion, Decoding, Step
from k2mini.inference.request import End, Prompt, Request
from k2mini.inference.scheduler import Scheduler
from k2mini.nn.llama import Llama

AHEAD = 4  # times as many prompts as are continued at a time: so far one may be before the first that is not done
StoppingCriteria = Callable[[int, int], bool]  # (row, its new token) -> whether the row ends here


def generate(model: Llama, prompts: Sequence[Sequence[int]], decoding: Decoding, **how: Any) -> list[Completion]:
    """What `completions` yields, all at once."""
    return list(completions(model, prompts, decoding, **how))


def completions(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stop_ids: Sequence[int],
    vocab_size: int | None = None,
    stopping_criteria: StoppingCriteria | None = None,
    places: Sequence[int] | None = None,
) -> Iterator[Completion]:
    """Continue prompts of any lengths; none's result depends on the others (on a GPU, but for rounding).

    Args:
        prompts: token ids, BOS included.
        decoding: without beams. Prompt i draws with its seed + i. `batch_size` prompts are continued at a time: where
            one ends, the next begins.
        stop_ids: an answer ends before the first of these (usually EOS).
        vocab_size: ids from here on are never chosen (rows of the embedding that no token has).
        stopping_criteria: called with a prompt's number and its new token; the answer ends where it returns True.
        places: of the prompts among more, for what they draw with; None: 0, 1, 2, …

    Yields: each prompt's completion, as soon as it and those before it are there.

    Raises ValueError: an empty prompt, or one too long for the model's context; logits that are not finite.
    """
    new = rooms(prompts, decoding.max_new_tokens, model.config.max_seq_len)
    capacity = max(len(prompt) + most for prompt, most in zip(prompts, new, strict=True))
    slots = min(len(prompts), decoding.batch_size)
    scheduler = Scheduler(model, slots=slots, capacity=capacity, vocab_size=vocab_size)
    found, begun, given = [Completion() for _ in prompts], 0, 0

    def deliver(row: int, event: Prompt | Step | End) -> bool:
        if isinstance(event, Step):
            found[row].add(event)
            return stopping_criteria is not None and stopping_criteria(row, event.token)
        if isinstance(event, End):
            found[row].finish = event.reason
            if event.reason == "error":
                raise ValueError(event.error)
        return False

    while given < len(prompts):
        # What is done waits for those before it: not for too long, since an interruption loses it.
        while begun < min(len(prompts), given + AHEAD * slots) and scheduler.free:
            own = replace(decoding, seed=decoding.seed + (begun if places is None else places[begun]))
            scheduler.admit(Request([*prompts[begun]], own, tuple(stop_ids), partial(deliver, begun)))
            begun += 1
        scheduler.step()
        while given < begun and found[given].finish:
            yield found[given]
            given += 1
