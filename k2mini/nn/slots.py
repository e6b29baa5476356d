"""Slots: fixed rows of keys and values, each filled, reused or copied without touching the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from k2mini.model_config import ModelConfig
from k2mini.nn.kv_cache import KVCache, LayerCache

WIDTH = 256  # single tokens attend over a multiple of so many places, which are summed up by so many


class Chunk(NamedTuple):
    """Tokens `start` to `end` (not included) of one slot's prompt."""

    slot: int
    start: int
    end: int


class SlotLayer(NamedTuple):
    """One layer's keys and values, (S, K, places, E), and the tokens of the pass."""

    keys: Tensor
    values: Tensor
    batch: SlotBatch

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, each (1, N, K, E), and attend. q: (1, N, H, E) -> (1, N, H, E)."""
        batch, (q, k, v) = self.batch, (q[0], k[0], v[0])
        self.keys[batch.slots, :, batch.places] = k
        self.values[batch.slots, :, batch.places] = v
        singles, grouped = len(batch.rows), q.shape[1] != k.shape[1]
        parts = []
        if singles:
            used, width = batch.mask.shape[0], batch.mask.shape[-1]
            spread = q.new_zeros(used, *q.shape[1:]).index_copy_(0, batch.slots[:singles], q[:singles])
            keys, values = self.keys[:used, :, :width], self.values[:used, :, :width]
            if q.device.type == "cpu":
                out = attend_written(spread, keys, values, batch.mask)
            else:
                each = spread.unsqueeze(2)  # (S, H, 1, E)
                out = F.scaled_dot_product_attention(each, keys, values, batch.mask, enable_gqa=grouped).squeeze(2)
            parts.append(out[batch.slots[:singles]])
        if batch.chunk is not None:
            slot, start, end = batch.chunk
            # (T, H, E) -> (1, H, T, E), over (1, K, end, E)
            own = q[singles : singles + end - start].transpose(0, 1).unsqueeze(0)
            keys, values = self.keys[slot : slot + 1, :, :end], self.values[slot : slot + 1, :, :end]
            causal = batch.chunk_mask is None
            out = F.scaled_dot_product_attention(
                own, keys, values, attn_mask=batch.chunk_mask, is_causal=causal and end - start > 1, enable_gqa=grouped
            )
            parts.append(out[0].transpose(0, 1))
        done = torch.cat(parts)
        return F.pad(done, (0, 0, 0, 0, 0, len(q) - len(done))).unsqueeze(0)


def attend_written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one query a row, as products: its bits depend neither on the other rows nor on the width.

    (PyTorch's fused attention divides rows and heads among threads, and a product divides a long sum, by its length.)

    q: (S, H, E); k, v: (S, K, W, E); mask: (S, 1, 1, W) bool. Returns (S, H, E).
    """
    num_slots, _, head_dim = q.shape
    groups = q.view(num_slots, k.shape[1], -1, head_dim) * head_dim**-0.5  # (S, K, H/K, E)
    scores = (groups @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))  # (S, K, H/K, W)
    weights = scores.masked_fill_(~mask, -torch.inf).softmax(dim=-1).to(v.dtype)
    sums = [part @ values for part, values in zip(weights.split(WIDTH, dim=-1), v.split(WIDTH, dim=-2), strict=True)]
    return sum(sums[1:], sums[0]).reshape(q.shape)


class SlotBatch:
    """The tokens of one pass through the model, of several slots: a new token of each of some, then a chunk of one.

    It stands in a `KVCache`'s place. The tokens are one row, (1, N), in this order. One alone gets another beside it,
    which is no token of any slot: a product of one row takes another kernel, of other last bits, than one of several.

    Args:
        rows: (slot, place) of each single token.
        chunk: of a prompt, if any.
    """

    fixed = False
    batch_size = 1

    def __init__(self, slots: Slots, rows: Sequence[tuple[int, int]], chunk: Chunk | None) -> None:
        device = slots.keys[0].device
        self.rows, self.chunk, self._slots = rows, chunk, slots
        tokens = list(rows)
        if chunk is not None:
            tokens += [(chunk.slot, place) for place in range(chunk.start, chunk.end)]
        self.positions = [place for _, place in tokens]
        self.padded = len(tokens) == 1
        if self.padded:
            tokens.append((0, slots.spare))
            self.positions.append(0)
        self.slots, self.places = torch.tensor(tokens, device=device).unbind(dim=1)  # (N,) each
        self.chunk_mask: Tensor | None = None
        if rows:
            ends = torch.full((max(slot for slot, _ in rows) + 1,), 0, dtype=torch.int64)  # idle slots: their first
            for slot, place in rows:
                ends[slot] = place
            width = -(-(int(ends.max()) + 1) // WIDTH) * WIDTH
            self.mask = (torch.arange(width) <= ends[:, None]).to(device)[:, None, None]  # (S, 1, 1, W)
        if chunk is not None and chunk.start:
            queries = torch.arange(chunk.start, chunk.end, device=device)[:, None]
            self.chunk_mask = torch.arange(chunk.end, device=device) <= queries  # (T, end)

    def advance(self, num_tokens: int, positions: Tensor | None) -> tuple[Tensor, None]:
        """The positions of the tokens, (1, N), and no mask; see `KVCache.advance`."""
        assert positions is None
        assert num_tokens == len(self.positions)
        return torch.tensor([self.positions], device=self.slots.device), None

    def layer(self, layer: int) -> SlotLayer:
        """One layer's keys and values."""
        return SlotLayer(self._slots.keys[layer], self._slots.values[layer], self)


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the keys and values of one token take, in bytes."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class Slots:
    """Keys and values of `number` rows, of `capacity` tokens each, made once.

    Attributes:
        keys, values: of each layer, (number, K, capacity and some more, E). Place p of a slot holds the token at
            position p.
        spare: a place that no token has.
    """

    def __init__(
        self, config: ModelConfig, number: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        places = -(-(capacity + 1) // WIDTH) * WIDTH
        shape = (number, config.num_kv_heads, places, config.head_dim)
        # Zeros, not empty: a masked place weighs 0, and 0 x NaN would still be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.spare = places - 1

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
