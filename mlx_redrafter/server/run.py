"""From options to a server that listens, and how it leaves."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..options import ModelOptions
from .app import Access, make_app
from .catalog import Catalog, ServingOptions
from .errors import BadRequest
from .service import Service
from .worker import Worker

if TYPE_CHECKING:
    from ..engine.ranks import Ranks

LAST_WORDS = 2.0  # seconds in which clients are told that the server cannot go on
HEADER_SECONDS = 20.0  # in which a request's headers must have come, from when they may
log = logging.getLogger("mlx_redrafter.server")


@dataclass(frozen=True)
class Settings:
    """All that a server needs to know.

    Attributes:
        usual: ``Sampling``'s fields, where a request does not say.
        max_tokens: of an answer, likewise; None: what fits.
        queue: texts at once, those that wait included.
        patience: seconds in which running answers may end when the server is told to.
    """

    model: ModelOptions
    serving: ServingOptions = field(default_factory=ServingOptions)
    access: Access = field(default_factory=Access)
    host: str = "127.0.0.1"
    port: int = 8080
    usual: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    queue: int = 256
    patience: float = 30.0
    log_prompts: bool = False


def serve(settings: Settings, ranks: "Ranks | None" = None) -> None:
    """Serve until the process is told to end (SIGINT, SIGTERM): running answers are ended properly then.

    Args:
        ranks: machines that have a part of each model; this is the first one.

    Raises:
        ValueError: the model cannot be loaded, or the address is taken.
    """
    _log_to_stderr()
    listening = listen(settings.host, settings.port)
    server = _make(settings, ranks)
    # uvicorn hands on the signal that it has obeyed.
    with contextlib.closing(listening), contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(server, listening, ranks))
    if server.failure is not None:
        raise server.failure
    if server.service.loads:  # in another thread, on which Python would not wait, and be aborted
        if ranks is not None:
            ranks.channel.stop(0)
        os._exit(0)


async def _serve(server: "Server", listening: socket.socket, ranks: "Ranks | None") -> None:
    if ranks is not None:
        ranks.channel.leaving = partial(server.leave_at_once, asyncio.get_running_loop())
    await server.serve([listening])


async def make_server(settings: Settings) -> "Server":
    """A server that has loaded its model, to be told where to listen.

    Raises:
        ValueError: the model cannot be loaded.
    """
    server = _make(settings)
    await server.load()
    return server


def _make(settings: Settings, ranks: "Ranks | None" = None) -> "Server":
    worker = Worker()
    catalog = Catalog(worker, settings.model, settings.serving, ranks)
    service = Service(
        worker, catalog, usual=settings.usual, max_tokens=settings.max_tokens, queue=settings.queue
    )
    config = uvicorn.Config(
        make_app(service, settings.access, log_prompts=settings.log_prompts),
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=int(settings.patience) + 10,
    )
    return Server(config, service, settings.patience)


class Connection(H11Protocol):
    """uvicorn's, which ends when the headers of a request do not come: it would wait for ever otherwise."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """It says something."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """It has been answered, and may ask again."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has left."""
        super().connection_lost(exc)
        self._watch(is_there=False)

    def _watch(self, is_there: bool = True) -> None:
        waits = is_there and self.conn.their_state is h11.IDLE  # for headers
        if waits and self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        elif self._waiting is not None and not waits:
            self._waiting.cancel()
            self._waiting = None


class Server(uvicorn.Server):
    """uvicorn's, which loads its model while it answers already, and lets running answers end.

    Attributes:
        failure: why it had to end.
    """

    failure: Exception | None = None

    def __init__(self, config: uvicorn.Config, service: Service, patience: float) -> None:
        super().__init__(config)
        self.service, self._patience = service, patience

    async def load(self) -> None:
        """Load the model; ``ValueError`` if it cannot be."""
        catalog = self.service.catalog
        try:
            await catalog.get(None)
        except BadRequest as error:
            name = catalog.default_name
            raise ValueError(f"{name} cannot be loaded: {error.__cause__ or error}") from error
        self.service.loads = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where once the model is there."""
        await super().startup(sockets)
        self._begun = asyncio.create_task(self._begin(sockets or []))

    async def _begin(self, sockets: list[socket.socket]) -> None:
        try:
            await self.load()
        except Exception as error:
            self.failure, self.should_exit = error, True
            return
        for each in sockets:
            host, port = each.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            name = self.service.catalog.default_name
            print(f"Serving {name} at http://{shown}:{port}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take in no more, and give what runs some time to end."""
        self.service.leaves = True
        self._begun.cancel()
        ending = asyncio.get_running_loop().call_later(self._patience, self._end_answers)
        await super().shutdown(sockets)
        ending.cancel()

    def leave_at_once(self, loop: asyncio.AbstractEventLoop, reason: str) -> None:
        """Tell all clients that the server ends, for it cannot go on; called in another thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._end_answers, "the server has lost a machine, and ends.")
        end = time.monotonic() + LAST_WORDS
        while self.server_state.tasks and time.monotonic() < end:
            time.sleep(0.01)

    def _end_answers(self, *why: str) -> None:
        self.service.leaves = True
        for generation in list(self.service.generations):
            generation.stop(*why)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; ``ValueError`` if it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen at {host} port {port} ({error}): give another --host or --port."
        ) from error


def _log_to_stderr() -> None:
    """One line of JSON for each request; warnings of libraries likewise."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if not text.startswith("{"):
            text = json.dumps({"level": record.levelname.lower(), "message": text})
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text
