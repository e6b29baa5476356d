"""What a request asks for: each of OpenAI's fields is done, or accepted where it changes nothing, or refused by name."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from k2mini.data.prompts import TEMPLATES, encode_prompt
from k2mini.data.tokenizer import Tokenizer
from k2mini.errors import short
from k2mini.inference.generate import Decoding
from k2mini.inference.sampling import Sampling

MOST_ROWS = 64  # answers of one request: prompts times n
MOST_STOPS, LONGEST_STOP = 16, 128  # stop strings and their characters: each step looks for all of them
COMPLETION_TOKENS = 16  # of a completion, where a request does not say (OpenAI's)

# Fields that are numbers: the type, the least and the largest.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, 2**31),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.1, 10),
    "no_repeat_ngram_size": (int, 0, 2**31),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "n": (int, 1, MOST_ROWS),
    "best_of": (int, 1, MOST_ROWS),
    "seed": (int, -(2**62), 2**62),
    "max_tokens": (int, 0, 2**31),
    "max_completion_tokens": (int, 1, 2**31),
    "logprobs": (int, 0, 20),
    "top_logprobs": (int, 0, 20),
}
SAMPLING = tuple(NUMBERS)[:8]
SHARED = {*SAMPLING, "model", "stream", "stream_options", "n", "stop", "seed", "max_tokens", "logprobs", "logit_bias"}
COMPLETION = SHARED | {"prompt", "echo", "best_of", "return_token_ids"}
CHAT = SHARED | {"messages", "max_completion_tokens", "top_logprobs", "template", "return_token_ids"}
# Known fields that are not done: the values, or the type, with which they would change nothing. null never does.
IDLE: dict[str, Any] = {
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key"), str),
    "metadata": dict,
    "store": [False],
    "suffix": [""],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "service_tier": ["auto", "default"],
    "parallel_tool_calls": bool,
    **dict.fromkeys(("tools", "functions"), [[]]),
    **dict.fromkeys(("tool_choice", "function_call"), ["none", "auto"]),
    "reasoning_effort": ["none"],
    **dict.fromkeys(("audio", "prediction", "verbosity", "web_search_options"), []),
}


class RefusedError(Exception):
    """A request that is not answered as it asks: a status, and OpenAI's error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict[str, str]()
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.error = {"message": message, "type": kind, "param": param, "code": code}


def refuse(param: str, why: str, code: str = "invalid_value") -> RefusedError:
    """The error to raise for a field: '`n` must be …'."""
    return RefusedError(400, f"`{param}` {why}", param, code)


@dataclass(frozen=True)
class Served:
    """What requests are checked against.

    Args:
        models: name -> its adapter's name, or None for the base, which comes first.
        template: of a chat, where the request names none.
        capacity: tokens of a prompt and its answer together.
        max_tokens: of an answer; None: what the capacity leaves.
        seed: where a request names none; None: drawn.
    """

    tokenizer: Tokenizer
    models: Mapping[str, str | None]
    template: str
    capacity: int
    max_tokens: int | None = None
    seed: int | None = None

    @cached_property
    def longest(self) -> int:
        """Characters that a token has at most."""
        return max(len(self.tokenizer.piece(token)) for token in range(self.tokenizer.vocab_size))

    def adapter(self, body: dict[str, Any]) -> str | None:
        """The adapter of the model that a request names. Raises RefusedError where there is no such model."""
        if not isinstance(name := body.get("model"), str):
            raise refuse("model", f"must name one of {', '.join(self.models)}", "missing_required_parameter")
        if name not in self.models:
            there = ", ".join(self.models)
            said = f"the model {short(name)} does not exist; there are {there}"
            raise RefusedError(404, said, "model", "model_not_found")
        return self.models[name]

    def ids(self, field: str, tokens: Any) -> list[int]:
        """A list of token ids, checked."""
        if not isinstance(tokens, list) or not tokens:
            raise refuse(field, f"must be text or a list of token ids, not {short(tokens)}", "invalid_type")
        if len(tokens) > self.capacity:
            raise self.too_long(field, f"has {len(tokens):,} tokens")
        for token in tokens:
            if type(token) is not int or not 0 <= token < self.tokenizer.vocab_size:
                raise refuse(field, f"has {short(token)}, which is no token id below {self.tokenizer.vocab_size}")
        return tokens

    def text(self, field: str, text: str) -> str:
        """Text that is not too long to be worth encoding."""
        if len(text) > self.capacity * self.longest:
            raise self.too_long(field, f"has {len(text):,} characters")
        return text

    def too_long(self, field: str, what: str) -> RefusedError:
        """The error to raise where a prompt, and its answer, do not fit."""
        return refuse(field, f"{what}; the context has {self.capacity:,} tokens", "context_length_exceeded")


