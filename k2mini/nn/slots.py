"""Slots: fixed rows of keys and values, each filled, reused or copied without touching the others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from k2mini.model_config import ModelConfig
from k2mini.nn.decode_ops import attend_once, attends_once
from k2mini.nn.kv_cache import ALIGNED, KVCache, LayerCache

WIDTH = 256  # single tokens attend over a multiple of so many places, which are summed up by so many
COMPILED_WIDTH = 32  # compiled code, which sums up otherwise, over a multiple of fewer


class Chunk(NamedTuple):
    """Tokens `start` to `end` (not included) of one slot's prompt."""

    slot: int
    start: int
    end: int


class SlotLayer(NamedTuple):
    """One layer's keys and values, (S, K, places, E), and where the tokens of a pass belong.

    Attributes:
        slots, places: (N,) int64, of each token.
        singles: so many tokens come first that are alone in their slots.
        mask: (s, 1, 1, W) bool, which places of slots `first` and following their queries attend to.
        more: tokens that follow, in some of these slots, by slot, each with a mask of its own, (t, 1, 1, W).
        chunks: of prompts, after them, each with its mask; None: causal.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    places: Tensor
    singles: int
    first: int
    mask: Tensor
    more: list[tuple[int, Tensor]]
    chunks: list[tuple[Chunk, Tensor | None]]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, each (1, N, K, E), and attend. q: (1, N, H, E) -> (1, N, H, E)."""
        q, k, v = q[0], k[0], v[0]
        self.keys[self.slots, :, self.places] = k
        self.values[self.slots, :, self.places] = v
        parts, done = [], self.singles
        if done:
            number, width = self.mask.shape[0], self.mask.shape[-1]
            own = self.slots[:done] - self.first
            spread = q.new_zeros(number, *q.shape[1:]).index_copy_(0, own, q[:done])
            rows = slice(self.first, self.first + number)
            parts.append(
                attend_singles(spread, self.keys[rows, :, :width], self.values[rows, :, :width], self.mask)[own]
            )
        for slot, seen in self.more:
            own, width = q[done : done + len(seen)], seen.shape[-1]
            keys, values = self.keys[slot : slot + 1, :, :width], self.values[slot : slot + 1, :, :width]
            parts.append(attend_singles(own, keys, values, seen))
            done += len(own)
        for (slot, start, end), mask in self.chunks:
            each = q[done : done + end - start].transpose(0, 1).unsqueeze(0)  # (1, H, T, E), over (1, K, end, E)
            width = end if mask is None else mask.shape[1]
            keys, values = self.keys[slot : slot + 1, :, :width], self.values[slot : slot + 1, :, :width]
            bias: Any = mask
            if start and mask is None:
                from torch.nn.attention.bias import causal_lower_right  # takes a second to import

                bias = causal_lower_right(end - start, end)
            groups = each.shape[1] // keys.shape[1]
            if each.is_cuda and mask is not None and groups > 1:  # or a kernel keeps all scores, GiB of a long chunk
                keys, values, groups = *(part.repeat_interleave(groups, dim=1) for part in (keys, values)), 1
            how = {"is_causal": bias is None and end - start > 1, "enable_gqa": groups > 1}
            out = F.scaled_dot_product_attention(each, keys, values, attn_mask=bias, **how)
            parts.append(out[0].transpose(0, 1))
            done += end - start
        out = torch.cat(parts)
        return F.pad(out, (0, 0, 0, 0, 0, len(q) - len(out))).unsqueeze(0)


