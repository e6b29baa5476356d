"""The engine: what a request gets does not depend on what else is asked, and nothing is lost."""

import copy
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from k2mini.build import load_model
from k2mini.config import LoraSection
from k2mini.inference.compile import compile_behind, compile_decoding, compiled_rows
from k2mini.inference.decoding import Decoding, Step
from k2mini.inference.engine import Engine
from k2mini.inference.generate import generate
from k2mini.inference.request import End, Prompt, QueueFullError, Request
from k2mini.inference.sampling import Sampling
from k2mini.inference.scheduler import CHUNK
from k2mini.nn import slots
from k2mini.nn.lora import TARGETS, attach, init_adapters, lora_modules
from k2mini.nn.quant import KINDS
from k2mini.nn.slots import Chunk
from tests.conftest import tiny_config, tiny_llama
from tests.helpers import quantised

STOPS = (7, 8)
SETTINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2),
    Sampling(no_repeat_ngram_size=3),
    Sampling(temperature=0.7, min_p=0.1, presence_penalty=0.5, frequency_penalty=0.2, logit_bias=((5, 3.0), (9, -9.0))),
]


# Windows shorter and longer than a chunk, biases, norms.
FEATURES = {
    "llama": {},
    "window of 100": {"sliding_window": 100},
    "window of 150": {"sliding_window": 150},
    "biases": {"attention_bias": True},
    "norms": {"qk_norm": True},
}
each_feature = pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)


