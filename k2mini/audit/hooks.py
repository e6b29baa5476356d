"""Hooks on the model that trains and answers: `trace` records activations, `intervene` replaces them.

A point is a named activation. In layer N, from 0 (S tokens are attended to, F is the MLP's width):
    layers.N.residual_in       (B, T, D)     the residual stream before the layer
    layers.N.attention.q       (B, T, H, E)  queries, after rotary
    layers.N.attention.k       (B, T, K, E)  keys of the new tokens, after rotary
    layers.N.attention.v       (B, T, K, E)  values of the new tokens
    layers.N.attention.pattern (B, H, T, S)  attention weights, after softmax
    layers.N.attention.head_out (B, T, H, E) each head's weighted sum of values, before o_proj
    layers.N.attention.out     (B, T, D)     what attention adds to the residual stream
    layers.N.residual_mid      (B, T, D)     the residual stream between attention and MLP
    layers.N.mlp.gate, .up     (B, T, F)     gate_proj and up_proj, before the non-linearity
    layers.N.mlp.hidden        (B, T, F)     silu(gate) * up
    layers.N.mlp.out           (B, T, D)     what the MLP adds to the residual stream
    layers.N.residual_out      (B, T, D)     the residual stream after the layer
and outside the layers: `embed` (B, T, D), `final_norm` (B, T, D), `logits` (B, T, V).

The model's fused attention never forms a pattern. While a handler asks for one, it is computed beside the fused
attention, whose result stands; only where a pattern is edited does the model attend with it. A point that no handler
asks for costs nothing.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from k2mini.distributed import is_dtensor
from k2mini.nn.layers import Hook, Mask
from k2mini.nn.llama import Llama

# Module of a block ('' is the block itself) -> the points that it reports.
POINTS = {
    "self_attn": (
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.pattern",
        "attention.head_out",
        "attention.out",
    ),
    "mlp": ("mlp.gate", "mlp.up", "mlp.hidden", "mlp.out"),
    "": ("residual_in", "residual_mid", "residual_out"),
}
Edit = Callable[[Tensor], Tensor]  # from an activation to one of the same shape


def point_names(model: Llama) -> list[str]:
    """All points of a model, in the order in which a forward pass reaches them."""
    order = (
        "residual_in", *POINTS["self_attn"], "residual_mid", *POINTS["mlp"], "residual_out"
    )  # fmt: skip
    layers = range(len(model.model.layers))
    return ["embed", *(f"layers.{layer}.{point}" for layer in layers for point in order), "final_norm", "logits"]


def find_points(model: Llama, patterns: Sequence[str]) -> list[str]:
    """The points that match names or patterns (`layers.*.residual_out`, `layers.-1.mlp.out`), in the model's order.

    Raises ValueError where a pattern matches none, with the nearest names, or a layer is out of range.
    """
    names, wanted, number = point_names(model), set(), len(model.model.layers)
    for pattern in patterns:
        pattern = re.sub(r"^layers\.-(\d+)\.", lambda m: f"layers.{number - int(m[1])}.", pattern)
        found = fnmatch.filter(names, pattern)
        if not found:
            layer = re.match(r"layers\.(-?\d+)\.", pattern)
            if layer and not 0 <= int(layer[1]) < number:
                raise ValueError(f"{pattern}: the model has layers 0 to {number - 1}")
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(f"there is no point {pattern!r}; the nearest are {', '.join(near) or 'none'}")
        wanted.update(found)
    return [name for name in names if name in wanted]


class _Hooks:
    """The handlers of one model: each has its points, a function of name and activation, and whether it edits."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.handlers: list[tuple[frozenset[str], Callable[[str, Tensor], Tensor], bool]] = []

    def visit(self, name: str, tensor: Tensor) -> Tensor:
        """Pass an activation through the handlers of its point, in the order in which they were added."""
        for points, handler, _ in self.handlers:
            if name in points:
                tensor = handler(name, tensor)
        return tensor

    def install(self) -> None:
        """Set `hook` and `attention_override` on the modules whose points have a handler, and remove them elsewhere."""
        wanted = {name for points, _, _ in self.handlers for name in points}
        edited = {name for points, _, edits in self.handlers if edits for name in points}
        parts: list[tuple[nn.Module, str, Sequence[str]]] = [
            (self.model, "", ("logits",)),
            (self.model.model, "", ("embed", "final_norm")),
        ]
        for layer, block in enumerate(self.model.model.layers):
            prefix = f"layers.{layer}."
            parts += [(block, prefix, POINTS[""])]
            for child, within in (("self_attn", "attention."), ("mlp", "mlp.")):
                parts.append((block.get_submodule(child), prefix + within, [p[len(within) :] for p in POINTS[child]]))
            attention, pattern = block.get_submodule("self_attn"), prefix + "attention.pattern"
            attention.__dict__.pop("attention_override", None)
            if pattern in wanted:
                attention.__dict__["attention_override"] = _edited_attention if pattern in edited else _traced_attention
        for module, prefix, points in parts:
            module.__dict__.pop("hook", None)
            if any(prefix + point in wanted for point in points):
                module.__dict__["hook"] = self._hook(prefix)

    def _hook(self, prefix: str) -> Hook:
        return lambda point, tensor: self.visit(prefix + point, tensor)


