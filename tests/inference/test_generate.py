import pytest
import torch

from k2mini.inference.generate import generate
from k2mini.inference.sampling import Sampling
from tests.conftest import tiny_config, tiny_llama
from tests.reference import to_transformers

PROMPTS = [[1, 5, 9, 77, 3], [1, 40], [1, 8, 8, 120, 60, 33, 2, 18, 190]]


def test_greedy_equals_transformers(shape):
    model = tiny_llama(shape)
    reference = to_transformers(model)
    ours = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[])
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert completion.tokens == theirs[0, len(prompt) :].tolist()
        assert completion.finish == "length"


DRAWN = Sampling(temperature=1.2, top_k=40, top_p=0.9)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_ragged_rows_get_what_they_get_alone(shape, sampling):
    model = tiny_llama(shape)
    options = {"max_new_tokens": 15, "stop_ids": [7, 8, 9], "sampling": sampling}
    batch = generate(model, PROMPTS, seed=3, **options)
    alone = [generate(model, [prompt], seed=3 + i, **options)[0] for i, prompt in enumerate(PROMPTS)]
    assert batch == alone


def test_a_row_stops_at_a_stop_id_and_the_others_go_on():
    model = tiny_llama()
    free = generate(model, PROMPTS, max_new_tokens=12, stop_ids=[])
    stop = free[1].tokens[4]
    stopped = generate(model, PROMPTS, max_new_tokens=12, stop_ids=[stop])
    for before, after in zip(free, stopped, strict=True):
        if stop in before.tokens:
            assert after.tokens == before.tokens[: before.tokens.index(stop)]
            assert after.finish == "eos"
        else:
            assert after == before
    assert stopped[1].finish == "eos"


def test_ids_beyond_the_tokenizer_are_never_chosen():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[150:] *= 100
    (completion,) = generate(model, [[1, 2]], max_new_tokens=30, stop_ids=[], vocab_size=150)
    assert max(completion.tokens) < 150


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 5, "there is no prompt"),
        ([[1], []], 5, "the prompt is empty"),
        ([[1]], 0, "max_new_tokens must be at least 1, not 0"),
        ([[1] * 60], 10, "6 more than the model's context of 64; ask for at most 4 new ones or shorten it"),
        ([[1] * 70], 10, "16 more than the model's context of 64; shorten it"),
    ],
)
def test_what_can_not_be_answered_is_refused(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_llama(tiny_config(max_seq_len=64)), prompts, max_new_tokens=new, stop_ids=[])
