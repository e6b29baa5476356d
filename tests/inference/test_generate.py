import json
from dataclasses import replace

import pytest
import torch
import torch.nn.attention.bias

from k2mini.build import load_model
from k2mini.data.prompts import shared_prefix
from k2mini.inference.beam import Beams, beam_search, prefill
from k2mini.inference.compile import Compiled, _group, compile_decoding
from k2mini.inference.decoding import Decoding
from k2mini.inference.generate import generate
from k2mini.inference.sampling import Sampling
from k2mini.nn.kv_cache import KVCache, extend
from tests.conftest import SHAPES, tiny_config, tiny_llama
from tests.helpers import HostWaits
from tests.reference import to_transformers

PROMPTS = [[1, 5, 9, 77, 3], [1, 40], [1, 8, 8, 120, 60, 33, 2, 18, 190]]


def test_greedy_equals_transformers(shape):
    model = tiny_llama(shape)
    reference = to_transformers(model)
    ours = generate(model, PROMPTS, Decoding(20), stop_ids=[])
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert completion.tokens == theirs[0, len(prompt) :].tolist()
        assert completion.finish == "length"


@pytest.mark.parametrize(
    ("name", "beams"),
    [("qwen2", None), ("mistral", Beams(2)), *(pytest.param(*each, marks=pytest.mark.slow) for each in
     (("mistral", None), ("qwen2", Beams(2)), ("qwen3", None), ("qwen3", Beams(2))))],
)  # fmt: skip
def test_compiled_decoding_gives_the_same_tokens(name, beams):
    config = tiny_config(**{**SHAPES[name], "num_layers": 1})
    eager, compiled = tiny_llama(config), tiny_llama(config)
    compile_decoding(compiled)
    ask = generate if beams is None else beam_search
    ours, theirs = (ask(m, PROMPTS[2:], Decoding(16, beams=beams), stop_ids=[])[0] for m in (compiled, eager))
    assert (ours if beams is None else ours[0]).tokens == (theirs if beams is None else theirs[0]).tokens


DRAWN = Sampling(temperature=1.2, top_k=40, top_p=0.9)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_ragged_rows_get_what_they_get_alone(shape, sampling):
    model = tiny_llama(shape)
    decoding, stops = Decoding(15, sampling, seed=3), [7, 8, 9]
    batch = generate(model, PROMPTS, decoding, stop_ids=stops)
    alone = [
        generate(model, [prompt], replace(decoding, seed=3 + i), stop_ids=stops)[0] for i, prompt in enumerate(PROMPTS)
    ]
    assert batch == alone


def test_a_row_stops_at_a_stop_id_and_the_others_go_on():
    model = tiny_llama()
    free = generate(model, PROMPTS, Decoding(12), stop_ids=[])
    stop = free[1].tokens[4]
    stopped = generate(model, PROMPTS, Decoding(12), stop_ids=[stop])
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
    (completion,) = generate(model, [[1, 2]], Decoding(30), stop_ids=[], vocab_size=150)
    assert max(completion.tokens) < 150


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 5, "there is no prompt"),
        ([[1], []], 5, "the prompt is empty"),
        ([[1]], 0, "--max-new-tokens must be at least 1, not 0"),
        ([[1] * 64], 10, "64 tokens leaves no room for an answer in the model's context of 64; shorten it by 1 or"),
        ([[1], [1] * 70], 10, "70 tokens leaves no room for an answer in the model's context of 64; shorten it by 7"),
    ],
)
def test_what_can_not_be_answered_is_refused(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_llama(tiny_config(max_seq_len=64)), prompts, Decoding(new), stop_ids=[])


