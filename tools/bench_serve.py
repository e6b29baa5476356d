"""`k2mini serve` beside llama.cpp's server and `transformers serve`: tokens a second over HTTP, and times to the first.

    python tools/bench_serve.py --model DIR [--llama-python PYTHON] [--transformers-python PYTHON] [--compile]

PYTHON is that of an environment with `llama-cpp-python[server]`, or with `transformers[serving]`. All get the same
weights in float32, as many threads and the same prompts; each measurement is taken in turns, and whoever's turn it is
not is stopped. Printed are medians, and the range of the ratios repeat by repeat. A stream is a completion of 64 greedy
tokens after a prompt of its own, random words, without EOS. llama-cpp-python answers one request after another.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from k2mini.build import load_model
from k2mini.config import LoraSection
from k2mini.data.tokenizer import Tokenizer
from k2mini.nn.lora import adapter_tensors, attach, init_adapters, lora_modules
from k2mini.weights.adapter import save_adapter
from k2mini.weights.convert import convert

PROMPT, NEW, COMMON, TAIL = 64, 64, 600, 20  # tokens of a prompt, of an answer; of what prompts share, and of the rest
MOST = 8  # streams at a time
ADAPTERS = ("clay", "sand")


class Row(NamedTuple):
    """What is measured: streams at a time and the tokens their prompts share; bars against llama.cpp: rate and wait."""

    streams: int
    common: int = 0
    least: float = 0.0
    wait: float = 0.0


ROWS = (Row(1, 0, 0.95), Row(4, 0, 1.8), Row(MOST, 0, 2.5, 0.25), Row(MOST, COMMON, 5.0))


class Server:
    """A server, on a port of its own, which stands still but while it is measured.

    Args:
        model: the name that requests give it.
        more: fields that requests need beside the usual.
    """

    def __init__(self, name: str, command: Sequence[Any], model: str, log: Path, threads: int, **more: Any) -> None:
        self.name, self.model, self._more = name, model, more
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        arguments = [*map(str, command), "--port", str(self._port)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with log.open("wb") as out:
            self.process = subprocess.Popen(arguments, stdout=out, stderr=out, env=environment)
        end = time.monotonic() + 300
        while True:
            with suppress(OSError, ValueError):
                self.run(["Warm"])
                return
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise SystemExit(f"{name} does not answer; it said:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.5)

    def compiled(self, log: Path) -> None:
        """Wait until it has compiled all that it will."""
        self.process.send_signal(signal.SIGCONT)
        while f"up to {MOST} at a time" not in log.read_text():
            time.sleep(1)
        self.process.send_signal(signal.SIGSTOP)

    async def _ask(self, head: str, content: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head += f" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + content)
        return reader, writer

    async def _stream(self, prompt: str, model: str) -> float:
        """Ask for a completion, and read all of it. Returns the seconds to its first text."""
        usual = {"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True}
        start, first, finish = time.perf_counter(), 0.0, None
        reader, writer = await self._ask("POST /v1/completions", json.dumps(usual | self._more).encode())
        status = await reader.readline()
        async for line in reader:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                first = first or (time.perf_counter() - start) * bool(choice["text"])
                finish = choice.get("finish_reason") or finish
        writer.close()
        if finish != "length":  # only then there were as many tokens as were asked for
            raise ValueError(f"{self.name} answered {status!r} and ended with {finish}")
        return first

    def run(self, prompts: Sequence[str], models: Sequence[str] = (), health: bool = False) -> tuple[float, ...]:
        """Answer prompts together, of its models in turns.

        Returns: tokens a second, the median of the seconds to the first, and the longest that /health took.
        """

        async def together() -> tuple[float, ...]:
            start, slowest = time.perf_counter(), 0.0
            pairs = zip(prompts, itertools.cycle(models or [self.model]), strict=False)
            streams = asyncio.gather(*(self._stream(prompt, model) for prompt, model in pairs))
            while health and not streams.done():
                asked = time.perf_counter()
                reader, writer = await self._ask("GET /health")
                assert b" 200 " in await reader.read()
                writer.close()
                slowest = max(slowest, time.perf_counter() - asked)
                await asyncio.wait([streams], timeout=0.1)
            firsts = await streams
            return NEW * len(prompts) / (time.perf_counter() - start), statistics.median(firsts), slowest

        self.process.send_signal(signal.SIGCONT)
        result = asyncio.run(together())
        self.process.send_signal(signal.SIGSTOP)
        return result


def prompts_of(row: Row, tokenizer: Tokenizer, seed: int) -> list[str]:
    """A prompt of random words for each stream; those of other seeds begin otherwise."""
    pieces = map(tokenizer.piece, range(tokenizer.vocab_size))
    words, drawn = [piece[1:] for piece in pieces if re.fullmatch("▁[a-z]{4,}", piece)], random.Random(seed)

    def text(tokens: int) -> str:
        chosen: list[str] = []
        while len(tokenizer.encode(" ".join(chosen), bos=True, eos=False)) < tokens:
            chosen.append(drawn.choice(words))
        return " ".join(chosen)

    start = text(row.common) + " " if row.common else ""
    return [start + text(TAIL if row.common else PROMPT) for _ in range(row.streams)]


def write_adapters(model: Path, folder: Path) -> list[Any]:
    """Two random adapters, as arguments of `k2mini serve`."""
    adapted, _ = load_model(model)
    section, arguments = LoraSection(), []
    attach(adapted, section)
    for seed, name in enumerate(ADAPTERS):
        init_adapters(adapted, seed)
        with torch.no_grad():
            for module in lora_modules(adapted).values():
                module.lora_B.normal_(std=0.01)
        save_adapter(adapter_tensors(adapted), section, folder / name, str(model))
        arguments += ["--adapter", f"{name}={folder / name}"]
    return arguments


def ratios(own: Sequence[float], others: Sequence[float]) -> tuple[float, str]:
    """The median of ratios repeat by repeat, and how it is printed, with the range."""
    found = [mine / other for mine, other in zip(own, others, strict=True)]
    middle = statistics.median(found)
    return middle, f"{middle:5.2f} ({min(found):.2f} to {max(found):.2f})"


def bar(met: bool, what: str) -> str:
    """Whether a bar was reached."""
    return f"  {what}: {'met' if met else 'NOT MET'}"


def compare(servers: Sequence[Server], row: Row, asked: Callable[[Row], list[str]], repeats: int) -> float:
    """Measure in turns and print, k2mini first. Returns the longest that its /health took."""
    results: dict[str, list[tuple[float, ...]]] = {server.name: [] for server in servers}
    for _ in range(repeats):
        prompts = asked(row)
        for server in servers:
            results[server.name].append(server.run(prompts, health=server is servers[0] and row.streams == MOST))
    label = f"{row.streams} streams" + f", {row.common} tokens in common" * bool(row.common)
    own_rates, own_firsts, slowest = zip(*results["k2mini"], strict=True)
    for name, found in results.items():
        rates, firsts, _ = zip(*found, strict=True)
        line = f"{label:32} {name:12} {statistics.median(rates):7.1f} {statistics.median(firsts):8.2f}"
        if name != "k2mini":
            (rate, rate_text), (wait, wait_text) = ratios(own_rates, rates), ratios(own_firsts, firsts)
            line += f"  {rate_text}  {wait_text}"
            if name == "llama.cpp":
                line += bar(rate >= row.least, f"rate {row.least}")
                line += bar(wait <= row.wait, f"wait {row.wait}") if row.wait else ""
        print(line, flush=True)
    return max(slowest)


def main() -> None:
    """Measure every server that there is, then k2mini's adapters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--transformers-python", type=Path)
    parser.add_argument("--compile", action="store_true", help="k2mini's decoding")
    parser.add_argument("--warm-up", type=int, default=1, metavar="N", help="rounds before, while code is compiled")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    servers: list[Server] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run(options, options.model.resolve(), Path(scratch), servers)
        finally:
            for server in servers:
                server.process.kill()


