"""The two answers of NeMo Gym's head server, so that its clients find the servers registered here.

Their shapes are those of ``nemo_gym/server_utils.py`` and ``nemo_gym/cli`` in
https://github.com/NVIDIA-NeMo/Gym (``HeadServer``, ``ServerInstanceDisplayConfig``, ``ServerClient``):
``/server_instances`` is a list of its display records; ``/global_config_dict_yaml`` is a YAML text inside a
JSON string, in which ``NAME.SERVER_TYPE.IMPLEMENTATION`` leads to the ``host`` and ``port`` of a server.
Theirs is their whole configuration, keys of model endpoints and all; ours names the servers and nothing else.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request

from gym_queue.head.errors import responses
from gym_queue.head.services import Services
from gym_queue.records import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.api import ServerView

router = APIRouter(tags=["NeMo Gym"])

_HEAD = "head_server"
_PORTS = {"http": 80, "https": 443}


class ServerInstance(Record):
    """One server in NeMo Gym's words. ``start_time`` is a Unix time; ``status`` is left to who asks it."""

    config_path: str
    dir_path: str | None = None
    entrypoint: str | None = None
    host: str
    name: str
    pid: int | None = None
    port: int
    process_name: str
    server_type: str
    start_time: float
    status: str | None = None
    uptime_seconds: float
    url: str


@router.get("/server_instances", summary="Servers, in NeMo Gym's shape", responses=responses())
async def server_instances(services: Services) -> list[ServerInstance]:
    """List the registered servers, healthy ones first, as NeMo Gym's head server does."""
    now = time.time()
    return [_instance(server, now) for server in await services.registry.servers()]


@router.get("/global_config_dict_yaml", summary="Configuration, in NeMo Gym's shape", responses=responses())
async def global_config_dict_yaml(request: Request, services: Services) -> str:
    """Return where each server is found by its name (the healthiest of that name), as a YAML text in a JSON
    string. It holds no secrets.
    """
    import yaml  # noqa: PLC0415 - nothing else needs it

    host, port = request.scope.get("server") or ("", 0)  # where this request came in
    head = {"host": host, "port": port}
    text: str = yaml.safe_dump(config_of(await services.registry.servers(), head), sort_keys=False)
    return text


def config_of(servers: Sequence[ServerView], head: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration: the first of ``servers`` under each name."""
    config: dict[str, Any] = {_HEAD: head}
    for server in servers:
        host, port = _place(server)
        found = {"host": host, "port": port, "url": server.url}
        config.setdefault(server.name, {server.kind: {server.name: found}})
    return config


def _instance(server: ServerView, now: float) -> ServerInstance:
    host, port = _place(server)
    return ServerInstance(
        config_path=server.name,
        host=host,
        name=server.name,
        port=port,
        process_name=server.name,
        server_type=server.kind,
        start_time=server.registered_at,
        uptime_seconds=max(0.0, now - server.registered_at),
        url=server.url,
    )


def _place(server: ServerView) -> tuple[str, int]:
    parts = urlsplit(server.url)
    return parts.hostname or "", parts.port or _PORTS[parts.scheme]
