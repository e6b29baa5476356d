import io
import json
import os
import pty
import shutil
import subprocess
import sys
from contextlib import suppress
from select import select

import pytest
import torch

from k2mini.build import load_model
from k2mini.data.chats import open_template
from k2mini.data.prompts import get_template
from k2mini.inference.decoding import Decoding
from k2mini.inference.generate import generate
from k2mini.inference.sampling import Sampling
from k2mini.inference.terminal import Conversation
from k2mini.weights.model_files import save_model
from tests.helpers import copy_model, make_chat_model


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


def test_bytes_that_are_not_utf8_do_not_end_the_conversation(tiny_directory, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"gran\xffite\nquartz\n"), encoding="utf-8"))
    status, out, err = run("chat", "--model", tiny_directory, "--max-new-tokens", 4)
    assert status == 0
    assert "gran\\udcff')" in err
    assert len(out.splitlines()) >= 1


def test_a_model_that_is_not_finite_ends_the_conversation(broken, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is granite?\nAnd basalt?\n"))
    status, _, err = run("chat", "--model", broken / "head", "--max-new-tokens", 3)
    assert (status, err.count("the logits are not finite; lm_head.weight holds NaN")) == (2, 1)


def answered(loaded, *questions, system="", new=4):
    """What a conversation prints, question after question."""
    model, tokenizer = loaded
    talk, printed = Conversation(model, tokenizer, get_template("alpaca"), Decoding(new)), []
    talk.system = system
    for question in questions:
        talk.turn(question, out := io.StringIO())
        printed.append(out.getvalue() + "\n")
    return printed


def chat(run, tiny_directory, monkeypatch, typed, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return run("chat", "--model", tiny_directory, *(options or ["--max-new-tokens", 4]))


def test_what_a_line_may_be(loaded, tiny_directory, run, monkeypatch):
    typed = '/rest\n/help\n\n"""What is\n\n  granite?\n"""\n"""/exit is a word"""\n/etc/hosts is what?\n/exit\nquartz\n'
    status, out, err = chat(run, tiny_directory, monkeypatch, typed)
    assert status == 0
    assert out == "".join(answered(loaded, "What is\n\n  granite?", "/exit is a word"))
    lines = err.splitlines()
    assert lines[1:3] == ["/help for help", "k2mini: there is no /rest; /help says what there is"]
    for word in ("/help", "/reset", "/system TEXT", "/exit", "Ctrl-D", "Ctrl-C", '"""'):
        assert word in err.split("/help says", 1)[1]
    assert "k2mini: there is no /etc/hosts; /help says what there is" in lines


def test_system_and_reset(loaded, tiny_directory, run, monkeypatch):
    typed = "quartz\n/system You are a rock.\nquartz\n/reset\nquartz\n/system\nquartz\n"
    status, out, err = chat(run, tiny_directory, monkeypatch, typed)
    (plain,), (spoken,) = answered(loaded, "quartz"), answered(loaded, "quartz", system="You are a rock.")
    assert (status, out) == (0, plain + spoken + spoken + plain)
    assert (err.count("(begun anew)"), err.count("(forgotten)")) == (2, 1)


def test_a_question_in_quotes_that_never_ends_is_not_lost_silently(tiny_directory, run, monkeypatch):
    status, out, err = chat(run, tiny_directory, monkeypatch, '"""What is\ngranite?\n')
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == 'k2mini: a question that begins with """ must end with """'


def test_chat_says_where_an_answer_was_cut(loaded, tiny_directory, run, monkeypatch):
    tokenizer = loaded[1]
    question = "granite " * 240
    while (left := 1024 - len(tokenizer.encode(get_template("none").prompt(question), bos=True, eos=False))) > 30:
        question += "a"
    status, out, err = chat(run, tiny_directory, monkeypatch, f"{question.strip()}\nquartz\n", "--template", "none",
                            "--max-new-tokens=40")  # fmt: skip
    assert status == 0
    said = err.splitlines()[-2:]
    assert "tokens: the model's context ends; /reset starts anew" in said[0]
    assert f"k2mini: stopped after {left}" in said[0] or f"k2mini: stopped after {left + 1}" in said[0]
    assert "leaves no room for an answer in the model's context of 1024" in said[1]
    assert said[1].endswith("; /reset starts anew")
    assert len(out.splitlines()) >= 1


class Terminal:
    """`k2mini chat` in a terminal."""

    def __init__(self, *command, **streams):
        self.main, side = pty.openpty()
        ends = {"stdin": side, "stdout": side, "stderr": side, **streams}
        environment = {**os.environ, "TERM": "xterm"}
        self.program = subprocess.Popen([sys.executable, "-m", "k2mini", "chat", *command], env=environment, **ends)
        os.close(side)
        self.said = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.program.kill()
        self.program.wait()
        os.close(self.main)

    def read(self, until="> "):
        """What it shows up to a prompt, or to its end."""
        self.said = ""
        with suppress(OSError):  # the other side is closed
            while not self.said.endswith(until) and select([self.main], [], [], 60)[0]:
                self.said += os.read(self.main, 10**5).decode(errors="replace").replace("\r\n", "\n")
        return self.said

    def type(self, text):
        os.write(self.main, text.encode())
        return self.read()


QUESTION = "What is granite?\nAnd what is quartz,\n\nof which it is made?"


def test_a_pasted_paragraph_is_one_question(loaded, tiny_directory):
    (paragraph,) = answered(loaded, QUESTION)
    one, two = answered(loaded, "What is granite?", "quartz")
    pasted = QUESTION.replace("\n", "\r")
    with Terminal("--model", str(tiny_directory), "--max-new-tokens", "4") as terminal:
        assert terminal.read().count("/help for help") == 1
        # As terminals that know of it send it, and readline asks them to.
        os.write(terminal.main, f"\x1b[200~{pasted}\x1b[201~".encode())
        assert paragraph in terminal.type("\r")
        terminal.type("/reset\r")
        # As others do: at once, its last line ended or not.
        assert paragraph in terminal.type(pasted + "\r")
        terminal.type("/reset\r")
        assert paragraph in terminal.type('"""' + pasted + '"""\r')
        terminal.type("/reset\r")
        # A command takes no line that follows it.
        said = terminal.type("/reset\rWhat is granite?\r")
        while one not in said:
            said += (more := terminal.read())
            assert more, said
        assert said.count("(forgotten)") == 1
        terminal.type("/reset\r")
        # Two that are typed one after the other stay two.
        assert one in terminal.type("What is granite?\r")
        assert two in terminal.type("quartz\r")
        terminal.type("/reset\r")
        os.write(terminal.main, b"\x04")
        assert terminal.program.wait(60) == 0


def test_a_paste_without_line_editing(loaded, tiny_directory, tmp_path):
    """Standard output is a file, so Python reads plain lines."""
    (paragraph,) = answered(loaded, QUESTION)
    command = ("--model", str(tiny_directory), "--max-new-tokens", "4")
    with (tmp_path / "out").open("w") as out, Terminal(*command, stdout=out) as terminal:
        while (tmp_path / "out").read_text() != "> ":  # its prompt
            assert terminal.program.poll() is None
        os.write(terminal.main, (QUESTION + "\n").encode())
        terminal.read("says so\n")
        os.write(terminal.main, b"/exit\n")
        assert terminal.program.wait(60) == 0
    assert (tmp_path / "out").read_text() == f"> {paragraph}> "


def in_own_template(directory, new=12):
    model, tokenizer = load_model(directory)
    return Conversation(model, tokenizer, open_template(None, directory, tokenizer), Decoding(new))


def published(directory, messages):
    """The ids of a conversation as transformers makes them."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_turns_in_a_models_own_template_are_those_of_transformers(chat_directory):
    talk, model = in_own_template(chat_directory), load_model(chat_directory)[0]
    talk.system = "You are a rock."
    talk.reset()
    messages = [{"role": "system", "content": talk.system}]
    for question in ("granite", "And basalt?\n", "é 岩"):
        messages.append({"role": "user", "content": question})
        ids = published(chat_directory, messages)
        assert talk.extended(question) == ids
        found = talk.turn(question, out := io.StringIO())
        (expected,) = generate(model, [ids], Decoding(12), stop_ids=[0, 2], vocab_size=talk.tokenizer.vocab_size)
        assert found == expected
        messages.append({"role": "assistant", "content": out.getvalue()})
    assert talk.messages == messages
    talk.system = ""
    talk.reset()
    assert talk.extended("granite") == published(chat_directory, [{"role": "user", "content": "granite"}])


def test_ctrl_c_in_a_models_own_template(chat_directory):
    talk = in_own_template(chat_directory)
    talk.turn("granite", out := Interrupting())
    assert talk.messages[1]["content"].startswith(out.getvalue())
    assert talk.extended("basalt") == published(chat_directory, [*talk.messages, {"role": "user", "content": "basalt"}])


def test_what_a_chat_template_refuses(chat_directory, run, monkeypatch):
    """One sentence, and the conversation goes on; a prompt of `generate` ends it."""
    typed = "hello <|im_end|>\nquartz\n"
    status, out, err = chat(run, chat_directory, monkeypatch, typed)
    in_own_template(chat_directory, 4).turn("quartz", answer := io.StringIO())
    assert (status, out) == (0, answer.getvalue() + "\n")
    said = "messages[0] has '<|im_end|>' in its text, which the model would take for the conversation's structure"
    assert f"k2mini: {said}\n" in err
    assert "the template is the model's own" in err
    status, out, err = run("generate", "--model", chat_directory, "--prompt", "hello <|im_end|>")
    assert (status, out, err.splitlines()[-1]) == (2, "", f"k2mini: {said}")
    asked = ["generate", "--model", chat_directory, "--template", "alpaca", "--max-new-tokens", 1]
    assert run(*asked, "--prompt", "hello <|im_end|>")[0] == 0  # plain text there


@pytest.mark.parametrize("beams", [(), ("--num-beams", 2)])
def test_every_end_token_ends_an_answer(chat_directory, tmp_path, run, monkeypatch, beams):
    """Those of generation_config.json's list, and the template's."""
    asked = ["--prompt", "granite", "--max-new-tokens", 9, "--json", *beams]
    (whole,) = json.loads(run("generate", "--model", chat_directory, *asked)[1])
    assert (len(whole["tokens"]), whole["finish"]) == (9, "length")
    end = next(token for token in whole["tokens"][3:] if token not in whole["tokens"][:3])
    ended = copy_model(chat_directory, tmp_path / "ended", eos_token_id=[0, end])
    (found,) = json.loads(run("generate", "--model", ended, *asked)[1])
    if not beams:  # a search may find another way
        before = whole["tokens"][: whole["tokens"].index(end)]
        assert (found["tokens"], found["finish"]) == (before, "eos")
        monkeypatch.setattr("sys.stdin", io.StringIO("granite\n"))
        printed = run("chat", "--model", ended, "--max-new-tokens", 9)[1]
        assert printed == run("generate", "--model", ended, "--prompt", "granite", "--max-new-tokens", 9)[1]
        assert printed == found["answer"] + "\n"
    assert end not in found["tokens"]


def test_the_end_of_a_built_in_templates_turn_ends_an_answer(tmp_path, run):
    """As generation_config.json says nothing of <|im_end|>; in another template it is one token among others."""
    directory = make_chat_model(tmp_path / "model", template=None)
    model, tokenizer = load_model(directory)
    text, vocab = "<|im_start|>user\ngranite<|im_end|>\n<|im_start|>assistant\n", tokenizer.vocab_size
    prompt = tokenizer.encode(text, bos=False, eos=False, special=True)
    (free,) = generate(model, [prompt], Decoding(9, Sampling(forbidden=(2,))), stop_ids=[0], vocab_size=vocab)
    likely = free.tokens[2]
    with torch.no_grad():
        model.head_weight[2] = 1.01 * model.head_weight[likely]  # where that is the likeliest, <|im_end|> is now
    save_model(model.state_dict(), model.config, tmp_path / "new")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(directory / name, tmp_path / "new" / name)
    asked = ["generate", "--model", tmp_path / "new", "--prompt", "granite", "--max-new-tokens", 30, "--json"]
    (found,) = json.loads(run(*asked, "--template", "chatml")[1])
    assert (found["finish"], found["tokens"]) == ("eos", free.tokens[: free.tokens.index(likely)])
    status, out, err = run(*asked, "--template", "own")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].endswith("has no chat template, in chat_template.jinja or tokenizer_config.json")


def test_the_real_model_answers_in_chatml_and_stops_by_itself(smollm2_json, run, monkeypatch):
    typed = "What is granite? Answer in one short sentence.\n"
    status, out, err = chat(run, smollm2_json, monkeypatch, typed, "--max-new-tokens", 120)
    assert status == 0
    assert "stopped after" not in err  # by its own end token
    assert out.strip()
    assert "<|im" not in out
    talk = in_own_template(smollm2_json, 120)
    message = {"role": "user", "content": typed.strip()}
    assert talk.extended(typed.strip()) == published(smollm2_json, [message])
