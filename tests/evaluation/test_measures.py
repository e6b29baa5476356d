import json
import math

import pytest
import torch

from k2mini.build import load_model
from k2mini.data.tokenizer import Tokenizer
from k2mini.evaluation.compare import mcnemar
from k2mini.evaluation.measures import rouge_l, token_f1
from k2mini.evaluation.perplexity import score_text, text_perplexity
from tests.conftest import tiny_config, tiny_llama
from tests.helpers import HostWaits
from tests.json_tokenizer import write_json_tokenizer


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


@pytest.mark.parametrize("context", ["", "basalt is a rock. ", "a volcano " * 60])
def test_each_tokens_logprob_and_rank(tiny_tokenizer, context):
    """Against the logits, one token at a time: texts and contexts that the model's context holds, or not."""
    model = tiny_llama(tiny_config(vocab_size=tiny_tokenizer.vocab_size, max_seq_len=64), dtype=torch.float64)
    for text in TEXTS:
        found, scored = score_text(model, tiny_tokenizer, text, context)
        ids = tiny_tokenizer.encode(context + text, bos=True, eos=False)
        assert [token for token, _, _ in scored] == ids[-len(scored) :]
        before = len(ids) - len(scored)
        assert abs(before - len(tiny_tokenizer.encode(context, bos=True, eos=False))) <= 1
        for place, (token, logprob, rank) in enumerate(scored, start=before):
            start = 0 if place < 64 else -(-(place - 64 + 1) // 32) * 32
            logprobs = model(torch.tensor([ids[start:place]]))[0, -1].log_softmax(-1)
            assert logprob == pytest.approx(logprobs[token].item(), abs=1e-12)
            assert rank == (logprobs > logprobs[token]).sum() <= 400
        if not context:
            assert found == text_perplexity(model, tiny_tokenizer, [text])


@pytest.mark.parametrize("context", ["", "basalt is a rock."])
def test_texts_without_bos_are_scored_from_their_first_token(tmp_path, context):
    """After EOS where nothing is before it, as lm-evaluation-harness does."""
    tokenizer = Tokenizer(write_json_tokenizer(tmp_path))
    model = tiny_llama(tiny_config(vocab_size=tokenizer.vocab_size), dtype=torch.float64)
    text = " granite is made of quartz"
    found, scored = score_text(model, tokenizer, text, context)
    whole, before = (tokenizer.encode(part, bos=True, eos=False) for part in (context + text, context))
    ids = whole if context else [tokenizer.eos_id, *whole]
    start = len(before) or 1
    logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
    assert [token for token, _, _ in scored] == ids[start:]
    expected = [logprobs[place - 1, ids[place]].item() for place in range(start, len(ids))]
    assert [logprob for _, logprob, _ in scored] == pytest.approx(expected, abs=1e-12)
    assert found.bits_per_byte == pytest.approx(-sum(expected) / math.log(2) / len(text.encode()))
    if not context:
        assert found == text_perplexity(model, tokenizer, [text])


def test_score_on_the_command_line(tiny_directory, tmp_path, run, monkeypatch):
    """The sums are those of `eval --perplexity` on the file, and the log-probabilities those of transformers."""
    import io

    from transformers import LlamaForCausalLM

    text = "granite  is\nmade of quartz\n"
    (tmp_path / "text.txt").write_text(text)
    command = ["score", "--model", tiny_directory]
    status, out, err = run(*command, "--input", tmp_path / "text.txt", "--json")
    assert status == 0, err
    found = json.loads(out)
    theirs = json.loads(run("eval", *command[1:], "--perplexity", tmp_path / "text.txt", "--json")[1])["perplexity"]
    assert {key: found[key] for key in ("perplexity", "bits_per_byte", "tokens", "num_bytes")} == {
        key: value for key, value in theirs.items() if key != "files"
    }
    _, tokenizer = load_model(tiny_directory)
    ids = tokenizer.encode(text, bos=True, eos=False)
    entries = found["logprobs"]
    assert [entry["id"] for entry in entries] == ids[1:]
    assert "".join(entry["token"] for entry in entries) == "␣granite␣␣is⏎made␣of␣quartz⏎"
    model = LlamaForCausalLM.from_pretrained(tiny_directory)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for row, entry in zip(logprobs, entries, strict=False):
        assert entry["logprob"] == pytest.approx(row[entry["id"]].item(), abs=1e-5)
        assert entry["rank"] == (row > row[entry["id"]]).sum()
    total = sum(entry["logprob"] for entry in entries)
    assert (found["total"], found["mean"]) == (total, total / len(entries))
    assert found["perplexity"] == pytest.approx(math.exp(-total / len(entries)))
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff" + text))
    status, lines, _ = run(*command, "--text", "-")
    assert status == 0
    head, *rows, last = lines.splitlines()
    assert head.split() == ["log", "p", "rank", "id", "token"]
    assert [row.split()[1:] for row in rows] == [
        [str(entry["rank"] + 1), str(entry["id"]), entry["token"]] for entry in entries
    ]
    assert last.startswith(f"total {total:.4f} nats over {len(entries)} tokens, mean {found['mean']:.4f}, perplexity ")


@pytest.mark.parametrize("options", [["--text", ""], ["--input", "/dev/null"], ["--text", "a", "--input", "b"], []])
def test_a_text_that_is_not_scored(tiny_directory, run, options):
    status, out, err = run("score", "--model", tiny_directory, *options)
    assert (status, out) == (2, "")
    assert "there is no text to score" in err or "usage: k2mini score" in err


def test_a_text_is_read_once(tiny_tokenizer):
    model = tiny_llama(tiny_config(vocab_size=tiny_tokenizer.vocab_size))
    with HostWaits() as waits:
        text_perplexity(model, tiny_tokenizer, TEXTS, window=8)
    assert waits.found == ["item"] * (len(TEXTS) + 1)


def test_a_stride_that_is_refused(tiny_directory):
    model, tokenizer = load_model(tiny_directory)
    with pytest.raises(ValueError, match="stride must be at least 1 and below the window of 8 tokens, not 8"):
        text_perplexity(model, tokenizer, TEXTS, window=8, stride=8)
    with pytest.raises(ValueError, match="there is no text"):
        text_perplexity(model, tokenizer, [""])
