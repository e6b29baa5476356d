"""Speculation: the same tokens as without, in fewer passes."""

import argparse
import io
import itertools
import random
import weakref

import pytest
import torch

from k2mini.build import load_model
from k2mini.commands.common import ANSWER
from k2mini.commands.serving import _engine, serve_arguments
from k2mini.inference import speculate as speculation
from k2mini.inference.compile import compile_decoding
from k2mini.inference.decoding import Decoding
from k2mini.inference.engine import Engine
from k2mini.inference.generate import generate
from k2mini.inference.request import Request
from k2mini.inference.sampling import Sampling
from k2mini.inference.scheduler import Scheduler
from k2mini.inference.speculate import MOST, PRIOR, Costs, _Known, check_vocabulary, speculate
from k2mini.nn.slots import attend_singles, attended, token_bytes
from k2mini.weights.model_directory import ModelDirectory
from tests.conftest import tiny_config, tiny_llama
from tests.helpers import quantised
from tests.inference.test_engine import SETTINGS, STOPS, Asked, adapter, answered, config, finish, mixed

TURN = [12, 90, 45, 33, 150]


def prompts(number, seed=0):
    """Some repeat themselves, some do not."""
    rng = random.Random(seed)
    drawn = [[1, *(rng.randrange(10, 190) for _ in range(rng.choice([1, 3, 40, 130])))] for _ in range(number)]
    return [prompt + TURN * rng.choice([0, 1, 3]) for prompt in drawn]


@pytest.fixture
def eager(monkeypatch):
    """Drafts are long, whatever they cost."""
    monkeypatch.setattr(_Known, "length", lambda known, most, *_: max(0, min(most, 6)))


def passes(model, prompt, decoding):
    """How many passes an answer takes after its prompt, and the engine's counts."""
    scheduler = Scheduler(model, slots=1, capacity=model.config.max_seq_len)
    asked = Asked(prompt, decoding)
    asked.request.stop_ids = ()
    scheduler.admit(asked.request)
    while scheduler.step():
        pass
    return scheduler.counts.steps, scheduler.counts, asked


@pytest.mark.parametrize(
    ("drafter", "changes"),
    [
        ("lookup", {}),
        ("lookup", {"sliding_window": 20}),
        ("itself", {"qk_norm": True, "num_kv_heads": 2}),
        ("another", {}),
    ],
)
def test_answers_are_those_without(drafter, changes, eager):
    """Greedy, drawn, penalised: tokens, how they end, and log-probabilities to the bit."""
    model = tiny_llama(config(**changes))
    draft = {"lookup": None, "itself": model, "another": tiny_llama(config(num_layers=1, max_seq_len=100), 5)}[drafter]
    for seed, sampling in enumerate(SETTINGS):
        decoding = Decoding(24, sampling, seed=seed, batch_size=2, top_logprobs=2)
        model.speculation = None
        expected = generate(model, prompts(3, seed), decoding, stop_ids=STOPS)
        speculate(model, draft)
        assert generate(model, prompts(3, seed), decoding, stop_ids=STOPS) == expected


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_answers_of_quantised_weights_are_those_without(how, eager):
    model = quantised(tiny_llama(config()), how)
    expected = generate(model, prompts(4), Decoding(30), stop_ids=STOPS)
    speculate(model)
    assert generate(model, prompts(4), Decoding(30), stop_ids=STOPS) == expected


def test_an_engine_answers_as_without(eager):
    """Requests of several adapters come while others are drafted; each gets what it gets alone, undrafted."""
    rng = random.Random(3)
    model = tiny_llama(config(num_layers=2, max_seq_len=500))
    adapters = {"rocks": adapter(model, 1), "ores": adapter(model, 2, targets=("q_proj", "down_proj"))}
    requests = list(mixed(rng, 9, [None, *adapters], 140))
    expected = [answered(model, Asked(**how), adapters) for how in requests]
    speculate(model)
    engine, asked = Engine(model, slots=3, capacity=500, adapters=adapters), [Asked(**how) for how in requests]
    for each in asked:
        engine.submit(each.request)
        engine.step()
    finish(engine)
    assert engine.counts.drafted_tokens > 0
    for each, parts in zip(asked, expected, strict=True):
        assert each.parts[:-1] == parts[:-1]
        assert each.end.reason == parts[-1].reason


def test_a_draft_that_holds_saves_passes(eager):
    model = tiny_llama(config())
    _, _, expected = passes(model, [1, 5], Decoding(48))
    speculate(model, model)
    fewer, counts, asked = passes(model, [1, 5], Decoding(48))
    assert asked.tokens == expected.tokens
    assert fewer == 1 + 7  # the prompt's, which gives a token, and 47 more by sevens
    assert counts.drafted_tokens == 48 - 8


