"""Runs a workload on the real stack while a schedule of faults strikes, and checks what came of it."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from gym_queue import names
from gym_queue.testing import async_wait_until
from tests.chaos import checks
from tests.chaos.faults import play
from tests.chaos.processes import command_line
from tests.chaos.stack import COORDINATOR, cancelled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.chaos.faults import Fault, Schedule
    from tests.chaos.stack import Stack
    from tests.chaos.workload import Ending, Workload

_PATIENCE = 30.0
_CHANCES = 10
_PROGRESS_INTERVAL = 5.0
_SHOWN_OF_A_KIND = 3


@dataclass
class Report:
    """What a run was like. ``seconds`` is from the coordinator's first start to its last end."""

    seconds: float
    succeeded: list[checks.Row]
    failed: list[checks.Row]
    struck: list[Fault]
    wrong: list[str] = field(default_factory=list)
    noted: list[str] = field(default_factory=list)


async def collect(
    stack: Stack,
    workload: Workload,
    schedule: Schedule = (),
    *,
    limit: float,
    also: Sequence[Ending] = (),
) -> Report:
    """Submit the workload, let the faults strike until it is done, and check everything.

    Args:
        stack: entered.
        workload: the input.
        schedule: faults, timed from now on. Those that are due after the end do not strike.
        limit: seconds that the run may take.
        also: endings that any rollout may have instead of its own.
    """
    stack.submit(workload)
    return await finish(stack, workload, schedule, limit=limit, also=also)


async def finish(
    stack: Stack,
    workload: Workload,
    schedule: Schedule = (),
    *,
    limit: float,
    also: Sequence[Ending] = (),
) -> Report:
    """Like ``collect``, for a workload that is submitted already."""
    began = stack.processes.now
    for fault in schedule:
        stack.say(f"planned {fault}")
    faults = asyncio.create_task(play(stack, schedule))
    progress = asyncio.create_task(_say_progress(stack))
    try:
        await async_wait_until(partial(_run_has_ended, stack, faults), limit, what="the run to end")
        seconds = stack.processes.now - began
    except AssertionError:
        stack.say(await _what_is_left(stack))
        raise
    finally:
        await cancelled(progress)
        await cancelled(faults)
    stack.say(f"the run has ended after {seconds:.1f} s")
    out = stack.out
    report = Report(seconds, checks.read(out), checks.read(out.with_suffix(".failures.jsonl")), stack.struck)
    report.wrong += checks.each_once(report.succeeded, report.failed, workload)
    report.wrong += checks.endings([*report.succeeded, *report.failed], workload, also)
    report.wrong += checks.metrics(stack.metrics(), report.succeeded, report.failed)
    report.wrong += checks.deaths(stack.processes.deaths, poison="poison" in workload.kinds)
    report.wrong += await _wind_down(stack)
    report.wrong += checks.logs(stack.logs())
    return report


def _run_has_ended(stack: Stack, faults: asyncio.Task[None]) -> bool:
    if faults.done():
        faults.result()  # a fault that could not be made to happen is no run worth waiting for
    own = [death for death in stack.processes.deaths if death.name == COORDINATOR and not death.asked]
    assert len(own) < _CHANCES, f"the coordinator keeps ending: {own[-1]}"
    return not stack.part(COORDINATOR).wanted


async def _wind_down(stack: Stack) -> list[str]:
    """Stop what still runs, as an operator would, and say what does not go as it should."""
    wrong = []
    steps = [
        (
            lambda: stack.leased(no_others=True),
            "the workers to be back, and the leases of the dead to be gone",
        ),
        (lambda: _ended(stack, "beat"), "beat to end"),
        (lambda: _empty(stack), "the queues to be empty"),
        (lambda: _ended(stack, *(part.name for part in stack.workers)), "the workers to end"),
    ]
    for done, what in steps:
        try:
            await async_wait_until(done, _PATIENCE, what=what)
        except AssertionError as error:
            wrong += [str(error), await _what_is_left(stack)]
    last = {death.name: death.status for death in stack.processes.deaths}
    wrong += [
        f"{part.name}, told to end, ended with {last.get(part.name)}"
        for part in stack.workers
        if last.get(part.name) != 0
    ]
    client = stack.server.client
    left = [(key.decode(), await client.pttl(key)) async for key in client.scan_iter(count=1000)]
    wrong += checks.keys(left)
    if strays := set(stack.processes.living()) - {stack.part("redis").pid}:
        wrong.append(f"{len(strays)} processes are left behind: {'; '.join(map(command_line, strays))}")
    return wrong


async def _ended(stack: Stack, *those: str) -> bool:
    parts = [stack.part(name) for name in those]
    for part in parts:
        if part.wanted:
            part.wanted = False
            if part.asked != part.pid:  # a second SIGTERM would hurry it
                part.end(signal.SIGTERM)
    return all(part.process is None for part in parts)


async def _empty(stack: Stack) -> bool:
    return not await stack.server.client.exists(*names.QUEUE_OF_STAGE.values(), names.MAINTENANCE_QUEUE)


async def _say_progress(stack: Stack) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_INTERVAL)
        if (status := stack.status) is not None:
            counts = status.model_dump(exclude={"spec"})
            stack.say(", ".join(f"{name} {value}" for name, value in counts.items() if value))


async def _what_is_left(stack: Stack) -> str:
    """Describe the ledger and the broker: what a run that does not end is waiting for."""
    client: Any = stack.server.client  # redis-py's annotations mix str and bytes
    kinds: Counter[str] = Counter()
    lines = []
    async for key in client.scan_iter(count=1000):
        name, kind = key.decode(), (await client.type(key)).decode()
        family = f"{':'.join(name.split(':')[:2])} ({kind})"
        kinds[family] += 1
        if kinds[family] <= _SHOWN_OF_A_KIND:
            lines.append(f"  {name}: {str(await _content(client, name, kind))[:600]}")
    return "\n".join(["what is left:", *(f"  {count} x {kind}" for kind, count in kinds.items()), *lines])


async def _content(client: Any, name: str, kind: str) -> object:
    match kind:
        case "hash":
            return await client.hgetall(name)
        case "zset":
            return await client.zcard(name), await client.zrange(name, 0, 3, withscores=True)
        case "list":
            return await client.llen(name)
        case "stream":
            return await client.xlen(name)
    return ""
