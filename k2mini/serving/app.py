"""The server's ASGI application: who may ask, what is asked for where, and how a request ends.

Nothing stands between the server and a handler, so that `receive` tells each of them when its client has gone.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2mini.files import parse_json
from k2mini.serving.asked import RefusedError, read_asked
from k2mini.serving.service import Answering, Service

log = logging.getLogger(__name__)

MOST_BYTES = 4 * 2**20  # of a request's body
PATIENCE = 60.0  # seconds that a client may take to send its body, or to read a part of its answer
PAGE = Path(__file__).with_name("page")
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")

ANSWERS = {"/v1/completions": False, "/v1/chat/completions": True}  # whether it is a chat
POSTS = {"/tokenize": Service.tokenize, "/detokenize": Service.detokenize, "/k2mini/why": Service.why}
GETS: dict[str, Callable[[Service], Any]] = {
    "/v1/models": Service.models,
    "/tokenizer_info": Service.tokenizer_info,
    "/k2mini/info": Service.info,
    "/metrics": Service.metrics,
}

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
        keys: one of them must come with a request for anything but the page and /health; none: no key is needed.
        origins: of other sites, whose pages may ask; '*' is all.
        hosts: names by which the server may be called; none: by any. Without keys, a page elsewhere must neither reach
            a server on this machine by a name of its own that leads here, nor by a form.
    """

    keys: Sequence[bytes] = ()
    origins: Sequence[str] = ()
    hosts: Sequence[str] = ()

    def check(self, headers: Mapping[bytes, bytes], *, public: bool) -> None:
        """Raise RefusedError where a request may not be made."""
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if self.hosts and re.sub(":[0-9]*$", "", host).strip("[]") not in self.hosts:
            raise RefusedError(403, "this server answers to its own address alone; --host gives it another")
        foreign = origin and origin.partition("://")[2] != host and not {origin, "*"} & {*self.origins}
        if foreign and not self.keys:
            raise RefusedError(403, "a page of another site asks; --cors ORIGIN would let it")
        key = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        known = [hmac.compare_digest(key, each) for each in self.keys]  # all of them, in any case
        if self.keys and not public and not any(known):
            raise RefusedError(401, "the API key is missing or wrong", code="invalid_api_key")

    def allowed(self, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """What lets a page of another site read the answer."""
        origin = headers.get(b"origin", b"")
        if not {origin.decode("latin-1"), "*"} & {*self.origins} or not origin:
            return []
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]


