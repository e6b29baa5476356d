"""Causes: what happens to the answer when a part of the model thinks something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from k2mini.audit.hooks import find_points, intervene, trace
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama

Metric = Callable[[Tensor], float]  # of the logits at the last position, (V,)


def logit_difference(target: int, foil: int) -> Metric:
    """How much the target's logit is above the foil's."""
    return lambda logits: (logits[target] - logits[foil]).item()


def log_probability(target: int) -> Metric:
    """The target's log-probability, in nats."""
    return lambda logits: log_softmax(logits)[target].item()


@torch.inference_mode()
def run(model: Llama, tokens: Sequence[int]) -> Tensor:
    """The logits at the last position. (V,)"""
    return model(torch.tensor([list(tokens)], device=model.device))[0, -1]


@torch.inference_mode()
def patch_positions(
    model: Llama, clean: Sequence[int], corrupted: Sequence[int], metric: Metric, point: str = "residual_out"
) -> Tensor:
    """The metric of the corrupted run with one point's clean values at one position, for all layers and positions.

    Activation patching (Meng et al. 2022, arXiv 2202.05262, section 2.1, "causal tracing").

    Args:
        point: a point within a layer, with positions along its second dimension.

    Returns: (L, T).

    Raises ValueError where the two prompts differ in length.
    """
    _check_lengths(clean, corrupted)
    names = find_points(model, [f"layers.*.{point}"])
    with trace(model, names) as cache:
        run(model, clean)
    found = torch.zeros(len(names), len(clean))
    for layer, name in enumerate(names):
        for place in range(len(clean)):

            def put(tensor: Tensor, name: str = name, place: int = place) -> Tensor:
                edited = tensor.clone()
                edited[:, place] = cache[name][:, place]
                return edited

            with intervene(model, {name: put}):
                found[layer, place] = metric(run(model, corrupted))
    return found


@torch.inference_mode()
def patch_heads(model: Llama, clean: Sequence[int], corrupted: Sequence[int], metric: Metric) -> Tensor:
    """The metric of the corrupted run with one head's clean values, at all positions. (L, H).

    Raises ValueError where the two prompts differ in length.
    """
    _check_lengths(clean, corrupted)
    names = find_points(model, ["layers.*.attention.head_out"])
    with trace(model, names) as cache:
        run(model, clean)
    return _over_heads(model, names, corrupted, metric, lambda name: cache[name])


@torch.inference_mode()
def ablate_heads(
    model: Llama, tokens: Sequence[int], metric: Metric, *, mean_of: Sequence[Sequence[int]] = ()
) -> Tensor:
    """The metric without one head: zero in its place, or its mean over the prompts `mean_of`. (L, H)."""
    names = find_points(model, ["layers.*.attention.head_out"])
    sums: dict[str, Tensor] = {}
    for prompt in mean_of:
        with trace(model, names) as cache:
            run(model, prompt)
        for name in names:
            sums[name] = sums.get(name, 0) + cache[name].mean(dim=1, keepdim=True) / len(mean_of)

    def replacement(name: str) -> Tensor:
        return sums[name] if mean_of else torch.zeros(1, device=model.device)

    return _over_heads(model, names, tokens, metric, replacement)


def _over_heads(
    model: Llama, names: list[str], tokens: Sequence[int], metric: Metric, replacement: Callable[[str], Tensor]
) -> Tensor:
    found = torch.zeros(len(names), model.config.num_heads)
    for layer, name in enumerate(names):
        for head in range(model.config.num_heads):

            def put(tensor: Tensor, name: str = name, head: int = head) -> Tensor:
                edited, new = tensor.clone(), replacement(name)
                edited[:, :, head] = new[:, :, head] if new.dim() == 4 else new
                return edited

            with intervene(model, {name: put}):
                found[layer, head] = metric(run(model, tokens))
    return found


def _check_lengths(clean: Sequence[int], corrupted: Sequence[int]) -> None:
    if len(clean) != len(corrupted):
        raise ValueError(
            f"the two prompts must be of one length: they are {len(clean)} and {len(corrupted)} tokens; "
            "exchange a word for one of as many tokens"
        )