@dataclass(frozen=True)
class Asked:
    """A completion or a chat, checked.

    Args:
        new: of each prompt, how many tokens may follow it.
        n: answers of each prompt.
        usage: the last event of a stream says how many tokens there were.
        token_ids: the answer has ids too.
    """

    model: str
    adapter: str | None
    prompts: list[list[int]]
    new: list[int]
    n: int
    decoding: Decoding
    stream: bool
    usage: bool
    echo: bool
    token_ids: bool


def read_asked(body: dict[str, Any], served: Served, *, chat: bool) -> Asked:
    """Check a request for a completion or a chat. Raises RefusedError, which names the field."""
    check_names(body, CHAT if chat else COMPLETION)
    adapter, n = served.adapter(body), _number(body, "n") or 1
    if body.get("best_of") not in (None, n):
        raise refuse("best_of", f"must equal `n`, which is {n}: every answer is returned")
    stream, echo, options = flag(body, "stream"), flag(body, "echo"), body.get("stream_options")
    if options is not None and (not stream or not isinstance(options, dict) or not {*options} <= {"include_usage"}):
        raise refuse("stream_options", 'goes with `stream` and must be {"include_usage": true} or false')
    top = _number(body, "top_logprobs" if chat else "logprobs")
    if chat and flag(body, "logprobs"):
        top = top or 0
    elif chat and top is not None:
        raise refuse("top_logprobs", "needs `logprobs`: true")
    prompts = [_chat_prompt(body, served)] if chat else _prompts(body, served)
    if len(prompts) * n > MOST_ROWS:
        raise refuse("n" if chat else "prompt", f"asks for more than {MOST_ROWS} answers at once")
    drawn = secrets.randbits(48) if served.seed is None else served.seed
    seed = drawn if body.get("seed") is None else _number(body, "seed")
    decoding = Decoding(sampling=_sampling(body, served), seed=seed, stop=_stop(body), top_logprobs=top)
    usage, ids = flag(options or {}, "include_usage"), flag(body, "return_token_ids")
    new = _new_tokens(body, served, [len(prompt) for prompt in prompts], chat=chat, echo=echo)
    return Asked(body["model"], adapter, prompts, new, n, decoding, stream, usage, echo, ids)


