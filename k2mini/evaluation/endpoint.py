"""A model behind an HTTP server that speaks OpenAI's API: ours, vLLM's, llama.cpp's, OpenAI's own."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from k2mini.errors import short
from k2mini.files import parse_json

TRIES, TIMEOUT = 4, 600.0  # seconds: a long prompt on a CPU
# What servers say of a text that is longer than their context, beside 400, 413 or 422.
_TOO_LONG = re.compile(
    r"context (length|size|window)|the context has|too (long|large)|longer than the max", re.IGNORECASE
)


class TooLongError(ValueError):
    """The endpoint refuses a text that is longer than its context."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: another host is not told the key."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)


class TextToken(NamedTuple):
    """A token of a prompt: its text, where it begins in the prompt, in characters, and its log-probability in nats."""

    text: str
    place: int
    logprob: float | None


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked.

    Attributes:
        url: with the version, as OpenAI's clients have it: `http://localhost:8000/v1`.
        model: its name at the server.

    The key, where the server wants one, is the environment variable OPENAI_API_KEY.
    """

    url: str
    model: str

    def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Ask `path` ("completions", "chat/completions") and return the JSON object that answers.

        Busy servers (429, 5xx), and answers that break off, are asked for again, after 1, 2 and 4 seconds. Raises
        ValueError naming the address and what is wrong where there is no server, it refuses, sends elsewhere, or its
        answer is no JSON object; `TooLongError` where it says that the text is too long.
        """
        where = f"{self.url.rstrip('/')}/{path}"
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            if not re.fullmatch("https?://[!-~]+", where) or urlsplit(where).port == 0:  # it raises for what is no port
                raise ValueError
            request = urllib.request.Request(where, json.dumps({"model": self.model, **payload}).encode(), headers)
        except ValueError:
            raise ValueError(f"{self.url!r} is no address of a server, such as http://localhost:8000/v1") from None
        for tried in range(TRIES):
            try:
                with _OPENER.open(request, timeout=TIMEOUT) as response:
                    answer = parse_json(response.read().decode("utf-8", "replace"), where)
            except (OSError, http.client.HTTPException) as error:  # urllib's own errors, and time that ran out
                code = getattr(error, "code", 599 if isinstance(error, http.client.HTTPException) else 0)
                if (code == 429 or code >= 500) and tried + 1 < TRIES:
                    time.sleep(2**tried)
                    continue
                raise _refused(where, error) from None
            if not isinstance(answer, dict):
                raise ValueError(f"{where} answers {short(answer)}, no JSON object")
            return answer
        raise AssertionError("the last try returns or raises")

    def tokens(self, text: str) -> list[TextToken]:
        """The tokens of `text`, as the endpoint makes and scores them; BOS is the first of them where it shows one.

        Raises ValueError where the endpoint gives no log-probabilities of a prompt, as chat endpoints and OpenAI's do.
        """
        asked = {"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        answer = self.post("completions", asked)
        pairs = []
        with suppress(KeyError, IndexError, TypeError, ValueError):
            choice = answer["choices"][0]
            names, places, values = (choice["logprobs"][key] for key in ("tokens", "text_offset", "token_logprobs"))
            shift = _shift(names, places, text)
            places = [max(place - shift, 0) for place in places]
            found = [TextToken(*token) for token in zip(names, places, values, strict=True)]
            own = [token for token in found if token.place < len(text)]
            new = len(found) - len(own)
            if new == 1 or (new == 0 and choice["finish_reason"] != "length"):  # EOS may be one, and may not
                pairs = own
        if len(pairs) < 2 or any(not isinstance(token.logprob, float | int) for token in pairs[1:]):
            raise ValueError(
                f"{self.url} gives no log-probabilities of the prompt (`echo` with `logprobs` of /completions), which "
                "scoring needs; k2mini serve, vLLM and llama-cpp-python (--logits_all true, of a model with BOS) do"
            )
        return pairs


def at_a_time(number: int, ask: Callable[[Any], Any], what: Sequence[Any]) -> Iterator[Any]:
    """What `ask` returns for each, in their order, so many of them being asked at a time."""
    pool = ThreadPoolExecutor(number)
    try:
        yield from pool.map(ask, what)
    finally:
        pool.shutdown(cancel_futures=True)


def _shift(names: list[str], places: list[int], text: str) -> int:
    """How many characters of tokens' texts come before the prompt's, where places count them.

    They do in vLLM, which counts BOS as it is written, and in llama.cpp, which counts the space that LLaMA's tokenizer
    puts before a text. Raises ValueError where the tokens are not the text's.
    """
    sums = [0, *accumulate(map(len, names))][: len(places)]
    begin = re.match("[ -~]{0,16}", text)
    return "".join(names).index(begin[0]) if begin and places[:2] == sums[:2] else 0


def _refused(where: str, error: Exception) -> ValueError:
    """What to raise; the server's own words, in OpenAI's form or as they are."""
    if not isinstance(error, urllib.error.HTTPError):
        what = "gives a broken answer" if isinstance(error, http.client.HTTPException) else "can't be reached"
        return ValueError(f"{where} {what} ({getattr(error, 'reason', None) or repr(error)[:200]})")
    if location := error.headers.get("Location"):
        return ValueError(f"{where} answers {error.code}, it is at {short(location)}; name that address")
    text = ""
    with suppress(OSError, http.client.HTTPException):
        text = error.read().decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    kind = TooLongError if error.code in (400, 413, 422) and _TOO_LONG.search(str(text)) else ValueError
    return kind(f"{where} answers {error.code}: {str(text)[:300]!r}")
