import io

import pytest
import torch

from k2mini.build import load_model
from k2mini.data.prompts import get_template
from k2mini.inference.generate import Decoding, generate
from k2mini.inference.terminal import Conversation


@pytest.fixture(scope="module")
def loaded(tiny_directory):
    return load_model(tiny_directory)


def test_streamed_answers_are_the_engines(loaded, tiny_directory, run):
    model, tokenizer = loaded
    prompt = tokenizer.encode("granite is", bos=True, eos=False)
    options = ["--model", tiny_directory, "--template", "none", "--prompt", "granite is", "--max-new-tokens", 30]
    status, out, err = run("generate", *options)
    (expected,) = generate(model, [prompt], Decoding(30), stop_ids=[tokenizer.eos_id])
    assert status == 0
    assert ("stopped after --max-new-tokens 30" in err) == (expected.finish == "length")
    assert tokenizer.decode([*prompt, *expected.tokens]) == "granite is" + out.removesuffix("\n")
    stop = out[5:9]
    assert run("generate", *options, "--stop", stop)[1] == out[: out.index(stop)] + "\n"


def conversation(loaded, max_new_tokens=12):
    model, tokenizer = loaded
    return Conversation(model, tokenizer, get_template("alpaca_short"), Decoding(max_new_tokens))


def test_turns_build_on_each_other_as_if_computed_anew(loaded):
    model, tokenizer = loaded
    talk = conversation(loaded)
    first = talk.turn("granite", io.StringIO())
    second = talk.turn("basalt", io.StringIO())
    template = get_template("alpaca_short")
    history = tokenizer.encode(template.prompt("granite"), bos=True, eos=False)
    history += [*first.tokens, tokenizer.eos_id]
    history += tokenizer.encode(template.prompt("basalt"), bos=True, eos=False)
    (expected,) = generate(model, [history], Decoding(12), stop_ids=[tokenizer.eos_id])
    assert second == expected
    talk.reset()
    assert talk.turn("granite", io.StringIO()) == first


class Interrupting(io.StringIO):
    """Ctrl-C while the third piece is written."""

    writes = 0

    def write(self, text):
        self.writes += 1
        if self.writes == 3:
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_ends_the_answer_and_not_the_conversation(loaded):
    talk, undisturbed = conversation(loaded), conversation(loaded)
    cut = talk.turn("granite", Interrupting())
    assert cut.finish == "stop"
    assert len(cut.tokens) == 3
    # The next turn sees the cut answer, computed as if nothing had happened.
    undisturbed.history = list(talk.history)
    assert talk.turn("basalt", io.StringIO()) == undisturbed.turn("basalt", io.StringIO())


def test_a_full_context_is_an_error_that_changes_nothing(loaded):
    talk = conversation(loaded)
    before = list(talk.history)
    with pytest.raises(ValueError, match="leaves no room for an answer in the model's context of 1024"):
        talk.turn("granite " * 600, io.StringIO())
    assert talk.history == before
    with pytest.raises(ValueError, match="the prompt is empty"):
        talk.turn("  ", io.StringIO())
    assert torch.equal(talk.cache.lengths, torch.tensor([0]))


def test_bytes_that_are_not_utf8_do_not_end_the_conversation(tiny_directory, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"gran\xffite\nquartz\n"), encoding="utf-8"))
    status, out, err = run("chat", "--model", tiny_directory, "--max-new-tokens", 4)
    assert status == 0
    assert "gran\\udcff')" in err.splitlines()[-1]
    assert len(out.splitlines()) >= 1


def test_a_model_that_is_not_finite_ends_the_conversation(broken, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is granite?\nAnd basalt?\n"))
    status, _, err = run("chat", "--model", broken / "head", "--max-new-tokens", 3)
    assert (status, err.count("the logits are not finite; lm_head.weight holds NaN")) == (2, 1)
