"""The HTTP application: OpenAI's routes, `/health`, and a web page for trying the model at `/`."""

import base64
import hashlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from fedtune.inference.serve.answer import GONE, Answer, EventStream, Schedules, require_capacity, whole
from fedtune.inference.serve.formats import ResponseFormatter
from fedtune.inference.serve.limits import ApiKeys, Limits, check_host, read_json
from fedtune.inference.serve.logprobs import LogprobFormatter
from fedtune.inference.serve.prompts import Prompts
from fedtune.inference.serve.protocol import ChatRequest, CompletionRequest, read
from fedtune.inference.serve.refusal import Refused
from fedtune.inference.serve.served_model import ServedModel, make_generation_request
from fedtune.inference.serve.tools import CallReader

HTTP_ERRORS = {
    404: ("no such path", "not_found"),
    405: ("this path does not support that method", "method_not_allowed"),
}


def create_app(scheduler: Schedules, served: ServedModel, limits: Limits, keys: ApiKeys, *, local: bool) -> FastAPI:
    """Return the application for a running scheduler.

    Args:
        local: The server listens on a loopback address without API keys, so the Host header must name localhost.
    """
    app = FastAPI(title="fedtune", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    page, policy = _page()
    prompts = Prompts(served, scheduler.limit)

    async def authorize(request: Request) -> None:
        if local:
            check_host(request)
        keys.check(request)

    async def answer(request: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
        arrived = time.monotonic()
        await authorize(request)
        require_capacity(scheduler)  # before the body is read; checked again on submit
        parsed = read(kind, await read_json(request, limits))
        adapter = served.adapter(parsed.model)
        ids = await prompts.tokens(request, parsed, arrived + limits.timeout)
        chat = kind is ChatRequest
        generation = make_generation_request(parsed, ids, adapter, served, limits, scheduler.limit, arrived + limits.timeout)
        output = Answer(scheduler, generation, trims=chat)
        formatter = ResponseFormatter(
            chat=chat,
            id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            model=served.full_name(parsed.model),
            usage_in_stream=parsed.wants_usage,
            calls=CallReader() if isinstance(parsed, ChatRequest) and parsed.schemas and served.writes_calls else None,
        )
        output.begin()
        logprobs = None if parsed.tops is None else LogprobFormatter(served.text, generation.ids if generation.joins else (), trims=chat)
        if parsed.stream:
            return EventStream(output, formatter, logprobs, limits.timeout)
        return await whole(request, output, formatter, logprobs)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatRequest)

    began = int(time.time())

    def card(name: str) -> dict[str, Any]:
        more = {
            "context": scheduler.limit,
            "max_tokens": min(limits.max_tokens, scheduler.limit),
            "chat": served.chats,
            "turns": served.text.template is not None,
        }
        return {"id": name, "object": "model", "created": began, "owned_by": "fedtune", **more}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        await authorize(request)
        return JSONResponse({"object": "list", "data": [card(name) for name in served.models]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        await authorize(request)
        served.adapter(name)
        return JSONResponse(card(name))

    @app.get("/health")
    async def health() -> Response:
        running, waiting = scheduler.load
        state = "stopping" if scheduler.draining else "ok"
        figures = {"running": running, "waiting": waiting, "passes": scheduler.passes, "preempted": scheduler.preempted}
        return JSONResponse({"status": state, **figures}, status_code=503 if scheduler.draining else 200)

    @app.get("/")
    async def try_it(request: Request) -> Response:
        if local:
            check_host(request)
        return Response(page, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy})

    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _server_error)
    app.add_middleware(_SecurityHeaders)
    return app


async def _refused(request: Request, why: Any) -> Response:
    return JSONResponse(why.body(), status_code=why.status, headers=why.headers())


async def _http_error(request: Request, why: Any) -> Response:
    message, code = HTTP_ERRORS.get(why.status_code, ("the request cannot be served", None))
    return JSONResponse(Refused(why.status_code, message, code=code).body(), status_code=why.status_code, headers=why.headers)


async def _gone(request: Request, why: Any) -> Response:
    return Response(status_code=GONE)


async def _server_error(request: Request, why: Exception) -> Response:
    return JSONResponse(Refused(500, "the server failed on this request: its log says why").body(), status_code=500)


class _SecurityHeaders:
    """Middleware that adds security headers to every response: no content sniffing, no caching, no referrer. HTTP only."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        async def plain(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        await self._app(scope, receive, plain)


def _page() -> tuple[bytes, str]:
    """The web page, and a content security policy that allows only the page's own script and style, and only requests to this server."""
    text = (files("fedtune.inference.serve") / "page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in found)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy
