import pytest
import torch

from k2mini.inference.sampling import Sampling, keep_top_k, keep_top_p, sample, transform


def logits(rows=4):
    return torch.randn(rows, 50, generator=torch.Generator().manual_seed(0)) * 3


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("k", [1, 5, 50, 80])
def test_top_k_equals_transformers(k):
    from transformers import TopKLogitsWarper

    assert torch.equal(keep_top_k(logits(), k), TopKLogitsWarper(k)(None, logits()))


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.75, 0.999])
def test_top_p_equals_transformers(p):
    from transformers import TopPLogitsWarper

    assert torch.equal(keep_top_p(logits(), p), TopPLogitsWarper(p)(None, logits()))


def test_transforms_come_in_transformers_order():
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    reference = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8)])
    ours = transform(logits(), Sampling(temperature=0.7, top_k=20, top_p=0.8))
    torch.testing.assert_close(ours, reference(None, logits()))


def test_draws_follow_the_distribution():
    sampling = Sampling(temperature=1.3, top_k=12, top_p=0.95)
    row = logits(1)
    expected = transform(row, sampling).softmax(-1)[0]
    draws = 20_000
    generator = generators(0)
    counts = torch.zeros(50)
    for _ in range(draws):
        counts[sample(row, sampling, generator)] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
    # The 99.9 % quantile of chi-square with at most 11 degrees of freedom is 31.3.
    assert chi_square < 31.3


def test_a_row_does_not_depend_on_its_neighbours():
    sampling = Sampling(temperature=1.0)
    batch = sample(logits(4), sampling, generators(7, 8, 9, 10))
    alone = [sample(logits(4)[i : i + 1], sampling, generators(7 + i)).item() for i in range(4)]
    assert batch.tolist() == alone
    assert torch.equal(batch, sample(logits(4), sampling, generators(7, 8, 9, 10)))


def test_greedy_takes_the_likeliest():
    assert torch.equal(sample(logits(), Sampling(), []), logits().argmax(-1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "--temperature must be 0 .greedy. or a positive number, not -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "--top-p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.2}, "--top-p must be above 0 and at most 1, not 1.2"),
        ({"top_k": -1}, "--top-k must be 0"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
