"""A server in a thread, over a tiny model with an adapter, whose steps can be made to take time."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from k2mini.config import LoraSection
from k2mini.inference.engine import Engine
from k2mini.nn.lora import adapter_tensors
from k2mini.serving.app import LOOPBACK, Access, App
from k2mini.serving.asked import Served
from k2mini.serving.server import open_socket, serve
from k2mini.serving.service import Service
from k2mini.weights.adapter import load_adapters, save_adapter
from k2mini.weights.model_directory import ModelDirectory
from tests.helpers import adapted


@pytest.fixture(autouse=True)
def own_log(monkeypatch):
    """Commands that other tests have run log to streams that are closed by now."""
    monkeypatch.setattr(logging.getLogger("k2mini"), "handlers", [])


class SlowEngine(Engine):
    """An engine whose steps take `delay` seconds more."""

    delay = 0.0

    def step(self) -> bool:
        if self.delay and self._scheduler.free < self.slots:
            time.sleep(self.delay)
        return super().step()


class Server:
    """A server, and what a test asks it."""

    def __init__(self, directory, adapters=None, access=Access(hosts=LOOPBACK), slots=3, queue=64, **served):  # noqa: B008
        from k2mini.build import load_model

        self.model, self.tokenizer = load_model(directory)
        loaded = load_adapters(self.model, ModelDirectory(directory), adapters or {})
        capacity = self.model.config.max_seq_len
        models = {"tiny": None, **{name: name for name in adapters or {}}}
        self.served = Served(self.tokenizer, models, "alpaca_short", capacity, **served)
        given = {"slots": slots, "capacity": capacity, "queue": queue, "adapters": loaded}
        self.engine = SlowEngine(self.model, vocab_size=self.tokenizer.vocab_size, **given)
        self.app, self.loaded = App(access), threading.Event()
        listening = open_socket("127.0.0.1", 0)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a client that does not read is soon noticed
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        ready = threading.Event()
        arguments = (self.app, listening, self._load, lambda _service: ready.set())
        self.thread = threading.Thread(target=serve, args=arguments)
        self.thread.start()
        self.loaded.set()
        assert ready.wait(30)

    def _load(self) -> Service:
        assert self.loaded.wait(30)
        return Service(self.engine, self.served)

    def stop(self) -> None:
        self.app.draining = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    @property
    def client(self):
        openai = pytest.importorskip("openai")
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def raw(self, content: bytes) -> socket.socket:
        """A connection on which something has been sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(content)
        return connection

    def post(self, path: str, body, headers=()) -> socket.socket:
        """A connection on which JSON has been sent."""
        return self.raw(http_post(path, json.dumps(body).encode(), headers))

    def ask(self, path: str, body=None, headers=()):
        """(status, headers, body) of an answer; GET without a body."""
        with self.post(path, body, headers) if body is not None else self.raw(http_get(path, headers)) as connection:
            return read_answer(connection)

    def wait_until(self, condition, seconds=20.0) -> None:
        """Wait until a condition on the engine's counts holds."""
        end = time.monotonic() + seconds
        while not condition(self.engine.counts):
            assert time.monotonic() < end, self.engine.counts
            time.sleep(0.002)

    @contextmanager
    def slow(self, seconds: float):
        self.engine.delay = seconds
        try:
            yield
        finally:
            self.engine.delay = 0.0
            self.wait_until(lambda counts: counts.slots_busy == 0)


def http_get(path, headers=()):
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{_lines(headers)}Connection: close\r\n\r\n".encode("latin-1")


def http_post(path, content, headers=()):
    kind = "" if any(name.lower() == "content-type" for name, _ in headers) else "Content-Type: application/json\r\n"
    host = "" if any(name.lower() == "host" for name, _ in headers) else "Host: localhost\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\n{host}{kind}{_lines(headers)}Content-Length: {len(content)}\r\nConnection: close\r\n"
    )
    return head.encode("latin-1") + b"\r\n" + content


def _lines(headers):
    return "".join(f"{name}: {value}\r\n" for name, value in headers)


def read_answer(connection):
    content = b""
    while chunk := connection.recv(1 << 16):
        content += chunk
    head, _, body = content.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        parts = []
        while body:
            size, _, rest = body.partition(b"\r\n")
            parts.append(rest[: int(size, 16)])
            body = rest[int(size, 16) + 2 :]
        body = b"".join(parts)
    return int(status.split()[1]), headers, body


@pytest.fixture(scope="session")
def adapter_directory(tmp_path_factory, tiny_directory):
    """An adapter of the tiny model that does something."""
    from k2mini.build import load_model

    model, _ = load_model(tiny_directory)
    tuned = adapted(model.config)
    section = LoraSection(rank=4, alpha=6.0, target_modules=["q_proj", "k_proj", "v_proj"])
    out = tmp_path_factory.mktemp("adapter") / "rocks"
    with torch.no_grad():
        save_adapter(adapter_tensors(tuned), section, out, str(tiny_directory))
    return out


@pytest.fixture(scope="module")
def server(tiny_directory, adapter_directory):
    running = Server(tiny_directory, {"rocks": adapter_directory})
    yield running
    running.stop()
