"""Workers and servers: who is there, and how a server makes itself known."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Path, Query

from gym_queue.api import ServerRequest, ServerView
from gym_queue.head.bodies import StrictRoute
from gym_queue.head.errors import responses
from gym_queue.head.services import Services
from gym_queue.records import Record

router = APIRouter(route_class=StrictRoute)

_Id = Annotated[str, Path(pattern=r"^server-[0-9a-f]{16}$", examples=["server-3f2a9c0d1e4b5a67"])]


class WorkerView(Record):
    """A worker as the head shows it. ``age`` is seconds since its last heartbeat; ``slots`` and ``used`` are
    rollouts, ``None`` where it has not said. ``info`` is all that it says of itself.
    """

    worker: str
    kind: str | None
    node: str | None
    age: float
    healthy: bool
    slots: int | None
    used: int | None
    info: dict[str, str]


class WorkerList(Record):
    """The workers that have a lease."""

    workers: list[WorkerView]


class ServerList(Record):
    """Registered servers, healthy ones first."""

    servers: list[ServerView]


class Registered(Record):
    """A server's id, and how it keeps it: a heartbeat every ``heartbeat_interval`` seconds; after ``timeout``
    seconds of silence it is forgotten.
    """

    id: str
    heartbeat_interval: float
    timeout: float


@router.get("/v1/workers", tags=["fleet"], summary="List workers", responses=responses())
async def workers(services: Services) -> WorkerList:
    """List the workers that hold a lease: when each was last heard of, and what room it has."""
    interval = services.settings.worker_heartbeat_interval
    leases = [lease for lease in await services.ledger.leases() if not lease.is_server]
    return WorkerList(
        workers=[
            WorkerView(
                worker=lease.worker,
                kind=lease.info.get("kind"),
                node=lease.info.get("node"),
                age=lease.age,
                healthy=not lease.is_silent(interval),
                slots=_number(lease.info.get("slots")),
                used=_number(lease.info.get("used")),
                info=lease.info,
            )
            for lease in sorted(leases, key=lambda lease: (lease.info.get("kind", ""), lease.worker))
        ]
    )


@router.post(
    "/v1/servers", status_code=201, tags=["fleet"], summary="Register a server", responses=responses(413, 422)
)
async def register(services: Services, server: ServerRequest) -> Registered:
    """Register a server. The same name, kind and URL again is the same server, which has started anew."""
    return _registered(services, await services.registry.register(server))


@router.post(
    "/v1/servers/{server_id}/heartbeat",
    tags=["fleet"],
    summary="Renew a server's lease",
    responses=responses(404, 422),
)
async def heartbeat(services: Services, server_id: _Id) -> Registered:
    """Say that a server is alive. 404: it was silent for too long and must register again."""
    if not await services.registry.renew(server_id):
        msg = f"no server {server_id} is registered (any more): register it again"
        raise HTTPException(404, msg)
    return _registered(services, server_id)


@router.delete(
    "/v1/servers/{server_id}",
    status_code=204,
    tags=["fleet"],
    summary="Forget a server",
    responses=responses(422),
)
async def forget(services: Services, server_id: _Id) -> None:
    """Forget a server that stops. Safe to repeat."""
    await services.registry.drop(server_id)


@router.get("/v1/servers", tags=["fleet"], summary="List servers", responses=responses(422))
async def servers(
    services: Services, name: Annotated[str | None, Query(description="Only servers of this name.")] = None
) -> ServerList:
    """List the registered servers, healthy ones first."""
    return ServerList(servers=await services.registry.servers(name))


def _registered(services: Services, identity: str) -> Registered:
    settings = services.settings
    return Registered(
        id=identity,
        heartbeat_interval=settings.worker_heartbeat_interval,
        timeout=settings.worker_timeout,
    )


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None