def run(options: argparse.Namespace, folder: Path, scratch: Path, servers: list[Server]) -> None:
    """All measurements of one model."""
    tokenizer, threads = Tokenizer(folder / "tokenizer.model"), options.threads
    seeds, eos = itertools.count(), {"logit_bias": {str(tokenizer.eos_id): -100}}

    def asked(row: Row) -> list[str]:
        return prompts_of(row, tokenizer, next(seeds))

    serve = [sys.executable, "-m", "k2mini", "serve", "--model", folder, "--slots", MOST, "--threads", threads]
    serve += ["--compile"] * options.compile
    servers.append(Server("k2mini", serve, folder.name, scratch / "k2mini.log", threads, **eos))
    if options.compile:
        servers[0].compiled(scratch / "k2mini.log")
    if options.llama_python:
        convert(folder, "gguf", scratch / "f32.gguf", dtype=torch.float32)
        command = [options.llama_python, "-m", "llama_cpp.server", "--model", scratch / "f32.gguf", "--n_ctx", 1024]
        command += ["--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "false"]
        servers.append(Server("llama.cpp", command, "f32", scratch / "llama.log", threads, **eos))
    if options.transformers_python:
        command = [options.transformers_python, "-m", "transformers.cli.transformers", "serve", folder]
        command += ["--continuous-batching", "--dtype", "float32", "--device", "cpu"]
        how = json.dumps({"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1})
        log = scratch / "transformers.log"
        servers.append(Server("transformers", command, str(folder), log, threads, generation_config=how))
    for _, row, server in itertools.product(range(options.warm_up), ROWS, servers):
        server.run(asked(row))
    print(f"{'':45} {'tokens/s':>7} {'first, s':>8}  {'rate of k2mini / its':21}  wait of k2mini / its", flush=True)
    slowest = max(compare(servers, row, asked, options.repeats) for row in ROWS)
    print(f"/health under {MOST} streams: {1e3 * slowest:.0f} ms at most{bar(slowest <= 0.05, '50 ms')}", flush=True)
    for server in servers:
        server.process.kill()
    serve += write_adapters(folder, scratch)
    adapted = Server("k2mini", serve, folder.name, scratch / "adapted.log", threads, **eos)
    servers.append(adapted)
    if options.compile:
        adapted.compiled(scratch / "adapted.log")
    rates: list[tuple[float, float]] = []
    for _ in range(options.warm_up + options.repeats):
        alone, mixed = asked(Row(MOST)), asked(Row(MOST))
        rates.append((adapted.run(alone)[0], adapted.run(mixed, [folder.name, *ADAPTERS])[0]))
    bases, both = zip(*rates[options.warm_up :], strict=True)
    ratio, text = ratios(both, bases)
    print(f"{MOST} streams of the base {statistics.median(bases):.1f}, of it and two adapters", end=" ")
    print(f"{statistics.median(both):.1f}: {text}{bar(ratio >= 0.85, 'rate 0.85')}")


if __name__ == "__main__":
    main()
