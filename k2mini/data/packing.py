"""Packing: the examples of one global batch in fewer and fuller rows.

A step takes the same examples that an unpacked one would, and documents in a row do not see each other, so its loss and
gradients are the unpacked step's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2mini.config import IGNORE_INDEX
from k2mini.data.batches import Batch, Example, Examples, without_weight

MULTIPLE = 8  # rows are padded to a multiple of it, for the sake of GPUs


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of what goes into each row: longest first, each into the fullest row that has room (best fit decreasing).

    Raises ValueError where one alone is longer than a row.
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
    """Examples of which several share a row of at most `capacity` tokens.

    `micro_batch_size` counts rows here. Ranks that run out of rows get one of no weight, since all ranks run as many
    passes.
    """

    even = False  # any number of ranks can share any number of examples

    def __init__(self, examples: Sequence[Example], capacity: int, *, seed: int | None) -> None:
        super().__init__(examples, seed=seed)
        self.capacity = capacity

    def rank_batches(self, position: int, count: int, size: int, rank: int, ranks: int) -> list[Batch]:
        """This rank's micro-batches, of at most `size` rows, of samples position, …, position + count - 1."""
        examples = self.examples(position, count)
        # The last token of an example predicts nothing, so it needs no place.
        rows = pack([len(example.tokens) - 1 for example in examples], self.capacity)
        mine = rows[rank::ranks]
        passes = -(-len(rows[::ranks]) // size)  # rank 0 has the most
        batches = []
        for index in range(passes):
            part = mine[index * size : (index + 1) * size]
            content = [[examples[i] for i in row] for row in part]
            batches.append(packed_rows(content) if content else without_weight(packed_rows([examples[:1]])))
        return batches


def packed_rows(rows: Sequence[Sequence[Example]]) -> Batch:
    """Rows of examples one after the other, each starting at position 0, padded on the right to one length."""
    longest = max(sum(len(example.tokens) - 1 for example in row) for row in rows)
    length = -(-longest // MULTIPLE) * MULTIPLE
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
            start = end
    return Batch(tokens, positions, labels)
