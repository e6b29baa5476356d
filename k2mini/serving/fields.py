"""The fields of requests: each is done, or accepted where it changes nothing, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from k2mini.errors import short

Check = Callable[[Any], Any]  # a field's value as it is used; raises ValueError saying what it must be
MOST_ROWS = 64  # answers of one request: prompts times n


class RefusedError(Exception):
    """A request that is not answered as it asks: a status, OpenAI's error, and headers."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: Any):
        super().__init__(message)
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status, self.headers = status, headers
        self.error = {"message": message, "type": kind, "param": param, "code": code}


def refuse(param: str, why: str, code: str = "invalid_value") -> RefusedError:
    """The error to raise for a field: '`n` must be …'."""
    return RefusedError(400, f"`{param}` {why}", param, code)


def between(kind: type, low: float, high: float) -> Check:
    """A number from `low` to `high`."""

    def check(value: Any) -> Any:
        if type(value) not in (int, kind) or not low <= value <= high:
            raise ValueError(f"must be a {'whole ' if kind is int else ''}number from {low:,} to {high:,}")
        return kind(value)

    return check


def only(*values: Any) -> Check:
    """One of these values, or anything of these types."""
    names = {str: "text", bool: "true or false", dict: "an object", list: "a list"}
    said = " or ".join(names[value] if isinstance(value, type) else json.dumps(value) for value in values)

    def check(value: Any) -> Any:
        if not any(isinstance(value, each) if isinstance(each, type) else value == each for each in values):
            raise ValueError(f"must be {said or 'null'}")
        return value

    return check


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value  # each step looks for all of them: they are few and short
    if (
        not isinstance(stops, list)
        or len(stops) > 16
        or any(type(s) is not str or not 0 < len(s) <= 128 for s in stops)
    ):
        raise ValueError("must be text of 1 to 128 characters, or a list of at most 16 such")
    return tuple(stops)


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or len(value) > 1024 or not all(k.isdecimal() and len(k) < 10 for k in value):
        raise ValueError("must be an object of at most 1,024 token ids, each with a number")
    return tuple((int(token), between(float, -100, 100)(bias)) for token, bias in value.items())


FLAG, ROWS, TOP = only(bool), between(int, 1, MOST_ROWS), between(int, 0, 20)
SAMPLING: dict[str, Check] = {
    "temperature": between(float, 0, 2),
    "top_p": between(float, 1e-6, 1),
    "min_p": between(float, 0, 1),
    "repetition_penalty": between(float, 0.1, 10),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size"), between(int, 0, 2**31)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), between(float, -2, 2)),
    "logit_bias": _bias,
}
# Known fields that are not done, with what changes nothing. Of any field, null does not.
IDLE: dict[str, Check] = {
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key"), only(str)),
    **dict.fromkeys(("tools", "functions"), only([])),
    **dict.fromkeys(("tool_choice", "function_call"), only("none", "auto")),
    **dict.fromkeys(("audio", "prediction", "verbosity", "web_search_options"), only()),
    "metadata": only(dict),
    "store": only(False),
    "suffix": only(""),
    "response_format": only({"type": "text"}),
    "modalities": only(["text"]),
    "parallel_tool_calls": FLAG,
    "reasoning_effort": only("none"),
    "service_tier": only("auto", "default"),
}
SHARED: dict[str, Check] = {
    **SAMPLING,
    **IDLE,
    **dict.fromkeys(("stream", "return_token_ids"), FLAG),
    "stream_options": only({}, {"include_usage": True}, {"include_usage": False}),
    "model": only(str),
    "n": ROWS,
    "stop": _stops,
    "seed": between(int, -(2**62), 2**62),
}
COMPLETION: dict[str, Check] = dict(
    SHARED, prompt=only(str, list), echo=FLAG, best_of=ROWS, logprobs=TOP, max_tokens=between(int, 0, 2**31)
)
CHAT: dict[str, Check] = dict(SHARED, messages=only(list), template=only(str), logprobs=FLAG, top_logprobs=TOP)
CHAT |= dict.fromkeys(("max_tokens", "max_completion_tokens"), between(int, 1, 2**31))
MESSAGE: dict[str, Check] = {
    **dict.fromkeys(("refusal", "tool_calls", "function_call", "audio", "annotations"), only([])),
    "role": only("system", "developer", "user", "assistant", "tool"),
    "content": only(str, list),
    "input": only(str),
}


def read(body: Mapping[str, Any], fields: Mapping[str, Check]) -> dict[str, Any]:
    """The fields of a request that are not null, checked. Raises RefusedError, which names the field."""
    found = {}
    for name, value in body.items():
        if name not in fields:
            raise RefusedError(400, f"there is no field `{name[:99]}`", name[:99], "unknown_parameter")
        try:
            if value is not None:
                found[name] = fields[name](value)
        except ValueError as error:
            raise refuse(name, f"{error}, not {short(value)}") from None
    return found