def config(**changes):
    """Widths that fill whole vector registers, as those of real models do; other widths differ in the last bits."""
    return tiny_config(**{"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "intermediate_dim": 128, **changes})


def adapter(model, seed, targets=TARGETS, rank=4):
    """A random adapter, as `load_adapters` gives it."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            out, width = module.out_features, module.in_features
            draws = (torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator))
            found[name] = (draws[0] / width**0.5, draws[1] * 0.1, 2.0)
    return found


class Asked:
    """A request and what has been delivered of it."""

    def __init__(self, tokens, decoding=None, deliver=lambda part: None, **how):
        self.parts = []
        self.request = Request(tokens, decoding or Decoding(10), STOPS, self._deliver, **how)
        self._also = deliver

    def _deliver(self, part):
        self.parts.append(part)
        return self._also(part)

    @property
    def end(self):
        return self.parts[-1] if self.parts and isinstance(self.parts[-1], End) else None

    @property
    def steps(self):
        return [part for part in self.parts if isinstance(part, Step)]

    @property
    def tokens(self):
        return [step.token for step in self.steps]


def finish(engine):
    while engine.step():
        pass


def answered(model, asked, adapters=None):
    """What a request gets when it is alone."""
    model = copy.deepcopy(model) if adapters else model  # an engine keeps its model's layers
    engine = Engine(model, slots=1, capacity=model.config.max_seq_len, adapters=adapters)
    engine.submit(asked.request)
    finish(engine)
    return asked.parts


def mixed(rng, number, names, longest):
    """Arguments of requests, many of which begin alike."""
    common = [1, *(rng.randrange(10, 190) for _ in range(longest))]
    for seed in range(number):
        length = rng.choice([1, 2, 3, 10, CHUNK - 1, CHUNK, CHUNK + 1, 200, 300])
        tokens = common[:length] if rng.random() < 0.6 else [1, *(rng.randrange(10, 190) for _ in range(length))]
        tokens = tokens + [rng.randrange(10, 190) for _ in range(rng.choice([0, 1, 5, 50]))]
        most = rng.choice([1, 5, 40, 100])
        yield {
            "tokens": tokens,
            "decoding": Decoding(most, rng.choice(SETTINGS), seed=seed, top_logprobs=rng.choice([None, 0, 3])),
            "prompt_logprobs": rng.choice([None, None, 0, 2]),
            "score_only": rng.random() < 0.1,
            "adapter": rng.choice(names),
        }


def compare_with_alone(model, adapters, requests, slots, rng):
    """Submit requests at random moments, cancel some, and compare each with what it gets alone. Returns the engine."""
    busy = copy.deepcopy(model) if adapters else model
    engine = Engine(busy, slots=slots, capacity=model.config.max_seq_len, queue=len(requests), adapters=adapters)
    waiting, asked = [Asked(**how) for how in requests], []
    cancelled = set()
    while waiting or engine.step():
        if waiting and rng.random() < 0.15:
            asked.append(waiting.pop(0))
            engine.submit(asked[-1].request)
        if asked and rng.random() < 0.03:
            some = rng.choice(asked)
            if some.end is None:
                cancelled.add(some)
                engine.cancel(some.request)
        engine.step()
    for how, got in zip(requests, asked, strict=True):
        alone = answered(model, Asked(**how), adapters)
        if got in cancelled:
            assert got.end.reason == "cancelled"
            assert got.parts[:-1] == alone[: len(got.parts) - 1]
        else:
            assert got.parts[:-1] == alone[:-1]
            assert got.end.reason == alone[-1].reason
    return engine


@pytest.mark.parametrize(
    ("number", "name"),
    [(14, "llama"), (14, "window of 100"), (14, "biases"), pytest.param(500, "llama", marks=pytest.mark.slow)],
)
def test_a_request_gets_what_it_gets_alone(number, name):
    model = tiny_llama(config(max_seq_len=600, **FEATURES[name]))
    adapters = {"rocks": adapter(model, 1), "ores": adapter(model, 2, ["q_proj", "down_proj"])}
    rng = random.Random(2)
    requests = list(mixed(rng, number, [None, "rocks", "ores"], 300))
    engine = compare_with_alone(model, adapters, requests, 5, rng)
    assert engine.counts.reused_tokens >= CHUNK
    assert engine.counts.cancelled >= 1
    assert engine.counts.requests == number
    assert engine.counts.steps > (3000 if number == 500 else 100)
    assert engine.counts.slots_busy == engine.counts.waiting == 0


@pytest.mark.slow
def test_the_real_model_gives_what_it_gives_alone(real_model):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, _ = load_model(real_model)
        rng = random.Random(1)
        requests = [how | {"adapter": None} for how in mixed(rng, 20, [None], 600)]
        compare_with_alone(model, {}, requests, 4, rng)
    finally:
        torch.set_num_threads(threads)


def test_tokens_are_those_of_generate():
    model = tiny_llama(config(max_seq_len=600))
    requests = [how | {"adapter": None, "score_only": False} for how in mixed(random.Random(2), 12, [None], 300)]
    asked = [Asked(**how) for how in requests]
    engine = Engine(model, slots=4, capacity=600)
    for each in asked:
        engine.submit(each.request)
    finish(engine)
    for how, got in zip(requests, asked, strict=True):
        (completion,) = generate(model, [how["tokens"]], how["decoding"], stop_ids=STOPS)
        assert got.tokens == completion.tokens
        assert got.end.reason == completion.finish
        if completion.logprobs:
            torch.testing.assert_close([step.logprob for step in got.steps], completion.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "biases", "int8", "nf4"])
def test_adapters_answer_as_models_that_have_them(kind):
    def made():
        model = tiny_llama(config(**FEATURES.get(kind, {})))
        return quantised(model, kind) if kind in KINDS else model

    section, targets = LoraSection(rank=4, alpha=8, target_modules=["v_proj", "up_proj"]), ["v_proj", "up_proj"]
    adapters = {str(seed): adapter(made(), seed, targets) for seed in (1, 2)}
    engine = Engine(made(), slots=3, capacity=100, adapters=adapters)
    asked = {name: Asked([1, 20, 30, 40], Decoding(20), adapter=name) for name in (None, "1", "2")}
    for each in asked.values():
        engine.submit(each.request)
    finish(engine)
    for name, got in asked.items():
        model = made()
        if name is not None:
            attach(model, section)
            init_adapters(model, 0)
            for module, layer in lora_modules(model).items():
                layer.lora_A.data, layer.lora_B.data = adapters[name][module][:2]
            model.eval()
        (completion,) = generate(model, [[1, 20, 30, 40]], Decoding(20), stop_ids=STOPS)
        assert got.tokens == completion.tokens
    assert len({tuple(got.tokens) for got in asked.values()}) == 3


@each_feature
def test_a_prompt_is_scored(changes):
    model = tiny_llama(config(max_seq_len=600, **changes))
    tokens = [1, *(torch.randint(10, 190, (299,), generator=torch.Generator().manual_seed(0)).tolist())]
    engine = Engine(model, slots=2, capacity=600)
    for reused in (0, CHUNK):  # the second time most of it stands in the cache
        asked = Asked(tokens, prompt_logprobs=3, score_only=True)
        engine.submit(asked.request)
        finish(engine)
        prompt, end = asked.parts
        assert end == End("length", reused=reused)
        with torch.inference_mode():
            expected = model(torch.tensor([tokens]))[0].log_softmax(-1)
        own = expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
        assert prompt.logprobs[0] is None
        torch.testing.assert_close(torch.tensor(prompt.logprobs[1:]), own, rtol=0, atol=1e-4)
        assert prompt.top[0] == []
        assert [[token for token, _ in top] for top in prompt.top[1:]] == expected[:-1].topk(3).indices.tolist()


def test_chunks_under_a_gpus_masks(monkeypatch):
    """Which reach over a multiple of 8 places, and are only there where a window ends."""
    gpu, made = torch.device("meta"), slots._mask
    assert [made(Chunk(0, start, 53), window, gpu) for start in (0, 20) for window in (None, 53)] == [None] * 4
    assert made(Chunk(0, 20, 53), 52, gpu).shape == (33, 56)
    model, prompts = tiny_llama(config(max_seq_len=600, sliding_window=100)), [[1, *range(10, 180)], [1, *[9, 8] * 90]]
    expected = [answered(model, Asked(prompt)) for prompt in prompts]

    def aligned(chunk, window, device):
        mask = made(chunk, window, device)
        return None if mask is None else F.pad(mask, (0, -mask.shape[1] % 8))

    monkeypatch.setattr(slots, "_mask", aligned)
    found = [answered(model, Asked(prompt)) for prompt in prompts]
    for ours, theirs in zip(found, expected, strict=True):
        assert [part.token for part in ours[:-1]] == [part.token for part in theirs[:-1]]


@each_feature
def test_prompts_that_begin_alike_are_read_once(changes):
    model = tiny_llama(config(max_seq_len=600, **changes))
    common = [1] + [20] * (2 * CHUNK)
    engine = Engine(model, slots=3, capacity=600)
    asked = [Asked([*common, 30 + i]) for i in range(3)]
    for each in asked:
        engine.submit(each.request)
    finish(engine)
    assert [each.end.reused for each in asked] == [0, 2 * CHUNK, 2 * CHUNK]  # from a slot that is busy
    late = Asked([*common, 77])
    engine.submit(late.request)
    finish(engine)
    assert late.end.reused == 2 * CHUNK  # from one that is done
    assert late.parts[:-1] == answered(model, Asked([*common, 77]))[:-1]


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["queued", "in prefill", "decoding"])
def test_a_cancelled_request_frees_its_slot_at_once(steps):
    model = tiny_llama(config(max_seq_len=600))
    engine = Engine(model, slots=1, capacity=600)
    asked = Asked([1] * (CHUNK + 5), Decoding(50))
    engine.submit(asked.request)
    for _ in range(steps):
        engine.step()
    engine.cancel(asked.request)
    assert not engine.step()
    assert asked.end == End("cancelled")
    assert engine.counts.slots_busy == 0
    assert len(asked.tokens) == max(0, steps - 1)


def test_the_caller_may_end_an_answer():
    asked = Asked([1, 2], Decoding(50), deliver=lambda part: isinstance(part, Step) and len(asked.tokens) == 4)
    parts = answered(tiny_llama(config()), asked)
    assert parts[-1] == End("stop")
    assert len(asked.tokens) == 4


def test_what_can_not_be_answered_is_refused():
    engine = Engine(tiny_llama(config()), slots=1, capacity=64, queue=2, adapters={})
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit(Asked([]).request)
    with pytest.raises(ValueError, match=r"64 tokens leaves no room .* context of 64"):
        engine.submit(Asked([1] * 64).request)
    engine.submit(Asked([1] * 64, score_only=True, prompt_logprobs=0).request)
    with pytest.raises(ValueError, match="there is no adapter 'x'; there are none"):
        engine.submit(Asked([1], adapter="x").request)
    for _ in range(2):
        engine.submit(Asked([1]).request)
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        engine.submit(Asked([1]).request)
    finish(engine)


def test_an_answer_ends_where_the_context_does():
    parts = answered(tiny_llama(config(max_seq_len=20)), Asked([1] * 15, Decoding(50)))
    assert parts[-1].reason in ("length", "eos")
    assert len(parts) <= 6


def test_logits_that_are_not_finite_end_a_request_and_no_other():
    model = tiny_llama(config())
    model.model.embed_tokens.weight.data[100] = torch.nan
    engine = Engine(model, slots=2, capacity=100)
    good, bad = Asked([1, 2, 3]), Asked([1, 100, 3])
    for each in (good, bad):
        engine.submit(each.request)
    finish(engine)
    assert bad.end.reason == "error"
    assert "model.embed_tokens.weight" in bad.end.error
    after = Asked([1, 2, 3])  # in a slot that held what was not finite
    engine.submit(after.request)
    finish(engine)
    assert good.tokens == after.tokens == [part.token for part in answered(model, Asked([1, 2, 3])) if part != good.end]


def test_a_thread_answers_until_it_is_stopped():
    model = tiny_llama(config())
    engine = Engine(model, slots=2, capacity=100, queue=100)
    asked = [Asked([1, 10 + i], Decoding(8)) for i in range(12)]
    thread = threading.Thread(target=engine.run)
    thread.start()
    askers = [threading.Thread(target=engine.submit, args=(each.request,)) for each in asked]
    for each in askers:
        each.start()
    for each in askers:
        each.join()
    engine.alone(None)
    assert engine.between(lambda: threading.current_thread()).result(timeout=60) is thread
    with pytest.raises(ZeroDivisionError):
        engine.between(lambda: 1 / 0).result(timeout=60)
    engine.stop()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert all(each.end is not None and each.end.reason in ("length", "eos") for each in asked)
    with pytest.raises(QueueFullError, match="the engine ends"):
        engine.submit(Asked([1]).request)
    with pytest.raises(RuntimeError, match="the engine ends"):
        engine.between(lambda: None).result(timeout=60)


def test_a_thread_may_be_stopped_at_once():
    engine = Engine(tiny_llama(config(max_seq_len=4000)), slots=1, capacity=4000)
    first, second = Asked([1], Decoding(3900)), Asked([1])
    thread = threading.Thread(target=engine.run)
    for each in (first, second):
        each.request.stop_ids = ()
        engine.submit(each.request)
    thread.start()
    engine.stop(drain=False)
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert first.end.reason == second.end.reason == "cancelled"


def test_a_failed_step_is_told_and_the_next_request_is_answered():
    model = tiny_llama(config())
    engine = Engine(model, slots=2, capacity=100)
    hidden, calls = model.hidden, []

    def failing(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return hidden(*arguments, **named)

    model.hidden = failing
    first, second = Asked([1, 2, 3], Decoding(50)), Asked([1, 2, 3])
    engine.submit(first.request)
    thread = threading.Thread(target=engine.run)
    thread.start()
    while first.end is None:
        pass
    engine.submit(second.request)
    engine.stop()
    thread.join(timeout=60)
    assert first.end == End("error", "out of luck")
    assert second.end.reason in ("length", "eos")


def test_a_deliver_that_fails_ends_its_own_request():
    model = tiny_llama(config())
    engine = Engine(model, slots=2, capacity=100)

    def deliver(part):
        raise OSError("nobody listens")

    bad, good = Asked([1, 2, 3], deliver=deliver), Asked([1, 2, 3])
    for each in (bad, good):
        engine.submit(each.request)
    finish(engine)
    assert [type(part) for part in bad.parts] == [Step, End]
    assert good.parts == answered(model, Asked([1, 2, 3]))


def test_a_request_that_can_not_begin_is_told_so():
    engine = Engine(tiny_llama(config()), slots=2, capacity=100)
    bad, good = Asked([1, 2], Decoding(5, Sampling(temperature=1.0), seed=2**70)), Asked([1, 2])
    for each in (bad, good):
        engine.submit(each.request)
    finish(engine)
    assert bad.end.reason == "error"
    assert good.end.reason in ("length", "eos")
    with pytest.raises(ValueError, match="the prompt has token 199, which the model does not know"):
        engine.submit(Asked([1, 199]).request)


def test_scores_are_kept_with_as_many_likeliest_tokens_as_before():
    engine = Engine(tiny_llama(config(max_seq_len=600)), slots=1, capacity=600)
    tokens = [1, *(torch.randint(10, 190, (449,), generator=torch.Generator().manual_seed(0)).tolist())]
    for length, wanted in ((300, 5), (450, 2), (450, 5)):
        asked = Asked(tokens[:length], prompt_logprobs=wanted, score_only=True)
        engine.submit(asked.request)
        finish(engine)
        assert [len(top) for top in asked.parts[0].top] == [0] + [wanted] * (length - 1)


def test_prompts_are_delivered_before_answers():
    asked = Asked([1, 2, 3], Decoding(3, top_logprobs=2), prompt_logprobs=2)
    parts = answered(tiny_llama(config()), asked)
    assert [type(part) for part in parts[:2]] == [Prompt, Step]
    assert all(len(step.top) == 2 for step in asked.steps)


def test_conversations_in_turns_keep_their_slots():
    """Also where all begin alike: what they share is copied, and none is thrown away while a slot is empty."""
    model = tiny_llama(config(max_seq_len=600))
    engine = Engine(model, slots=4, capacity=600)
    engine._scheduler._grain = 1  # as on a GPU
    same = [1, *range(10, 40)]
    reused = []
    for turn in range(3):
        for talk in range(2):
            asked = Asked([*same, *[50 + talk] * (100 + 20 * turn)], Decoding(2))
            engine.submit(asked.request)
            finish(engine)
            reused.append(asked.end.reused)
    assert reused == [0, 31, 131, 131, 151, 151]


def test_what_is_compiled_meanwhile_answers_as_before():
    """Nothing that is kept in slots changes, prefixes go on to be found, and nothing more has to be compiled."""
    prompts = [[1, *range(10, 10 + CHUNK + row)] for row in range(2)]
    model = tiny_llama(config(max_seq_len=400, num_layers=2))
    adapters = {"rocks": adapter(model, 1)}
    names = [None, "rocks"]
    expected = [answered(model, Asked(prompt, adapter=name), adapters) for prompt in prompts for name in names]
    compile_decoding(model, rows=())
    engine = Engine(model, slots=2, capacity=400, adapters=adapters)
    first = Asked(prompts[0])
    engine.submit(first.request)
    engine.step()
    thread = compile_behind(model, engine.cache)
    finish(engine)
    assert first.parts == expected[0]
    thread.join()
    assert [compiled_rows(model, rows) for rows in (1, 2, 3)] == [1, 2, 0]
    graphs = counters["stats"]["unique_graphs"]
    for number in (1, 2):
        for start in range(0, 4, number):
            asked = [Asked(prompts[each // 2], adapter=names[each % 2]) for each in range(start, start + number)]
            for each in asked:
                engine.submit(each.request)
            finish(engine)
            for each, parts in zip(asked, expected[start:], strict=False):
                assert each.tokens == [part.token for part in parts[:-1]]
    assert engine.counts.reused_tokens >= 4 * CHUNK
    assert counters["stats"]["unique_graphs"] == graphs
