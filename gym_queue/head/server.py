"""The head as a process: uvicorn, stopped gently, and with no patience for connections that say nothing."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gym_queue.errors import UsageError
from gym_queue.head.errors import answer

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp

KEEP_ALIVE = 30
"""Seconds that an idle connection is kept: longer than clients keep theirs, so none asks on a dying one."""

HEADERS_TIMEOUT = 15.0
"""Seconds that a new connection has to bring the head of its first request."""

_LARGEST_HEADERS = 32 << 10
_BACKLOG = 2048
_GRACE = 5
"""Seconds that answers under way may take when the head stops. Feeds end at once."""


class Protocol(H11Protocol):
    """uvicorn's protocol, which closes a connection that brings no whole request head in time.

    uvicorn has a timeout between two requests, but none for the first one, nor for a head that comes byte by
    byte (known as slowloris).
    """

    headers_timeout = HEADERS_TIMEOUT

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See ``asyncio.Protocol``."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        cycle = self.cycle
        super().data_received(data)
        if self.cycle is not cycle:
            self._patience.cancel()
        elif (cycle is None or cycle.response_complete) and self._patience.cancelled():
            self._expect_headers()  # of the next request: its first bytes are here

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._patience.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in the shape of all errors; uvicorn would say it in plain text."""
        refusal = answer(400, "this is not HTTP that can be understood", {"Connection": "close"})
        reason = b"Bad Request"
        for event in (
            h11.Response(status_code=400, headers=refusal.raw_headers, reason=reason),
            h11.Data(data=bytes(refusal.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_headers(self) -> None:
        self._patience = self.loop.call_later(self.headers_timeout, self.timeout_keep_alive_handler)


class Server(uvicorn.Server):
    """A server whose signals stop it and nothing else: the process then ends with status 0."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    async def shutdown(self, sockets: Any = None) -> None:
        """Tell the routes first: feeds end, and the leader's office is given up after the last answer."""
        self._on_stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals while serving; uvicorn would raise them again when all is done."""
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there.

    Raises:
        UsageError: there is no such address here, or another process has it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = None
    try:
        # asyncio switches off Nagle's algorithm only where it can see that this is TCP: without that, the two
        # pieces of an answer (head, body) are 40 ms apart.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        msg = f"the head cannot listen on {host}, port {port}: {error.strerror or error}"
        raise UsageError(msg) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL under which a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: ASGIApp, on_stop: Callable[[], None]) -> Server:
    """Return what serves the app (``run``) until SIGTERM or SIGINT; ``on_stop`` is called then.

    With ``FORWARDED_ALLOW_IPS`` (uvicorn's own variable) in the environment, the client's address is taken
    from ``X-Forwarded-For`` where a proxy named there sends it.
    """
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
        h11_max_incomplete_event_size=_LARGEST_HEADERS,
    )
    return Server(config, on_stop)
