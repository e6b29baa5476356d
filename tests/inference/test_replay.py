"""Steps that are replayed, without a GPU: a stand-in records what a step does to tensors, and does it to them again."""

import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k2mini.audit.hooks import trace
from k2mini.build import load_model
from k2mini.config import LoraSection
from k2mini.data.prompts import get_template
from k2mini.inference.beam import Beams, beam_search
from k2mini.inference.compile import Compiled, _group
from k2mini.inference.decoding import Decoding, can_replay
from k2mini.inference.engine import Engine
from k2mini.inference.generate import generate
from k2mini.inference.replay import Replayed
from k2mini.inference.sampling import Sampling
from k2mini.inference.terminal import Conversation
from k2mini.nn.llama import Llama
from k2mini.nn.lora import attach, init_adapters
from tests.conftest import SHAPES, tiny_config, tiny_llama
from tests.helpers import HostWaits, quantised
from tests.inference.test_engine import SETTINGS, Asked, adapter, finish

PROMPTS = [[1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [1, 5, 6, 7, 8, 9, 10, 11, 12], [1, 20, 21], [1] + [30, 31, 32] * 30]


class Recording(TorchDispatchMode):
    """Every operation with its arguments and results."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """What `torch.cuda.CUDAGraph` does, but for the first replay: here that has happened when the step is recorded."""

    made = 0

    def __init__(self):
        self._recording, self._fresh = Recording(), True
        Graph.made += 1

    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self._recording.__enter__()

    def capture_end(self):
        self._recording.__exit__(None, None, None)

    def replay(self):
        if not self._fresh:
            for func, args, kwargs, out in self._recording.operations:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)  # into the memory that the operations after it read
        self._fresh = False


class Stream:
    def wait_stream(self, _other):
        pass


@pytest.fixture
def replaying(monkeypatch):
    """Whether `generate` replays; the graphs made are counted from 0."""

    def switch(on):
        for place in ("scheduler", "beam"):
            monkeypatch.setattr(f"k2mini.inference.{place}.can_replay", lambda _model: on)

    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", lambda _stream: torch.no_grad())
    monkeypatch.setattr(Graph, "made", 0)
    return switch


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.9),
        Sampling(1.3, 20, 0.9, repetition_penalty=1.3),
        Sampling(no_repeat_ngram_size=2, forbidden=(3,)),
        Sampling(1.1, repetition_penalty=1.2, no_repeat_ngram_size=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:2], PROMPTS], ids=len)
def test_tokens_are_those_of_the_step_itself(replaying, prompts, sampling):
    """Of one and of several rows, some of which end before the others; over a width of 256 places."""
    new = 180 if sampling.temperature == 0.9 else 40  # 180 reach over a width of attention
    model, decoding = tiny_llama(tiny_config(max_seq_len=512)), Decoding(new, sampling, seed=5, top_logprobs=2)
    replaying(False)
    expected = generate(model, prompts, decoding, stop_ids=[7, 8])
    assert Graph.made == 0
    replaying(True)
    found = generate(model, prompts, decoding, stop_ids=[7, 8])
    assert [(c.tokens, c.finish) for c in found] == [(c.tokens, c.finish) for c in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    longest = max(len(prompt) + len(c.tokens) for prompt, c in zip(prompts, found, strict=True))
    assert Graph.made == (2 if longest > 258 else 1)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_other_shapes(replaying, name):
    """Rows and beams, over a width of 256 places and behind a window."""
    changes = {**SHAPES[name], **({"sliding_window": 60} if name == "mistral" else {})}
    model = tiny_llama(tiny_config(max_seq_len=512, **changes))
    found = []
    for on in (False, True):
        replaying(on)
        beams = beam_search(model, PROMPTS, Decoding(20, beams=Beams(3)), stop_ids=[7])
        rows = generate(model, PROMPTS, Decoding(180), stop_ids=[])
        found.append([[c.tokens for c in rows], [[c.tokens for c in best] for best in beams]])
    assert found[0] == found[1]
    assert Graph.made == 3


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_quantised_weights_and_adapters(replaying, tiny_directory, wide_directory, quantize):
    model, _ = load_model(wide_directory if quantize == "nf4" else tiny_directory, quantize=quantize)
    if quantize is None:
        attach(model, LoraSection(rank=2))
        init_adapters(model, 0)
    replaying(False)
    expected = generate(model, PROMPTS[:3], Decoding(20), stop_ids=[7])
    replaying(True)
    assert generate(model, PROMPTS[:3], Decoding(20), stop_ids=[7]) == expected
    assert Graph.made == 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.3, no_repeat_ngram_size=2)], ids=str)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=len)
def test_beams(replaying, prompts, sampling):
    """To the end, with one read a step, and where the search ends early."""
    model = tiny_llama(tiny_config(max_seq_len=512))
    for beams, stop in ((Beams(4, num_return_sequences=4), [7, 8]), (Beams(3, 0.6, early_stopping=True), [*range(60)])):
        decoding = Decoding(30, sampling, beams=beams)
        replaying(False)
        expected = beam_search(model, prompts, decoding, stop_ids=stop)
        replaying(True)
        with HostWaits() as waits:
            found = beam_search(model, prompts, decoding, stop_ids=stop)
        assert {*waits.found} == {"tolist"}
        assert len(waits.found) <= 30 + 3
        for ours, theirs in zip(found, expected, strict=True):
            assert [(c.tokens, c.finish) for c in ours] == [(c.tokens, c.finish) for c in theirs]
            assert [c.score for c in ours] == pytest.approx([c.score for c in theirs], abs=1e-5)
    assert Graph.made == 2


def test_turns_of_a_conversation(replaying, tiny_directory):
    """Over a slot that goes on from turn to turn, past its first 256 places."""
    model, tokenizer = load_model(tiny_directory)
    answers = []
    for on in (False, True):
        replaying(on)
        talk = Conversation(model, tokenizer, get_template("alpaca"), Decoding(12, Sampling(0.8)))
        answers.append([talk.turn(question, io.StringIO()).tokens for question in ("granite", "and basalt", "why")])
    assert answers[0] == answers[1]
    assert Graph.made == 2


def test_a_row_that_the_context_ends_leaves_the_rest_as_they_are(replaying):
    model, prompts = tiny_llama(tiny_config(max_seq_len=64)), [[1] * 50, [1, 9], [1, 8]]
    replaying(False)
    expected = generate(model, prompts, Decoding(30), stop_ids=[])
    replaying(True)
    assert generate(model, prompts, Decoding(30), stop_ids=[]) == expected
    assert [len(c.tokens) for c in expected] == [14, 30, 30]
    assert Graph.made == 1


def test_only_a_gpu_without_hooks_replays(monkeypatch):
    model = tiny_llama()
    assert not can_replay(model)
    monkeypatch.setattr(Llama, "device", torch.device("cuda", 0))
    assert can_replay(model)
    with trace(model, ["embed"]):
        assert not can_replay(model)
    assert can_replay(model)


@pytest.mark.parametrize("how", ["replayed", "as if compiled", "replayed over nf4"])
def test_rows_of_different_adapters_and_settings(replaying, monkeypatch, how):
    """Among them one that ends early, one of another rank and a base; the slot that gets free is taken again."""
    found = []
    for on in (False, True):
        model = tiny_llama(tiny_config(max_seq_len=512, intermediate_dim=128 if "nf4" in how else 112))
        model = quantised(model, "nf4") if "nf4" in how else model
        replaying(on and how.startswith("replayed"))
        if on and how == "as if compiled":
            model.model.decode_blocks, model.decode_logits = Compiled(_group), Llama.logits
        adapters = {"rocks": adapter(model, 1), "ores": adapter(model, 2, ["q_proj", "down_proj"], rank=2)}
        engine = Engine(model, slots=4, capacity=400, adapters=adapters)
        names, most = ["rocks", None, "ores", "rocks", "ores", None], [3, 30, 20, 25, 12, 12]
        asked = [
            Asked([1, 9 + row], Decoding(length, SETTINGS[row % len(SETTINGS)], seed=row, top_logprobs=1), adapter=name)
            for row, (name, length) in enumerate(zip(names, most, strict=True))
        ]
        for each in asked:
            engine.submit(each.request)
        finish(engine)
        found.append([each.parts for each in asked])
    for ours, theirs in zip(*found, strict=True):
        assert [getattr(part, "token", part) for part in ours] == [getattr(part, "token", part) for part in theirs]
        for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-5)
    assert (Graph.made > 1) == how.startswith("replayed")


def test_a_step_that_failed_is_not_captured_next(replaying):
    replaying(True)
    done = []

    def step():
        done.append(Graph.made)
        if len(done) == 1:
            raise KeyboardInterrupt

    replayed = Replayed(step)
    with pytest.raises(KeyboardInterrupt):
        replayed()
    for _ in range(3):
        replayed()
    assert done == [0, 0, 1]
