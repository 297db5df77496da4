"""Who may: a bearer token on every route but two; without a token, only this machine."""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from gym_queue.errors import UsageError
from gym_queue.head.errors import answer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_ROUTES = frozenset({"/health", "/ready"})
"""Paths that ask for no token: probes have none, and learn nothing but that the head is there."""

_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="gym_queue"'}


def check_host(host: str, token: str) -> None:
    """Refuse to listen where strangers could reach a head that asks for no token.

    Raises:
        UsageError: one sentence.
    """
    if not token and not is_loopback(host):
        msg = (
            f"without a token the head listens on this machine only, not on {host}: whoever reaches it can "
            "run code on the workers; set GYM_QUEUE_AUTH_TOKEN, or leave --host at 127.0.0.1"
        )
        raise UsageError(msg)


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Auth:
    """Middleware that lets through who knows the token.

    Without a token it lets through whoever asks for this machine by its own name: a web page that somebody
    looks at here cannot (its requests carry its ``Origin``, or its host's name).
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http" or scope["path"] in OPEN_ROUTES:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._token and not self._is_known(headers):
            message = "a token is needed: Authorization: Bearer GYM_QUEUE_AUTH_TOKEN"
            await answer(401, message, _CHALLENGE)(scope, receive, send)
        elif not self._token and not _is_from_here(headers):
            message = "without a token the head answers requests to localhost only, and none of web pages"
            await answer(403, message)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        given = credentials.strip().encode("latin-1", errors="replace")  # as ASGI decoded it
        return scheme.lower() == "bearer" and hmac.compare_digest(given, self._token)


def _is_from_here(headers: Headers) -> bool:
    named = [f"//{headers['host']}"] if "host" in headers else []
    named += [headers["origin"]] if "origin" in headers else []
    try:
        return all(is_loopback(urlsplit(name).hostname or "") for name in named)
    except ValueError:
        return False
