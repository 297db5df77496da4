"""The service that ``gym-queue up`` keeps up: a supervised stack with a head, and its logs on the screen."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from gym_queue import assembly
from gym_queue.cli import pulse
from gym_queue.cli.burial import bury_as_they_die, hand_back_of_the_dead, leased
from gym_queue.cli.configuration import load_settings
from gym_queue.cli.findings import Level
from gym_queue.cli.interrupts import Interrupts
from gym_queue.cli.relay import Relay
from gym_queue.cli.status import INTERRUPTED, OK, OPERATOR, say
from gym_queue.coordinator.sidework import beside
from gym_queue.embedded.stack import EmbeddedStack
from gym_queue.errors import StackError, UsageError
from gym_queue.head.app import create_app
from gym_queue.head.auth import check_host
from gym_queue.head.server import listen, make_server
from gym_queue.settings import variable
from gym_queue.telemetry.logging import configure

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.celery_app import CeleryBroker
    from gym_queue.embedded.stack import Death
    from gym_queue.ledger.base import Ledger
    from gym_queue.settings import Settings

_TIME_TO_HAND_BACK = 8.0
"""Seconds, after those for what is in flight, in which workers hand back the rest."""

HEAD = [sys.executable, "-m", "gym_queue.cli.main", "head"]

_LOOK = 0.2
_FORGIVEN_AFTER = 60.0
"""Seconds after which a death is no longer held against its part: what dies seldom is started again for ever,
what cannot start any more each time a little later.
"""


@dataclass(frozen=True)
class Plan:
    """What to bring up, and where its data and logs are. ``embedded``: the head runs inside this process."""

    embedded: bool
    workers: int
    verifiers: int
    folder: Path


def serve(plan: Plan) -> int:
    """Keep it up until told to stop; return the exit status.

    Raises:
        GymQueueError: a part cannot be started.
    """
    settings = load_settings()
    check_host(settings.head_host, settings.auth_token)
    if settings.head_port == 0:
        msg = f"{variable('head_port')} is 0: name a port, so that the head is found"
        raise UsageError(msg)
    configure(settings.log_level, "up")
    try:
        asyncio.run(_serve(plan, settings))
    except (asyncio.CancelledError, KeyboardInterrupt):
        say("stopped at once", OPERATOR)
        return INTERRUPTED
    say("all parts have stopped", OPERATOR)
    return OK


async def _serve(plan: Plan, settings: Settings) -> None:
    stopping = asyncio.Event()
    relay = Relay(plan.folder / "logs")
    with Interrupts() as interrupts:
        interrupts.gently = stopping.set
        async with beside(relay.follow()) as during:
            try:
                await during(_up(plan, settings, stopping))
            finally:
                relay.show()


async def _up(plan: Plan, settings: Settings, stopping: asyncio.Event) -> None:
    stack = EmbeddedStack(
        settings,
        plan.folder,
        workers=plan.workers,
        verifiers=plan.verifiers,
        fresh=False,
        services={} if plan.embedded else {"head": HEAD},
    )
    async with stack, AsyncExitStack() as closing:
        ledger, publisher = assembly.make_ledger(stack.settings), assembly.make_broker(stack.settings)
        closing.push_async_callback(ledger.close)
        closing.push_async_callback(publisher.close)
        deaths: asyncio.Queue[Death] = asyncio.Queue()
        now = asyncio.get_running_loop().time
        helpers = [
            stack.supervise(deaths.put_nowait, lambda: int(now() / _FORGIVEN_AFTER)),
            bury_as_they_die(deaths, ledger, publisher, stack.could_start),
            _begin(stack, ledger, publisher),
        ]
        if plan.embedded:
            helpers.append(_head_here(stack.settings))
        async with beside(*helpers) as during:
            await during(stopping.wait())
            say(
                f"stopping: what is in flight has {settings.shutdown_grace:g} s (again: stop at once)",
                OPERATOR,
            )
        await stack.stop(settings.shutdown_grace + _TIME_TO_HAND_BACK)


async def _head_here(settings: Settings) -> None:
    """Be the head, in a thread with an event loop of its own, until cancelled."""
    with listen(settings.head_host, settings.head_port) as listener:
        app = create_app(settings)
        server = make_server(app, lambda: app.state.services.stop())  # noqa: PLW0108 - they are made later
        serving = asyncio.ensure_future(asyncio.to_thread(server.run, [listener]))
        try:
            await asyncio.shield(serving)
        finally:
            server.should_exit = True
            await serving
    msg = "the head ended by itself; its last lines say why"
    raise StackError(msg)


async def _begin(stack: EmbeddedStack, ledger: Ledger, publisher: CeleryBroker) -> None:
    """Give back what an earlier stack left, wait until all parts are ready, and say how to use them."""
    await hand_back_of_the_dead(ledger, publisher, stack.pids if stack.own_redis else None)
    head = pulse.head_here(stack.settings)
    while True:
        if await asyncio.to_thread(_is_ready, head):
            break
        await asyncio.sleep(_LOOK)
    await stack.wait_ready(partial(leased, ledger))  # last: the stack is less patient before
    say(f"the head listens on {head}: submit-rollouts INPUT.jsonl --model MODEL --head {head} ...", OPERATOR)
    if stack.own_redis:
        say(f"to look into its Redis: export GYM_QUEUE_REDIS_URL={stack.settings.redis_url}", OPERATOR)
    say("Ctrl-C stops all", OPERATOR)


def _is_ready(head: str) -> bool:
    return pulse.server("head", head, "/ready").level is Level.OK
