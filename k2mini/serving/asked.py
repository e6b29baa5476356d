"""What a completion or a chat asks for, checked against what is served."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from k2mini.data.chats import encode_chat, stop_ids
from k2mini.data.prompts import TEMPLATES, AnyTemplate
from k2mini.data.tokenizer import Tokenizer
from k2mini.errors import short
from k2mini.inference.decoding import Decoding
from k2mini.inference.sampling import Sampling
from k2mini.serving.fields import CHAT, COMPLETION, MESSAGE, MOST_ROWS, SAMPLING, RefusedError, only, read, refuse

COMPLETION_TOKENS = 16  # of a completion, where a request does not say (OpenAI's)


@dataclass(frozen=True)
class Served:
    """What requests are checked against.

    Args:
        models: name -> its adapter's name, or None for the base, which comes first.
        template: of a chat, where the request names none.
        capacity: tokens of a prompt and its answer together.
        max_tokens: of an answer; None: what the capacity leaves.
        seed: where a request names none; None: drawn.
        rows: answers of one request.
        templates: those that a request may name.
    """

    tokenizer: Tokenizer
    models: Mapping[str, str | None]
    template: str
    capacity: int
    max_tokens: int | None = None
    seed: int | None = None
    rows: int = MOST_ROWS
    templates: Mapping[str, AnyTemplate] = field(default_factory=lambda: TEMPLATES)

    @cached_property
    def _longest(self) -> int:
        return max(len(self.tokenizer.piece(token)) for token in range(self.tokenizer.vocab_size))

    def adapter(self, given: Mapping[str, Any]) -> str | None:
        """The adapter of the model that a request names. Raises RefusedError where there is no such model."""
        name, there = given.get("model"), ", ".join(self.models)
        if name is None:
            raise refuse("model", f"must name one of {there}", "missing_required_parameter")
        if name not in self.models:
            said = f"the `model` {short(name)} does not exist; there are {there}"
            raise RefusedError(404, said, "model", "model_not_found")
        return self.models[name]

    def ids(self, field: str, tokens: Any) -> list[int]:
        """A list of token ids, checked."""
        if not isinstance(tokens, list) or not tokens:
            raise refuse(field, f"must be text or token ids, not {short(tokens)}", "invalid_type")
        self.fit(field, len(tokens))
        for token in tokens:
            if type(token) is not int or not 0 <= token < self.tokenizer.vocab_size:
                raise refuse(field, f"has {short(token)}, which is no token id below {self.tokenizer.vocab_size}")
        return tokens

    def text(self, field: str, text: str) -> str:
        """Text that is not so long that encoding it would be in vain."""
        self.fit(field, len(text) // self._longest)
        return text

    def fit(self, field: str, tokens: int, more: int = 0) -> None:
        """Raise RefusedError where a prompt, and `more` tokens of an answer, are too long."""
        if tokens + more > self.capacity:
            said = f"has {tokens:,} tokens or more{f' and asks for {more:,} more' if more else ''}"
            raise refuse(field, f"{said}; the context has {self.capacity:,}", "context_length_exceeded")


@dataclass(frozen=True)
class Asked:
    """A completion or a chat, checked.

    Args:
        new: of each prompt, how many tokens may follow it.
        n: answers of each prompt: those of the highest mean log-probability among `best_of`.
        logprobs: None, or of how many of the likeliest tokens the answer has the log-probabilities.
        usage: the last event of a stream says how many tokens there were.
        token_ids: the answer has ids too.
        stop_ids: each of them ends an answer.
    """

    chat: bool
    model: str
    adapter: str | None
    prompts: list[list[int]]
    new: list[int]
    n: int
    best_of: int
    logprobs: int | None
    decoding: Decoding
    stream: bool
    usage: bool
    echo: bool
    token_ids: bool
    stop_ids: tuple[int, ...]


def read_asked(body: Mapping[str, Any], served: Served, *, chat: bool) -> Asked:
    """Check a request for a completion or a chat. Raises RefusedError, which names the field."""
    given = read(body, {**CHAT, "template": only(*served.templates)} if chat else COMPLETION)
    template = served.templates[given.get("template", served.template)]
    adapter, n, echo = served.adapter(given), given.get("n", 1), given.get("echo", False)
    best = given.get("best_of", n)
    top, limit = given.get("logprobs"), _limit(given, served)
    if chat:
        top = given.get("top_logprobs", 0) if top else None
    for param, wrong, why in (
        ("best_of", best < n, f"must be at least `n`, which is {n}"),
        ("best_of", best > n and given.get("stream"), "does not go with `stream`: the best is known at the end"),
        ("stream_options", "stream_options" in given and not given.get("stream"), "goes with `stream`"),
        ("top_logprobs", "top_logprobs" in given and top is None, "needs `logprobs`: true"),
        ("temperature", 0 < given.get("temperature", 1) < 0.01, "must be 0, the likeliest token, or at least 0.01"),
        ("max_tokens", limit == 0 and not echo, "is 0, which goes with `echo` alone"),
    ):
        if wrong:
            raise refuse(param, why)
    for token, _ in given.get("logit_bias", ()):
        served.ids("logit_bias", [token])
    sampling = Sampling(**{"temperature": 1.0, **{name: given[name] for name in SAMPLING if name in given}})
    seed = given.get("seed", secrets.randbits(48) if served.seed is None else served.seed)
    scored = 0 if best > n and top is None else top
    decoding = Decoding(sampling=sampling, seed=seed, stop=given.get("stop", ()), top_logprobs=scored)
    prompts, new = [_chat_prompt(given, served, template)] if chat else _prompts(given, served), []
    if len(prompts) * best > served.rows:
        field = "best_of" if best > n else "n" if n > 1 else "prompt"
        raise refuse(field, f"asks for more than {served.rows} answers at once")
    for prompt in prompts:
        served.fit("messages" if chat else "prompt", len(prompt), 1 if limit is None else limit)
        most = (served.max_tokens or served.capacity) if chat else COMPLETION_TOKENS
        new.append(min(most, served.capacity - len(prompt)) if limit is None else limit)
    usage, ids = given.get("stream_options", {}).get("include_usage", False), given.get("return_token_ids", False)
    ends = stop_ids(served.tokenizer, template) if chat else served.tokenizer.stop_ids
    how = (n, best, top, decoding, given.get("stream", False), usage, echo, ids, ends)
    return Asked(chat, given["model"], adapter, prompts, new, *how)


def _limit(given: Mapping[str, Any], served: Served) -> int | None:
    """How many tokens may follow a prompt, where the request says so."""
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    limit = given[names[0]] if names else None
    if len(names) > 1:
        raise refuse(names[1], "and `max_tokens` are the same; leave one")
    if limit is not None and limit > (most := served.max_tokens or served.capacity):
        raise refuse(names[0], f"must be at most {most:,}, not {limit}")
    return limit


def _prompts(given: Mapping[str, Any], served: Served) -> list[list[int]]:
    """Text with BOS before it; ids as they are."""
    prompt, encode = given.get("prompt"), served.tokenizer.encode
    many = prompt if isinstance(prompt, list) and prompt and type(prompt[0]) in (str, list) else [prompt]
    if len(many) > served.rows:
        raise refuse("prompt", f"asks for more than {served.rows} answers at once")
    texts = [served.text("prompt", one) if isinstance(one, str) else served.ids("prompt", one) for one in many]
    found = [encode(one, bos=True, eos=False) if isinstance(one, str) else one for one in texts]
    if [] in found:
        raise refuse("prompt", "must not be empty, since this model has no BOS to go on from")
    return found


def _chat_prompt(given: Mapping[str, Any], served: Served, template: AnyTemplate) -> list[int]:
    """The tokens of a conversation, as `k2mini chat` has them. The template says which roles go, in which order."""
    messages = [_message(message, place) for place, message in enumerate(given.get("messages", []))]
    if not messages or messages[-1]["role"] in ("system", "assistant") or not messages[-1]["content"].strip():
        raise refuse("messages", "must end with what is to be answered")
    served.text("messages", "".join(message["content"] + message.get("input", "") for message in messages))
    try:
        return encode_chat(served.tokenizer, template, messages)
    except ValueError as error:
        raise refuse("messages", f"can't be asked in the template {template.name}: {error}") from None


def _message(message: Any, place: int) -> dict[str, str]:
    """A message's role, content and, where a user gives one, the template's input."""
    try:
        given = read(message, MESSAGE) if isinstance(message, dict) else {}
    except RefusedError as error:
        raise refuse("messages", f"can't be done: of [{place}], {error}") from None
    content, role = given.get("content"), given.get("role")
    if isinstance(content, list):
        plain = all(isinstance(p, dict) and {*p} == {"type", "text"} and type(p["text"]) is str for p in content)
        content = "".join(part["text"] for part in content) if plain else None
    if role is None or content is None or ("input" in given and role != "user"):
        raise refuse("messages", f"must have a role and text, and an input the user's alone; [{place}] does not")
    role = "system" if role == "developer" else role
    return {"role": role, "content": content, **({"input": given["input"]} if "input" in given else {})}
