"""Clients that go, that do not read, that send anything; more requests than there is room for; who may ask."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from k2mini.build import load_model
from k2mini.inference.decoding import Decoding
from k2mini.inference.generate import generate
from k2mini.serving.app import MOST_BYTES, Access
from k2mini.weights.model_files import save_model
from tests.conftest import ROOT
from tests.serving.conftest import Server, http_post, read_answer

LONG = {"model": "tiny", "prompt": [5] * 20, "max_tokens": 900, "temperature": 0, "logit_bias": {"2": -100}}
SHORT = {**LONG, "max_tokens": 3}
PATHS = {
    "/v1/completions": {"prompt": "granite"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "granite"}]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["queued", "prefill", "decoding"])
def test_a_slot_is_free_two_steps_after_its_client_has_gone(server, stream, when):
    asked = {**LONG, "stream": stream}
    if when == "prefill":
        asked["prompt"] = random.Random(time.time()).choices(range(3, 300), k=1000)
        asked["max_tokens"] = 20
    with server.slow(0.05):
        others = [server.post("/v1/completions", LONG) for _ in range(3 if when == "queued" else 0)]
        server.wait_until(lambda counts: counts.slots_busy == len(others))
        before = server.engine.counts.cancelled
        made = server.engine.counts.new_tokens
        connection = server.post("/v1/completions", asked)
        if when == "queued":
            server.wait_until(lambda counts: counts.waiting == 1)
        else:
            server.wait_until(lambda counts: counts.slots_busy == 1)
        if when == "decoding":
            server.wait_until(lambda counts: counts.new_tokens > made + 2)
        connection.close()
        step = server.engine.counts.steps
        server.wait_until(lambda counts: counts.cancelled == before + 1 and counts.slots_busy == len(others))
        assert server.engine.counts.steps <= step + 2
        assert f"\nk2mini_slots_busy {len(others)}\n" in server.ask("/metrics")[2].decode()
        if when == "prefill":
            assert server.engine.counts.new_tokens == made
        for other in others:
            other.close()


def test_health_answers_while_the_engine_works(server):
    with server.slow(0.3):
        connections = [server.post("/v1/completions", LONG) for _ in range(5)]
        server.wait_until(lambda counts: counts.slots_busy == 3)
        start = time.monotonic()
        assert server.ask("/health")[0] == 200
        assert time.monotonic() - start < 0.25
        for connection in connections:
            connection.close()


def test_a_client_that_does_not_read_holds_no_slot(server):
    """Its answer waits in memory, of which max_tokens is the bound."""
    asked = {**LONG, "logprobs": 20, "stream": True, "n": 2, "max_tokens": 200}
    made = server.engine.counts.new_tokens
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(http_post("/v1/completions", json.dumps(asked).encode()))
    server.wait_until(lambda counts: counts.new_tokens == made + 400)
    assert server.app.active == 1
    server.wait_until(lambda counts: counts.slots_busy == 0)
    _, _, content = read_answer(connection)
    connection.close()
    assert content.endswith(b"data: [DONE]\n\n")
    assert content.count(b"data: ") >= 200


def test_fifty_at_once_are_answered_or_told_to_come_again(tiny_directory):
    server = Server(tiny_directory, queue=8)
    with server.slow(0.01), ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda number: server.ask("/v1/completions", {**SHORT, "n": 1 + number % 3}), range(50)))
    statuses = [status for status, _, _ in found]
    assert set(statuses) == {200, 429}
    for number, (status, headers, content) in enumerate(found):
        if status == 200:
            assert len(json.loads(content)["choices"]) == 1 + number % 3
        else:
            assert int(headers["retry-after"]) >= 1
            assert json.loads(content)["error"]["type"] == "rate_limit_error"
    server.wait_until(lambda counts: counts.slots_busy == counts.waiting == 0)
    openai = pytest.importorskip("openai")
    with server.slow(0.1):
        connections = [server.post("/v1/completions", {**LONG, "n": 11})]
        server.wait_until(lambda counts: counts.waiting == 8)
        with pytest.raises(openai.RateLimitError, match="wait already"):
            server.client.completions.create(**SHORT)
        connections[0].close()
        server.wait_until(lambda counts: counts.slots_busy == counts.waiting == 0)
    server.stop()


def test_answers_are_as_long_and_as_many_as_the_server_allows(tiny_directory):
    server = Server(tiny_directory, max_tokens=30, seed=4, rows=5)
    for field, value in {"max_tokens": 31, "n": 6, "best_of": 6, "prompt": ["a"] * 6}.items():
        status, _, content = server.ask("/v1/completions", {**SHORT, field: value})
        assert (status, json.loads(content)["error"]["param"]) == (400, field)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "granite"}], "logit_bias": {"2": -100}}
    first, second = (json.loads(server.ask("/v1/chat/completions", chat)[2]) for _ in range(2))
    assert first["usage"]["completion_tokens"] == 30
    assert first["choices"] == second["choices"]  # of the seed that the server has
    server.stop()


def test_keys(tiny_directory, monkeypatch, caplog):
    """One of them opens all but /health and the page; none is ever logged, nor found by how long its refusal takes."""
    caplog.set_level("INFO", "k2mini")
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    server = Server(tiny_directory, access=Access(keys=(b"alpha", b"beta")))
    for headers in ([], [("Authorization", "Bearer alph")], [("Authorization", "Bearer ")], [("Authorization", "é")]):
        status, _, content = server.ask("/v1/models", headers=headers)
        assert (status, json.loads(content)["error"]["code"]) == (401, "invalid_api_key")
        assert server.ask("/v1/completions", SHORT, headers)[0] == server.ask("/metrics", headers=headers)[0] == 401
        assert server.ask("/nothing", headers=headers)[0] == 401
        assert server.ask("/health", headers=headers)[0] == 200
    assert server.ask("/v1/models", headers=[("Authorization", "Bearer beta")])[0] == 200
    assert compared[-2:] == [(b"beta", b"alpha"), (b"beta", b"beta")]  # with all keys, in any case
    assert server.ask("/v1/models?key=beta", headers=[("Authorization", "Bearer alpha")])[0] == 200
    assert compared[-2:] == [(b"alpha", b"alpha"), (b"alpha", b"beta")]
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.AuthenticationError):
        server.client.models.list()
    server.stop()
    assert "GET /v1/models 200" in caplog.text
    assert not re.search("alph|beta", caplog.text)


def test_pages_of_other_sites_can_not_ask(server, tiny_directory):
    """Neither by a name of theirs that leads to this machine, nor by a form, nor by a script."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]:80", "["):
        assert server.ask("/v1/completions", SHORT, [("Host", host)])[0] in (400, 403)
    for host in (f"localhost:{server.port}", "127.0.0.1", "[::1]:1"):
        assert server.ask("/v1/completions", SHORT, [("Host", host)])[0] == 200
    for origin in ("https://evil.example", "null", "http://localhost:9"):
        assert server.ask("/v1/completions", SHORT, [("Origin", origin)])[0] == 403
    status, headers, _ = server.ask("/v1/completions", SHORT, [("Origin", "http://localhost")])
    assert (status, "access-control-allow-origin" in headers) == (200, False)
    assert server.ask("/v1/completions", SHORT, [("Content-Type", "text/plain")])[0] == 415
    allowing = Server(tiny_directory, access=Access(origins=("https://friend.example",)))
    status, headers, _ = allowing.ask("/v1/completions", SHORT, [("Origin", "https://friend.example")])
    assert (status, headers["access-control-allow-origin"]) == (200, "https://friend.example")
    assert allowing.ask("/v1/completions", SHORT, [("Origin", "https://evil.example")])[0] == 403
    with allowing.raw(b"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                      b"Origin: https://friend.example\r\n\r\n") as connection:  # fmt: skip
        status, headers, _ = read_answer(connection)
    assert (status, "content-type" in headers["access-control-allow-headers"]) == (204, True)
    allowing.stop()


def test_what_is_no_request_for_this_server(server):
    for path, body, status in [
        ("/nothing", None, 404), ("/v1/completions", None, 405), ("/v1/models", {}, 405), ("/v1/models/a/b", None, 404),
        ("/v1/completions", [], 400), ("/v1/completions", "a", 400), ("/v1/completions", {"model": "\ud800"}, 400),
    ]:  # fmt: skip
        found, headers, content = server.ask(path, body)
        assert found == status
        assert json.loads(content)["error"]["message"]
        assert (status != 405) or headers["allow"] in ("GET", "POST")
    for content in (b"", b"{", b"\xff", b"[" * 100000, b'{"a":1,"a":2}', b'{"n": NaN}', b"9" * 5000):
        with server.raw(http_post("/v1/completions", content)) as connection:
            assert read_answer(connection)[0] == 400
    with server.raw(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 99999999\r\n\r\n" + b" " * (MOST_BYTES + 1)) as connection:  # fmt: skip
        assert read_answer(connection)[0] == 413
    assert server.ask("/v1/completions", SHORT, [("Content-Encoding", "gzip")])[0] == 415


WORDS = [
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    10**400,
    "",
    "a",
    "\x00",
    "é" * 99,
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    "granite",
    [5, 6],
    2,
]


def mutated(rng, names):
    """A request with something wrong, or not: fields changed, removed or made up, bytes changed, headers too."""
    path = rng.choice(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/k2mini/why"])
    body = {"model": "tiny", "max_tokens": 1, **PATHS.get(path, {"tokens": [5, 6], "prompt": "a"})}
    for _ in range(rng.randint(0, 3)):
        value = rng.choice(WORDS)
        if rng.random() < 0.3:
            value = [value] * rng.choice([1, 3, 70])
        elif rng.random() < 0.2:
            value = [{"role": rng.choice(["user", "system", "x"]), "content": value}]
        body[rng.choice(names)] = value
    content = json.dumps(body).encode()
    if rng.random() < 0.3:
        place = rng.randrange(len(content))
        content = content[:place] + rng.randbytes(rng.randint(0, 3)) + content[place + rng.randint(0, 3) :]
    headers = []
    if rng.random() < 0.2:
        header = rng.choice(["Host", "Content-Type", "Authorization", "Origin", "Transfer-Encoding", "X", "Expect"])
        headers.append((header, "".join(rng.choices("chunked /;=\xff\x01aé:*", k=rng.randint(0, 12)))))
    request = http_post(path if rng.random() < 0.95 else "/" + "%00é?".join("abc"), content, headers)
    if rng.random() < 0.1:
        place = rng.randrange(len(request))
        request = request[:place] + rng.randbytes(4) + request[place + 4 :]
    return request


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_requests(server, number, capfd, caplog):
    """No traceback, no 500, and memory stays."""
    from k2mini.serving import fields

    names = sorted({*fields.COMPLETION, *fields.CHAT, "tokens", "unheard_of"})
    rng, statuses, size = random.Random(17), [], 0

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def send(request):
        with server.raw(request) as connection:
            connection.settimeout(5)
            try:
                return read_answer(connection)[0]
            except (TimeoutError, ValueError, IndexError, ConnectionError):
                return None  # it promises more than it sends

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, number, 100):
            statuses += pool.map(send, [mutated(rng, names) for _ in range(min(100, number - start))])
            size = size or (resident() if start >= 200 else 0)
    assert resident() - (size or resident()) < 64 * 2**20
    assert 500 not in statuses
    assert statuses.count(200) > number // 20
    assert statuses.count(400) > number // 4
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    assert server.ask("/v1/completions", SHORT)[0] == 200
    server.wait_until(lambda counts: counts.slots_busy == 0)


class Process:
    """`k2mini serve` in a process of its own."""

    started: ClassVar[list[subprocess.Popen]] = []

    def __init__(self, *arguments, folder=ROOT, before=""):
        start = ["-c", f"{before}\nfrom k2mini.cli import main\nmain()"] if before else ["-m", "k2mini"]
        command = [sys.executable, *start, "serve", "--threads", "1", *map(str, arguments)]
        self.err = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would stop it)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.err, text=True, cwd=folder)
        self.started.append(self.process)
        self.line = self.said() if before else self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+) (serves|is open)", self.line)
        assert found, self.end()
        self.port = int(found[1])

    ask, post, raw = Server.ask, Server.post, Server.raw

    def said(self, text="\n"):
        """Its log, once that has some text."""
        end = time.monotonic() + 60
        while text not in (log := os.pread(self.err.fileno(), 1 << 20, 0).decode()):
            assert time.monotonic() < end, log
            time.sleep(0.01)
        return log

    def end(self, *signals):
        """Send it signals. Returns its exit status, and what it said, once it has ended."""
        for number in signals:
            self.process.send_signal(number)
        self.process.communicate(timeout=30)
        self.err.seek(0)
        return self.process.returncode, self.err.read()

    def wait_until_busy(self, slots, waiting=0):
        """Wait until so many slots are busy, and so many requests wait."""
        end = time.monotonic() + 30
        wanted = {f"k2mini_slots_busy {slots}", f"k2mini_waiting {waiting}"}
        while not wanted <= {*self.ask("/metrics")[2].decode().splitlines()}:
            assert time.monotonic() < end, self.end(signal.SIGKILL)
            time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    while Process.started:
        Process.started.pop().kill()


