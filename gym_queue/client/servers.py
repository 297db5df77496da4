"""Servers that are reached by name: who looks one up, and who wants to be found."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import random
import time
from collections import Counter, OrderedDict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import aiohttp

from gym_queue.client.connection import KEEP_ALIVE, reason_of
from gym_queue.errors import GymQueueError, NotFoundError, ServerAwayError, ServerBrokeOffError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from types import TracebackType

    from gym_queue.client.asynchronous import AsyncClient

_log = logging.getLogger(__name__)

CACHED = 5.0
"""Seconds that the instances of a name are remembered."""

MOST_SESSIONS = 100_000
"""Sessions that are remembered; the one that was quiet longest is forgotten first."""

_CONNECT_TIMEOUT = 10.0


@dataclass
class _Session:
    """Where a session lives, and its cookies. ``begun``: the instance has answered and may know it."""

    url: str = ""
    begun: bool = False
    cookies: SimpleCookie = field(default_factory=SimpleCookie)


@dataclass
class _Known:
    """The healthy instances of a name, as the head listed them at ``at`` (monotonic)."""

    urls: list[str]
    at: float


class ServerClient:
    """Sends requests to servers by their names. For one event loop; ``async with`` closes it.

    Each goes to the healthy instance that has the fewest requests of this client open; requests of one
    session go to the same one, with the cookies that it set.

    Args:
        client: of the head where they are registered. Not closed here.
        timeout: seconds for a whole request.
        cached: seconds that instances are remembered.
    """

    def __init__(self, client: AsyncClient, *, timeout: float = 300.0, cached: float = CACHED) -> None:
        self._head = client.connection
        self._timeout = timeout
        self._cached = cached
        self._known: dict[str, _Known] = {}
        self._open: Counter[str] = Counter()
        self._sessions: OrderedDict[tuple[str, str], _Session] = OrderedDict()
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def post(
        self,
        *,
        server_name: str,
        url_path: str,
        json: Any = None,
        session: str | None = None,
        idempotent: bool = False,
        **request: Any,
    ) -> aiohttp.ClientResponse:
        """Send a POST, and return the answer, whatever its status, with its body read.

        Args:
            server_name: under which the server is registered.
            url_path: below the instance's URL.
            json: the body.
            session: requests of one session are answered by one instance.
            idempotent: done twice it does no harm, so it may be sent again where it is not known if it was
                done. Otherwise only a request that nobody has seen goes to another instance.
            request: ``headers``, ``params``, ``timeout`` and the like, as in aiohttp.

        Raises:
            ServerAwayError: no healthy instance takes a connection, or that of the session does not.
            ServerBrokeOffError: the request may have been done or not.
            GymQueueError: the head cannot say which instances there are (see ``Connection.call``).
        """
        return await self._send("POST", server_name, url_path, session, idempotent, json=json, **request)

    async def get(
        self, *, server_name: str, url_path: str, session: str | None = None, **request: Any
    ) -> aiohttp.ClientResponse:
        """Send a GET, which may be repeated; otherwise as ``post``."""
        return await self._send("GET", server_name, url_path, session, True, **request)  # noqa: FBT003

    def forget(self, server_name: str, session: str) -> None:
        """End a session: its place and its cookies are forgotten."""
        self._sessions.pop((server_name, session), None)

    async def close(self) -> None:
        """Close all connections. Safe to repeat."""
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    async def _send(
        self,
        method: str,
        name: str,
        path: str,
        session: str | None,
        again: bool,  # noqa: FBT001 - ours alone
        **request: Any,
    ) -> aiohttp.ClientResponse:
        place = _Session() if session is None else self._session(name, session)
        if place.begun:
            return await self._stay(method, name, path, place, again, request)
        tried: set[str] = set()
        why: GymQueueError = ServerAwayError(f"no healthy server is registered as {name!r}")
        for anew in (False, True):
            urls = await self._instances(name, anew=anew)
            while left := [url for url in urls if url not in tried]:
                place.url = place.url if place.url in left else self._idlest(left)
                tried.add(place.url)
                try:
                    return await self._once(method, place.url, path, place, request)
                except ServerAwayError as error:
                    why = error
                except ServerBrokeOffError as error:
                    if not again:
                        raise
                    why = error
                _log.info("%s; another instance of %s is tried", why, name)
        raise why

    async def _stay(
        self,
        method: str,
        name: str,
        path: str,
        place: _Session,
        again: bool,  # noqa: FBT001 - ours alone
        request: Mapping[str, Any],
    ) -> aiohttp.ClientResponse:
        """Send a request of a session that only its own instance knows."""
        try:
            try:
                return await self._once(method, place.url, path, place, request)
            except ServerBrokeOffError:
                if not again:
                    raise
                return await self._once(method, place.url, path, place, request)
        except ServerAwayError as error:
            msg = f"the instance of {name} that knows this session is gone: {error}"
            raise ServerAwayError(msg) from error

    def _idlest(self, urls: list[str]) -> str:
        fewest = min(self._open[url] for url in urls)
        return random.choice([url for url in urls if self._open[url] == fewest])

    async def _instances(self, name: str, *, anew: bool) -> list[str]:
        """Return the healthy instances of a name, as the head said lately or (``anew``) says now."""
        known = self._known.get(name)
        if anew or known is None or time.monotonic() - known.at > self._cached:
            self._known[name] = known = await self._look_up(name)
        return known.urls

    async def _look_up(self, name: str) -> _Known:
        answer = await self._head.call("GET", "/v1/servers", params={"name": name})
        urls = [str(server["url"]).rstrip("/") for server in answer["servers"] if server.get("healthy", True)]
        return _Known(list(dict.fromkeys(urls)), time.monotonic())

    def _session(self, name: str, session: str) -> _Session:
        place = self._sessions.setdefault((name, session), _Session())
        self._sessions.move_to_end((name, session))
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return place

    async def _once(
        self, method: str, url: str, path: str, place: _Session, request: Mapping[str, Any]
    ) -> aiohttp.ClientResponse:
        """Send a request to one instance.

        Raises:
            ServerAwayError: there was no connection: nobody has seen the request.
            ServerBrokeOffError: there was one.
        """
        target = f"{url}/{path.lstrip('/')}"
        limits = aiohttp.ClientTimeout(total=self._timeout, sock_connect=_CONNECT_TIMEOUT)
        self._open[url] += 1
        try:
            async with self._opened().request(
                method, target, **{"timeout": limits, "cookies": _plain(place.cookies), **request}
            ) as answer:
                await answer.read()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            msg = f"{url} takes no connection ({reason_of(error)})"
            raise ServerAwayError(msg) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            msg = f"{url} broke off ({reason_of(error)}): {method} {path} may have been done or not"
            raise ServerBrokeOffError(msg) from error
        finally:
            self._open[url] -= 1
        place.begun = True
        place.cookies.update(answer.cookies)
        return answer

    def _opened(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._http


def _plain(cookies: SimpleCookie) -> dict[str, str]:
    return {name: morsel.value for name, morsel in cookies.items()}


@asynccontextmanager
async def registered(
    client: AsyncClient,
    *,
    name: str,
    kind: str,
    url: str,
    node: str | None = None,
    versions: Mapping[str, str] | None = None,
    capacity: int = 1,
) -> AsyncIterator[str]:
    """Let a server be found by its name while the block runs; gives its id.

    The registration is renewed as often as the head asks for, made anew where a head has forgotten it, and
    taken back at the end. A head that is away in between is waited for.

    Args:
        client: of the head.
        name: what callers ask for; instances share it.
        kind: what it is, as ``responses_api_models``.
        url: where this instance is reached.
        node: its machine; by default this one.
        versions: of its parts.
        capacity: how many requests it likes at once.

    Raises:
        GymQueueError: the head cannot be reached or refuses (see ``Connection.call``).
    """
    server = {
        "name": name,
        "kind": kind,
        "url": url,
        "node": platform.node() if node is None else node,
        "versions": dict(versions or {}),
        "capacity": capacity,
    }
    head = client.connection
    known = await head.call("POST", "/v1/servers", json=server)
    path = f"/v1/servers/{quote(known['id'], safe='')}"

    async def renew() -> None:
        while True:
            await asyncio.sleep(known["heartbeat_interval"])
            try:
                await head.call("POST", f"{path}/heartbeat", forever=True)
            except NotFoundError:
                _log.warning("the head has forgotten %s at %s; it is registered again", name, url)
                await head.call("POST", "/v1/servers", json=server, forever=True)

    renewing = asyncio.create_task(renew())
    try:
        yield known["id"]
    finally:
        renewing.cancel()
        broken = (await asyncio.gather(renewing, return_exceptions=True))[0]
        if isinstance(broken, Exception):
            _log.error("the registration of %s at %s could not be renewed: %s", name, url, broken)
        with contextlib.suppress(GymQueueError):  # it forgets us on its own, in a while
            await head.call("DELETE", path)