@pytest.mark.parametrize("fixed", [False, True], ids=["eager", "fixed"])
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_the_context_cuts_each_row_by_itself(sampling, fixed):
    """Prompts of 60, 3, 63 and 50 tokens in a context of 64: at most 4, 30, 1 and 14 tokens follow."""
    model = tiny_llama(tiny_config(max_seq_len=64))
    if fixed:  # as compiled blocks want the cache, without the seconds that compiling takes
        model.model.decode_blocks = Compiled(_group)
        model.decode_logits = type(model).logits
    prompts = [[1] + [7 + row] * (length - 1) for row, length in enumerate((60, 3, 63, 50))]
    decoding = Decoding(30, sampling, seed=3)
    batch = generate(model, prompts, decoding, stop_ids=[])
    assert [(len(c.tokens), c.finish) for c in batch] == [(n, "length") for n in (4, 30, 1, 14)]
    unbounded = tiny_llama(tiny_config(max_seq_len=640))
    free = generate(unbounded, prompts, decoding, stop_ids=[])
    for row, (prompt, completion) in enumerate(zip(prompts, batch, strict=True)):
        (alone,) = generate(model, [prompt], replace(decoding, seed=3 + row), stop_ids=[])
        assert alone == completion
        assert completion.tokens == free[row].tokens[: len(completion.tokens)]
    ended = generate(model, prompts, decoding, stop_ids=[batch[2].tokens[0], batch[0].tokens[-1]])
    assert [c.finish for c in ended[::2]] == ["eos", "eos"]


ALL = Sampling(0.9, 30, 0.95, repetition_penalty=1.2, no_repeat_ngram_size=2, forbidden=(3, 4))


@pytest.mark.parametrize("sampling", [Sampling(), ALL], ids=["greedy", "all transforms"])
def test_rows_are_as_alone_with_stops_of_all_kinds(sampling):
    """Rows end at different steps, by an id, by the caller or by length, and leave the batch when half have."""
    model = tiny_llama()
    prompts = [[1, 2 + i, *range(20, 20 + 3 * i)] for i in range(6)]

    def ends_after(limits):
        made = dict.fromkeys(range(6), 0)

        def ended(row, _token):
            made[row] += 1
            return made[row] >= limits[row]

        return ended

    limits = [3, 40, 1, 7, 40, 5]
    decoding, stops = Decoding(20, sampling, seed=11, top_logprobs=4), list(range(90, 110))
    batch = generate(model, prompts, decoding, stop_ids=stops, stopping_criteria=ends_after(limits))
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        own = replace(decoding, seed=11 + row)
        (alone,) = generate(model, [prompt], own, stop_ids=stops, stopping_criteria=ends_after([limit]))
        assert (alone.tokens, alone.finish) == (batch[row].tokens, batch[row].finish)
        assert alone.logprobs == pytest.approx(batch[row].logprobs, abs=1e-5)
        for one, other in zip(alone.top, batch[row].top, strict=True):
            assert [token for token, _ in one] == [token for token, _ in other]
    assert {"stop", "eos", "length"} >= {c.finish for c in batch} > {"stop"}


