"""A small HTTP port in a thread of its own: neither a busy pool nor a blocked event loop delays its answers.

``/health``: this process answers. ``/ready``: it can work, or why not. ``/metrics``: for Prometheus.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from weakref import WeakSet

from gym_queue.telemetry.exposition import CONTENT_TYPE, exposed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gym_queue.telemetry.catalogue import Family

_log = logging.getLogger(__name__)

PORTS = 16
"""How many ports are tried, from the one of the settings on: workers of one machine share their settings."""

_SLOWEST = 10.0
"""Seconds that a client may take to send its request."""


class Port:
    """Serves what it is told to, until the process ends or ``close``.

    Args:
        trouble: what keeps this process from working, a sentence each; nothing: it is ready.
        families: its metrics.
    """

    def __init__(self, trouble: Callable[[], list[str]], families: Callable[[], Iterable[Family]]) -> None:
        self._trouble = trouble
        self._families = families
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """Where it serves; empty if nowhere."""
        if self._server is None:
            return ""
        host, port = map(str, self._server.server_address[:2])
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def open(self, host: str, first: int) -> None:
        """Open the first port that is free of ``PORTS``. If none is, the log says so, and work goes on."""
        for number in range(first, min(first + PORTS, 65536)):
            try:
                self._server = _Server(host, number, self)
            except OSError as error:
                failure = error
            else:
                break
        else:
            _log.warning("no /health, /ready and /metrics here: port %s:%d: %s", host, first, failure)
            return
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()
        _log.info("/health, /ready and /metrics on %s", self.url)

    def close(self) -> None:
        """Serve no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, path: str) -> tuple[int, str, bytes] | None:
        """Return status, content type and body; ``None``: there is no such page."""
        match path:
            case "/health":
                return _json(200, {"status": "ok"})
            case "/ready":
                trouble = self._trouble()
                return _json(503 if trouble else 200, {"ready": not trouble, "because": trouble})
            case "/metrics":
                return 200, CONTENT_TYPE, exposed(self._families())
        return None


def _json(status: int, body: dict[str, Any]) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps(body).encode()


class _Handler(BaseHTTPRequestHandler):
    timeout = _SLOWEST
    server: _Server

    def do_GET(self) -> None:
        try:
            answer = self.server.port.answer(urlsplit(self.path).path)
        except Exception:  # noqa: BLE001 - a page that fails must say so, to both sides
            _log.exception("%s failed", self.path)
            answer = _json(500, {"error": {"type": "internal", "message": "the log says more"}})
        status, content_type, body = answer or _json(
            404, {"error": {"type": "not_found", "message": "there are /health, /ready and /metrics"}}
        )
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "gym_queue"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        _log.debug(format, *args)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    port: Port

    def __init__(self, host: str, number: int, port: Port) -> None:
        self.port = port
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, number), _Handler)
        _OPEN.add(self)

    def server_bind(self) -> None:
        """Bind, and ask no name server who we are, as HTTPServer does: it may not answer."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a client of /metrics went away", exc_info=True)


_OPEN: WeakSet[_Server] = WeakSet()


def _close_in_child() -> None:
    """Let no child of a prefork pool keep its parent's port open."""
    for server in list(_OPEN):
        server.socket.close()


os.register_at_fork(after_in_child=_close_in_child)
