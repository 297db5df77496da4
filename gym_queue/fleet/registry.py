"""Servers that are found by name. Each has a lease in the ledger, as workers do, and loses it in silence."""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING

from gym_queue.api import ServerRequest, ServerView
from gym_queue.errors import UsageError
from gym_queue.ledger.base import SERVER

if TYPE_CHECKING:
    from gym_queue.ledger.base import Lease, Ledger

MOST_SERVERS = 10_000
"""Servers that are registered at once; one more is refused."""


class Registry:
    """The servers of one ledger.

    Args:
        ledger: where the leases are.
        heartbeat_interval: seconds between two renewals, as the servers are told.
        timeout: seconds of silence after which a server is no longer listed.
    """

    def __init__(self, ledger: Ledger, *, heartbeat_interval: float, timeout: float) -> None:
        self._ledger = ledger
        self._interval = heartbeat_interval
        self._timeout = timeout

    async def register(self, server: ServerRequest) -> str:
        """Register a server, or renew what the same one (name, kind and URL) said before. Returns its id.

        Raises:
            UsageError: there are too many.
        """
        identity = _id_of(server)
        present = await self._leases()
        if identity not in present and len(present) >= MOST_SERVERS:
            msg = f"{len(present)} servers are registered: no more are taken"
            raise UsageError(msg)
        await self._ledger.heartbeat(identity, _info_of(server, time.time()))
        return identity

    async def renew(self, identity: str) -> bool:
        """Renew a server's lease. Returns false if it has none (any more): it must register again."""
        lease = (await self._leases()).get(identity)
        if lease is None:
            return False
        await self._ledger.heartbeat(identity, lease.info)
        return True

    async def drop(self, identity: str) -> None:
        """Forget a server. Does nothing where there is none of that id; a worker is none."""
        if identity in await self._leases():
            await self._ledger.drop_lease(identity)

    async def servers(self, name: str | None = None) -> list[ServerView]:
        """Return the servers (of a name), healthy ones first, those that were heard of last in front."""
        views = [_view_of(lease, self._interval) for lease in (await self._leases()).values()]
        wanted = [view for view in views if name is None or view.name == name]
        return sorted(wanted, key=lambda view: (not view.healthy, view.age))

    async def _leases(self) -> dict[str, Lease]:
        """Return the leases of servers by id, but for those of the dead, which stand until a sweep."""
        leases = await self._ledger.leases()
        return {lease.worker: lease for lease in leases if lease.is_server and lease.age <= self._timeout}


def _id_of(server: ServerRequest) -> str:
    digest = hashlib.sha256(json.dumps([server.name, server.kind, server.url]).encode()).hexdigest()
    return f"{SERVER}-{digest[:16]}"


def _info_of(server: ServerRequest, now: float) -> dict[str, str]:
    """Return what the lease keeps. ``kind`` is what makes it a server's; its own is in ``server``."""
    return {
        "kind": SERVER,
        "node": server.node,
        "registered_at": str(now),
        "server": server.model_dump_json(),
    }


def _view_of(lease: Lease, interval: float) -> ServerView:
    return ServerView(
        **dict(ServerRequest.model_validate_json(lease.info["server"])),
        id=lease.worker,
        age=lease.age,
        healthy=not lease.is_silent(interval),
        registered_at=float(lease.info["registered_at"]),
    )