def test_every_transform_as_transformers_generates():
    model = tiny_llama()
    reference = to_transformers(model)
    for options in ({"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}):
        ours = generate(model, PROMPTS, Decoding(24, Sampling(**options)), stop_ids=[])
        for prompt, completion in zip(PROMPTS, ours, strict=True):
            theirs = reference.generate(
                torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0, **options
            )
            assert completion.tokens == theirs[0, len(prompt) :].tolist()


def test_logprobs_are_those_of_the_whole_text():
    model = tiny_llama()
    (completion,) = generate(model, [[1, 2, 3]], Decoding(8, top_logprobs=3), stop_ids=[])
    tokens = torch.tensor([[1, 2, 3, *completion.tokens]])
    logprobs = model(tokens)[0].log_softmax(-1)
    for place, (own, top) in enumerate(zip(completion.logprobs, completion.top, strict=True)):
        assert own == pytest.approx(logprobs[2 + place, completion.tokens[place]].item(), abs=1e-5)
        assert [token for token, _ in top] == logprobs[2 + place].topk(3).indices.tolist()


@pytest.mark.parametrize("chunk", [1, 4, 7, 512, None])
@pytest.mark.parametrize("maskless", [[], ["cpu"]], ids=["masks", "no masks"])
def test_prefill_in_chunks(shape, chunk, maskless, monkeypatch):
    """As on a CPU and as on a GPU; the rows then go on, over what was stored of the padding."""
    monkeypatch.setattr("k2mini.nn.kv_cache.MASKLESS", maskless)
    model = tiny_llama(shape)
    rows = [list(range(1, 24)), [5, 6], list(range(40, 55)), [9]]
    with torch.inference_mode():
        cache = KVCache(shape, 4)
        assert cache.maskless == bool(maskless)
        with HostWaits() as waits:
            hidden = extend(model.hidden, rows, cache, chunk)
        assert waits.found == []
        assert cache.lengths.tolist() == [23, 2, 15, 1]
        later = model(torch.tensor([[7, 8]] * 4), cache=cache)
        for row, tokens in enumerate(rows):
            alone = model.model(torch.tensor([[*tokens, 7, 8]]))[0]
            torch.testing.assert_close(hidden[row], alone[-3], rtol=0, atol=1e-5)
            torch.testing.assert_close(later[row], model.logits(alone[-2:]), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_later_parts_of_a_prompt_need_no_mask(shape, monkeypatch):
    monkeypatch.setattr("k2mini.nn.kv_cache.MASKLESS", ["cpu"])
    model, seen = tiny_llama(shape), []
    place, bias = "torch.nn.attention.bias.causal_lower_right", torch.nn.attention.bias.causal_lower_right
    monkeypatch.setattr(place, lambda *sizes: (seen.append(sizes), bias(*sizes))[1])
    prefill(model, [list(range(1, 30)), list(range(40, 50))], capacity=40, chunk=10)
    windowed = shape.sliding_window is not None  # and the prompts are longer
    assert seen == ([] if windowed else [(10, 20)] * shape.num_layers + [(9, 29)] * shape.num_layers)
    if windowed:
        model = tiny_llama(replace(shape, sliding_window=29))
        prefill(model, [list(range(1, 30)), list(range(40, 50))], capacity=40, chunk=10)
        assert len(seen) == 2 * shape.num_layers


def test_chunks_are_larger_on_a_gpu_where_there_are_few_rows(monkeypatch):
    monkeypatch.setattr("k2mini.nn.kv_cache.MASKLESS", ["cpu"])
    model, seen = tiny_llama(tiny_config(max_seq_len=2048, num_layers=1)), []
    monkeypatch.setattr(model, "hidden", lambda t, *_: (seen.append(t.shape[1]), torch.zeros(*t.shape, 64))[1])
    for rows in (1, 8, 40):
        extend(model.hidden, [[5] * 1500] * rows, KVCache(model.config, rows))
    assert seen == [1500, 1024, 476, 512, 512, 476]


def test_a_common_prefix_is_computed_once(shape, monkeypatch):
    model = tiny_llama(shape)
    prefix = list(range(1, 100))
    prompts = [[*prefix, 150 + i, *([7] * i)] for i in range(5)]
    assert shared_prefix(prompts) == 99
    seen = []
    forward = type(model.model).forward
    monkeypatch.setattr(
        type(model.model), "forward", lambda self, t, *a, **k: (seen.append(t.numel()), forward(self, t, *a, **k))[1]
    )
    with torch.inference_mode():
        _, logits = prefill(model, prompts, capacity=128)
        assert sum(seen) == 99 + 5 * 5  # the prefix, and five rows padded to five
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(logits[row], model(torch.tensor([prompt]))[0, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "common"),
    [([[1, 2, 3], [1, 2, 3]], 2), ([[1], [1, 2]], 0), ([[1, 2, 9], [1, 2, 3, 4]], 2), ([[5], [6]], 0)],
)
def test_shared_prefix(prompts, common):
    assert shared_prefix(prompts) == common


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--temperature", "0.8", "--top-k", "5", "--top-p", "0.9"],
        ["--temperature", "1"],
        ["--num-beams", "3"],
        ["--quantize", "int8"],
        ["--repetition-penalty", "1.3", "--no-repeat-ngram-size", "2"],
    ],
)
def test_a_model_that_is_not_finite_answers_nothing(broken, tmp_path, run, options):
    """One value of the head or of the last layer is NaN."""
    (tmp_path / "prompts.txt").write_text("granite is\nbasalt and quartz are\n")
    for asked in (["--prompt", "granite is"], ["--input", tmp_path / "prompts.txt"]):
        common = ["generate", *asked, "--template", "none", "--max-new-tokens", 3, *options]
        for name, said in (
            ("head", "the logits are not finite; lm_head.weight holds NaN or infinity"),
            ("layer", "the logits are not finite; model.layers.2.mlp.up_proj.weight holds NaN or infinity"),
        ):
            status, out, err = run(*common, "--model", broken / name)
            assert (status, out) == (2, "")
            if "int8" in options and name == "layer":  # seen while it is loaded
                said = "model.layers.2.mlp.up_proj.weight is not finite, so it can't be quantised"
            assert said in err.splitlines()[-1]
    status, out, err = run(*common, "--model", broken / "large", "--dtype", "float16")
    assert (status, "activations overflow in torch.float16; try --dtype float32 or bfloat16" in err) == (2, True)


def test_masks_of_our_own_are_no_fault(tiny_directory):
    """-inf of forbidden tokens and banned n-grams, even where nothing else is left."""
    model, _ = load_model(tiny_directory)
    vocab = model.config.vocab_size
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature, forbidden=tuple(range(1, vocab)), no_repeat_ngram_size=1)
        (completion,) = generate(model, [[1, 0, 5]], Decoding(3, sampling), stop_ids=[2])
        assert len(completion.tokens) == 3


