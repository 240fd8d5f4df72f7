"""The server's routes, and who may use them."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import anthropic, openai, responses
from .errors import BadRequest
from .service import Service

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
LEFT = 499  # a status for the log: nobody reads the answer
BODY_SECONDS = 60.0  # in which a request's body must have come
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
log = logging.getLogger("mlx_redrafter.server")

Handler = Callable[[Service, Request, bytes], Awaitable[Response]]


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much at once.

    Attributes:
        api_key: that requests must carry; None: none.
        hosts: names by which the server may be called; (): any. They keep pages of other sites, whose names
            may be made to mean this machine, from using a server without a key.
        origins: of pages that may use it from a browser, besides its own.
        body_bytes: that a request may have.
    """

    api_key: str | None = None
    hosts: Sequence[str] = LOOPBACK
    origins: Sequence[str] = ()
    body_bytes: int = 16 << 20


def make_app(
    service: Service, access: Access, idle_check: float = 5.0, log_prompts: bool = False
) -> Starlette:
    """The server as an ASGI application; its worker runs while the application does."""

    def post(path: str, handle: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            body = await _body(request, access.body_bytes)
            if log_prompts:
                request.state.body = body.decode("utf-8", "replace")
            return await handle(service, request, body)

        return Route(path, endpoint, methods=["POST"])

    async def list_models(request: Request) -> Response:
        return await openai.models(service)

    async def one_model(request: Request) -> Response:
        return await openai.model(service, request.path_params["name"])

    async def health(request: Request) -> Response:
        status = "shutting down" if service.leaves else "loading" if service.loads else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    routes: list[Any] = [
        post("/v1/chat/completions", openai.chat),
        post("/v1/completions", openai.completions),
        post("/v1/responses", responses.respond),
        post("/v1/messages", anthropic.messages),
        post("/v1/messages/count_tokens", anthropic.count_tokens),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/", page),
        Mount("/page", StaticFiles(directory=PAGE, check_dir=False)),
    ]

    async def watch_idle() -> None:
        while True:
            await asyncio.sleep(idle_check)
            await service.catalog.unload_idle()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(watch_idle())
        yield
        watching.cancel()
        if not service.loads:  # the worker may be busy with it
            await asyncio.get_running_loop().run_in_executor(None, service.worker.stop)

    def refuse(request: Request, error: Exception) -> Response:
        return refusal(request, error)

    kinds: list[Any] = [BadRequest, HTTPException, ClientDisconnect, Exception]
    middleware = [Middleware(Guard, access=access, service=service)]
    if access.origins:
        allowed: dict[str, Any] = {
            "allow_origins": list(access.origins),
            "allow_methods": ["*"],
            "allow_headers": ["*"],
        }
        middleware.insert(0, Middleware(CORSMiddleware, **allowed))
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers=dict.fromkeys(kinds, refuse),
        lifespan=lifespan,
    )


def refusal(request: Request, error: Exception) -> Response:
    """An error as the interface that was asked tells it."""
    path = request.scope["path"]  # request.url is made from the header Host, too
    if isinstance(error, HTTPException):
        error = BadRequest(f"{request.method} {path[:200]}: {error.detail}.", error.status_code)
    if isinstance(error, ClientDisconnect):
        error = BadRequest("the client has left.", LEFT)
    if not isinstance(error, BadRequest):
        log.error("%s", json.dumps({"error": f"{type(error).__name__}: {error}"}), exc_info=error)
        error = BadRequest("something went wrong in the server: its log says what.", 500)
    if error.code == "model_not_loaded":
        log.error("%s", json.dumps({"error": f"{error} {error.__cause__}"}))
    if path.startswith("/v1/messages"):
        content: Any = {"type": "error", "error": {"type": error.kind, "message": str(error)}}
    else:
        content = openai.error_object(str(error), error.status, error.kind, error.code, error.param)
    response = JSONResponse(content, error.status)
    if error.status in (429, 503):
        response.headers["Retry-After"] = "2"
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


async def _body(request: Request, most: int) -> bytes:
    """A request's body.

    Raises:
        BadRequest: it is too large, or does not come.
    """
    too_large = BadRequest(f"the body has more than {most} bytes: send less.", 413)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > most:
                raise too_large

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise BadRequest(f"the body did not come within {BODY_SECONDS:g} seconds.", 408) from error
    return bytes(body)


class Guard:
    """Lets in who may ask, adds headers, and writes a line to the log for each request."""

    def __init__(self, app: ASGIApp, access: Access, service: Service) -> None:
        self._app, self._access, self._service = app, access, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request, begun, status = Request(scope, receive), time.monotonic(), 0

        async def answering(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            self._check(request)
            await self._app(scope, receive, answering)
        except BadRequest as error:
            await refusal(request, error)(scope, receive, answering)
        finally:
            self._record(request, status, time.monotonic() - begun)

    def _check(self, request: Request) -> None:
        """Raise ``BadRequest`` for who may not ask."""
        access, headers = self._access, request.headers
        host = _name(headers.get("host", ""))
        if access.hosts and host not in access.hosts:
            raise BadRequest(f"host {host[:100]!r} is not this server's: use --allow-host for it.", 403)
        origin = headers.get("origin")
        own = origin is not None and origin.split("://")[-1] == headers.get("host")
        if origin is not None and not own and not {origin, "*"} & set(access.origins):
            raise BadRequest(f"pages of {origin[:100]!r} may not ask: use --allow-origin for it.", 403)
        if access.api_key is None or request.method == "OPTIONS" or _is_open(request.scope["path"]):
            return
        given = headers.get("authorization", "")
        given = given[7:] if given[:7].lower() == "bearer " else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode("latin-1"), access.api_key.encode()):  # as it was sent
            raise BadRequest("a wrong API key, or none: send it as Authorization: Bearer KEY.", 401)

    def _record(self, request: Request, status: int, seconds: float) -> None:
        path = getattr(request.scope.get("route"), "path", "other")
        self._service.metrics.requests.labels(path, str(status)).inc()
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "method": request.method,
            "path": request.scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 3),
        }
        if (usage := getattr(request.state, "usage", None)) is not None:
            names = ("prompt_tokens", "cached_tokens", "completion_tokens")
            line |= {name: getattr(usage, name) for name in names} | usage.extensions
        if (body := getattr(request.state, "body", None)) is not None:
            line["body"] = body
        log.info("%s", json.dumps(line, ensure_ascii=False))


def _name(host: str) -> str:
    """A host without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdecimal() else host).lower()


def _is_open(path: str) -> bool:
    return path in ("/", "/health") or path.startswith("/page/")
