"""What can go wrong, when, and how to make it happen. A schedule is data: drawn from a seed, shown whole."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gym_queue import names

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping
    from typing import Any

    from tests.chaos.stack import Stack


@dataclass(frozen=True, order=True)
class Fault:
    """One fault: seconds after the run began, what, to whom, and for how many seconds if it heals."""

    at: float
    what: str
    target: str = ""
    lasts: float = 0.0

    def __str__(self) -> str:
        return f"{self.at:7.2f}  {self.what} {self.target}{f' for {self.lasts:.1f} s' if self.lasts else ''}"


Schedule = tuple[Fault, ...]


@dataclass(frozen=True)
class Recipe:
    """How often a fault strikes and how long it lasts (from, to), in seconds.

    ``every`` is a mean: gaps are drawn between half of it and one and a half.
    """

    what: str
    targets: tuple[str, ...]
    every: float
    lasts: tuple[float, float] = (0.0, 0.0)
    at_most: int | None = None


def draw(seed: int, recipes: Iterable[Recipe], horizon: float) -> Schedule:
    """Draw a schedule up to ``horizon`` seconds. Each recipe has its own dice, so others may come and go."""
    faults = []
    for recipe in recipes:
        dice = random.Random(f"{seed} {recipe.what} {recipe.targets}")
        times = itertools.accumulate(recipe.every * dice.uniform(0.5, 1.5) for _ in itertools.count())
        for at in itertools.islice(itertools.takewhile(lambda at: at < horizon, times), recipe.at_most):
            target = dice.choice(recipe.targets)
            faults.append(Fault(round(at, 2), recipe.what, target, round(dice.uniform(*recipe.lasts), 1)))
    return tuple(sorted(faults))


async def _kill(stack: Stack, fault: Fault) -> None:
    stack.part(fault.target).end(signal.SIGKILL)


async def _terminate(stack: Stack, fault: Fault) -> None:
    stack.part(fault.target).end(signal.SIGTERM)


async def _freeze(stack: Stack, fault: Fault) -> None:
    part = stack.part(fault.target)
    pid = part.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.lasts)
    finally:
        if pid is not None and part.pid == pid:
            part.send(signal.SIGCONT)


async def _stop_redis(stack: Stack, fault: Fault) -> None:
    """Stop Redis: ``in order``, ``killed``, or ``with the mains`` (its last second of writes is lost)."""
    async with stack.redis_lock:
        try:
            number = signal.SIGTERM if fault.target == "in order" else signal.SIGKILL
            await stack.server.down(number, unsynced=fault.target == "with the mains")
            await asyncio.sleep(fault.lasts)
        finally:
            await stack.server.up()


async def _fill_redis(stack: Stack, fault: Fault) -> None:
    """Leave Redis no memory for further writes (``maxmemory`` under ``noeviction``)."""
    async with stack.redis_lock:
        client = stack.server.client
        await client.config_set("maxmemory", "1")
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            await client.config_set("maxmemory", "0")


async def _disconnect(stack: Stack, _fault: Fault) -> None:
    async with stack.redis_lock:
        for kind in ("normal", "pubsub"):
            await stack.server.client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


async def _empty(stack: Stack, _fault: Fault) -> None:
    async with stack.redis_lock:
        await stack.server.client.delete(*names.QUEUE_OF_STAGE.values(), names.MAINTENANCE_QUEUE)


async def _cut(stack: Stack, fault: Fault) -> None:
    stack.cable.cut()
    try:
        await asyncio.sleep(fault.lasts)
    finally:
        stack.cable.heal()


FAULTS: Mapping[str, Callable[[Stack, Fault], Coroutine[Any, Any, None]]] = {
    "kill": _kill,
    "terminate": _terminate,
    "freeze": _freeze,
    "stop redis": _stop_redis,
    "fill redis": _fill_redis,
    "disconnect": _disconnect,
    "empty the queues": _empty,
    "cut the cable": _cut,
}


async def play(stack: Stack, schedule: Schedule) -> None:
    """Let the faults of a schedule strike, each at its time. When cancelled, heals what can be healed."""
    began = stack.processes.now
    async with asyncio.TaskGroup() as striking:
        for fault in schedule:
            await asyncio.sleep(began + fault.at - stack.processes.now)
            stack.say(f"FAULT {fault}")
            stack.struck.append(fault)
            striking.create_task(FAULTS[fault.what](stack, fault))
