"""Beam search against transformers, hypothesis by hypothesis, with scores."""

import pytest
import torch

from k2mini.build import load_model
from k2mini.inference.beam import Beams, beam_search
from k2mini.inference.decoding import Decoding
from k2mini.inference.generate import generate
from k2mini.inference.sampling import Sampling
from tests.conftest import tiny_config, tiny_llama
from tests.reference import to_transformers

PROMPTS = [[1, 5, 9, 77, 3], [1, 40], [1, 8, 8, 120, 60, 33, 2, 18, 190], [1, 7, 7, 9]]


def theirs(reference, prompts, *, eos, new, beams, sampling):
    """transformers' hypotheses, prompts padded on the left: [(tokens without prompt and padding, score)] a prompt."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = reference.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        num_beams=beams.num_beams,
        num_return_sequences=beams.num_return_sequences,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size or None,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = []
    for row, score in zip(out.sequences[:, longest:].tolist(), out.sequences_scores.tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token in (eos or [])]
        found.append((row[: ends[0]] if ends else row, score))
    number = beams.num_return_sequences
    return [found[i : i + number] for i in range(0, len(found), number)]


def assert_same(ours, reference):
    for mine, their in zip(ours, reference, strict=True):
        assert [c.tokens for c in mine] == [tokens for tokens, _ in their]
        assert [c.score for c in mine] == pytest.approx([score for _, score in their], abs=2e-5)


@pytest.mark.parametrize("length_penalty", [0.6, 1.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("eos", [[], list(range(60, 75)), [5, 9]], ids=["no eos", "many", "two"])
def test_equals_transformers(eos, early_stopping, length_penalty):
    model = tiny_llama(tiny_config(num_kv_heads=2))
    reference = to_transformers(model)
    beams = Beams(4, length_penalty, early_stopping, num_return_sequences=4)
    sampling = Sampling(no_repeat_ngram_size=2)
    ours = beam_search(model, PROMPTS, Decoding(32, sampling, beams=beams), stop_ids=eos)
    assert_same(ours, theirs(reference, PROMPTS, eos=eos or None, new=32, beams=beams, sampling=sampling))
    if len(eos) > 2:
        assert any(c.finish == "eos" for rows in ours for c in rows)


def test_all_shapes(shape):
    model, beams = tiny_llama(shape), Beams(4, num_return_sequences=4)
    ours = beam_search(model, PROMPTS, Decoding(12, beams=beams), stop_ids=[7, 8, 9])
    assert_same(ours, theirs(to_transformers(model), PROMPTS, eos=[7, 8, 9], new=12, beams=beams, sampling=Sampling()))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.3), Sampling(no_repeat_ngram_size=3)])
@pytest.mark.parametrize("width", [2, 7])
def test_widths_and_constraints(width, sampling):
    model = tiny_llama(tiny_config(num_kv_heads=2))
    beams = Beams(width, num_return_sequences=width)
    ours = beam_search(model, PROMPTS[2:3], Decoding(32, sampling, beams=beams), stop_ids=[7])
    assert_same(ours, theirs(to_transformers(model), PROMPTS[2:3], eos=[7], new=32, beams=beams, sampling=sampling))


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}], ids=str)
@torch.inference_mode()
def test_one_beam_takes_the_likeliest_token_each_time(options):
    """transformers runs its greedy search at width 1, which has no scores; so its processors, in a loop of our own."""
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    kinds = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
    }
    processors = LogitsProcessorList([kinds[name](value) for name, value in options.items()])
    model, tokens, total = tiny_llama(tiny_config(num_kv_heads=2)), torch.tensor(PROMPTS[2:3]), 0.0
    start = tokens.shape[1]
    for _ in range(20):
        best = processors(tokens, model(tokens)[:, -1].log_softmax(-1))[0].max(-1)
        tokens, total = torch.cat([tokens, best.indices.view(1, 1)], 1), total + best.values.item()
    decoding = Decoding(20, Sampling(**options), beams=Beams(1, 0.6))
    ((mine,),) = beam_search(model, PROMPTS[2:3], decoding, stop_ids=[])
    assert mine.tokens == tokens[0, start:].tolist()
    assert mine.score == pytest.approx(total / 20**0.6, abs=2e-5)


def test_a_prompt_does_not_depend_on_the_others():
    model = tiny_llama()
    decoding, stops = Decoding(16, beams=Beams(3, num_return_sequences=3)), [5, 6, 7, 8]
    batch = beam_search(model, PROMPTS, decoding, stop_ids=stops)
    for prompt, rows in zip(PROMPTS, batch, strict=True):
        (alone,) = beam_search(model, [prompt], decoding, stop_ids=stops)
        assert [c.tokens for c in alone] == [c.tokens for c in rows]
        assert [c.score for c in alone] == pytest.approx([c.score for c in rows], abs=1e-5)


def test_the_real_model(real_model):
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_model(real_model)
    reference = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    prompts = [
        tokenizer.encode(text, bos=True, eos=False) for text in ("Granite is a rock that", "Plates move because")
    ]
    beams, sampling = Beams(4, num_return_sequences=4), Sampling(no_repeat_ngram_size=2)
    ours = [beam_search(model, [p], Decoding(32, sampling, beams=beams), stop_ids=[2])[0] for p in prompts]
    expected = [theirs(reference, [p], eos=[2], new=32, beams=beams, sampling=sampling)[0] for p in prompts]
    assert_same(ours, expected)
    greedy = reference.generate(
        torch.tensor([prompts[0]]), max_new_tokens=32, do_sample=False, eos_token_id=2, pad_token_id=0, num_beams=1
    )
    (mine,) = generate(model, prompts[:1], Decoding(32), stop_ids=[2])
    assert mine.tokens == [t for t in greedy[0, len(prompts[0]) :].tolist() if t != 2]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_beams": 0}, "--num-beams must be at least 1, not 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences must be 1 to num_beams"),
        ({"num_beams": 2, "early_stopping": "maybe"}, "early_stopping must be"),
    ],
)
def test_values_out_of_range(values, said):
    with pytest.raises(ValueError, match=said):
        Beams(**values)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_the_context_cuts_each_search_by_itself(early_stopping):
    model = tiny_llama(tiny_config(max_seq_len=64))
    prompts = [[1] + [7 + row] * (length - 1) for row, length in enumerate((60, 3, 63))]
    decoding = Decoding(9, beams=Beams(3, early_stopping=early_stopping, num_return_sequences=2))
    found = beam_search(model, prompts, decoding, stop_ids=[])
    assert [[(len(c.tokens), c.finish) for c in best] for best in found] == [[(n, "length")] * 2 for n in (4, 9, 1)]
    assert found == [beam_search(model, [prompt], decoding, stop_ids=[])[0] for prompt in prompts]
    short = Decoding(4, beams=decoding.beams)
    assert found[0] == beam_search(model, prompts[:1], short, stop_ids=[])[0]
