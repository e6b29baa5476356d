import math

import pytest
import torch

from k2mini.build import load_model
from k2mini.evaluation.compare import mcnemar
from k2mini.evaluation.measures import rouge_l, token_f1
from k2mini.evaluation.perplexity import text_perplexity
from tests.conftest import tiny_config, tiny_llama


@pytest.mark.parametrize(
    ("answer", "reference", "rouge", "f1"),
    [
        ("the cat sat", "the cat sat", 1, 1),
        ("police killed the gunman", "police kill the gunman", 0.75, 0.75),  # Lin 2004, section 3.1
        ("gunman the killed police", "police kill the gunman", 0.25, 0.75),
        ("the gunman kill police", "police kill the gunman", 0.5, 1),
        ("a a a", "a", 0.5, 0.5),
        ("", "a", 0, 0),
        ("b", "a", 0, 0),
    ],
)
def test_rouge_and_f1(answer, reference, rouge, f1):
    assert rouge_l(answer, reference) == pytest.approx(rouge)
    assert token_f1(answer.upper() + "!", reference) == pytest.approx(f1)


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(9, 1) == mcnemar(1, 9)


TEXTS = ["granite is made of quartz and the crust " * 6, "a volcano", "plates quickly erodes " * 12]


@pytest.mark.parametrize(("window", "stride"), [(32, 7), (32, 31), (16, 1), (None, None)])
def test_perplexity_with_a_stride(tiny_tokenizer, window, stride):
    """Every token once, each after at least window - stride others, against a loop that takes one token at a time."""
    model = tiny_llama(tiny_config(vocab_size=tiny_tokenizer.vocab_size), dtype=torch.float64)
    found = text_perplexity(model, tiny_tokenizer, TEXTS, window=window, stride=stride)
    window, total, tokens = window or 256, 0.0, 0
    stride = stride or window // 2
    for text in TEXTS:
        ids = tiny_tokenizer.encode(text, bos=True, eos=False)
        for place in range(1, len(ids)):
            start = 0 if place < window else -(-(place - window + 1) // stride) * stride
            logprobs = model(torch.tensor([ids[start:place]]))[0, -1].log_softmax(-1)
            total, tokens = total - logprobs[ids[place]].item(), tokens + 1
    assert found.tokens == tokens
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-9)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / num_bytes, rel=1e-9)


def test_a_stride_that_is_refused(tiny_directory):
    model, tokenizer = load_model(tiny_directory)
    with pytest.raises(ValueError, match="stride must be at least 1 and below the window of 8 tokens, not 8"):
        text_perplexity(model, tokenizer, TEXTS, window=8, stride=8)
    with pytest.raises(ValueError, match="there is no text"):
        text_perplexity(model, tokenizer, [""])