def test_the_demo_is_served_and_sigterm_lets_what_was_accepted_end(tiny_directory, adapter_directory, tmp_path):
    demo = tmp_path / "runs" / "demo"
    adapters = dict.fromkeys(("stage1/adapter", "stage2/adapter"), adapter_directory)
    for name, directory in {"pretrain/model": tiny_directory, **adapters}.items():
        (demo / name).parent.mkdir(parents=True)
        (demo / name).symlink_to(directory)
    base, tokenizer = load_model(tiny_directory)
    with torch.no_grad():
        base.head_weight.neg_()
    save_model(base.state_dict(), base.config, demo / "base", tokenizer=tokenizer)
    (demo / "stage2" / "config.yaml").write_text('{"data": {"template": "vigogne"}}')
    running = Process("--demo", "--port", 0, "--slots", 2, folder=tmp_path)
    room = "2 slots, each of 1,024 tokens for a prompt and its answer"
    assert running.line.endswith(f"serves base, pretrain, stage1, stage2: {room}\n")
    (wanted,) = generate(base, [SHORT["prompt"]], Decoding(3), stop_ids=[])
    answers = {}
    for name in ("base", "pretrain"):
        asked = {**SHORT, "model": name, "logit_bias": {}, "return_token_ids": True}
        answers[name] = json.loads(running.ask("/v1/completions", asked)[2])["choices"][0]["token_ids"]
        assert running.ask("/k2mini/why", {"model": name, "tokens": [5, 6]})[0] == 200
    assert answers["base"] == wanted.tokens != answers["pretrain"]
    assert b"\nk2mini_requests_total 2\n" in running.ask("/metrics")[2]
    assert json.loads(running.ask("/k2mini/info")[2])["template"] == "vigogne"
    asked = {**LONG, "model": "stage2", "max_tokens": 100}
    connections = [running.post("/v1/completions", {**asked, "stream": bool(number % 2)}) for number in range(6)]
    running.wait_until_busy(2, waiting=4)
    running.process.send_signal(signal.SIGTERM)
    refused = 0
    while not refused:
        status, headers, _ = running.ask("/v1/completions", {**SHORT, "n": 0})
        assert status in (503, 400)
        refused = status == 503
    assert headers["retry-after"]
    assert json.loads(running.ask("/health")[2]) == {"status": "draining"}
    for number, connection in enumerate(connections):
        with connection:
            status, _, content = read_answer(connection)
        assert status == 200
        assert number % 2 or json.loads(content)["usage"]["completion_tokens"] == 100
        assert content.endswith(b"[DONE]\n\n" if number % 2 else b"}")
    status, err = running.end()
    assert status == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert "every accepted request was answered" in err.splitlines()[-1]
    assert re.search(r"POST /v1/completions 200 [\d.]+ s, 20 \+ 100 tokens", err)


