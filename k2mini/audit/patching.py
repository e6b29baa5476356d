"""Activation patching and head ablation: how a metric of the answer changes when one activation is replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from k2mini.audit.hooks import find_points, intervene, trace
from k2mini.inference.decoding import check_finite
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama

Metric = Callable[[Tensor], float]  # of the logits at the last position, (V,)


def logit_difference(target: int, foil: int) -> Metric:
    """A metric: the target's logit minus the foil's."""
    return lambda logits: (logits[target] - logits[foil]).item()


def log_probability(target: int) -> Metric:
    """A metric: the target's log-probability, in nats."""
    return lambda logits: log_softmax(logits)[target].item()


@torch.inference_mode()
def final_logits(model: Llama, tokens: Sequence[int]) -> Tensor:
    """The logits at a prompt's last position, (V,). Raises ValueError where they are not finite."""
    logits = model(torch.tensor([list(tokens)], device=model.device))[0, -1]
    check_finite(model, logits)
    return logits


@torch.inference_mode()
def patch_positions(
    model: Llama, clean: Sequence[int], corrupted: Sequence[int], metric: Metric, point: str = "residual_out"
) -> Tensor:
    """Run the corrupted prompt with one clean activation put in, for every layer and position; the metric of each run.

    Activation patching (Meng et al. 2022, arXiv 2202.05262, section 2.1, "causal tracing").

    Args:
        clean, corrupted: token ids, as many in both.
        point: the activation, a point within a layer with positions along its second dimension.

    Returns: (L, T).

    Raises ValueError where the two prompts differ in length.
    """
    _check_lengths(clean, corrupted)
    names = find_points(model, [f"layers.*.{point}"])
    with trace(model, names) as cache:
        final_logits(model, clean)
    # Up to the first token that differs the two runs are one: there is nothing to patch.
    start = next((i for i, (one, other) in enumerate(zip(clean, corrupted, strict=True)) if one != other), len(clean))
    found = torch.full((len(names), len(clean)), metric(final_logits(model, corrupted)))
    for layer, name in enumerate(names):
        for position in range(start, len(clean)):

            def patch(tensor: Tensor, name: str = name, position: int = position) -> Tensor:
                edited = tensor.clone()
                edited[:, position] = cache[name][:, position]
                return edited

            with intervene(model, {name: patch}):
                found[layer, position] = metric(final_logits(model, corrupted))
    return found


@torch.inference_mode()
def patch_heads(model: Llama, clean: Sequence[int], corrupted: Sequence[int], metric: Metric) -> Tensor:
    """Run the corrupted prompt with one head's clean output put in at all positions; the metric for every head. (L, H).

    Raises ValueError where the two prompts differ in length.
    """
    _check_lengths(clean, corrupted)
    names = find_points(model, ["layers.*.attention.head_out"])
    with trace(model, names) as cache:
        final_logits(model, clean)
    return _over_heads(model, names, corrupted, metric, lambda name: cache[name])


@torch.inference_mode()
def ablate_heads(
    model: Llama, tokens: Sequence[int], metric: Metric, *, mean_of: Sequence[Sequence[int]] = ()
) -> Tensor:
    """Run a prompt without one head; the metric for every head. (L, H).

    The head's output becomes zero, or its mean over the positions of each prompt of `mean_of`, averaged over those.
    """
    names = find_points(model, ["layers.*.attention.head_out"])
    sums: dict[str, Tensor] = {}
    for prompt in mean_of:
        with trace(model, names) as cache:
            final_logits(model, prompt)
        for name in names:
            sums[name] = sums.get(name, 0) + cache[name].mean(dim=1, keepdim=True) / len(mean_of)

    def replacement(name: str) -> Tensor:
        return sums[name] if mean_of else torch.zeros(1, device=model.device)

    return _over_heads(model, names, tokens, metric, replacement)


def _over_heads(
    model: Llama, names: list[str], tokens: Sequence[int], metric: Metric, replacement: Callable[[str], Tensor]
) -> Tensor:
    """The metric with each head's output, in turn, replaced by `replacement(point)`. (L, H)."""
    found = torch.zeros(len(names), model.config.num_heads)
    for layer, name in enumerate(names):
        for head in range(model.config.num_heads):

            def patch(tensor: Tensor, name: str = name, head: int = head) -> Tensor:
                edited, new = tensor.clone(), replacement(name)
                edited[:, :, head] = new[:, :, head] if new.dim() == 4 else new
                return edited

            with intervene(model, {name: patch}):
                found[layer, head] = metric(final_logits(model, tokens))
    return found


def _check_lengths(clean: Sequence[int], corrupted: Sequence[int]) -> None:
    # Positions are patched one for one.
    if len(clean) != len(corrupted):
        raise ValueError(
            f"the two prompts must be of one length: they are {len(clean)} and {len(corrupted)} tokens; "
            "exchange a word for one of as many tokens"
        )