@contextmanager
def _attached(
    model: Llama, points: Sequence[str], handler: Callable[[str, Tensor], Tensor], *, edits: bool
) -> Iterator[None]:
    """Call `handler` with the name and activation of each point, inside the context; what it returns goes on."""
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        raise ValueError("a sharded model takes no hooks; load it in one process")
    if any(block._compiled_call_impl is not None for block in model.model.layers):
        raise ValueError("a compiled model takes no hooks; load it without compiling")
    hooks: _Hooks = model.__dict__.setdefault("_hooks", _Hooks(model))
    entry = (frozenset(find_points(model, points)), handler, edits)
    hooks.handlers.append(entry)
    hooks.install()
    compiled = model.model.decode_blocks, model.decode_logits  # has no hooks
    model.model.decode_blocks = model.decode_logits = None
    try:
        yield
    finally:
        model.model.decode_blocks, model.decode_logits = compiled
        hooks.handlers.remove(entry)
        hooks.install()
        if not hooks.handlers:
            del model.__dict__["_hooks"]


@contextmanager
def trace(
    model: Llama, points: Sequence[str], *, positions: Sequence[int] | None = None, device: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Record activations: `with trace(model, ["layers.*.residual_out"]) as cache: model(tokens)`.

    Args:
        points: names or patterns, as in `find_points`.
        positions: record these token positions only (of an attention pattern: these rows); None: all.
        device: where to keep the recorded activations; None: on the model's device.

    Yields: point -> activation, of the last forward pass that reached it.

    Raises ValueError where a point does not exist, or the model is sharded or compiled.
    """
    cache: dict[str, Tensor] = {}
    chosen = None if positions is None else torch.tensor(list(positions))

    def keep(name: str, tensor: Tensor) -> Tensor:
        kept = tensor.detach()
        if chosen is not None:
            along = 2 if name.endswith(".pattern") else 1
            kept = kept.index_select(along, chosen.to(kept.device) % kept.shape[along])
        cache[name] = kept if device is None else kept.to(device)
        return tensor

    with _attached(model, points, keep, edits=False):
        yield cache


@contextmanager
def intervene(model: Llama, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace activations: inside the context, the model goes on with what the edits return.

    Args:
        edits: a point's name or pattern -> a function from its activation to one of the same shape.

    Raises ValueError where a point does not exist, an edit changes the shape, or the model is sharded or compiled.
    """
    by_name = {name: edit for pattern, edit in edits.items() for name in find_points(model, [pattern])}

    def change(name: str, tensor: Tensor) -> Tensor:
        edited = by_name[name](tensor)
        if edited.shape != tensor.shape:
            raise ValueError(f"{name}: the edit made {tuple(edited.shape)} of {tuple(tensor.shape)}")
        return edited

    with _attached(model, list(edits), change, edits=True):
        yield


def _pattern(q: Tensor, k: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(E)), computed in float32 or wider. q (B, H, T, E), k (B, K, S, E) -> (B, H, T, S)."""
    assert not isinstance(mask, list), "packed rows are attended document by document in training only"
    precise = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.to(precise) @ k.to(precise).transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1).to(q.dtype)


def _traced_attention(hook: Hook, q: Tensor, k: Tensor, v: Tensor, mask: Mask, out: Tensor) -> Tensor:
    """Compute the pattern for the handlers; the model's own result stands. Returns `out`."""
    hook("pattern", _pattern(q, k, mask))
    return out


def _edited_attention(hook: Hook, q: Tensor, k: Tensor, v: Tensor, mask: Mask, out: Tensor) -> Tensor:
    """Attend with the pattern that the edits return, instead of the model's own result. Returns (B, T, H, E)."""
    pattern = hook("pattern", _pattern(q, k, mask))  # (B, H, T, S)
    v = v.repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)  # (B, H, S, E)
    return (pattern @ v.to(pattern.dtype)).transpose(1, 2).to(out.dtype)
