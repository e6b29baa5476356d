"""What the server does: answers made by the engine, and what is known of models, tokenizer and load."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from itertools import accumulate, pairwise
from typing import Any

import torch

from k2mini.audit.hooks import trace
from k2mini.data.tokenizer import Tokenizer
from k2mini.inference.engine import Engine
from k2mini.inference.request import QueueFullError
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama
from k2mini.serving.asked import Asked, Served
from k2mini.serving.choices import Choice, Part, chat_logprobs, completion_logprobs, token_text
from k2mini.serving.fields import FLAG, Check, RefusedError, only, read, refuse

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
GAUGES = ("slots_busy", "waiting")  # of the engine's counts; the others only grow
BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, math.inf)  # seconds, of the histograms


class Service:
    """What is served, and its engine; `others`, by name, are those of models with weights of their own."""

    def __init__(self, engine: Engine, served: Served, others: Mapping[str, Engine] | None = None) -> None:
        self.engine, self.served, self.created = engine, served, int(time.time())
        self.engine_of = {**dict.fromkeys(served.models, engine), **(others or {})}  # model -> engine
        self.engines = [engine, *(others or {}).values()]
        self._one_look = asyncio.Lock()
        self.seconds = {"time_to_first_token": 0.0, "time_per_token": 0.0}  # in all
        self.times = Counter[tuple[str, float]]()  # how many were no longer than a bound, and longer than the one below

    def run(self) -> None:
        """Let the engines answer until `stop`, the first in this thread."""
        for other in self.engines[1:]:
            threading.Thread(target=other.run, daemon=True).start()
        self.engine.run()

    def stop(self) -> None:
        """Let `run` return; what is being answered is told so."""
        for engine in self.engines:
            engine.stop(drain=False)

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.served.models]}

    def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        self.served.adapter({"model": name})
        about = {"id": name, "object": "model", "created": self.created, "owned_by": "k2mini"}
        return {**about, "max_model_len": self.served.capacity}

    def info(self) -> dict[str, Any]:
        """GET /k2mini/info, for the page."""
        models = [{"id": name, "adapter": adapter is not None} for name, adapter in self.served.models.items()]
        about = {"context": self.served.capacity, "version": version("k2mini")}
        return {"models": models, "templates": list(self.served.templates), "template": self.served.template, **about}

    def tokenizer_info(self) -> dict[str, Any]:
        """GET /tokenizer_info, which lm-evaluation-harness asks for."""
        return {**self.served.tokenizer.hf_config(), "model_max_length": self.served.capacity}

    async def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /tokenize. A control symbol that stands alone, such as '</s>', is its id: so a client learns it."""
        given = self._given(body, "prompt", prompt=only(str), add_special_tokens=FLAG)
        tokenizer, text, bos = self.served.tokenizer, given["prompt"], given.get("add_special_tokens", True)
        stands = [token for token in (tokenizer.bos_id, *tokenizer.stop_ids) if token is not None]
        tokens = {tokenizer.piece(token): [token] for token in stands}.get(text, [])
        if not tokens:
            tokens = await asyncio.to_thread(tokenizer.encode, text, bos=bos, eos=False)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.served.capacity}

    async def detokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /detokenize."""
        tokens = self._given(body, "tokens", tokens=only(list))["tokens"]
        return {"prompt": self.served.tokenizer.decode(self.served.ids("tokens", tokens)) if tokens else ""}

    def _given(self, body: dict[str, Any], field: str, **fields: Check) -> dict[str, Any]:
        """What is asked of `field`. A model may be named, though all have one tokenizer."""
        given = read(body, {"model": only(*self.served.models), **fields})
        if field not in given:
            raise refuse(field, "is missing", "missing_required_parameter")
        return given

    async def why(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /k2mini/why: what each layer would have said in the place of the last token."""
        given = read(body, {"model": only(str), "tokens": only(list)})
        adapter, tokens = self.served.adapter(given), self.served.ids("tokens", given.get("tokens"))
        engine = self.engine_of[given["model"]]
        if len(tokens) < 2:
            raise refuse("tokens", "must have at least one token before the last")

        def look() -> list[dict[str, Any]]:
            engine.alone(adapter)
            return lens(engine.model, tokens, self.served.tokenizer)

        try:
            async with self._one_look:  # the engine steps between one and the next
                return {"layers": await asyncio.wrap_future(engine.between(look))}
        except ValueError as error:
            raise RefusedError(400, str(error)) from None

    def metrics(self) -> str:
        """GET /metrics, in Prometheus' text format."""
        lines = ["# TYPE k2mini_slots gauge", f"k2mini_slots {sum(engine.slots for engine in self.engines)}"]
        for name in asdict(self.engine.counts):
            value = sum(getattr(engine.counts, name) for engine in self.engines)
            full, kind = (name, "gauge") if name in GAUGES else (f"{name}_total", "counter")
            lines += [f"# TYPE k2mini_{full} {kind}", f"k2mini_{full} {value}"]
        for name, seconds in self.seconds.items():
            full, numbers = f"k2mini_{name}_seconds", [*accumulate(self.times[name, bound] for bound in BOUNDS)]
            lines.append(f"# TYPE {full} histogram")
            for bound, number in zip(BOUNDS, numbers, strict=True):
                lines.append(f'{full}_bucket{{le="{str(bound).replace("inf", "+Inf")}"}} {number}')
            lines += [f"{full}_sum {seconds}", f"{full}_count {numbers[-1]}"]
        return "\n".join(lines) + "\n"

    def timed(self, name: str, seconds: float) -> None:
        """Add to the times that `metrics` shows."""
        self.times[name, BOUNDS[bisect_left(BOUNDS, seconds)]] += 1
        self.seconds[name] += seconds


