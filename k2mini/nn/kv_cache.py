"""The KV cache: keys and values of the tokens so far. It is an argument of the model, never a part of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from k2mini.model_config import ModelConfig

GROWTH_STEP = 256  # slots; a cache grows to the next multiple, so a long answer copies it few times
ALIGNED = 8  # a GPU's attention wants masks over a multiple of it
PREFILL_CHUNK = 512  # tokens of each row in one forward pass of a long prompt; on a GPU, more of few rows:
PREFILL_TOKENS = 8192  # of all rows together
MASKLESS = ["cuda"]  # where causal attention over more keys than queries needs no mask, which would be slow


class LayerCache(NamedTuple):
    """One layer's keys and values, and the slots of the new tokens.

    Attributes:
        keys, values: (B, K, capacity + 1, E).
        slots: of the new tokens: a slice where they are the same in all rows, else (B, T) int64.
        length: how many slots queries attend to, or are masked from.
    """

    keys: Tensor
    values: Tensor
    slots: slice | Tensor
    length: int

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values, each (B, T, K, E), of the tokens announced to `KVCache.advance`.

        Returns: all keys and all values up to `length`, each (B, K, S, E).
        """
        if isinstance(self.slots, slice):
            self.keys[:, :, self.slots] = key.transpose(1, 2)
            self.values[:, :, self.slots] = value.transpose(1, 2)
        else:
            rows = torch.arange(key.shape[0], device=key.device)[:, None]  # (B, 1), against slots (B, T)
            self.keys[rows, :, self.slots] = key
            self.values[rows, :, self.slots] = value
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KVCache:
    """A rotated key and a value for each row, layer and position.

    Slot p of a row holds the token at position p, and a query at position p attends to slots 0..p, or to the last of
    these, which a sliding window covers (the others stay). So rows may differ in length. Padding (position -1) is
    stored in one spare slot at the end, which no query attends to.

    Args:
        config: the model's shape.
        batch_size: B.
        dtype: the model's compute dtype.
        capacity: positions to make room for at once; the cache grows by itself past that.
        fixed: for compiled blocks: single tokens are decoded over all slots under a mask, so that shapes stay the
            same until the cache grows.

    Attributes:
        lengths: (B,) int64, tokens held of each row.
        length: an upper bound of `lengths`, kept on the CPU, so that reading it does not wait for a GPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = GROWTH_STEP,
        fixed: bool = False,
    ) -> None:
        self.fixed = fixed
        self.max_seq_len, self.window = config.max_seq_len, config.sliding_window
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.length = 0
        self.capacity = 0
        self._in_step = True  # all rows have the same length, `self.length`
        self._slots: slice | Tensor = slice(0, 0)
        self.maskless = self.lengths.device.type in MASKLESS
        shape = (batch_size, config.num_kv_heads, 1, config.head_dim)
        # Zeros, not empty: a masked slot weighs 0, and 0 x NaN would still be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.reserve(capacity)

    @property
    def batch_size(self) -> int:
        """How many rows the cache has."""
        return self.lengths.shape[0]

    def reserve(self, length: int) -> None:
        """Make room for `length` positions a row, keeping what the cache holds."""
        if length <= self.capacity:
            return
        slots = -(-(length + 1) // GROWTH_STEP) * GROWTH_STEP  # the last one is the padding's
        if self.fixed:  # by doubling, since blocks are compiled anew for each capacity
            slots = GROWTH_STEP << max(0, math.ceil(math.log2(slots / GROWTH_STEP)))
        slots = min(slots, -(-(max(self.max_seq_len, length) + 1) // ALIGNED) * ALIGNED)

        def grown(old: Tensor) -> Tensor:
            batch_size, heads, _, head_dim = old.shape
            new = old.new_zeros(batch_size, heads, slots, head_dim)
            new[:, :, : self.length] = old[:, :, : self.length]
            return new

        for layer in range(len(self.keys)):
            self.keys[layer] = grown(self.keys[layer])
            self.values[layer] = grown(self.values[layer])
        self.capacity = slots - 1

    def advance(self, num_tokens: int, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Announce `num_tokens` more tokens a row; `LayerCache.append` then stores their keys and values by layer.

        Args:
            num_tokens: T.
            positions: (B, T) int64, each row's next positions in order, -1 for padding; None: every row continues
                where it stopped.

        Returns: the positions, (B or 1, T), and the mask, (B or 1, 1, T, S) bool, True where a query attends, or None:
        attention is causal, and the last query attends to all.

        Raises ValueError where the model's context is exceeded.
        """
        start, end = self.length, self.length + num_tokens
        single = positions is None and self.fixed and num_tokens == 1
        together = positions is None and self._in_step and not single
        if end > self.max_seq_len and (single or together):
            most = self.max_seq_len
            raise ValueError(f"{end} tokens are {end - most} more than the model's context of {most}")
        self.reserve(end)
        self.length = self._seen = end
        if together:
            self._slots = slice(start, end)
            self.lengths += num_tokens
            positions = torch.arange(start, end, device=self.lengths.device).unsqueeze(0)  # (1, T)
            if self.window is not None and end > self.window:
                self._seen = self._aligned(end)
            elif start == 0 or num_tokens == 1 or self.maskless:
                return positions, None
        else:
            if positions is None:
                positions = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)  # (B, T)
            self._slots = positions
            if single:
                self._seen = self.capacity + 1
                self.lengths += 1  # in place: a graph goes on from it
            else:
                self._in_step, self.lengths = False, torch.maximum(self.lengths, positions.amax(dim=1) + 1)
                self._seen = self._aligned(end)
        # A padding query sees slot 0, so that its (ignored) softmax is not 0/0.
        slots = torch.arange(self._seen, device=positions.device)
        mask = slots <= (last := positions.clamp(min=0)[..., None])
        if self.window is not None and self._seen > self.window:
            mask &= slots > last - self.window
        return positions, mask.unsqueeze(1)

    def _aligned(self, end: int) -> int:
        return -(-end // ALIGNED) * ALIGNED if self.maskless else end

    def compiled(self, num_tokens: int) -> bool:
        """Whether a pass of so many tokens a row runs compiled code, if the model has any."""
        return self.fixed and num_tokens == 1

    def layer(self, layer: int) -> LayerCache:
        """The cache of one layer, for the tokens last announced to `advance`."""
        return LayerCache(self.keys[layer], self.values[layer], self._slots, self._seen)

    def end(self, lengths: Tensor) -> None:
        """Let rows end after so many tokens, (B,) int64. Padding that was stored after them is overwritten unseen."""
        self.lengths, self._in_step = lengths, False

    def select(self, rows: Tensor) -> KVCache:
        """A new cache with copies of the given rows, in their order. rows: (N,) int64, with repeats."""
        new = object.__new__(KVCache)
        new.__dict__.update(self.__dict__)
        new.lengths = self.lengths[rows]
        new.keys = [key[rows] for key in self.keys]
        new.values = [value[rows] for value in self.values]
        return new


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch: tokens (B, T) and positions (B, T), -1 where padded."""
    tokens = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    positions = pad_sequence([torch.arange(len(row)) for row in rows], batch_first=True, padding_value=-1)
    return tokens.to(device, non_blocking=True), positions.to(device, non_blocking=True)


def extend(
    hidden_of: Callable[..., Tensor], rows: Sequence[Sequence[int]], cache: KVCache, chunk: int | None = None
) -> Tensor:
    """Run more tokens of every row through the model into the cache, whose rows all have the same length so far.

    Args:
        hidden_of: the model's `hidden`.
        chunk: tokens of each row in one forward pass, which bounds the memory of a long prompt; None: as many as suit.

    Returns: the hidden state after each row's last token, (B, D). The host does not wait for it.
    """
    tokens, offsets = pad_right(rows, cache.lengths.device)  # (B, T)
    start, ends = cache.length, offsets.amax(dim=1)  # (B,)
    ragged = len({len(row) for row in rows}) > 1
    # Without a mask, padding is taken for tokens: it comes after the row's own, which do not see it.
    positions = torch.where(offsets >= 0, offsets + start, -1) if ragged and not cache.maskless else None
    chunk = chunk or (max(PREFILL_CHUNK, PREFILL_TOKENS // len(rows)) if cache.maskless else PREFILL_CHUNK)
    last, here = torch.empty(0), torch.arange(len(rows), device=tokens.device)
    for begin in range(0, tokens.shape[1], chunk):
        part = slice(begin, begin + chunk)
        hidden = hidden_of(tokens[:, part], None if positions is None else positions[:, part], cache)  # (B, t, D)
        newest = hidden[here, (ends - begin).clamp(0, hidden.shape[1] - 1)]  # of rows that end here
        last = torch.where((ends >= begin)[:, None], newest, last) if begin else newest
    if ragged and positions is None:
        cache.end(start + ends + 1)
    return last
