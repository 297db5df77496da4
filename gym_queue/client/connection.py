"""Requests to the head: who we are, what is tried again, and which error each refusal becomes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import hdrs

from gym_queue.client.tries import AgainError, Tries
from gym_queue.errors import (
    ConflictError,
    GymQueueError,
    HeadAwayError,
    HeadFailedError,
    NotFoundError,
    RequestRefusedError,
    UnauthorizedError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

_log = logging.getLogger(__name__)

_CONNECT_TIMEOUT = 10.0
_BUFFER = 1 << 18
_LONGEST_MESSAGE = 1000
_SHORT = 1 << 16
"""Bytes of a body that is sent at once: aiohttp reads a file in a thread, which takes longer than this."""

KEEP_ALIVE = 2.0
"""Seconds: shorter than any server's own (uvicorn: 5), so that no request meets a connection just closed."""

_AGAIN = frozenset({408, 429, 502, 503, 504})
_CLOSED = "this client is closed"
_TYPED: Mapping[int, type[GymQueueError]] = {403: UnauthorizedError, 404: NotFoundError, 409: ConflictError}


class Connection:
    """Speaks to one head (or to a load balancer before several). One event loop only.

    Every request made here may be repeated: it changes nothing, or the head knows it again.

    Args:
        url: the head's, as ``http://head:11000``.
        token: bearer token; empty: none is sent.
        patience: seconds that a request is tried again while the head is away.
        silence: seconds without a byte after which an answer counts as broken.

    Attributes:
        met: the head has answered once, so it exists and may be waited for.

    Raises:
        UsageError: this is no URL of a head.
    """

    def __init__(self, url: str, token: str, *, patience: float, silence: float) -> None:
        self.base = _checked(url)
        self.met = False
        self._headers = {hdrs.AUTHORIZATION: f"Bearer {token}"} if token else {}
        self._token = token
        self._patience = patience
        self._silence = silence
        self._session: aiohttp.ClientSession | None = None
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._away_since: float | None = None
        self._closed = False

    def tries(self, *, forever: bool = False) -> Tries:
        """Begin to try something. ``forever``: once the head has been met, it is waited for without end."""
        return Tries(self._patience, forever=forever and self.met)

    async def call(self, method: str, path: str, *, forever: bool = False, **request: Any) -> Any:
        """Send a request until it is answered, and return the decoded JSON (``None`` for an empty body).

        Args:
            method: HTTP's.
            path: below the head's URL, quoted.
            forever: see ``tries``.
            request: ``params``, ``json``, ``data``, ``headers`` as in aiohttp.

        Raises:
            HeadAwayError: it did not answer within the patience.
            UnauthorizedError, NotFoundError, ConflictError, RequestRefusedError, HeadFailedError: it refused.
        """
        tries = self.tries(forever=forever)
        while True:
            limit = self._silence if tries.forever else min(self._silence, max(tries.left, 1.0))
            try:
                async with self._answer(method, path, limit, request) as response:
                    raw = await response.read()
            except AgainError as again:
                await self.pause(tries, again)
            else:
                return self._decoded(raw)

    @asynccontextmanager
    async def stream(self, path: str, params: Mapping[str, str], limit: float) -> AsyncIterator[Any]:
        """Open an answer that goes on for long; gives its content (``aiohttp.StreamReader``).

        Raises:
            AgainError: it did not open, or broke while the block read it.
        """
        async with self._answer("GET", path, limit, {"params": params}) as response:
            yield response.content

    async def pause(self, tries: Tries, again: AgainError) -> None:
        """Wait for the next try; say once that the head is away."""
        if self._away_since is None:
            self._away_since = time.monotonic()
            _log.warning("%s; trying again", again)
        await tries.pause(again)

    async def close(self) -> None:
        """Close all connections, for good. Safe to repeat."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @property
    def silence(self) -> float:
        """Seconds without a byte after which a stream counts as broken."""
        return self._silence

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, limit: float, request: dict[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request once; whatever breaks on the way, until the block ends, is an ``AgainError``."""
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=min(_CONNECT_TIMEOUT, limit), sock_read=limit
        )
        if len(request.get("data", b"")) > _SHORT:  # a file, so that aiohttp sends it piece by piece
            request = {**request, "data": io.BytesIO(request["data"])}
        try:
            async with self._opened().request(
                method, self.base + path, timeout=timeout, allow_redirects=False, **request
            ) as response:
                if response.status not in (200, 201, 204):
                    raise self._refusal(response, await response.read())
                self._is_here()
                yield response
        except aiohttp.ConnectionTimeoutError as error:
            reason = f"no connection within {timeout.sock_connect:g} s"
            raise self._gone(reason) from error
        except TimeoutError as error:
            reason = f"nothing came for {limit:g} s"
            raise self._gone(reason) from error
        except aiohttp.InvalidURL as error:
            msg = f"{self.base}{path} is not an address"
            raise UsageError(msg) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._gone(reason_of(error)) from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._closed:
            raise UsageError(_CLOSED)
        owner = (os.getpid(), asyncio.get_running_loop())
        if self._session is None:
            self._owner = owner
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                read_bufsize=_BUFFER,
            )
        elif self._owner != owner:
            msg = "this client belongs to another process or event loop; make one where it is used"
            raise UsageError(msg)
        return self._session

    def _is_here(self) -> None:
        self.met = True
        if self._away_since is not None:
            away, self._away_since = time.monotonic() - self._away_since, None
            _log.warning("the head at %s answers again, after %.1f s", self.base, away)

    def _gone(self, reason: str) -> Exception:
        if self._closed:
            return UsageError(_CLOSED)
        return AgainError(HeadAwayError(f"the head at {self.base} cannot be reached ({reason})"))

    def _refusal(self, response: aiohttp.ClientResponse, raw: bytes) -> Exception:
        """Return the error for an answer that is none of ours."""
        status, said = response.status, self._message(raw)
        answered = f"the head at {self.base} answered {status}{': ' if said else ''}{said}"
        if status in _AGAIN:
            return AgainError(HeadAwayError(answered), after=_retry_after(response))
        if status >= 500:  # noqa: PLR2004 - HTTP's own number
            return AgainError(HeadFailedError(answered), is_failure=True)
        self._is_here()
        if status == 401:  # noqa: PLR2004 - the same
            have = "does not take this token" if self._token else "asks for a token"
            return UnauthorizedError(f"the head at {self.base} {have}; is GYM_QUEUE_AUTH_TOKEN right?")
        if status < 400:  # noqa: PLR2004 - the same
            return HeadFailedError(f"{answered}, which a head does not")
        return _TYPED.get(status, RequestRefusedError)(said or answered)

    def _message(self, raw: bytes) -> str:
        """Find the sentence in the body of an error: the head's own, or one of what stands before it."""
        text = raw.decode(errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):  # not a head's: a proxy's page
            text = str(json.loads(text)["error"]["message"])
        if self._token:
            text = text.replace(self._token, "***")
        words = "" if "<html" in text.lower() else " ".join(text.split())
        return words if len(words) <= _LONGEST_MESSAGE else words[:_LONGEST_MESSAGE] + "…"

    def _decoded(self, raw: bytes) -> Any:
        try:
            return json.loads(raw) if raw else None
        except ValueError as error:
            msg = f"{self.base} answers with something that is not JSON; is it a head?"
            raise HeadFailedError(msg) from error


def _checked(url: str) -> str:
    """Return the URL without a slash at its end."""
    if not url:
        msg = "no head is named: give its url, or set HEAD_SERVER_URL"
        raise UsageError(msg)
    try:
        parts = urlsplit(url)
        is_wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        is_wrong = True
    if is_wrong or parts.query or parts.fragment:
        msg = f"{url!r} is no address of a head; write http(s)://HOST:PORT"
        raise UsageError(msg)
    if parts.username or parts.password:
        msg = "a head's address must not carry a password; set GYM_QUEUE_AUTH_TOKEN"
        raise UsageError(msg)
    return url.rstrip("/")


def reason_of(error: BaseException) -> str:
    """Say why no answer came, in the words of the system and not of the library."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return "the connection broke off"
    return str(error) or type(error).__name__


def _retry_after(response: aiohttp.ClientResponse) -> float:
    """Return the seconds that the head asks for (it sends numbers, not dates)."""
    try:
        return max(0.0, float(response.headers.get(hdrs.RETRY_AFTER, "")))
    except ValueError:
        return 0.0