@torch.inference_mode()
def lens(model: Llama, tokens: list[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The logit lens where the last token was chosen: each layer's likeliest tokens, and the rank of that token."""
    with trace(model, ["layers.*.residual_out"], positions=[-1]) as cache:
        model.hidden(torch.tensor([tokens[:-1]], device=model.device))
    layers = []
    for number in range(model.config.num_layers):
        logits = model.logits(model.model.norm(cache[f"layers.{number}.residual_out"][0]))  # (1, V)
        probabilities = log_softmax(logits[0, : tokenizer.vocab_size]).exp()
        own, (values, ids) = probabilities[tokens[-1]], probabilities.topk(min(5, len(probabilities)))
        top = [[token_text(tokenizer, token), p] for token, p in zip(ids.tolist(), values.tolist(), strict=True)]
        rank = int((probabilities > own).sum())
        layers.append({"layer": number, "top": top, "rank": rank, "probability": own.item()})
    return layers


class Answering:
    """The answers to one request, from the engine to JSON. All of it runs in the server's loop."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self.service, self.asked, self._tokenizer = service, asked, service.served.tokenizer
        self._engine = service.engine_of[asked.model]
        parts: asyncio.Queue[Part] = asyncio.Queue()  # no more than one for each token
        self._parts, loop = parts, asyncio.get_running_loop()
        kind, name = ("chat.completion", "chatcmpl") if asked.chat else ("text_completion", "cmpl")
        about = {"object": kind + ".chunk" * (asked.stream and asked.chat), "model": asked.model}
        self._about = {"id": f"{name}-{secrets.token_hex(12)}", "created": int(time.time()), **about}

        def put(part: Part) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(parts.put_nowait, part)

        number = len(asked.prompts) * asked.best_of
        self.choices = [Choice(index, asked, self._tokenizer, put) for index in range(number)]

    def submit(self) -> None:
        """Ask the engine. Raises RefusedError where too many wait."""
        try:
            for choice in self.choices:
                self._engine.submit(choice.request)
        except QueueFullError as error:
            wait = 1 + self._engine.counts.waiting // self._engine.slots
            raise RefusedError(429, str(error), code="queue_full", retry_after=wait) from None

    def cancel(self) -> None:
        """Free what is still held, and count what was made."""
        for choice in self.choices:
            if choice.end is None:
                self._engine.cancel(choice.request)
            for place, (before, time_) in enumerate(pairwise(choice.times)):
                self.service.timed("time_per_token" if place else "time_to_first_token", time_ - before)

    async def _until_end(self) -> AsyncIterator[Part]:
        """The parts of all choices as they come. Raises RefusedError where the engine failed."""
        left = len(self.choices)
        while left:
            part = await self._parts.get()
            if part.end is not None:
                left -= 1
                if part.end.reason == "error":
                    raise RefusedError(500, f"the answer broke off: {part.end.error}", code="engine_error")
                if part.end.reason not in FINISH:
                    raise RefusedError(503, "the server stops", code="draining")
            yield part

    async def whole(self) -> dict[str, Any]:
        """The answer, once all of it is there."""
        parts = [Part(choice.index) for choice in self.choices]
        async for new in self._until_end():
            old = parts[new.index]
            parts[new.index] = Part(new.index, old.text + new.text, old.tokens + new.tokens, new.end)
        if (many := self.asked.best_of) > self.asked.n:
            parts.sort(key=lambda part: (part.index // many, -self.choices[part.index].mean))
            parts = [part for place, part in enumerate(parts) if place % many < self.asked.n]
        choices = [{**self._choice(part, first=True), "index": index} for index, part in enumerate(parts)]
        return {**self._about, "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, but for the last, [DONE]."""
        usage: dict[str, Any] = {"usage": None} if self.asked.usage else {}
        begun = set[int]()
        try:
            async for part in self._until_end():
                choice = self._choice(part, first=part.index not in begun)
                begun.add(part.index)
                yield _event({**self._about, "choices": [choice], **usage})
            if usage:
                yield _event({**self._about, "choices": [], "usage": self.usage()})
        except RefusedError as error:
            yield _event({"error": error.error})

    def _choice(self, part: Part, *, first: bool) -> dict[str, Any]:
        asked, logprobs = self.asked, None
        said: dict[str, Any] = {"text": part.text}
        if asked.chat and asked.stream:
            said = {"delta": {"role": "assistant", "content": part.text} if first else {"content": part.text}}
        elif asked.chat:
            said = {"message": {"role": "assistant", "content": part.text, "refusal": None}}
        if asked.logprobs is not None:
            logprobs = (chat_logprobs if asked.chat else completion_logprobs)(self._tokenizer, part.tokens)
        ids: dict[str, Any] = {"token_ids": [token.id for token in part.tokens]} if asked.token_ids else {}
        if ids and first:
            ids["prompt_token_ids"] = asked.prompts[part.index // asked.best_of]
        finish = FINISH[part.end.reason] if part.end else None
        return {"index": part.index, **said, "logprobs": logprobs, "finish_reason": finish, **ids}

    def usage(self) -> dict[str, Any]:
        """How many tokens there were; a prompt counts once."""
        prompt, made = sum(map(len, self.asked.prompts)), sum(choice.made for choice in self.choices)
        ends = [choice.end for choice in self.choices[:: self.asked.best_of]]
        cached = {"cached_tokens": sum(end.reused for end in ends if end is not None)}
        tokens = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return {**tokens, "prompt_tokens_details": cached}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
