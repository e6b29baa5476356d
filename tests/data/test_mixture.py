"""Several sources: how often each comes, in which order, and that nobody's number of ranks changes it."""

import logging
from collections import Counter
from fractions import Fraction
from itertools import count, islice, pairwise

import pytest
import torch

from k2mini.config import CorpusSection, SourceSection
from k2mini.data.batches import shuffled
from k2mini.data.corpus import Documents
from k2mini.data.mixture import Mixture, mixed_blocks
from k2mini.data.packing import Examples, PackedExamples
from tests.helpers import examples

CASES = [
    ([6, 10, 8], [2.0, 1.0, 0.5]),
    ([7], [1.0]),
    ([10, 30], [0.1, 1.5]),
    ([5, 3, 11], [0.5, 0.3, 1.25]),
    ([3, 40], [0.01, 0.7]),
    ([1, 2], [3.0, 0.25]),
    ([4, 0, 9], [1.0, 2.0, 1.0]),
]


def sources(weights):
    return [SourceSection(f"{number}.json", weight) for number, weight in enumerate(weights)]


def mixture(sizes, weights, seed=3, parts=None, make=Examples):
    parts = parts or [[(i, j) for j in range(size)] for i, size in enumerate(sizes)]
    return Mixture(sources(weights), sizes, lambda chosen: make([parts[i][j] for i, j in chosen], seed=None), seed)


def rounded(value):
    return int(value + Fraction(1, 2))


def endless(source, size, seed):
    yield from ((source, shuffled(n, size, seed)) for n in count() if size)


def naive(sizes, weights, seed):
    """The order written out: each source's endless sequence is dealt out by epochs, each of which is shuffled."""
    exact = [size * Fraction(str(weight)) for size, weight in zip(sizes, weights, strict=True)]
    streams = [endless(i, size, seed) for i, size in enumerate(sizes)]
    epoch = 0
    while True:
        counts = [rounded((epoch + 1) * rate) - rounded(epoch * rate) for rate in exact]
        dealt = [each for stream, few in zip(streams, counts, strict=True) for each in islice(stream, few)]
        yield [dealt[shuffled(epoch * len(dealt) + n, len(dealt), seed)] for n in range(len(dealt))]
        epoch += 1


@pytest.mark.parametrize(("sizes", "weights"), CASES)
def test_counts_are_exact_and_nothing_comes_twice_too_soon(sizes, weights):
    mixed = mixture(sizes, weights)
    seen, position = Counter(), 0
    for number, epoch in enumerate(islice(naive(sizes, weights, 3), 9), start=1):
        assert [mixed.chosen(position + n) for n in range(len(epoch))] == epoch
        position += len(epoch)
        seen.update(epoch)
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            times = [seen[i, j] for j in range(size)]
            assert abs(sum(times) - number * size * Fraction(str(weight))) <= Fraction(1, 2)
            assert not times or max(times) - min(times) <= 1
    first = [rounded(size * Fraction(str(weight))) for size, weight in zip(sizes, weights, strict=True)]
    assert mixed.num_samples == sum(first)
    assert Counter(mixed.chosen(n)[0] for n in range(mixed.num_samples)) == {i: n for i, n in enumerate(first) if n}


def test_an_epoch_is_mixed_and_a_half_is_followed_by_the_other():
    mixed = mixture([100, 100], [1.0, 0.5])
    order = [mixed.chosen(position) for position in range(300)]
    halves = [{j for i, j in order[start : start + 150] if i == 1} for start in (0, 150)]
    assert [len(half) for half in halves] == [50, 50]
    assert halves[0] | halves[1] == set(range(100))
    assert 10 < sum(i for i, _ in order[:50]) < 25  # a third of them
    assert order[:150] != order[150:]
    assert [mixture([100, 100], [1.0, 0.5], seed=4).chosen(position) for position in range(300)] != order
    assert [mixed.chosen(position) for position in reversed(range(300))] == order[::-1]  # of the position alone
    in_order = mixture([2, 3], [1.0, 1.0], seed=None)
    assert [in_order.chosen(position) for position in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def rows_of(batches):
    """Each document or example of rows, as its tokens with their labels, sorted."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            places = batch.positions[row].tolist()
            starts = [n for n, place in enumerate(places) if place == 0] + [sum(place >= 0 for place in places)]
            pairs = list(zip(batch.tokens[row].tolist(), batch.labels[row].tolist(), strict=True))
            found += [pairs[a:b] for a, b in pairwise(starts)]
    return sorted(each for each in found if any(label >= 0 for _, label in each))


def corpora():
    generator = torch.Generator().manual_seed(0)
    return [
        Documents([[1, *torch.randint(3, 199, (n,), generator=generator).tolist(), 2] for n in lengths])
        for lengths in ((30, 9, 41, 60), (120, 7, 90, 33), (25, 26))
    ]


def made(kind):
    weights = [2.0, 0.5, 1.0]
    if kind == "blocks":
        section = CorpusSection(sources=sources(weights), seq_len=16)
        return mixed_blocks(corpora(), section.sources, section, 5)
    every = examples(26)
    parts = [every[:12], every[12:21], every[21:]]
    make = {"padded": Examples, "packed": lambda chosen, seed: PackedExamples(chosen, 64, seed=seed)}[kind]
    return mixture([12, 9, 5], weights, seed=5, parts=parts, make=make)


@pytest.mark.parametrize("kind", ["padded", "packed", "blocks"])
def test_the_same_samples_at_any_world_size(kind):
    """Of steps in the first epoch and across its end, each asked for alone, as a resumed run does."""
    mixed = made(kind)
    assert mixed.even == (kind != "packed")
    for position in (0, 8, mixed.num_samples - 4, 3 * mixed.num_samples + 1):
        expected = rows_of([mixed.batch(position, 8)])
        for ranks in (1, 2, 4):
            again = made(kind)
            parts = [again.rank_batches(position, 8, 2, rank, ranks) for rank in range(ranks)]
            assert len({len(part) for part in parts}) == 1
            assert rows_of([batch for part in parts for batch in part]) == expected


def test_blocks_are_those_of_each_corpus():
    """Cut from one corpus each: none runs from one into the next."""
    mixed = made("blocks")
    sizes = [(corpus.num_tokens - 1) // 16 for corpus in corpora()]
    assert mixed.num_samples == 2 * sizes[0] + rounded(Fraction(sizes[1], 2)) + sizes[2]
    blocks = [corpus.read(16 * j, 16 * j + 16)[0].tolist() for corpus in corpora() for j in range(16) if
              16 * j + 16 < corpus.num_tokens]  # fmt: skip
    taken = [mixed.batch(position, 1).tokens[0].tolist() for position in range(mixed.num_samples)]
    assert all(block in blocks for block in taken)


def test_what_an_epoch_takes_is_said(caplog):
    caplog.set_level(logging.INFO, logger="k2mini")
    mixture([100, 40], [0.5, 2.0])
    assert "0.json: an epoch takes 50 of 100 samples (weight 0.5)" in caplog.text
    assert "1.json: an epoch takes 80 of 40 samples (weight 2)" in caplog.text


def test_sources_that_give_nothing_are_refused():
    with pytest.raises(ValueError, match=r"data\.sources: an epoch takes no sample of any; raise the weights"):
        mixture([10, 20], [0.01, 0.02])
    section = CorpusSection(sources=sources([1.0, 1.0]), seq_len=64)
    with pytest.raises(ValueError, match=r"2\.json: 55 tokens do not fill one block of 64"):
        mixed_blocks(corpora()[1:], [*section.sources[:1], SourceSection("2.json")], section, 0)
