"""What training consumes: a batch is a pure function of (seed, position), so any run can start anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
    """Rows for one forward pass.

    Attributes:
        tokens: (B, T) int64.
        positions: (B, T) int64, counting from 0 within each document, -1 where padded; None: one document a row,
            without padding.
        labels: (B, T) int64, the token that each position should predict, or `IGNORE_INDEX`.
    """

    tokens: Tensor
    positions: Tensor | None
    labels: Tensor

    def num_supervised(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.tokens.numel() if self.positions is None else int((self.positions >= 0).sum())


class Samples(Protocol):
    """An endless, seeded sequence of samples that is addressed by one integer."""

    num_samples: int
    """Samples an epoch."""

    even: bool
    """Whether every rank and every micro-batch must get as many samples."""

    def rank_batches(self, position: int, count: int, size: int, rank: int, ranks: int) -> list[Batch]:
        """A rank's micro-batches, of `size` rows, of the step that takes samples position, …, position + count - 1."""
        ...

    def batch(self, position: int, count: int) -> Batch:
        """Samples position, …, position + count - 1 of the sequence."""
        ...


def shuffled(position: int, num_samples: int, seed: int | None) -> int:
    """The sample at a position of the endless sequence in which every epoch is a new permutation (seed None: the same).

    A 4-round Feistel network over the next power of four, walked until it lands inside (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", section 4): a bijection in O(1) memory.
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
    """A corpus, cut into blocks of `seq_len` tokens.

    Args:
        source: tokens of documents, BOS first (and EOS last, if wanted).
        document_mask: attention and positions restart at each document, and no token predicts across its end. False:
            a block is one text, as K2 trained.
        seed: of the order. None keeps the order, epoch after epoch (for validation).

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
        """See Samples. Ranks take slices one after the other."""
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


@dataclass(frozen=True)
class Example:
    """One instruction with its answer: (T,) token ids, and how many of them, from the left, are not supervised."""

    tokens: Sequence[int]
    unsupervised: int


class Examples:
    """Independent examples, a row each, padded on the right to the longest of their batch.

    Args:
        seed: of the order. None keeps it (for validation).
    """

    even = True

    def __init__(self, examples: Sequence[Example], *, seed: int | None) -> None:
        self.seed, self._examples = seed, examples
        self.num_samples = len(examples)

    def examples(self, position: int, count: int) -> list[Example]:
        """Samples position, …, position + count - 1, one by one."""
        return [self._examples[shuffled(position + row, self.num_samples, self.seed)] for row in range(count)]

    def rank_batches(self, position: int, count: int, size: int, rank: int, ranks: int) -> list[Batch]:
        """See Samples. Within a step rows are grouped by length, so that little is padded."""
        rows = sorted(self.examples(position, count), key=lambda example: len(example.tokens))
        groups = [rows[start : start + size] for start in range(0, count, size)]
        return [self._padded(group) for group in groups[rank::ranks]]

    def batch(self, position: int, count: int) -> Batch:
        """Samples position, …, position + count - 1."""
        return self._padded(self.examples(position, count))

    @staticmethod
    def _padded(rows: Sequence[Example]) -> Batch:
        count = len(rows)
        longest = max(len(row.tokens) for row in rows) - 1  # the last token predicts nothing
        tokens = torch.zeros(count, longest, dtype=torch.int64)
        positions = torch.full((count, longest), -1, dtype=torch.int64)
        labels = torch.full((count, longest), IGNORE_INDEX, dtype=torch.int64)
        for index, row in enumerate(rows):
            length = len(row.tokens) - 1
            ids = torch.tensor(row.tokens)
            tokens[index, :length] = ids[:-1]
            positions[index, :length] = torch.arange(length)
            first = max(row.unsupervised - 1, 0)  # position t predicts token t + 1
            labels[index, first:length] = ids[first + 1 :]
        return Batch(tokens, positions, labels)


def without_weight(batch: Batch) -> Batch:
    """The same rows with nothing supervised, for a rank that has to keep step and has no data left."""
    return Batch(batch.tokens, batch.positions, torch.full_like(batch.labels, IGNORE_INDEX))


class Prefetcher:
    """Makes the next step's batches in the background while this one's are computed on.

    Args:
        make: (position) -> the batches; a pure function.
    """

    def __init__(self, make: Callable[[int], list[Batch]]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._pending: tuple[int, Future[list[Batch]]] | None = None

    def get(self, position: int, following: int | None) -> list[Batch]:
        """The batches at a position; those at `following` are begun."""
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
