"""Packed steps are unpacked steps."""

import pytest
import torch

from k2mini.data.packing import Examples, PackedExamples, pack
from k2mini.training.step import accumulate
from tests.conftest import tiny_llama
from tests.helpers import examples


def test_rows_hold_everything_once_and_no_more_than_they_can():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 65, (30,), generator=generator).tolist()
        rows = pack(lengths, 64)
        assert sorted(index for row in rows for index in row) == list(range(30))
        assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
        assert len(rows) <= 1.25 * -(-sum(lengths) // 64) + 1
    with pytest.raises(ValueError, match="does not fit"):
        pack([65], 64)


def step(batches):
    """Loss and gradients of a step; of several ranks one after the other, added up."""
    model = tiny_llama(dtype=torch.float64)
    count = sum(batch.num_supervised() for part in batches for batch in part)
    loss = sum(accumulate(model, part, count).item() for part in batches)
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_loss_and_gradients_equal_the_unpacked_step(ranks, seed):
    data = examples()
    loss, expected = step([[Examples(data, seed=seed).batch(4, 12)]])
    packed = PackedExamples(data, 64, seed=seed)
    parts = [packed.rank_batches(4, 12, 2, rank, ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1  # all ranks run as many passes
    found, gradients = step(parts)
    assert found == pytest.approx(loss, abs=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-12)
    rows = sum(batch.tokens.shape[0] for part in parts for batch in part)
    assert rows < 12


def test_grouped_by_length_equals_ungrouped():
    data = Examples(examples(), seed=3)
    loss, expected = step([[data.batch(0, 8)]])
    parts = [data.rank_batches(0, 8, 2, rank, 2) for rank in range(2)]
    found, gradients = step(parts)
    assert found == pytest.approx(loss, abs=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-12)
    places = sum(batch.tokens.numel() for part in parts for batch in part)
    assert places < data.batch(0, 8).tokens.numel()


def test_a_rank_without_rows_gets_one_of_no_weight():
    data = PackedExamples(examples(2), 64, seed=None)
    parts = [data.rank_batches(0, 2, 4, rank, 3) for rank in range(3)]
    assert [sum(batch.num_supervised() for batch in part) for part in parts][-1] == 0
    assert [len(part) for part in parts] == [1, 1, 1]


def test_an_example_is_the_same_wherever_it_stands():
    """Rows restart positions at each example and end in padding that nothing looks at."""
    data = examples(5)
    (batch,) = PackedExamples(data, 200, seed=None).rank_batches(0, 5, 4, 0, 1)
    model = tiny_llama(dtype=torch.float64)
    starts = (batch.positions[0] == 0).nonzero().flatten().tolist()
    assert len(starts) == 5
    assert batch.tokens.shape[1] % 8 == 0
    with torch.no_grad():
        logits = model(batch.tokens, batch.positions)[0]
        for start in starts:
            ids = batch.tokens[0, start]
            assert ids == 1
            length = 1
            while start + length < batch.tokens.shape[1] and batch.positions[0, start + length] == length:
                length += 1
            alone = model(batch.tokens[:, start : start + length])[0]
            torch.testing.assert_close(logits[start : start + length], alone, rtol=0, atol=1e-12)
