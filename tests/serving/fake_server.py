"""What the page talks to in its tests: the server's interface with canned answers, fast and without a model."""

import asyncio
import json
import math
import re
import socket
import threading
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import k2mini

PAGE = Path(k2mini.__file__).parent / "serving" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MARKDOWN = """\
## Igneous rocks

They form when **magma** or *lava* cools. Grain size tells how fast:

1. *Intrusive* rocks cool slowly, and are coarse:
   - granite
   - gabbro, `Mg`-rich
2. *Extrusive* rocks cool fast, as basalt does.

| Rock | SiO2 (%) | Grain |
|:-----|---:|-----|
| Granite | 72 | coarse |
| Basalt | 49 | fine |

```python
def density(mass, volume):
    return mass / volume
```

> Bowen (1928) ordered the minerals.

See [the survey](https://example.org/rocks) and [this](javascript:alert(1)).
"""
ANSWERS = {
    "markdown": MARKDOWN,
    "image": 'Look: <img src="x" onerror="window.hacked = 1"> <script>window.hacked = 1</script>\n\n![a](http://x.invalid/a)',
    "blanks": "One\ttab\u200b here,\nand  two lines.",
    "slow": "A slow answer goes on and on. " * 60,
}
PLAIN = (
    "Granite is an intrusive igneous rock. It cools slowly at depth, so its crystals grow large enough to be seen: "
    "quartz, feldspar and mica. Its composition is felsic."
)


def unlike(*parts) -> float:
    """A number between 0 and 1 that looks random and is always the same."""
    return (
        math.modf(math.sin(sum(ord(c) * (i + 1.7) for i, c in enumerate("|".join(map(str, parts))))) * 43758.5453)[0]
        % 1
    )


def logprob(model: str, token: str) -> float:
    chance = unlike(model, token)
    return math.log(0.02 + 0.97 * chance ** (0.4 if model == "k2-geo" else 1.2))


class Fake:
    """The application, and what it was asked."""

    def __init__(self):
        self.requests = []  # (path, body)
        self.stopped = 0  # streams that the client left
        self.key = None
        self.loading = False
        self.pause = 0.0  # seconds a token
        self.vocabulary = ["<s>"]
        self.app = Starlette(
            routes=[
                Route("/k2mini/info", self.info),
                Route("/k2mini/why", self.why, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Mount("/", StaticFiles(directory=PAGE, html=True)),
            ]
        )

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)

    def error(self, status, message, **headers):
        return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status, headers)

    def refused(self, request):
        if self.loading:
            self.loading = False
            return self.error(503, "the server is loading", **{"Retry-After": "0.3"})
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return self.error(401, "Incorrect API key")
        return None

    def id_of(self, token):
        if token not in self.vocabulary:
            self.vocabulary.append(token)
        return self.vocabulary.index(token)

    async def info(self, request):
        models = [{"id": "k2-base", "adapter": False}, {"id": "k2-geo", "adapter": True}]
        return self.refused(request) or JSONResponse(
            {"models": models, "templates": ["alpaca", "none"], "template": "alpaca", "context": 2048, "version": "0"}
        )

    async def why(self, request):
        body = await request.json()
        self.requests.append(("why", body))
        token = self.vocabulary[body["tokens"][-1]]
        layers = []
        for layer in range(16):
            own = max(0.0, (layer - 5) / 10) ** 2 * 0.9
            words = [token, " the", ",", "\n", " stone"] if own > 0.2 else [" the", ",", "\u00a0", " of", "\u200b"]
            top = [[word, max(0.01, own if k == 0 else 0.4 - own / 3) / (k + 1)] for k, word in enumerate(words)]
            rank = 0 if own > 0.2 else 4000 - 250 * layer
            layers.append({"layer": layer, "top": top, "rank": rank, "probability": own})
        return JSONResponse({"layers": layers})

    async def completions(self, request):
        body = await request.json()
        self.requests.append(("completions", body))
        found = [None, *(logprob(body["model"], self.vocabulary[token]) for token in body["prompt"][1:])]
        return JSONResponse({"choices": [{"text": "", "logprobs": {"token_logprobs": found}}]})

    async def chat(self, request):
        refused = self.refused(request)
        if refused:
            return refused
        body = await request.json()
        self.requests.append(("chat", body))
        question = body["messages"][-1]["content"]
        if "busy" in question and sum(path == "chat" for path, _ in self.requests) == 1:
            return self.error(429, "The queue is full.", **{"Retry-After": "2"})
        if "wrong" in question:
            return self.error(400, "`messages`: the prompt has 4000 tokens, the context 2048.")
        answer = next((text for word, text in ANSWERS.items() if word in question), PLAIN)
        if body["model"] == "k2-base":
            answer = answer.replace("large enough to be seen", "over thousands of years")
        return StreamingResponse(self.stream(body, question, answer), media_type="text/event-stream")

    async def stream(self, body, question, answer):
        def event(**fields):
            return f"data: {json.dumps({'object': 'chat.completion.chunk', **fields})}\n\n"

        prompt = [0, *(self.id_of(word) for word in re.findall(r" ?\S+", question))]
        done = False
        tokens = re.findall(r" ?\w+|[^\w]", answer)
        try:
            for place, token in enumerate(tokens):
                if "break" in question and place == 5:
                    done = True
                    raise RuntimeError("the connection breaks, as the test wants")
                others = [
                    (token, logprob(body["model"], token)),
                    (" a", -2.5),
                    ("\n", -3.0),
                    (" the", -3.6),
                    ("bytes:\\xe2", -5),
                ]
                entries = [{"token": text, "logprob": lp, "bytes": list(text.encode())} for text, lp in others]
                choice = {
                    "index": 0,
                    "delta": {"content": token},
                    "logprobs": {"content": [{**entries[0], "top_logprobs": entries}]},
                    "token_ids": [self.id_of(token)],
                    "finish_reason": None,
                }
                yield event(choices=[choice], **({"prompt_token_ids": prompt} if place == 0 else {}))
                await asyncio.sleep(0.02 if "slow" in question or "break" in question else self.pause)
            yield event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
            yield event(choices=[], usage={"completion_tokens": len(tokens)})
            yield "data: [DONE]\n\n"
            done = True
        finally:
            self.stopped += not done


def serve(fake):
    """Start the server in a thread. Returns its address and a function that ends it."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(fake, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def stop():
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()

    return f"http://127.0.0.1:{listener.getsockname()[1]}/", stop
