"""Logit lens and direct logit attribution: what each layer would predict, and what each part adds to a logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2mini.audit.hooks import trace
from k2mini.inference.decoding import check_finite
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama


@dataclass(frozen=True)
class Lens:
    """The next token's distribution after each layer, read through the final norm and the head (nostalgebraist 2020).

    Attributes:
        top, top_probability: (L, T), the likeliest token and its probability.
        entropy: (L, T), in nats.
        divergence: (L, T), KL(model's own || layer's), in nats.
        logprob, rank: (L, T), of the target, in nats; rank 0 is the likeliest. None without a target.
    """

    top: Tensor
    top_probability: Tensor
    entropy: Tensor
    divergence: Tensor
    logprob: Tensor | None
    rank: Tensor | None


@torch.inference_mode()
def logit_lens(model: Llama, tokens: list[int], target: int | None = None) -> Lens:
    """Read the residual stream after every layer as if that layer were the last one.

    Args:
        target: a token whose log-probability and rank are wanted as well.
    """
    with trace(model, ["layers.*.residual_out"]) as cache:
        logits = model(torch.tensor([tokens], device=model.device))[0]  # (T, V)
    check_finite(model, logits)
    final = log_softmax(logits)
    rows: dict[str, list[Tensor]] = {key: [] for key in ("top", "p", "entropy", "kl", "target", "rank")}
    for layer in range(model.config.num_layers):
        logprobs = log_softmax(model.logits(model.model.norm(cache[f"layers.{layer}.residual_out"][0])))  # (T, V)
        best = logprobs.max(dim=-1)
        rows["top"].append(best.indices)
        rows["p"].append(best.values.exp())
        rows["entropy"].append(-(logprobs.exp() * logprobs).sum(dim=-1))
        rows["kl"].append((final.exp() * (final - logprobs)).sum(dim=-1))
        if target is not None:
            own = logprobs[:, target]
            rows["target"].append(own)
            rows["rank"].append((logprobs > own[:, None]).sum(dim=-1))
    stacked = {key: torch.stack(values).cpu() for key, values in rows.items() if values}
    return Lens(
        stacked["top"], stacked["p"], stacked["entropy"], stacked["kl"], stacked.get("target"), stacked.get("rank")
    )


@dataclass(frozen=True)
class Attribution:
    """What every part of the model adds to a logit at the last position; the parts add up to the logit.

    Attributes:
        embed: what the last token's embedding adds.
        heads, mlps: (L, H) and (L,), what each head and each MLP adds.
        logit: the logit, or the difference of two.
    """

    embed: float
    heads: Tensor
    mlps: Tensor
    logit: float


@torch.inference_mode()
def direct_logit_attribution(model: Llama, tokens: list[int], target: int, foil: int | None = None) -> Attribution:
    """What each head and MLP adds to the logit of `target`, or to its difference from the logit of `foil`.

    The residual stream is the sum of what embedding, heads and MLPs write. With the final norm's scale held fixed, a
    logit is linear in the stream, so it is a sum over the same parts (Elhage et al. 2021, "A Mathematical Framework
    for Transformer Circuits").
    """
    points = ["embed", "layers.*.attention.head_out", "layers.*.mlp.out", "layers.*.residual_out"]
    with trace(model, points, positions=[-1]) as cache:
        logits = model(torch.tensor([tokens], device=model.device))[0, -1]
    check_finite(model, logits)
    precise = torch.promote_types(model.dtype, torch.float32)
    last = cache[f"layers.{model.config.num_layers - 1}.residual_out"][0, 0].to(precise)
    scale = torch.rsqrt(last.square().mean() + model.config.norm_eps)
    row = model.head_weight[target].to(precise)
    if foil is not None:
        row = row - model.head_weight[foil].to(precise)
    direction = row * model.model.norm.weight.to(precise) * scale  # (D,)
    heads, mlps = [], []
    for layer, block in enumerate(model.model.layers):
        out = cache[f"layers.{layer}.attention.head_out"][0, 0]  # (H, E)
        alone = torch.diag_embed(out.T).permute(1, 2, 0).flatten(1)  # (H, H*E): in row h only head h
        heads.append(block.get_submodule("self_attn.o_proj")(alone).to(precise) @ direction)
        mlps.append(cache[f"layers.{layer}.mlp.out"][0, 0].to(precise) @ direction)
    logit = logits[target] - (logits[foil] if foil is not None else 0)
    embed = cache["embed"][0, 0].to(precise) @ direction
    return Attribution(embed.item(), torch.stack(heads).cpu(), torch.stack(mlps).cpu(), logit.item())
