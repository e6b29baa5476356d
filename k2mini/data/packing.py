"""Examples of instruction tuning: one a row, padded, or several packed into a row.

Packing puts the examples of one global batch into fewer and fuller rows. A packed step takes the same examples as a
padded one, and examples that share a row do not see each other, so both steps have the same loss and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from k2mini.config import IGNORE_INDEX
from k2mini.data.batches import Batch, shuffled

MULTIPLE = 8  # rows are padded to a multiple of it, for the sake of GPUs


@dataclass(frozen=True)
class Example:
    """One instruction with its answer, or a conversation: (T,) token ids, of which some do not count in the loss.

    Args:
        unsupervised: so many of the first do not.
        gaps: (first, end) of those after them that do not.
    """

    tokens: Sequence[int]
    unsupervised: int
    gaps: Sequence[tuple[int, int]] = ()


class Examples:
    """Samples that are examples, one a row, padded on the right to the longest of their batch.

    Args:
        seed: of the order; None keeps the order given, for validation.
    """

    even = True

    def __init__(self, examples: Sequence[Example], *, seed: int | None) -> None:
        self.seed, self._examples = seed, examples
        self.num_samples = len(examples)

    def examples(self, position: int, count: int) -> list[Example]:
        """Samples position, …, position + count - 1 of the sequence."""
        return [self._examples[shuffled(position + row, self.num_samples, self.seed)] for row in range(count)]

    def rank_batches(self, position: int, count: int, size: int, rank: int, ranks: int) -> list[Batch]:
        """See Samples. Within a step rows are grouped by length, so that little is padded."""
        rows = sorted(self.examples(position, count), key=lambda example: len(example.tokens))
        groups = [rows[start : start + size] for start in range(0, count, size)]
        return [_padded(group) for group in groups[rank::ranks]]

    def batch(self, position: int, count: int) -> Batch:
        """Samples position, …, position + count - 1."""
        return _padded(self.examples(position, count))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute examples over rows by best fit decreasing: longest first, each into the fullest row that has room.

    Args:
        lengths: tokens of each example.
        capacity: tokens that fit a row.

    Returns: for each row, the indices of its examples.

    Raises ValueError where an example is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise ValueError(f"an example of {lengths[index]} tokens does not fit a row of {capacity}")
        fitting = [row for row, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            row = min(fitting, key=lambda i: (room[i], i))
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


class PackedExamples(Examples):
    """Examples of which several share a row of at most `capacity` tokens; `train.micro_batch_size` counts these rows.

    All ranks run the same number of forward passes, so a rank with fewer rows gets rows without labels at the end.
    """

    even = False  # any number of ranks can share any number of examples

    def __init__(self, examples: Sequence[Example], capacity: int, *, seed: int | None) -> None:
        super().__init__(examples, seed=seed)
        self.capacity = capacity

    def rank_batches(self, position: int, count: int, size: int, rank: int, ranks: int) -> list[Batch]:
        """This rank's micro-batches, of at most `size` rows, of samples position, …, position + count - 1."""
        examples = self.examples(position, count)
        # The last token of an example predicts nothing, so it takes no room.
        rows = pack([len(example.tokens) - 1 for example in examples], self.capacity)
        mine = rows[rank::ranks]
        passes = -(-len(rows[::ranks]) // size)  # rank 0 has the most
        batches = []
        for index in range(passes):
            part = mine[index * size : (index + 1) * size]
            content = [[examples[i] for i in row] for row in part]
            batches.append(packed_rows(content) if content else packed_rows([examples[:1]]).unsupervised())
        return batches


def _padded(examples: Sequence[Example]) -> Batch:
    """A row an example, padded on the right to the longest of them."""
    return packed_rows([[example] for example in examples], multiple=1)


def packed_rows(rows: Sequence[Sequence[Example]], multiple: int = MULTIPLE) -> Batch:
    """Each row's examples one after the other, every one from position 0 on; padded on the right to one length.

    Args:
        multiple: the length is rounded up to a multiple of it.
    """
    longest = max(sum(len(example.tokens) - 1 for example in row) for row in rows)  # the last token predicts nothing
    length = -(-longest // multiple) * multiple
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    positions = torch.full((len(rows), length), -1, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.int64)
    for index, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.tokens) - 1
            ids = torch.tensor(example.tokens)
            tokens[index, start:end] = ids[:-1]
            positions[index, start:end] = torch.arange(end - start)
            first = max(example.unsupervised - 1, 0)  # position t predicts token t + 1
            labels[index, start + first : end] = ids[first + 1 :]
            for first, stop in example.gaps:
                labels[index, start + first - 1 : start + stop - 1] = IGNORE_INDEX
            start = end
    return Batch(tokens, positions, labels)
