"""Several sources in one run: `data.sources`, each as often as its weight says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from k2mini.config import CorpusSection, SourceSection
from k2mini.data.batches import Batch, Blocks, Samples, shuffled
from k2mini.data.corpus import TokenSource

log = logging.getLogger(__name__)

Make = Callable[[list[tuple[int, int]]], Samples]


class Mixture:
    """Samples of several sources, in an order that is a pure function of (seed, position), as `batches.shuffled`.

    Until the end of epoch k, source i has given k * size * weight samples, rounded. They are those of its own endless
    sequence of permutations, so none comes twice before all others came once. Where the products are not whole, epochs
    differ by a sample; `num_samples` is the first one's.

    Args:
        sizes: samples of each source.
        make: gives the samples that (source, index of the sample) name, in their order.
        seed: of the order; None: one source after the other, for validation.

    Raises ValueError where an epoch would take no sample at all.
    """

    def __init__(self, sources: Sequence[SourceSection], sizes: Sequence[int], make: Make, seed: int | None) -> None:
        self._sizes, self._make, self._seed = sizes, make, seed
        # The weight as it is written: 0.1 is a tenth.
        self._rates = [size * Fraction(str(source.weight)) for source, size in zip(sources, sizes, strict=True)]
        self._length, counts = sum(self._rates), self._given(1)
        for source, size, count in zip(sources, sizes, counts, strict=True):
            if seed is not None:
                log.info("%s: an epoch takes %d of %d samples (weight %g)", source.path, count, size, source.weight)
        self.num_samples = sum(counts)
        if not self.num_samples:
            raise ValueError("data.sources: an epoch takes no sample of any; raise the weights")
        self.even = make([self.chosen(0)]).even

    def _given(self, epochs: int) -> list[int]:
        """How many samples of each source so many epochs take."""
        return [(2 * epochs * r.numerator + r.denominator) // (2 * r.denominator) for r in self._rates]  # half up

    def chosen(self, position: int) -> tuple[int, int]:
        """The source of the sample at a position of the endless sequence, and its index there."""
        epoch = position // self._length  # within one of the right one, or a few where epochs are tiny
        while sum(self._given(epoch)) > position:
            epoch -= 1
        while sum(self._given(epoch + 1)) <= position:
            epoch += 1
        before, after = self._given(epoch), self._given(epoch + 1)
        length = sum(after) - sum(before)
        index = shuffled(epoch * length + position - sum(before), length, self._seed)
        source = 0
        while index >= after[source] - before[source]:
            index -= after[source] - before[source]
            source += 1
        return source, shuffled(before[source] + index, self._sizes[source], self._seed)

    def rank_batches(self, position: int, count: int, size: int, rank: int, ranks: int) -> list[Batch]:
        """See Samples."""
        taken = self._make([self.chosen(position + row) for row in range(count)])
        return taken.rank_batches(0, count, size, rank, ranks)

    def batch(self, position: int, count: int) -> Batch:
        """Samples position, …, position + count - 1."""
        return self._make([self.chosen(position + row) for row in range(count)]).batch(0, count)


class _Chosen:
    """Blocks of several corpora, one after the other, as a `TokenSource` of which whole blocks are read."""

    def __init__(self, corpora: Sequence[TokenSource], chosen: list[tuple[int, int]], seq_len: int) -> None:
        self._corpora, self._chosen, self._seq_len = corpora, chosen, seq_len
        self.num_tokens = len(chosen) * seq_len + 1

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        source, index = self._chosen[start // self._seq_len]
        first = index * self._seq_len
        return self._corpora[source].read(first, first + stop - start)


def mixed_blocks(
    corpora: Sequence[TokenSource], sources: Sequence[SourceSection], section: CorpusSection, seed: int | None
) -> Mixture:
    """Blocks of corpora, one a source. Raises ValueError naming a source that does not fill a block."""

    def blocks(source: TokenSource) -> Blocks:
        return Blocks(source, section.seq_len, document_mask=section.document_mask, seed=None)

    sizes = []
    for corpus, source in zip(corpora, sources, strict=True):
        try:
            sizes.append(blocks(corpus).num_samples)
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from None
    return Mixture(sources, sizes, lambda chosen: blocks(_Chosen(corpora, chosen, section.seq_len)), seed)
