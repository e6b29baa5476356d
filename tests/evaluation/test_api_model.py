"""`--backend api`: k2mini's own server, and the forms in which vLLM and llama.cpp give a prompt's log-probabilities."""

import json
import logging
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from k2mini.evaluation.api_model import ApiModel
from k2mini.evaluation.endpoint import Endpoint, at_a_time
from k2mini.evaluation.score import Request, num_tokens, score, split_jointly
from tests.evaluation.conftest import results
from tests.serving.conftest import Server

pytest.importorskip("uvicorn")
TEXT = "### Instruction:\nWhich is a rock?\n\n### Response:\nThe answer is: A"


@pytest.fixture(scope="module")
def server(tiny_directory):
    running, log = Server(tiny_directory), logging.getLogger("k2mini.serving")
    log.propagate = False  # a request's line may come when the command that asked has ended
    yield running
    running.stop()
    log.propagate = True


@pytest.mark.parametrize("scoring", ["letter", "text", "pmi"])
def test_through_our_own_server_results_are_those_of_eval(
    server, tiny_directory, rocks, tmp_path, run, geobench, scoring
):
    task = ("--benchmark", rocks, geobench["npee"], "--tasks", "rocks", "npee/noun", "--limit", 4, "--shots", 1)
    task = (*task, "--scoring", scoring, "--answer-prefix", "The answer is: ", "--template", "alpaca_short")
    for name, how in (
        ("ours", ("--model", tiny_directory)),
        ("api", ("--model", "tiny", "--backend", "api", "--url", f"{server.url}/v1")),
    ):
        status, _, err = run("eval", *how, *task, "--max-new-tokens", 6, "--out", tmp_path / name)
        assert status == 0, err
    for one, two in zip(results(tmp_path / "ours"), results(tmp_path / "api"), strict=True):
        assert two["logprobs"] == pytest.approx(one["logprobs"], abs=1e-4)
        assert two["prediction"] == one["prediction"]
    assert (tmp_path / "ours/answers_npee_noun.json").read_text() == (
        tmp_path / "api/answers_npee_noun.json"
    ).read_text()
    (a,), (b,) = (json.loads((tmp_path / n / "report.json").read_text())["subjective"] for n in ("ours", "api"))
    assert b["likelihood"] == pytest.approx(a["likelihood"], abs=1e-4)  # a token, not a character
    asking = json.loads((tmp_path / "api" / "asking.json").read_text())
    assert (asking["model"], asking["dtype"]) == (f"tiny at {server.url}/v1", "unknown")


def as_vllm(logprobs, text):
    """Tokens are text, BOS too, and offsets count all of it."""
    return counted(["<s>", *texts(logprobs, text)[1:]], logprobs)


def as_llama_cpp(logprobs, text):
    """No BOS; offsets count the space that is put before the text; the first token has no score."""
    cut = {key: values[1:] for key, values in logprobs.items()}
    cut["token_logprobs"][0] = None
    return counted(texts(logprobs, text)[1:], cut)


def texts(logprobs, text):
    """What each token adds to the text; of a character of several tokens, the last does."""
    parts = [text[start:end] for start, end in pairwise([*logprobs["text_offset"], None])]
    return [part if name[:5] == "bytes" else name for name, part in zip(logprobs["tokens"], parts, strict=True)]


def counted(names, logprobs):
    return logprobs | {"tokens": names, "text_offset": [sum(map(len, names[:place])) for place in range(len(names))]}


@pytest.fixture
def altered(server, monkeypatch):
    """Endpoint.post with what the server says of log-probabilities changed."""
    post = Endpoint.post

    def use(change):
        def changed(self, path, payload):
            answer = post(self, path, payload)
            choice = answer["choices"][0]
            choice["logprobs"] = change(choice["logprobs"], choice["text"])
            return answer

        monkeypatch.setattr(Endpoint, "post", changed)
        return Endpoint(f"{server.url}/v1", "tiny")

    return use


@pytest.mark.parametrize("form", [as_vllm, as_llama_cpp])
def test_offsets_of_other_servers(server, altered, form):
    own = Endpoint(f"{server.url}/v1", "tiny").tokens(TEXT)
    for one, two in pairwise(own[2:]):  # after BOS, and a token with a space before it that the text has not
        assert one.text == TEXT[one.place : two.place] or one.text.startswith("bytes")
    found = altered(form).tokens(TEXT)
    skip = len(own) - len(found)
    assert skip == (form is as_llama_cpp)
    for one, two in zip(own[skip:], found, strict=True):
        assert two.place == one.place
    assert [token.logprob for token in found[1:]] == [token.logprob for token in own[skip + 1 :]]
    assert found[-1].place == own[-1].place < len(TEXT)