def attend_singles(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one query a row, or of several of one. q: (S, H, E); k, v: (S or 1, K, W, E); mask: (S, 1, 1, W)
    bool. Returns (S, H, E).
    """
    each = q.unsqueeze(2)  # (S, H, 1, E)
    if torch.compiler.is_dynamo_compiling() and attends_once(each, k):
        return attend_once(each, k, v, mask).squeeze(2)
    if q.device.type == "cpu" and q.dtype == torch.promote_types(q.dtype, torch.float32):
        return attend_written(q, k, v, mask)
    grouped = q.shape[1] != k.shape[1]
    if len(k) < len(q):
        rows, mask = q.transpose(0, 1).unsqueeze(0), mask.transpose(0, 2)  # (1, H, S, E), (1, 1, S, W)
        return F.scaled_dot_product_attention(rows, k, v, mask, enable_gqa=grouped)[0].transpose(0, 1)
    return F.scaled_dot_product_attention(each, k, v, mask, enable_gqa=grouped).squeeze(2)


def attend_written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one query a row, as products: its bits depend neither on the other rows nor on the width.

    (PyTorch's fused attention divides rows and heads among threads, and a product divides a long sum, by its length.)

    q: (S, H, E); k, v: (S or 1, K, W, E); mask: (S, 1, 1, W) bool. Returns (S, H, E).
    """
    num_slots, _, head_dim = q.shape
    groups = q.reshape(num_slots, k.shape[1], -1, head_dim) * head_dim**-0.5  # (S, K, H/K, E)
    scores = _products(groups, k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))  # (S, K, H/K, W)
    weights = scores.masked_fill_(~mask, -torch.inf).softmax(dim=-1).to(v.dtype)
    parts = zip(weights.split(WIDTH, dim=-1), v.split(WIDTH, dim=-2), strict=True)
    sums = [_products(part, values) for part, values in parts]
    return sum(sums[1:], sums[0]).reshape(q.shape)


def _products(rows: Tensor, matrices: Tensor) -> Tensor:
    """(S, …) @ (S or 1, …): of several rows with one matrix one by one, as of a row alone: so are its bits."""
    return rows @ matrices if len(rows) == len(matrices) else torch.cat([row @ matrices for row in rows.split(1)])


