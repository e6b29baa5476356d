"""Batches of training: a batch is a pure function of (seed, position), so that a run can go on from anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from k2mini.config import IGNORE_INDEX
from k2mini.data.corpus import TokenSource


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass.

    Attributes:
        tokens: (B, T) int64.
        positions: (B, T) int64, counting from 0 within each document, -1 at padding; None: each row is one document,
            without padding.
        labels: (B, T) int64, the token that each position should predict, or `IGNORE_INDEX`.
    """

    tokens: Tensor
    positions: Tensor | None
    labels: Tensor

    def num_supervised(self) -> int:
        """How many tokens count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    def num_tokens(self) -> int:
        """How many tokens are not padding."""
        return self.tokens.numel() if self.positions is None else int((self.positions >= 0).sum())

    def unsupervised(self) -> Batch:
        """The same rows with no label: for a rank that has no data left while others have, as all run every pass."""
        return Batch(self.tokens, self.positions, torch.full_like(self.labels, IGNORE_INDEX))


class Samples(Protocol):
    """An endless sequence of samples, addressed by one integer: each epoch is a new permutation, drawn from a seed.

    Attributes:
        num_samples: samples of one epoch.
        even: whether all ranks and all micro-batches must get the same number of samples.
    """

    num_samples: int
    even: bool

    def rank_batches(self, position: int, count: int, size: int, rank: int, ranks: int) -> list[Batch]:
        """A rank's micro-batches, of `size` rows, of the step that takes samples position, …, position + count - 1."""
        ...

    def batch(self, position: int, count: int) -> Batch:
        """Samples position, …, position + count - 1 of the sequence."""
        ...


def shuffled(position: int, num_samples: int, seed: int | None) -> int:
    """The index of the sample at a position of the endless sequence. Without a seed every epoch keeps the order.

    An epoch's permutation is a 4-round Feistel network on 0, …, n - 1, where n is the next power of four; it is applied
    again while the result is not below `num_samples` (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains", section 4). So it needs no table, however many samples there are.
    """
    epoch, index = divmod(position, num_samples)
    if seed is None:
        return index
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(4):
            key = f"{seed}/{epoch}/{round_number}/{right}".encode()
            left, right = right, left ^ (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") & mask)
        index = left << half_bits | right
        if index < num_samples:
            return index


class Blocks:
    """Samples that are blocks of `seq_len` tokens, cut from a corpus.

    Args:
        source: the tokens of documents, each with BOS first (and EOS last, if wanted).
        document_mask: attention and positions restart at each document, and its last token predicts nothing. False: a
            block is treated as one text, K2's scheme.
        seed: of the order; None keeps the order of the corpus, for validation.

    Raises ValueError where the documents do not fill one block.
    """

    def __init__(self, source: TokenSource, seq_len: int, *, document_mask: bool, seed: int | None) -> None:
        self.even = True
        self.seq_len, self.document_mask, self.seed = seq_len, document_mask, seed
        self._source = source
        self.num_samples = (source.num_tokens - 1) // seq_len  # the last token of a block predicts the next one's first
        if self.num_samples < 1:
            raise ValueError(f"{source.num_tokens} tokens do not fill one block of {seq_len}; shorten data.seq_len")

    def rank_batches(self, position: int, count: int, size: int, rank: int, ranks: int) -> list[Batch]:
        """See Samples. Rank 0 takes the first slice of the step's samples, rank 1 the next, and so on."""
        share = count // ranks
        return [self.batch(position + rank * share + start, size) for start in range(0, share, size)]

    def batch(self, position: int, count: int) -> Batch:
        """Samples position, …, position + count - 1."""
        starts = [shuffled(position + row, self.num_samples, self.seed) * self.seq_len for row in range(count)]
        parts = [self._source.read(start, start + self.seq_len + 1) for start in starts]
        tokens = torch.from_numpy(np.stack([part[0] for part in parts]))  # (B, T+1)
        labels = tokens[:, 1:].clone()  # (B, T)
        if not self.document_mask:
            return Batch(tokens[:, :-1], None, labels)
        offsets = torch.from_numpy(np.stack([part[1] for part in parts]))
        labels[offsets[:, 1:] == 0] = IGNORE_INDEX
        # A document that began before its block counts from the block's first token.
        place = torch.arange(self.seq_len)
        return Batch(tokens[:, :-1], torch.minimum(offsets[:, :-1], place), labels)


class Prefetcher:
    """Makes the next step's batches in a thread while this step runs.

    Args:
        make: (position) -> the batches of the step that begins there; a pure function.
    """

    def __init__(self, make: Callable[[int], list[Batch]]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._pending: tuple[int, Future[list[Batch]]] | None = None

    def get(self, position: int, following: int | None) -> list[Batch]:
        """The batches at a position. A thread starts on those at `following`, which the next call should ask for."""
        if self._pending is not None and self._pending[0] == position:
            batches = self._pending[1].result()
        else:
            batches = self._make(position)
        self._pending = None if following is None else (following, self._pool.submit(self._make, following))
        return batches

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
