"""Endpoints that do not answer as they should: on a socket, for what is wrong is between HTTP's lines."""

import json
import socket
import threading

import pytest

from k2mini.evaluation.endpoint import TRIES, Endpoint
from k2mini.evaluation.judge import judge_there

GOOD = b'{"choices": [{"message": {"content": "A"}}]}'


@pytest.fixture
def serve(monkeypatch):
    """A server that answers each request with the next of some texts, the last one for ever, and keeps what it got."""
    monkeypatch.setattr("k2mini.evaluation.endpoint.time.sleep", lambda _: None)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    listening = []

    def start(*texts):
        server, got = socket.create_server(("127.0.0.1", 0)), []
        listening.append(server)

        def run():
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client, client.makefile("rb") as file:
                    head = b"".join(iter(file.readline, b"\r\n"))
                    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                    got.append(head + file.read(length))
                    text = texts[min(len(got), len(texts)) - 1]
                    client.sendall(text(got[-1]) if callable(text) else text)

        threading.Thread(target=run, daemon=True).start()
        return Endpoint(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "m"), got

    yield start
    for server in listening:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def http(status, body, *headers):
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers])
    return head.encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    "broken", [http("200 OK", GOOD)[:-5], b"HELLO WORLD\r\n\r\n", b""], ids=["cut", "no HTTP", "none"]
)
def test_an_answer_that_breaks_off_is_asked_for_again(serve, broken):
    endpoint, got = serve(broken, http("200 OK", GOOD))
    assert endpoint.post("x", {}) == json.loads(GOOD)
    assert len(got) == 2
    endpoint, got = serve(broken)
    with pytest.raises(ValueError, match="/v1/x gives a broken answer"):
        endpoint.post("x", {})
    assert len(got) == TRIES


def test_an_errors_text_that_breaks_off(serve):
    endpoint, _ = serve(http("400 Bad Request", b"no" * 20)[:-5])
    with pytest.raises(ValueError, match="/v1/x answers 400"):
        endpoint.post("x", {})


def test_a_redirect_is_not_followed_and_carries_no_key(serve):
    other, got = serve(http("200 OK", GOOD))
    endpoint, asked = serve(http("302 Found", b"", f"Location: {other.url}/steal"))
    with pytest.raises(ValueError, match=r"answers 302, it is at 'http.*name that address"):
        endpoint.post("x", {})
    assert b"sk-secret" in asked[0]
    assert got == []


@pytest.mark.parametrize(
    "url", ["file:///etc", "ftp://a/v1", "http://a b/v1", "http://a:b/v1", "http://a/v1\n", "localhost"]
)
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match="is no address of a server"):
        Endpoint(url, "m").post("passwd", {})


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 64 tokens. However, you requested 90 tokens.",  # OpenAI, vLLM
        "The decoder prompt (length 90) is longer than the maximum model length of 64.",  # vLLM
        "the request exceeds the available context size (64 tokens), try increasing it",  # llama.cpp
        "Requested tokens (90) exceed context window of 64",  # llama-cpp-python
        "max_tokens: 90 tokens; the context has 64",  # ours
    ],
    ids=["OpenAI", "vLLM", "llama.cpp", "llama-cpp-python", "k2mini"],
)
def test_what_is_too_long_for_an_endpoint_is_left_out(serve, said, caplog):
    def answer(request):
        long = b"bbbb" in request
        return (
            http("400 Bad Request", json.dumps({"error": {"message": said}}).encode()) if long else http("200 OK", GOOD)
        )

    endpoint, _ = serve(answer)
    items = [("a", None), ("b" * 100, None), ("c", None)]
    assert [*judge_there(endpoint, items, 2)] == [(items[0], "A"), (items[1], None), (items[2], "A")]
    assert "left out as too long: 1 of 3 prompts" in caplog.text
    with pytest.raises(ValueError, match="answers 400"):  # `eval --backend api` scores all or nothing
        endpoint.post("completions", {"prompt": "b" * 100})


def test_another_refusal_ends_a_judge(serve):
    endpoint, _ = serve(http("400 Bad Request", b'{"error": {"message": "max_tokens is not a field of this model"}}'))
    with pytest.raises(ValueError, match="answers 400: 'max_tokens is not a field"):
        [*judge_there(endpoint, [("a", None)], 2)]