@dataclass
class Call:
    """One request, and its answer as far as it has come."""

    scope: Scope
    receive: Receive
    send: Send
    more: list[tuple[bytes, bytes]]  # headers of the answer
    status: int = 0
    tokens: str = ""  # for the log
    headers: Mapping[bytes, bytes] = field(default_factory=dict)

    async def start(self, status: int, kind: str, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send the status and the headers."""
        self.status = status
        about = [(b"content-type", kind.encode()), (b"x-content-type-options", b"nosniff"), *self.more, *more]
        await self.send({"type": "http.response.start", "status": status, "headers": about})

    async def write(self, content: bytes, *, more: bool = False) -> None:
        """Send a part of the body. Raises TimeoutError where nobody reads it."""
        async with asyncio.timeout(PATIENCE):
            await self.send({"type": "http.response.body", "body": content, "more_body": more})

    async def answer(
        self, status: int, content: bytes, kind: str = "application/json", more: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """Send all of an answer."""
        await self.start(status, kind, [(b"content-length", str(len(content)).encode()), *more])
        await self.write(content)

    async def body(self) -> dict[str, Any]:
        """The JSON object of a POST. Raises RefusedError."""
        kind = self.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json" or b"content-encoding" in self.headers:
            raise RefusedError(415, "the body must be JSON, and content-type say so: application/json")
        content = bytearray()
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    content += message.get("body", b"")
                    if len(content) > MOST_BYTES:
                        self.more.append((b"connection", b"close"))
                        raise RefusedError(413, f"the body has more than {MOST_BYTES:,} bytes")
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            self.more.append((b"connection", b"close"))
            raise RefusedError(408, f"the body did not come within {PATIENCE:g} s") from None
        try:
            body = await asyncio.to_thread(parse_json, bytes(content), "the body")
        except ValueError as error:
            raise RefusedError(400, str(error), code="invalid_json") from None
        if not isinstance(body, dict):
            raise RefusedError(400, "the body must be a JSON object", code="invalid_json")
        return body

    async def gone(self) -> None:
        """Return once the client has gone."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


class App:
    """The application. `service` is None while the model is loaded.

    Attributes:
        active: requests that are being answered.
        draining: new ones are refused.
    """

    def __init__(self, access: Access) -> None:
        self.access, self.active, self.draining = access, 0, False
        self.service: Service | None = None
        self.files = {
            "/" if path.name == "index.html" else f"/{path.name}": (path.read_bytes(), KINDS[path.suffix])
            for path in PAGE.glob("*.*")
            if path.suffix in KINDS
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        started, headers = time.perf_counter(), dict(scope["headers"])
        call = Call(scope, receive, send, self.access.allowed(headers), headers=headers)
        self.active += 1
        try:
            await self._answer(call)
        except RefusedError as refused:
            more = [(name.encode(), value.encode()) for name, value in refused.headers.items()]
            await call.answer(refused.status, json.dumps({"error": refused.error}).encode(), more=more)
        except (ConnectionResetError, TimeoutError):  # the client has gone, or no longer reads
            call.status = call.status or 499
        except Exception:
            log.exception("a request failed")
            if not call.status:
                failed = RefusedError(500, "the server made a mistake; its log says more").error
                await call.answer(500, json.dumps({"error": failed}).encode())
        finally:
            self.active -= 1
            seconds = time.perf_counter() - started
            path = scope.get("raw_path", b"").decode("latin-1")[:100]
            log.info("%s %s %d %.2f s%s", scope["method"][:10], path, call.status or 499, seconds, call.tokens)

    @property
    def state(self) -> str:
        """'loading', 'ok' or 'draining'."""
        return "draining" if self.draining else "loading" if self.service is None else "ok"

    async def _answer(self, call: Call) -> None:
        path, method = call.scope["path"], call.scope["method"]
        public = path in self.files or path == "/health"
        if method == "OPTIONS" and call.more:  # a browser asks before it lets a page of another site ask
            allowed = {"methods": b"GET, POST", "headers": b"authorization, content-type", "max-age": b"600"}
            about = [
                (f"access-control-{'' if n == 'max-age' else 'allow-'}{n}".encode(), v) for n, v in allowed.items()
            ]
            return await call.answer(204, b"", "text/plain", about)
        self.access.check(call.headers, public=public)
        name = path.removeprefix("/v1/models/") if path.startswith("/v1/models/") else None
        known = "GET" if public or path in GETS or name else "POST" if path in POSTS or path in ANSWERS else ""
        if not known:
            raise RefusedError(404, f"there is no {path[:100]!r}", code="not_found")
        if method != known and not (known == "GET" and method == "HEAD"):
            refused = RefusedError(405, f"{path[:100]} takes {known}, not {method[:10]}", code="method_not_allowed")
            refused.headers["allow"] = known
            raise refused
        if path in self.files:
            content, kind = self.files[path]
            about = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}
            more = [(key.encode(), value.encode()) for key, value in about.items()]
            return await call.answer(200, content, f"{kind}; charset=utf-8", more)
        if path == "/health":
            return await call.answer(200 if self.state == "ok" else 503, json.dumps({"status": self.state}).encode())
        if self.service is None or (self.draining and known == "POST"):
            refused = RefusedError(503, f"the server is {self.state}", code=self.state)
            refused.headers["retry-after"] = "5"
            raise refused
        if path in ANSWERS:
            return await self._generate(call, self.service, chat=ANSWERS[path])
        if known == "POST":
            result = await POSTS[path](self.service, await call.body())
        else:
            result = self.service.model(name) if name else GETS[path](self.service)
        if isinstance(result, str):
            return await call.answer(200, result.encode(), "text/plain; version=0.0.4")
        return await call.answer(200, json.dumps(result).encode())

    async def _generate(self, call: Call, service: Service, *, chat: bool) -> None:
        """Answer a completion or a chat, for as long as the client is there."""
        asked = await asyncio.to_thread(read_asked, await call.body(), service.served, chat=chat)
        answering = Answering(service, asked, chat=chat)
        work, gone = asyncio.create_task(_send(call, answering)), asyncio.create_task(call.gone())
        try:
            answering.submit()
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ConnectionResetError
            work.result()
        finally:
            work.cancel()
            gone.cancel()
            answering.cancel()
            usage = answering.usage()
            call.tokens = f", {usage['prompt_tokens']} + {usage['completion_tokens']} tokens"


async def _send(call: Call, answering: Answering) -> None:
    if not answering.asked.stream:
        return await call.answer(200, json.dumps(await answering.whole()).encode())
    await call.start(200, "text/event-stream; charset=utf-8", [(b"cache-control", b"no-cache")])
    async for content in answering.events():
        await call.write(content, more=True)
    return await call.write(b"data: [DONE]\n\n")