class SlotBatch:
    """The tokens of one pass through the model, of several slots: new tokens of some, then chunks of prompts.

    It stands in a `KVCache`'s place. The tokens are one row, (1, N), in this order.

    Args:
        rows: (slot, place) of each single token; after one of each slot may follow more of these slots, slot by slot.
        chunks: of prompts.
        pad: a token that is alone gets another beside it, which is none of any slot.
        fixed: the pass runs compiled code, if the model has any: shapes are of few kinds.
    """

    batch_size = 1

    def __init__(
        self,
        cache: Slots,
        rows: Sequence[tuple[int, int]],
        chunks: Sequence[Chunk] = (),
        *,
        pad: bool = False,
        fixed: bool = False,
    ) -> None:
        device = cache.keys[0].device
        tokens = [*rows, *((slot, place) for slot, start, end in chunks for place in range(start, end))]
        self.padded, self.fixed = pad and len(tokens) == 1, fixed
        tokens += [(0, cache.spare)] * self.padded
        self._cache, self._first, slots = cache, 0, {slot for slot, _ in rows}
        self._singles = len(rows) if fixed else len(slots)
        both = torch.tensor([*zip(*tokens, strict=True)])  # (2, N)
        self._slots, self.places = both.to(device, non_blocking=True)
        self._mask, self._more = torch.empty(0), list[tuple[int, Tensor]]()
        if rows:
            rows, more = rows[: self._singles], rows[self._singles :]
            used = [slot for slot, _ in rows]
            self._first, last = (min(used), max(used)) if not fixed or len(rows) == 1 else (0, cache.number - 1)
            ends = torch.zeros(last + 1 - self._first, dtype=torch.int64)  # idle slots: their first place
            for slot, place in rows:
                ends[slot - self._first] = place
            step = COMPILED_WIDTH if fixed else WIDTH
            width = (int(ends.max()) // step + 1) * step
            self._mask = attended(ends, width, cache.window).to(device, non_blocking=True)
            for slot, own in itertools.groupby(more, key=lambda row: row[0]):
                ends = torch.tensor([place for _, place in own])
                seen = attended(ends, (int(ends.max()) // WIDTH + 1) * WIDTH, cache.window)
                self._more.append((slot, seen.to(device, non_blocking=True)))
        if fixed:  # `layer` gives the part of the cache from there on
            self._slots = self._slots - self._first
        self.chunks = [(chunk, _mask(chunk, cache.window, device)) for chunk in chunks]

    @classmethod
    def of_all(cls, cache: Slots, places: Tensor, width: int) -> SlotBatch:
        """A token of every slot, at `places` (S,) int64, under a mask over `width` places; of tensors alone."""
        new = object.__new__(cls)
        new.padded, new.fixed, new._cache, new._singles, new._first = False, True, cache, cache.number, 0
        new._slots, new.places = torch.arange(cache.number, device=places.device), places
        new._more, new.chunks = [], []
        new._mask = attended(places.clamp(max=width - 1), width, cache.window)  # idle slots stand beyond the width
        return new

    def advance(self, _num_tokens: int, _positions: Tensor | None) -> tuple[Tensor, None]:
        """The positions of the tokens, (1, N), and no mask; see `KVCache.advance`."""
        return self.places[None], None

    def compiled(self, _num_tokens: int) -> bool:
        """Whether the pass runs compiled code, if the model has any."""
        return self.fixed

    def layer(self, layer: int) -> SlotLayer:
        """One layer's keys and values."""
        keys, values, first = self._cache.keys[layer], self._cache.values[layer], self._first
        if self.fixed and len(self._mask) < self._cache.number:  # code that is compiled for one slot does for all
            rows = slice(first, first + len(self._mask))
            keys, values, first = keys[rows], values[rows], 0
        where = (self._slots, self.places, self._singles, first, self._mask, self._more, self.chunks)
        return SlotLayer(keys, values, *where)


def attended(ends: Tensor, width: int, window: int | None = None) -> Tensor:
    """The mask of queries at places `ends`, (S,) int64: (S, 1, 1, width) bool."""
    places = torch.arange(width, device=ends.device)
    mask = places <= ends[:, None]
    if window is not None and width > window:
        mask &= places > ends[:, None] - window
    return mask[:, None, None]


def _mask(chunk: Chunk, window: int | None, device: torch.device) -> Tensor | None:
    """The mask of a chunk, (T, end); on a GPU over some more places, and only where causal attention does not do."""
    on_cpu, leaves = device.type == "cpu", window is not None and chunk.end > window
    if not leaves and not (on_cpu and chunk.start):
        return None
    width = chunk.end if on_cpu else -(-chunk.end // ALIGNED) * ALIGNED
    return attended(torch.arange(chunk.start, chunk.end, device=device), width, window)[:, 0, 0]


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the keys and values of one token take, in bytes."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class Slots:
    """Keys and values of `number` rows, of `capacity` tokens each.

    Attributes:
        keys, values: of each layer, (number, K, capacity and some more, E). Place p of a slot holds the token at
            position p.
        spare: a place that no token has.
    """

    def __init__(
        self, config: ModelConfig, number: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.number, self.spare, self.window = number, -1, config.sliding_window
        shape = (number, config.num_kv_heads, 0, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.reserve(capacity)

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens in each slot, keeping what they hold."""
        if capacity <= self.spare:
            return
        self.spare = -(-capacity // WIDTH) * WIDTH  # more than any width of attention: so compiled code is the same
        places = self.spare + ALIGNED
        for parts in (self.keys, self.values):
            for layer, old in enumerate(parts):
                # Zeros, not empty: a masked place weighs 0, and 0 x NaN would still be NaN.
                parts[layer] = F.pad(old, (0, 0, 0, places - old.shape[2]))

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot the first `length` tokens of another."""
        if source != target:
            for part in (*self.keys, *self.values):
                part[target, :, :length] = part[source, :, :length]

    def clear(self, slot: int) -> None:
        """Forget what is not finite: a masked NaN would still be one."""
        for part in (*self.keys, *self.values):
            part[slot].zero_()


Cache = KVCache | SlotBatch | None  # what a model is called with
Cached = LayerCache | SlotLayer | None  # one layer of it
