import pytest
import torch

from k2mini.build import load_model
from k2mini.evaluation.geobench import load_geobench
from k2mini.evaluation.score import score_options, split_jointly
from k2mini.text.prompts import get_template


def test_white_space_that_ends_a_context_belongs_to_the_option(llama_tokenizer):
    context, options = split_jointly(llama_tokenizer, "The answer is: ", ["A", "B"])
    assert context == llama_tokenizer.encode("The answer is:", bos=True, eos=False)
    assert options == [[319], [350]]
    context, options = split_jointly(llama_tokenizer, "### Response:\n", ["A", "B"])
    assert options == [[29909], [29933]]


@pytest.mark.parametrize("scoring", ["letter", "text"])
@pytest.mark.parametrize("answer_prefix", ["", "The answer is: ", "The answer is:\n"])
def test_what_is_scored_is_the_joint_tokenisation(llama_tokenizer, geobench, scoring, answer_prefix):
    template = get_template("alpaca")
    for question in load_geobench(geobench["npee"]) + load_geobench(geobench["ap"])[:200]:
        context = question.context(template, scoring, answer_prefix)
        texts = [text for text in question.asked(scoring)[1] if text.strip()]
        if not texts:
            continue
        prefix, options = split_jointly(llama_tokenizer, context, texts)
        for text, ids in zip(texts, options, strict=True):
            assert ids
            assert prefix + ids == llama_tokenizer.encode(context + text, bos=True, eos=False)


def naive_score(model, tokenizer, context, option):
    """One full forward, no cache: the sum over all that follows the longest common beginning."""
    joint = tokenizer.encode(context + option, bos=True, eos=False)
    logprobs = model(torch.tensor([joint]))[0].log_softmax(-1)
    return joint, logprobs


@pytest.mark.parametrize(
    ("context", "options"),
    [
        ("granite is made of ", ["quartz", "crust and mantle", "a", "a rock"]),
        ("Response:\n", ["A", "B", "C", "D"]),
        ("the volcano", [" erodes quickly", " erodes", "s"]),
        ("quartz", ["!"]),
    ],
)
def test_scores_equal_naive_ones(tiny_directory, context, options):
    model, tokenizer = load_model(tiny_directory, dtype="float64")
    scores = score_options(model, tokenizer, context, options)
    for option, ids, logprob in zip(options, scores.token_ids, scores.logprobs, strict=True):
        joint, logprobs = naive_score(model, tokenizer, context, option)
        start = len(joint) - len(ids)
        assert joint[start:] == ids
        expected = sum(logprobs[i - 1, joint[i]] for i in range(start, len(joint)))
        assert logprob == pytest.approx(expected.item(), abs=1e-10)


def test_what_can_not_be_scored_is_refused(tiny_directory):
    model, tokenizer = load_model(tiny_directory)
    with pytest.raises(ValueError, match="an option is empty"):
        score_options(model, tokenizer, "granite", ["a", ""])
    with pytest.raises(ValueError, match="tokens more than the model's 1024"):
        score_options(model, tokenizer, "granite " * 2000, ["a", "b"])