def test_a_killed_server_leaves_its_port_and_a_second_signal_ends(tiny_directory):
    killed = Process("--model", tiny_directory, "--port", 0)
    assert "4 slots, each of 1,024 tokens" in killed.line
    with killed.post("/v1/completions", LONG):
        killed.wait_until_busy(1)
        killed.end(signal.SIGKILL)
    running = Process("--model", tiny_directory, "--port", killed.port, "--slots", 1)
    assert "1 slot, each of 1,024 tokens" in running.line
    with running.post("/v1/completions", {**LONG, "n": 30}) as whole:
        running.wait_until_busy(1, waiting=29)
        with running.post("/v1/completions", {**LONG, "stream": True}) as stream:
            running.wait_until_busy(1, waiting=30)
            running.process.send_signal(signal.SIGTERM)
            running.said("requests still to be answered: 2; a second signal cuts them off")
            assert running.process.poll() is None
            status, err = running.end(signal.SIGINT)
            assert read_answer(stream)[2].count(b'"code": "draining"') == 1
        number, _, content = read_answer(whole)
    assert (number, json.loads(content)["error"]["code"]) == (503, "draining")
    assert status == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert "stopped by SIGTERM; requests cut off: 2" in err.splitlines()[-1]


def test_a_signal_while_the_model_is_loaded(tiny_directory):
    """The page is there by then; the thread that loads can't be ended, and does not keep the program from its end."""
    forever = "k2mini.build.open_model = lambda *a, **k: any(torch.ones(200, 200).sum() < 0 for _ in iter(int, 1))"
    running = Process("--model", tiny_directory, "--port", 0, before=f"import torch, k2mini.build\n{forever}")
    assert f"it answers once {tiny_directory} is loaded" in running.line
    assert running.ask("/")[0] == 200
    status, _, content = running.ask("/health")
    assert (status, json.loads(content)) == (503, {"status": "loading"})
    for path, body in [("/v1/models", None), ("/v1/completions", SHORT)]:
        status, headers, content = running.ask(path, body)
        assert (status, json.loads(content)["error"]["code"]) == (503, "loading")
        assert int(headers["retry-after"]) > 0
    status, err = running.end(signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the model was not loaded yet" in err.splitlines()[-1]


def test_a_models_own_template_is_served(chat_directory):
    running = Process("--model", chat_directory, "--port", 0, "--slots", 1)
    assert "chats are asked in the template own" in running.said("in the template")
    info = json.loads(running.ask("/k2mini/info")[2])
    assert info["template"] == "own"
    assert info["templates"][:2] == ["alpaca", "alpaca_legacy"]
    assert {"own", "chatml"} <= {*info["templates"]}
    assert "llama3" not in info["templates"]  # for which the tokenizer has no tokens
    model = running.ask("/v1/models")
    name = json.loads(model[2])["data"][0]["id"]
    asked = {
        "model": name,
        "messages": [{"role": "user", "content": "rock"}],
        "max_tokens": 1,
        "return_token_ids": True,
    }
    ids = {}
    for template in (None, "chatml", "own"):
        body = {**asked, "template": template}
        (choice,) = json.loads(running.ask("/v1/chat/completions", body)[2])["choices"]
        ids[template] = choice["prompt_token_ids"]
    assert ids[None] == ids["chatml"] == ids["own"]
    assert ids[None][0] == 1  # <|im_start|>
    running.end(signal.SIGTERM)


def test_what_serve_can_not_begin_with(run, tiny_directory, adapter_directory, tmp_path, monkeypatch):
    """One sentence, before the model is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("\n")
    for name, template in {"a": "alpaca", "b": "vigogne"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter").symlink_to(adapter_directory)
        (tmp_path / name / "config.yaml").write_text(json.dumps({"data": {"template": template}}))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        model = ["--model", tiny_directory]
        for arguments, said in [
            ([*model, "--port", port], f"k2mini: 127.0.0.1, port {port}: Address already in use; --port"),
            ([*model, "--port", port, "--host", "0.0.0.0"], "whoever reaches 0.0.0.0 may ask"),
            ([*model, *(f"--adapter={run}={tmp_path}/{run}/adapter" for run in "ab")], "--template names the one"),
            ([*model, "--port", 70000], "--port"),
            ([*model, "--host", "no.such.host.invalid"], "no.such.host.invalid"),
            (["--model", tmp_path / "none"], "none"),
            (["--demo"], "k2mini demo"),
            ([*model, "--adapter", f"{Path(tiny_directory).name}={tmp_path}"], "the name of a model"),
            ([*model, "--adapter", "rocks"], "NAME=DIR"),
            ([*model, "--adapter", f"rocks={tmp_path}/none"], "none"),
            ([*model, "--template", "other"], "other"),
            ([*model, "--slots", 0], "--slots"),
            ([*model, "--api-key-file", tmp_path / "keys"], "holds no key"),
        ]:
            status, out, err = run("serve", *arguments)
            assert (status, out) == (2, ""), err
            assert said in err
            assert "parameters" not in err  # which is said of a model that has been loaded


def test_serve_without_its_extra(run, tiny_directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, out, err = run("serve", "--model", tiny_directory, "--port", 0)
    assert (status, out) == (2, "")
    assert ".[serve]" in err.splitlines()[-1]
