"""Transforms that look back, against transformers' processors."""

import pytest
import torch

from k2mini.inference.sampling import Sampling, as_history, constrain, sample, transform, uniforms

ROWS = [[1, 5, 9, 5, 9, 3, 5], [1, 2, 3, 1, 2, 3, 1, 2], [4, 4, 4, 4, 4, 4], [8]]
HISTORY = as_history(ROWS, 3, torch.device("cpu"))


def logits(seed=0):
    return torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)) * 3


def padded():
    """As transformers wants them: one tensor. Rows are cut to one length, so each is compared alone."""
    return [(row, torch.tensor([tokens])) for row, tokens in enumerate(ROWS)]


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_penalty(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    ours = constrain(logits(), Sampling(repetition_penalty=penalty), HISTORY)
    for row, tokens in padded():
        expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits()[row : row + 1].clone())
        assert torch.equal(ours[row : row + 1], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_no_repeated_ngram(size):
    from transformers import NoRepeatNGramLogitsProcessor

    ours = constrain(logits(), Sampling(no_repeat_ngram_size=size), HISTORY)
    for row, tokens in padded():
        expected = NoRepeatNGramLogitsProcessor(size)(tokens, logits()[row : row + 1].clone())
        assert torch.equal(ours[row : row + 1], expected)


def test_all_together_in_transformers_order():
    from transformers import (
        LogitsProcessorList,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
    )

    sampling = Sampling(repetition_penalty=1.4, no_repeat_ngram_size=2, forbidden=(7, 11, 99))
    ours = constrain(logits(), sampling, HISTORY)
    for row, tokens in padded():
        processors = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.4),
                NoRepeatNGramLogitsProcessor(2),
                SuppressTokensLogitsProcessor([7, 11]),
            ]
        )
        assert torch.equal(ours[row : row + 1], processors(tokens, logits()[row : row + 1].clone()))


def test_draws_under_all_transforms_follow_the_exact_distribution():
    """20,000 draws, as rows of one batch with a seed each, against the probabilities written out in float64."""
    row, history = logits(3)[:1], [1, 2, 3, 1, 2]
    sampling = Sampling(1.4, 15, 0.9, repetition_penalty=1.2, no_repeat_ngram_size=2, forbidden=(0,))
    exact = row[0].double()
    for token in set(history):
        exact[token] = exact[token] * 1.2 if exact[token] < 0 else exact[token] / 1.2
    exact[[3, 0]] = -torch.inf  # 2 was followed by 3
    exact /= 1.4
    exact[exact < exact.sort().values[-15]] = -torch.inf
    order = exact.argsort(descending=True)
    mass = exact.softmax(0)[order].cumsum(0)
    exact[order[1 + int((mass < 0.9).sum()) :]] = -torch.inf
    expected = exact.softmax(0)
    draws = 20_000
    seen = as_history([history], 0, row.device).expand(draws, -1)
    tokens = sample(row.expand(draws, -1), sampling, uniforms(range(draws), 1)[:, 0], seen)
    counts = torch.bincount(tokens, minlength=50).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
    assert chi_square < 36.1  # the 99.9 % quantile with 14 degrees of freedom
    assert int(possible.sum()) <= 15


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"repetition_penalty": 0}, "--repetition-penalty must be a positive number, not 0"),
        ({"no_repeat_ngram_size": -1}, "--no-repeat-ngram-size must be 0"),
        ({"forbidden": (-1,)}, "forbidden must be token ids"),
    ],
)
def test_values_out_of_range(values, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**values)


def test_penalties_of_new_tokens_and_biases():
    """OpenAI's: of each new token that has occurred once, and as often as it has; the prompt does not count."""
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    new, biases = [[4, 4, 9], [7]], ((3, 2.5), (29, -100.0))
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=biases)
    expected = logits.clone()
    for row, tokens in enumerate(new):
        for token in set(tokens):
            expected[row, token] -= 0.5 + 0.25 * tokens.count(token)
        for token, bias in biases:
            expected[row, token] += bias
    found = constrain(logits, sampling, None, as_history(new, 2, logits.device))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_min_p_equals_transformers(share):
    from transformers import MinPLogitsWarper

    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 3
    expected = MinPLogitsWarper(share)(None, logits)
    assert torch.equal(transform(logits, Sampling(temperature=1.0, min_p=share)), expected)