def test_what_stood_before_is_drafted():
    """A model that goes round in circles, as random ones of few tokens do when greedy, is soon drafted in whole."""
    model = tiny_llama(config(vocab_size=6, num_layers=1))
    steps, _, expected = passes(model, [1, 5], Decoding(200))
    speculate(model)
    fewer, counts, asked = passes(model, [1, 5], Decoding(200))
    assert asked.tokens == expected.tokens
    assert counts.drafted_tokens + fewer == steps == 200
    assert fewer < 60


@pytest.mark.parametrize("drafter", ["lookup", "itself"])
def test_an_answer_ends_within_a_draft_as_without(drafter, eager):
    """By the end token, by its caller, by its length, anywhere; the cache is right for what follows."""
    model = tiny_llama(config())
    whole = generate(model, [TURN * 3], Decoding(24), stop_ids=[])[0].tokens
    found = {}
    for drafted in (False, True):
        if drafted:
            speculate(model, model if drafter == "itself" else None)
        scheduler = Scheduler(model, slots=1, capacity=200, keep_answers=True)
        found[drafted] = [
            part
            for most in range(1, 24, 4)
            for decoding, stop_ids, stops in (
                (Decoding(most), (), 99),
                (Decoding(24), (whole[most],), 99),
                (Decoding(24), (), most),
            )
            for part in talk(scheduler, decoding, stop_ids, stops)
        ]
    assert found[False] == found[True]


def talk(scheduler, decoding, stop_ids, stops):
    """What is answered, and what to a prompt that goes on from it."""
    number = itertools.count(1)
    asked = Asked(TURN * 3, decoding, lambda part: next(number) == stops)
    asked.request.stop_ids = stop_ids
    scheduler.admit(asked.request)
    while scheduler.step():
        pass
    again = Asked(TURN * 3 + asked.tokens + [9], Decoding(4))
    scheduler.admit(again.request)
    while scheduler.step():
        pass
    return asked.parts + again.parts


def test_drawn_answers_have_the_models_distribution(eager):
    """20,000 answers of three tokens, drafted, against the product of the model's own probabilities: chi squared."""
    model = tiny_llama(tiny_config(vocab_size=6, num_layers=1, dim=16, num_heads=1, num_kv_heads=1))
    prompt, number = [1, 2, 3, 4, 2, 3], 20_000
    speculate(model)
    sampling = Sampling(temperature=0.7)
    scheduler = Scheduler(model, slots=250, capacity=16, keep_answers=True)
    found, seeds = dict.fromkeys(itertools.product(range(6), repeat=3), 0), itertools.count(1_000_000)

    def begin():
        tokens = []

        def deliver(event):
            if hasattr(event, "token"):
                tokens.append(event.token)
            else:
                found[tuple(tokens)] += 1

        scheduler.admit(Request(prompt, Decoding(3, sampling, seed=next(seeds)), (), deliver))

    left = number
    while left or scheduler.free < 250:
        while left and scheduler.free:
            begin()
            left -= 1
        scheduler.step()
    rows = torch.tensor([[*prompt, *each] for each in found])
    with torch.no_grad():
        logprobs = (model(rows).double() / sampling.temperature).log_softmax(-1)
    picked = logprobs[:, len(prompt) - 1 : -1].gather(-1, rows[:, len(prompt) :, None])
    expected = picked.sum(dim=(1, 2)).exp() * number
    counts = torch.tensor(list(found.values()), dtype=torch.float64)
    assert counts.sum() == number
    assert expected.sum() == pytest.approx(number)
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    p = torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2)
    assert p > 0.01
    assert scheduler.counts.drafted_tokens > number / 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_several_queries_of_a_slot_attend_as_each_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*s, generator=generator).to(dtype) for s in ((5, 4, 64), (1, 2, 512, 64), (1, 2, 512, 64)))
    mask = attended(torch.arange(253, 258), 512)
    together = attend_singles(q, k, v, mask)
    alone = torch.cat([attend_singles(q[i : i + 1], k, v, mask[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, **({} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}))


def test_drafts_are_as_long_as_pays():
    known = _Known(None)
    known.kind = 4
    assert known.length(MOST, 1, Costs(0.05)) > known.length(MOST, 8, Costs(0.05)) > 0
    assert known.length(3, 1, Costs(0.05)) == 3
    assert known.length(-1, 1, Costs(0.05)) == 0
    known.right[4] = 0.0
    assert known.length(MOST, 1, Costs(0.05)) == 0
    known.right[4] = known.tried[4]
    assert known.length(MOST, 1, Costs(0.0)) == MOST
    assert known.length(MOST, 1, Costs(0.05, token=2.0)) == 0
    assert [known.length(most, 1, Costs(0.0, drafted=4.0)) for most in (2, 3, 4)] == [0, 0, 4]
    assert len(PRIOR) == speculation.NGRAM + 1


def test_lookup_finds_the_last_occurrence_of_the_longest_ngram():
    known = _Known(None)
    assert known.look_up([1, 2, 3], 5, 1, Costs(0.0)) == []
    assert known.look_up([1, 2, 3, 9, 8, 3, 7, 7, 2, 3], 3, 1, Costs(0.0)) == [9, 8, 3]
    assert known.kind == 2
    assert known.look_up([1, 2, 3, 9, 8, 3, 7, 7, 2, 3, 4, 6, 4], 5, 1, Costs(0.0)) == [6, 4, 6, 4, 6]
    assert known.kind == 1


@pytest.mark.slow
def test_compiled_decoding_goes_with_drafts():
    """Near ties apart, which compiled code may decide otherwise; here there is none."""
    model = tiny_llama(config(num_layers=1))
    expected = generate(model, [[1, 5, 9]], Decoding(60), stop_ids=STOPS)
    compile_decoding(model)
    speculate(model)
    assert generate(model, [[1, 5, 9]], Decoding(60), stop_ids=STOPS) == expected


@pytest.mark.slow
def test_the_real_model_answers_as_without(real_model):
    model, tokenizer = load_model(real_model)
    texts = ["Granite is an igneous rock. Basalt is", "The three types of rock are", "List ten minerals:\n1."] * 4
    asked = [tokenizer.encode(text, bos=True, eos=False) for text in texts]
    for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.9), Sampling(no_repeat_ngram_size=2)):
        model.speculation = None
        expected = generate(model, asked, Decoding(48, sampling), stop_ids=tokenizer.stop_ids)
        speculate(model)
        assert generate(model, asked, Decoding(48, sampling), stop_ids=tokenizer.stop_ids) == expected


