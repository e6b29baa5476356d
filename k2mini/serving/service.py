"""What the server does: answers made by the engine, and what is known of models, tokenizer and load."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from bisect import bisect_left
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from k2mini.audit.hooks import trace
from k2mini.data.prompts import TEMPLATES
from k2mini.inference.request import QueueFullError, Request
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama
from k2mini.serving.asked import Asked, RefusedError, Served, check_names, flag, refuse
from k2mini.serving.choices import Choice, Part, chat_logprobs, completion_logprobs, token_text

if TYPE_CHECKING:
    from k2mini.inference.engine import Engine

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
GAUGES = ("slots_busy", "waiting")  # of the engine's counts; the others only grow
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


class Histogram:
    """How often something took how long, as Prometheus counts it."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        """In Prometheus' text format."""
        bounds = [*map(str, BUCKETS), "+Inf"]
        buckets = [f'{name}_bucket{{le="{le}"}} {sum(self.counts[: i + 1])}' for i, le in enumerate(bounds)]
        return [f"# TYPE {name} histogram", *buckets, f"{name}_sum {self.sum}", f"{name}_count {sum(self.counts)}"]


class Service:
    """An engine and what it serves."""

    def __init__(self, engine: Engine, served: Served) -> None:
        self.engine, self.served, self.created = engine, served, int(time.time())
        self.first_token, self.next_token = Histogram(), Histogram()

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
        template, context = self.served.template, self.served.capacity
        templates = {"templates": list(TEMPLATES), "template": template}
        return {"models": models, **templates, "context": context, "version": version("k2mini")}

    def tokenizer_info(self) -> dict[str, Any]:
        """GET /tokenizer_info, which lm-evaluation-harness asks for."""
        return {**self.served.tokenizer.hf_config(), "model_max_length": self.served.capacity}

    async def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /tokenize. A control symbol that stands alone, such as '</s>', is its id: so a client learns it."""
        check_names(body, ("model", "prompt", "add_special_tokens"))
        tokenizer, text = self.served.tokenizer, body.get("prompt")
        if not isinstance(text, str):
            raise refuse("prompt", "must be text", "invalid_type")
        bos = body.get("add_special_tokens") is None or flag(body, "add_special_tokens")
        control = {tokenizer.piece(token): token for token in (tokenizer.bos_id, tokenizer.eos_id)}
        tokens = (
            [control[text]] if text in control else await asyncio.to_thread(tokenizer.encode, text, bos=bos, eos=False)
        )
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.served.capacity}

    async def detokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /detokenize."""
        check_names(body, ("model", "tokens"))
        tokens = body.get("tokens") and self.served.ids("tokens", body["tokens"])
        return {"prompt": await asyncio.to_thread(self.served.tokenizer.decode, tokens or [])}

    async def why(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /k2mini/why: what each layer would have said in the place of the last token."""
        check_names(body, ("model", "tokens"))
        adapter, tokens = self.served.adapter(body), self.served.ids("tokens", body.get("tokens"))
        if len(tokens) < 2:
            raise refuse("tokens", "must have at least one token before the last")

        def look() -> list[dict[str, Any]]:
            self.engine.alone(adapter)
            return lens(self.engine.model, tokens, self.served)

        try:
            return {"layers": await asyncio.wrap_future(self.engine.between(look))}
        except ValueError as error:
            raise RefusedError(400, str(error)) from None

    def metrics(self) -> str:
        """GET /metrics, in Prometheus' text format."""
        lines = ["# TYPE k2mini_slots gauge", f"k2mini_slots {self.engine.slots}"]
        for name, value in asdict(self.engine.counts).items():
            full, kind = (f"k2mini_{name}", "gauge") if name in GAUGES else (f"k2mini_{name}_total", "counter")
            lines += [f"# TYPE {full} {kind}", f"{full} {value}"]
        lines += self.first_token.lines("k2mini_time_to_first_token_seconds")
        lines += self.next_token.lines("k2mini_time_per_token_seconds")
        return "\n".join(lines) + "\n"


@torch.inference_mode()
def lens(model: Llama, tokens: list[int], served: Served) -> list[dict[str, Any]]:
    """The logit lens where the last token was chosen: each layer's likeliest tokens, and the rank of that token."""
    with trace(model, ["layers.*.residual_out"], positions=[-1]) as cache:
        model.hidden(torch.tensor([tokens[:-1]], device=model.device))
    layers = []
    for number in range(model.config.num_layers):
        logits = model.logits(model.model.norm(cache[f"layers.{number}.residual_out"][0]))  # (1, V)
        probabilities = log_softmax(logits[0, : served.tokenizer.vocab_size]).exp()
        own, (values, ids) = probabilities[tokens[-1]], probabilities.topk(min(5, len(probabilities)))
        top = [[token_text(served.tokenizer, token), p] for token, p in zip(ids.tolist(), values.tolist(), strict=True)]
        rank = int((probabilities > own).sum())
        layers.append({"layer": number, "top": top, "rank": rank, "probability": own.item()})
    return layers


class Answering:
    """The answers to one request, from the engine to JSON. All but the choices' `deliver` runs in the server's loop."""

    def __init__(self, service: Service, asked: Asked, *, chat: bool) -> None:
        self.service, self.asked, self.chat = service, asked, chat
        self.tokenizer = service.served.tokenizer
        self._parts: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()  # at most one for each token
        self._loop = asyncio.get_running_loop()
        kind, name = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        self._about = {"id": f"{name}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
        self._about["model"] = asked.model
        self.choices: list[Choice] = []
        self._requests: list[Request] = []
        for prompt, new in zip(asked.prompts, asked.new, strict=True):
            for number in range(asked.n):
                self._add(prompt, new, number)

    def _add(self, prompt: list[int], new: int, number: int) -> None:
        asked = self.asked
        decoding = replace(asked.decoding, max_new_tokens=max(new, 1), seed=asked.decoding.seed + number)
        scored = decoding.top_logprobs if asked.echo else None
        put, echoed = partial(self._put, len(self.choices)), prompt if asked.echo else None
        with_eos = not self.chat and decoding.top_logprobs is not None
        choice = Choice(
            self.tokenizer, decoding.stop, put, echoed, scored=scored is not None, with_eos=with_eos
        )
        self.choices.append(choice)
        request = Request(prompt, decoding, (), choice.deliver, asked.adapter, scored, score_only=not new)
        self._requests.append(request)

    def _put(self, index: int, part: Part) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._parts.put_nowait, (index, part))

    def submit(self) -> None:
        """Ask the engine. Raises RefusedError where too many wait, or it can't be asked so."""
        try:
            for request in self._requests:
                self.service.engine.submit(request)
        except QueueFullError as error:
            refused = RefusedError(429, str(error), code="queue_full")
            counts, slots = self.service.engine.counts, self.service.engine.slots
            refused.headers["retry-after"] = str(1 + counts.waiting // slots)
            raise refused from None
        except ValueError as error:
            raise RefusedError(400, str(error)) from None

    def cancel(self) -> None:
        """Free what is still held, and count what was made."""
        for choice, request in zip(self.choices, self._requests, strict=True):
            if choice.end is None:
                self.service.engine.cancel(request)
            if choice.first:
                self.service.first_token.add(choice.first - choice.started)
            if choice.made > 1:
                self.service.next_token.add((choice.last - choice.first) / (choice.made - 1))

    async def _until_end(self) -> AsyncIterator[tuple[int, Part]]:
        """The parts of all choices as they come. Raises RefusedError where the engine failed."""
        left = len(self.choices)
        while left:
            index, part = await self._parts.get()
            if part.end is not None:
                left -= 1
                if part.end.reason == "error":
                    raise RefusedError(500, f"the answer broke off: {part.end.error}", code="engine_error")
                if part.end.reason not in FINISH:
                    raise RefusedError(503, "the server stops", code="draining")
            yield index, part

    async def whole(self) -> dict[str, Any]:
        """The answer, once all of it is there."""
        parts = [Part() for _ in self.choices]
        async for index, new in self._until_end():
            old = parts[index]
            parts[index] = Part(old.text + new.text, old.tokens + new.tokens, new.end)
        return {
            **self._about,
            "choices": [self._choice(index, part, first=True) for index, part in enumerate(parts)],
            "usage": self.usage(),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, but for the last, [DONE]."""
        about = {**self._about, "object": f"{self._about['object']}.chunk" if self.chat else self._about["object"]}
        usage: dict[str, Any] = {"usage": None} if self.asked.usage else {}
        begun = set[int]()
        try:
            async for index, part in self._until_end():
                choice = self._choice(index, part, first=index not in begun)
                begun.add(index)
                yield event({**about, "choices": [choice], **usage})
            if usage:
                yield event({**about, "choices": [], "usage": self.usage()})
        except RefusedError as error:
            yield event({"error": error.error})

    def _choice(self, index: int, part: Part, *, first: bool) -> dict[str, Any]:
        asked, finish = self.asked, FINISH[part.end.reason] if part.end else None
        said: dict[str, Any] = {"text": part.text}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            said = {"delta": {**role, "content": part.text}}
            if not asked.stream:
                said = {"message": {**role, "content": part.text, "refusal": None}}
        logprobs = None
        if asked.decoding.top_logprobs is not None:
            logprobs = (chat_logprobs if self.chat else completion_logprobs)(self.tokenizer, part.tokens)
        ids: dict[str, Any] = {"token_ids": [token.id for token in part.tokens]} if asked.token_ids else {}
        if ids and first:
            ids["prompt_token_ids"] = asked.prompts[index // asked.n]
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish, **ids}

    def usage(self) -> dict[str, Any]:
        """How many tokens there were; a prompt counts once."""
        prompt, made = sum(map(len, self.asked.prompts)), sum(choice.made for choice in self.choices)
        ends = [choice.end for choice in self.choices[:: self.asked.n]]
        cached = {"cached_tokens": sum(end.reused for end in ends if end is not None)}
        tokens = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return {**tokens, "prompt_tokens_details": cached}


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"
