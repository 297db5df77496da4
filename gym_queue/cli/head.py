"""``gym-queue head``: the service that trainers and operators talk to over HTTP."""

from __future__ import annotations

import asyncio

import click

from gym_queue.cli.configuration import load_settings
from gym_queue.cli.status import OPERATOR, say


@click.command()
@click.option("--host", metavar="ADDRESS", help="Where to listen.  [default: 127.0.0.1]")
@click.option("--port", type=int, metavar="N", help="The port.  [default: 11000]")
def head(host: str | None, port: int | None) -> None:
    """Serve runs, feeds and the fleet over HTTP, and lead the runs of GYM_QUEUE_RUNS_DIR.

    It asks for the token in GYM_QUEUE_AUTH_TOKEN; without one it listens on this machine only. SIGTERM or
    Ctrl-C stops it: feeds end, another head takes over. Several may run beside each other, with one folder
    and one Redis.
    """
    settings = load_settings(head_host=host, head_port=port)
    from gym_queue.head.auth import check_host  # noqa: PLC0415 - FastAPI loads slowly: not for --help

    check_host(settings.head_host, settings.auth_token)
    from gym_queue.embedded.preflight import await_redis  # noqa: PLC0415 - the same
    from gym_queue.head.app import create_app  # noqa: PLC0415
    from gym_queue.head.server import address_of, listen, make_server  # noqa: PLC0415
    from gym_queue.open_files import allow_many  # noqa: PLC0415
    from gym_queue.telemetry import logging  # noqa: PLC0415

    allow_many()
    logging.configure_process(settings, "head")
    with listen(settings.head_host, settings.head_port) as listener:
        asyncio.run(await_redis(settings.redis_url))
        app = create_app(settings)
        say(f"the head listens on {address_of(listener)}", OPERATOR)
        make_server(app, lambda: app.state.services.stop()).run([listener])  # noqa: PLW0108 - made later