def test_an_answer_is_written_over_nothing(tiny_directory, tmp_path, run, monkeypatch):
    questions, out = tmp_path / "questions.jsonl", tmp_path / "answers.json"
    questions.write_text('{"question": "What is granite?"}\n')
    (tmp_path / "none").mkdir()
    before = {path: path.read_bytes() for path in [questions, *tiny_directory.iterdir()]}
    common = ["generate", "--model", tiny_directory, "--input", questions, "--max-new-tokens", 3]
    with monkeypatch.context() as patch:
        patch.setattr("k2mini.build.open_model", lambda *_, **__: pytest.fail("the model was loaded"))
        out.write_text("mine")
        for place, said in (
            (questions, "is itself an input"),
            (tiny_directory / "model.safetensors", "which is an input"),
            (out, "answers.json exists already; name another place, remove it, or replace it with --force"),
            (tmp_path / "no" / "answers.json", "there is no folder"),
            (tmp_path / "none", "is a folder; name a file"),
        ):
            for force in ([], ["--force"]) if place != out else ([],):
                status, printed, err = run(*common, "--out", place, *force)
                assert (status, printed) == (2, "")
                assert said in err.splitlines()[-1]
    assert {path: path.read_bytes() for path in before} == before
    assert out.read_text() == "mine"
    assert run(*common, "--out", out, "--force")[0] == 0
    assert json.loads(out.read_text())[0]["prompt"] == "What is granite?"


def test_answers_that_can_not_be_written_are_printed(tiny_directory, tmp_path, run, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("k2mini.files.write_text", full)
    command = ["generate", "--model", tiny_directory, "--prompt", "granite", "--max-new-tokens", 3]
    status, out, err = run(*command, "--out", tmp_path / "answers.json")
    assert (status, json.loads(out)[0]["prompt"]) == (2, "granite")
    assert err.splitlines()[-1] == f"k2mini: {tmp_path}/answers.json: No space left on device"


@pytest.mark.parametrize("option", ["--prompt", "--context", "--stop"])
def test_options_that_are_not_utf8(tiny_directory, run, option):
    asked = ["--prompt", "granite"] if option != "--prompt" else []
    status, out, err = run("generate", "--model", tiny_directory, *asked, option, "a\udcff")
    assert (status, out) == (2, "")
    assert f"argument {option}: 'a\\udcff' is not UTF-8" in err
