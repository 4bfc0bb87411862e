"""The HTTP application: OpenAI's two endpoints, the model's name, health, metrics, and a page to watch."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

from dllm_fast.serve.bodies import Chat, Completion
from dllm_fast.serve.gate import Gate, Limits
from dllm_fast.serve.refusals import Refusal, json_response, of_validation
from dllm_fast.serve.reply import Reply
from dllm_fast.serve.worker import Served

PAGE = Path(__file__).with_name("page.html")
GUARDED = "/v1/"  # what needs a key
READING = 30.0  # seconds in which a body has to arrive


def make_app(served: Served, limits: Limits, gate: Gate | None = None) -> FastAPI:
    """The application. It starts its worker and ends it, unless it is given a ``gate`` that runs already."""
    own = gate is None
    gate = gate or Gate(served, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with gate if own else contextlib.nullcontext():
            yield

    codes = 400, 401, 404, 413, 429, 503, 504
    errors: dict[int | str, dict[str, Any]] = {code: {"description": "OpenAI's error object"} for code in codes}
    app = FastAPI(title="dllm_fast", lifespan=lifespan, responses=errors, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, gate=gate)

    @app.post("/v1/completions")
    async def completions(body: Completion) -> Response:
        return Reply(gate, body, *await gate.request(body))

    @app.post("/v1/chat/completions")
    async def chat(body: Chat) -> Response:
        return Reply(gate, body, *await gate.request(body))

    @app.get("/v1/models")
    async def models() -> dict:
        own = {"id": gate.limits.name, "object": "model", "created": gate.began, "owned_by": "dllm_fast"}
        return {"object": "list", "data": [own]}

    @app.get("/health")
    async def health() -> Response:
        if not gate.worker.up:
            return Refusal(503, "the worker process is being started").response
        return json_response({"status": "ok", "device": gate.ready.device})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gate.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return refusal.response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors()).response

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        response = Refusal(error.status_code, str(error.detail)).response
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return Refusal(500, f"{type(error).__name__}: see the server's log").response

    return app


def routed(scope) -> str:
    """The path that the routes see: without the prefix that the application is mounted at."""
    path, prefix = scope["path"], scope.get("root_path", "")
    return path[len(prefix) :] if path.startswith(f"{prefix}/") else path


class Guard:
    """Looks at the key, then at the size of the body, which it reads whole; counts what was answered."""

    def __init__(self, app, gate: Gate):
        self.app, self.gate = app, gate

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = routed(scope)
        known = path if path in ("/v1/completions", "/v1/chat/completions") else "other"

        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                self.gate.metrics.requests.labels(known, str(message["status"])).inc()
            await send(message)

        try:
            receive = await self.read(scope, receive)
        except Refusal as refusal:
            await refusal.response(scope, receive, counted)
            return
        if receive is not None:
            await self.app(scope, receive, counted)

    async def read(self, scope, receive):
        """A ``receive`` that hands out the body, read already; None if the client left. Raises Refusal."""
        headers = dict(scope["headers"])
        if routed(scope).startswith(GUARDED) and not self.gate.admits(headers.get(b"authorization", b"")):
            raise Refusal(401, "Incorrect API key provided", code="invalid_api_key")
        size, limit = headers.get(b"content-length", b"0"), self.gate.limits.body
        if size.isdigit() and (len(size) > 18 or int(size) > limit):
            raise Refusal(413, f"a body of {int(size[:18])} bytes is more than {limit}", code="body_too_large")
        try:
            body = await asyncio.wait_for(self.whole(receive, limit), READING)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body has not arrived after {READING} seconds") from None
        if body is None:
            return None
        handed = False

        async def again():
            nonlocal handed
            if handed:
                return await receive()
            handed = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    async def whole(self, receive, limit: int) -> bytes | None:
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise Refusal(413, f"a body of more than {limit} bytes", code="body_too_large")
            more = message.get("more_body", False)
        return b"".join(parts)