def test_commands_say_the_same_with_drafts(run, tiny_directory):
    common = ("--model", tiny_directory, "--max-new-tokens", 40)
    plain = run("generate", *common, "--prompt", "granite is made of")
    for how in (["--speculate"], ["--draft-model", tiny_directory]):
        assert run("generate", *common, "--prompt", "granite is made of", *how)[:2] == plain[:2]
    status, _, err = run("generate", *common, "--prompt", "x", "--speculate", "--num-beams", 2)
    assert status == 0
    assert "--speculate: no effect with --num-beams 2" in err


def test_what_can_not_be_drafted_is_said(run, tiny_directory, tmp_path):
    common = ("generate", "--model", tiny_directory, "--prompt", "x")
    status, out, err = run(*common, "--draft-model", tmp_path / "none")
    assert (status, out) == (2, "")
    assert "none" in err


def test_a_draft_model_has_the_models_tokens(tiny_tokenizer, llama_tokenizer):
    check_vocabulary(tiny_tokenizer, tiny_tokenizer, "draft")
    with pytest.raises(ValueError, match="draft has 32000 tokens, and the model 400"):
        check_vocabulary(tiny_tokenizer, llama_tokenizer, "draft")


def test_chat_says_the_same_with_drafts(run, tiny_directory, monkeypatch):
    said = []
    for how in ([], ["--speculate"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("granite is made of\nquartz quartz quartz\n"))
        said.append(run("chat", "--model", tiny_directory, "--max-new-tokens", 24, *how)[:2])
    assert said[0] == said[1]
    assert said[0][0] == 0


def test_serve_drafts(tiny_directory):
    parser = argparse.ArgumentParser(parents=[ANSWER])
    serve_arguments(parser)
    for how in ([], ["--speculate"], ["--draft-model", str(tiny_directory)]):
        options = parser.parse_args(["--model", str(tiny_directory), "--device", "cpu", *how])
        engine = _engine(options, ModelDirectory(str(tiny_directory)), {})
        assert (engine.model.speculation is not None) == bool(how)
        asked = Asked([1, 5, 9, 5, 9], Decoding(8))
        engine.submit(asked.request)
        finish(engine)
        assert len(asked.tokens) == 8 or asked.end.reason == "eos"


def test_the_slots_of_a_draft_model_are_counted(tiny_directory, monkeypatch):
    """As large as the model here, so half of the tokens fit."""
    parser = argparse.ArgumentParser(parents=[ANSWER])
    serve_arguments(parser)
    options = ["--model", str(tiny_directory), "--device", "cpu", "--slots", "4"]
    config = load_model(tiny_directory)[0].config
    monkeypatch.setattr("k2mini.build.free_memory", lambda _: 4 * 40 * token_bytes(config, torch.float32) / 0.8)
    held = [
        _engine(parser.parse_args(options + more), ModelDirectory(str(tiny_directory)), {}).capacity
        for more in ([], ["--draft-model", str(tiny_directory)])
    ]
    assert held == [40, 20]


def test_a_scheduler_with_drafts_is_freed_at_once():
    model = tiny_llama(config())
    speculate(model, tiny_llama(config()))
    scheduler = Scheduler(model, slots=1, capacity=64)
    gone = weakref.ref(scheduler)
    del scheduler
    assert gone() is None