def check_names(body: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise RefusedError where a field is unknown, or not done and not idle either."""
    for name, value in body.items():
        if name in known or (name in IDLE and value is None):
            continue
        if name not in IDLE:
            raise RefusedError(400, f"there is no field {short(name)}", name[:200], "unknown_parameter")
        idle = IDLE[name]
        if not (value in idle if isinstance(idle, list) else isinstance(value, idle)):
            raise refuse(name, f"is not supported (it is {short(value)})", "unsupported_parameter")


def flag(body: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; false where there is none."""
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise refuse(name, f"must be true or false, not {short(value)}", "invalid_type")
    return bool(value)


def _number(body: Mapping[str, Any], name: str) -> Any:
    """A number in its range; None where the request has none."""
    value, (kind, low, high) = body.get(name), NUMBERS[name]
    if value is None:
        return None
    if type(value) is not int and not (kind is float and type(value) is float):
        raise refuse(name, f"must be a {'whole ' if kind is int else ''}number, not {short(value)}", "invalid_type")
    if not low <= value <= high:
        raise refuse(name, f"must be from {low} to {high}, not {short(value)}")
    return kind(value)


def _sampling(body: dict[str, Any], served: Served) -> Sampling:
    given = {name: _number(body, name) for name in SAMPLING if body.get(name) is not None}
    if 0 < given.setdefault("temperature", 1.0) < 0.01:
        raise refuse("temperature", f"must be 0 (greedy) or from 0.01 to 2, not {given['temperature']}")
    if bias := body.get("logit_bias"):
        size = served.tokenizer.vocab_size
        if not isinstance(bias, dict) or len(bias) > 1024:
            raise refuse("logit_bias", "must be an object of at most 1,024 token ids with numbers", "invalid_type")
        for token, value in bias.items():
            if not (re.fullmatch("[0-9]{1,9}", token) and int(token) < size):
                raise refuse("logit_bias", f"has {short(token)}, which is no token id below {size}")
            if type(value) not in (int, float) or not -100 <= value <= 100:
                raise refuse("logit_bias", f"of {token} must be from -100 to 100, not {short(value)}")
        given["logit_bias"] = tuple((int(token), float(value)) for token, value in bias.items())
    try:
        return Sampling(**given)
    except ValueError as error:  # in the words of the command line
        option = re.search("--([a-z-]+)", str(error))
        name = option[1].replace("-", "_") if option else "temperature"
        raise refuse(name, re.sub("^--[a-z-]+ ", "", str(error))) from None


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise refuse("stop", f"must be text or a list of at most {MOST_STOPS}, not {short(stop)}", "invalid_type")
    for text in stops:
        if not isinstance(text, str) or not 0 < len(text) <= LONGEST_STOP:
            raise refuse("stop", f"must be text of 1 to {LONGEST_STOP} characters, not {short(text)}")
    return tuple(stops)


def _new_tokens(body: dict[str, Any], served: Served, lengths: list[int], *, chat: bool, echo: bool) -> list[int]:
    names = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    if len(names) > 1:
        raise refuse(names[1], "and `max_tokens` are the same; leave one")
    asked = _number(body, names[0]) if names else None
    if asked == 0 and not echo:
        raise refuse("max_tokens", "is 0, which goes with `echo` alone")
    most = served.capacity if served.max_tokens is None else served.max_tokens
    if asked is not None and asked > most:
        raise refuse(names[0], f"must be at most {most:,}, not {asked}")
    new = []
    for length in lengths:
        left = served.capacity - length
        if left < (1 if asked is None else asked):
            what = f"has {length:,} tokens{f' and asks for {asked:,} more' if asked else ''}"
            raise served.too_long("messages" if chat else "prompt", what)
        new.append(min(left, most if chat else COMPLETION_TOKENS) if asked is None else asked)
    return new


def _prompts(body: dict[str, Any], served: Served) -> list[list[int]]:
    """Text with BOS before it; ids as they are."""
    prompt = body.get("prompt")
    many = prompt if isinstance(prompt, list) and prompt and type(prompt[0]) in (str, list) else [prompt]
    if len(many) > MOST_ROWS:
        raise refuse("prompt", f"asks for more than {MOST_ROWS} answers at once")
    return [
        served.tokenizer.encode(served.text("prompt", one), bos=True, eos=False)
        if isinstance(one, str)
        else served.ids("prompt", one)
        for one in many
    ]


def _chat_prompt(body: dict[str, Any], served: Served) -> list[int]:
    """The tokens of a conversation, as `k2mini chat` joins its turns."""
    name = served.template if body.get("template") is None else body["template"]
    if not isinstance(name, str) or name not in TEMPLATES:
        raise refuse("template", f"must be one of {', '.join(TEMPLATES)}, not {short(name)}")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise refuse("messages", "must be a list of messages", "missing_required_parameter")
    read = [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]
    system = read.pop(0)[1] if read[0][0] in ("system", "developer") else ""
    if [role for role, *_ in read] != ["user", "assistant"] * (len(read) // 2) + ["user"]:
        what = "may begin with one `system`, then `user` and `assistant` take turns, and the last is `user`"
        raise refuse("messages", f"{what}: a template can't express another order")
    served.text("messages", "".join(text + context for _, text, context in read) + system)
    ids: list[int] = []
    for role, text, context in read:
        if role == "assistant":
            ids += [*served.tokenizer.encode_more(text), served.tokenizer.eos_id]
            continue
        try:
            ids += encode_prompt(served.tokenizer, TEMPLATES[name], text, context, "" if ids else system)
        except ValueError as error:
            raise refuse("messages", f"can't be answered: {error}") from None
    return ids


def _message(message: Any, place: str) -> tuple[str, str, str]:
    """A message's role, text and, where a user gives one, the template's input."""
    if not isinstance(message, dict):
        raise refuse("messages", f"must be objects; {place} is {short(message)}", "invalid_type")
    role, content, context = message.get("role"), message.get("content"), message.get("input")
    if role not in ("system", "developer", "user", "assistant"):
        raise refuse("messages", f"have a role; that of {place} can't be {short(role)}")
    for key, value in message.items():
        if key not in ("role", "content", "input") and value not in (None, []):
            raise refuse("messages", f"have role and content; {place} has {short(key)} too", "unsupported_parameter")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) and len(part) == 2
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not isinstance(context or "", str):
        raise refuse("messages", f"are text; the content of {place} is {short(content)}", "invalid_type")
    if context and role != "user":
        raise refuse("messages", f"have an input where the role is user; {place} is no such")
    return role, content, context or ""
