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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2mini.files import parse_json
from k2mini.serving.asked import read_asked
from k2mini.serving.fields import RefusedError
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
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
        keys: one of them must come with a request for anything but the page and /health; none: no key is needed.
        origins: of other sites, whose pages may ask; '*' is all.
        hosts: names by which the server may be called; none: by any. Without keys, a page elsewhere must not reach a
            server on this machine by a name of its own that leads here.
    """

    keys: Sequence[bytes] = ()
    origins: Sequence[str] = ()
    hosts: Sequence[str] = ()

    def allows(self, origin: str) -> bool:
        """Whether pages of a site may read answers."""
        return bool(origin) and bool({origin, "*"} & {*self.origins})

    def check(self, headers: Mapping[str, str], *, public: bool) -> None:
        """Raise RefusedError where a request may not be made."""
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if self.hosts and re.sub(":[0-9]*$", "", host).strip("[]").lower() not in self.hosts:
            raise RefusedError(403, "this server answers to its own address alone; --host gives it another")
        if not self.keys and origin and origin.partition("://")[2] != host and not self.allows(origin):
            raise RefusedError(403, "a page of another site asks; --cors ORIGIN would let it")
        key = headers.get("authorization", "").removeprefix("Bearer ").strip().encode("latin-1")
        known = [hmac.compare_digest(key, each) for each in self.keys]  # all of them, in any case
        if self.keys and not public and not any(known):
            raise RefusedError(401, "the API key is missing or wrong", code="invalid_api_key")


class Call:
    """One request, and its answer as far as it has come; `more` are headers that it gets."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send, access: Access) -> None:
        self.path, self.method = scope["path"], scope["method"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.receive, self._send = receive, send
        self.status, self.tokens = 0, ""
        self.more: dict[str, Any] = {"x-content-type-options": "nosniff"}
        if access.allows(origin := self.headers.get("origin", "")):
            self.more |= {"access-control-allow-origin": origin, "vary": "Origin"}

    async def start(self, status: int, kind: str, **headers: Any) -> None:
        """Send the status and the headers."""
        self.status = status
        every = ({"content-type": kind} | self.more | headers).items()
        encoded = [(name.replace("_", "-").encode(), str(value).encode("latin-1")) for name, value in every]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def write(self, content: bytes, *, more: bool = False) -> None:
        """Send a part of the body. Raises TimeoutError where nobody reads it."""
        async with asyncio.timeout(PATIENCE):
            await self._send({"type": "http.response.body", "body": content, "more_body": more})

    async def answer(self, status: int, content: Any, kind: str = "application/json", **headers: Any) -> None:
        """Send all of an answer: bytes, text, or what becomes JSON."""
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        await self.start(status, kind, content_length=len(content), **headers)
        await self.write(content)

    async def body(self) -> dict[str, Any]:
        """The JSON object of a POST. Raises RefusedError, and ConnectionResetError where the client goes."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or "content-encoding" in self.headers:
            raise RefusedError(415, "the body must be JSON, and content-type say so: application/json")
        content, more = bytearray(), True
        try:
            async with asyncio.timeout(PATIENCE):
                while more:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    content += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(content) > MOST_BYTES:
                        raise RefusedError(413, f"the body has more than {MOST_BYTES:,} bytes", connection="close")
        except TimeoutError:
            raise RefusedError(408, f"the body did not come within {PATIENCE:g} s", connection="close") from None
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
        files = {f"/{path.name}": path for path in PAGE.glob("*.*") if path.suffix in KINDS}
        self.files = {name.replace("/index.html", "/"): path for name, path in files.items()}

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        call, started = Call(scope, receive, send, self.access), time.perf_counter()
        self.active += 1
        try:
            await self._answer(call)
        except RefusedError as refused:
            await call.answer(refused.status, {"error": refused.error}, **refused.headers)
        except (ConnectionResetError, TimeoutError):  # the client has gone, or no longer reads
            call.status = call.status or 499
        except Exception:
            log.exception("a request failed")
            if not call.status:
                await call.answer(500, {"error": RefusedError(500, "the server made a mistake; its log has it").error})
        finally:
            self.active -= 1
            path, seconds = scope["raw_path"].decode("latin-1")[:99], time.perf_counter() - started
            log.info("%s %s %d %.2f s%s", call.method[:9], path, call.status or 499, seconds, call.tokens)

    async def _answer(self, call: Call) -> None:
        path, origin = call.path, call.headers.get("origin", "")
        if call.method == "OPTIONS" and self.access.allows(origin):  # before a browser lets a page of that site ask
            call.more |= {"access-control-allow-methods": "GET, POST", "access-control-max-age": 600}
            return await call.answer(204, b"", access_control_allow_headers="authorization, content-type")
        public, name = path in self.files or path == "/health", path.removeprefix("/v1/models/")
        self.access.check(call.headers, public=public)
        takes = "POST" if path in ANSWERS or path in POSTS else "GET" if public or path in GETS or name != path else ""
        if not takes:
            raise RefusedError(404, f"there is no {path[:99]!r}", code="not_found")
        if call.method != takes and (call.method, takes) != ("HEAD", "GET"):
            raise RefusedError(405, f"{path[:99]} takes {takes}", code="method_not_allowed", allow=takes)
        if path in self.files:
            content, kind = self.files[path].read_bytes(), KINDS[self.files[path].suffix]
            call.more |= {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
            return await call.answer(200, content, f"{kind}; charset=utf-8", cache_control="no-cache")
        state = "draining" if self.draining else "loading" if self.service is None else "ok"
        if path == "/health":
            return await call.answer(200 if state == "ok" else 503, {"status": state})
        if self.service is None or (self.draining and takes == "POST"):
            raise RefusedError(503, f"the server is {state}", code=state, retry_after=5)
        if path in ANSWERS:
            return await self._generate(call, self.service, chat=ANSWERS[path])
        if takes == "POST":
            return await call.answer(200, await POSTS[path](self.service, await call.body()))
        result = self.service.model(name) if name != path else GETS[path](self.service)
        plain = "text/plain; version=0.0.4" if isinstance(result, str) else "application/json"
        return await call.answer(200, result, plain)

    async def _generate(self, call: Call, service: Service, *, chat: bool) -> None:
        """Answer a completion or a chat, for as long as the client is there."""
        asked = await asyncio.to_thread(read_asked, await call.body(), service.served, chat=chat)
        answering = Answering(service, asked)
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
        return await call.answer(200, await answering.whole())
    await call.start(200, "text/event-stream; charset=utf-8", cache_control="no-cache")
    async for content in answering.events():
        await call.write(content, more=True)
    return await call.write(b"data: [DONE]\n\n")