@pytest.mark.parametrize("form", [lambda logprobs, _: logprobs, as_vllm, as_llama_cpp])
def test_the_boundary_is_that_of_joint_tokenisation(server, altered, form):
    """White space that ends a context is scored with the option, for all options alike."""
    context, options = "granite is ", ["quartz", "a", "a rock", " crust", "ééé"]
    prefix, ids = split_jointly(server.tokenizer, context, options)
    expected = dict(score(server.model, [Request(tuple(prefix), tuple(map(tuple, ids)))]))[0]
    model = ApiModel(altered(form))
    characters = model.require_tokenizer()
    context_ids, option_ids = split_jointly(characters, context, options)
    request = Request(tuple(context_ids), tuple(map(tuple, option_ids)))
    ((_, found),) = score(model, [request], batch_size=2)
    assert found == pytest.approx(expected, abs=1e-4)
    assert num_tokens(model, request) == [len(option) for option in ids]


@pytest.mark.parametrize(
    "form",
    [
        lambda logprobs, _: None,
        lambda logprobs, _: logprobs | {"token_logprobs": [None] * len(logprobs["tokens"])},
        lambda logprobs, _: {key: values[-1:] for key, values in logprobs.items()},  # of the new token alone
        lambda logprobs, _: {key: values[:-1] for key, values in logprobs.items()},  # as llama.cpp, without BOS
        lambda logprobs, _: {"content": []},  # a chat's
    ],
)
def test_an_endpoint_without_log_probabilities_of_the_prompt(altered, rocks, run, form):
    url = altered(form).url
    status, out, err = run("eval", "--model", "tiny", "--backend", "api", "--url", url, "--benchmark", rocks)
    assert (status, out) == (2, "")
    assert f"{url} gives no log-probabilities of the prompt (`echo` with `logprobs` of /completions)" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--template", "vicuna"), "an API scores plain text"),
        (("--template", "chatml"), "has no tokens for"),
        (("--template", "own"), "has no chat template"),
        (("--scoring", "text", "--score-end"), "an API scores plain text, without --score-end"),
        (("--scoring", "text", "--normalize", "token"), "--normalize token does not go with --backend api"),
        (("--scoring", "pmi", "--template", "none"), "--scoring pmi through an API needs text before an answer"),
        (("--scoring", "k2"), "reads LLaMA's ids of the letters"),
        (("--model", "other"), "answers 404"),
    ],
)
def test_what_an_api_can_not_score_is_refused(server, rocks, run, options, said):
    model = () if "--model" in options else ("--model", "tiny")
    status, _, err = run(
        "eval", *model, "--backend", "api", "--url", f"{server.url}/v1", "--benchmark", rocks, *options
    )
    assert (status, said in err, "Traceback" in err) == (2, True, False), err


def test_a_server_that_is_not_there(rocks, run):
    command = ("eval", "--model", "tiny", "--backend", "api", "--benchmark", rocks)
    secret = "a server's address may hold no password or query"
    for url, said in (
        ("http://127.0.0.1:9/v1", "can't be reached"),
        ("localhost", "is no address of a server"),
        ("http://me:pass@127.0.0.1:9/v1", secret),
        ("http://127.0.0.1:9/v1?key=pass", secret),
    ):
        status, _, err = run(*command, "--url", url)
        assert (status, said in err, "pass@" in err) == (2, True, False), err


def test_a_question_that_is_too_long_is_named(server, tmp_path, run):
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"question": "granite " * 600 + "is?", "choices": ["oak", "rock"], "answer": 1}]))
    command = ("eval", "--model", "tiny", "--backend", "api", "--url", f"{server.url}/v1", "--benchmark", path)
    status, _, err = run(*command)
    assert (status, "the text ends " in err, "granite is?" in err) == (2, True, True), err


def test_what_is_asked_at_a_time_comes_in_order():
    def ask(number):
        time.sleep(0.01 * (number % 3))
        if number == 7:
            raise ValueError("seven")
        return number

    assert list(at_a_time(3, ask, range(7))) == [*range(7)]
    assert list(at_a_time(3, ask, [])) == []
    with pytest.raises(ValueError, match="seven"):
        list(at_a_time(2, ask, range(10**6)))


def test_ctrl_c_does_not_wait_for_answers():
    code = (
        "import threading; from k2mini.evaluation.endpoint import at_a_time; "
        "answers = at_a_time(2, lambda number: number and threading.Event().wait(), [0, 1, 2]); "
        "print(next(answers)); raise KeyboardInterrupt"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ended.stdout, "KeyboardInterrupt" in ended.stderr) == ("0\n", True)
