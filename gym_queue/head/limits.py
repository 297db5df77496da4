"""How much one client may ask for: requests in a time, bytes in a request, time to send them."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from gym_queue.head.auth import OPEN_ROUTES
from gym_queue.head.errors import answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_ADDRESSES = 10_000
"""Addresses that a rate limit remembers; the one that was quiet longest is forgotten first."""

LARGEST_PLAIN_BODY = 1 << 20
"""Bytes of a request that brings no examples."""

BURST = 2.0
"""Seconds of requests that one address may send at once."""

_LONGEST_PAUSE, _LONGEST_BODY = 30.0, 300.0
"""Seconds that a client may let pass between two pieces of a body, and for all of it."""

_MOST_LARGE_BODIES = 4
"""Requests with examples that are read at once; others wait before theirs is read: memory is bounded."""


class Buckets:
    """Token buckets, one an address: ``rate`` requests a second, ``BURST`` seconds' worth at once."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, address: str) -> float:
        """Take one request's worth. Returns 0.0, or the seconds after which there will be one."""
        now, full = self._clock(), max(1.0, self._rate * BURST)
        level, since = self._levels.pop(address, (full, now))
        level = min(full, level + (now - since) * self._rate)
        granted = level >= 1.0
        self._levels[address] = (level - granted, now)
        if len(self._levels) > MOST_ADDRESSES:
            self._levels.popitem(last=False)
        return 0.0 if granted else (1.0 - level) / self._rate


def network_of(host: str) -> str:
    """Return what one client cannot choose of its address: of IPv6 the first 64 bits."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


class RateLimit:
    """Middleware that answers 429 where an address asks more often than ``rate`` times a second."""

    def __init__(self, app: ASGIApp, rate: float) -> None:
        self._app = app
        self._buckets = Buckets(rate) if rate else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "http" and self._buckets is not None and scope["path"] not in OPEN_ROUTES:
            client = scope.get("client")
            if wait := self._buckets.take(network_of(client[0]) if client else ""):
                headers = {"Retry-After": str(math.ceil(wait))}
                await answer(429, "too many requests from your address", headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Middleware that reads no more of a body than it may have, and waits no longer for it than it may take.

    Args:
        app: what it stands before.
        largest: bytes of a request with examples; ``LARGEST_PLAIN_BODY`` is for all others.
        pause, whole: see ``_LONGEST_PAUSE``.
    """

    def __init__(
        self, app: ASGIApp, largest: int, pause: float = _LONGEST_PAUSE, whole: float = _LONGEST_BODY
    ) -> None:
        self._app = app
        self._largest = largest
        self._pause = pause
        self._whole = whole
        self._room = asyncio.Semaphore(_MOST_LARGE_BODIES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"].endswith("/examples"):
            async with self._room:
                await self._limited(self._largest, scope, receive, send)
        else:
            await self._limited(min(self._largest, LARGEST_PLAIN_BODY), scope, receive, send)

    async def _limited(self, largest: int, scope: Scope, receive: Receive, send: Send) -> None:
        sentence = f"the body is too large: {largest:,} bytes are the most that is taken here"
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > largest:
            await answer(413, sentence, {"Connection": "close"})(scope, receive, send)
            return
        read, deadline, over = 0, time.monotonic() + self._whole, False

        async def limited() -> Message:
            nonlocal read, over
            if over:  # the body is there; what may still come is that the client leaves, at any time
                return await receive()
            try:
                async with asyncio.timeout(min(self._pause, max(0.0, deadline - time.monotonic()))):
                    message = await receive()
            except TimeoutError:
                detail = "the body did not come in time"
                raise HTTPException(408, detail, {"Connection": "close"}) from None
            read += len(message.get("body", b""))
            over = not message.get("more_body", False)
            if read > largest:
                raise HTTPException(413, sentence, {"Connection": "close"})
            return message

        await self._app(scope, limited, send)
