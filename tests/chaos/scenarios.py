"""The scenarios: which workload, which faults, and what must be seen besides the checks that always hold.

Each has a short form, for every change, and a full one, for ``make chaos``. Their folder must be empty.
"""

from __future__ import annotations

import random
import signal
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

from gym_queue.testing import async_wait_until
from tests.chaos import network, workload
from tests.chaos.driver import collect, finish
from tests.chaos.faults import Fault, Recipe, draw
from tests.chaos.stack import COORDINATOR, Stack

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection
    from pathlib import Path

    from tests.chaos.driver import Report


class Size(StrEnum):
    """How large a scenario is played: in seconds for every change, or in full."""

    SHORT = "short"
    FULL = "full"


_GPU = ("gpu1", "gpu2", "gpu3", "gpu4")
_SLOWER_AT_MOST = 2.0
_FAILOVER_AT_MOST = 8.0

_PATIENT = {"GYM_QUEUE_CONCURRENCY": 250, "GYM_QUEUE_TOOL_TIMEOUT": 120, "GYM_QUEUE_GENERATE_TIMEOUT": 120}
"""One worker has room for all, and none of them is too long at its gate."""


async def deaths(folder: Path, seed: int, size: Size) -> Report:
    """Workers killed one after the other, Redis restarted, coordinator and beat killed.

    In full: 2,000 rollouts on 4 workers, of which one dies every 5 s; and it takes no more than twice as long
    as the same rollouts undisturbed.
    """
    full = size is Size.FULL
    rows = workload.draw(seed, {"sleeps": 700, "queued": 300} if full else {"sleeps": 150, "queued": 50}, 2)
    # So often do workers die that one rollout in some ten thousand is there three times by chance.
    settings, undisturbed = {"GYM_QUEUE_CONCURRENCY": 8, "GYM_QUEUE_MAX_ATTEMPTS": 6}, 0.0
    if full:
        async with Stack(folder / "undisturbed", settings=settings) as stack:
            undisturbed = (await collect(stack, rows, limit=120)).seconds
    dice, most = random.Random(seed), 0.7 * (undisturbed or 10.0)
    single = [
        Fault(round(dice.uniform(1.0, most), 1), *what)
        for what in (
            ("stop redis", "killed"),
            ("stop redis", "in order"),
            ("kill", "beat"),
            ("kill", COORDINATOR),
        )
    ]
    schedule = tuple(sorted([*single, *draw(seed, [Recipe("kill", _GPU, 5.0)], 300.0)]))
    async with Stack(folder / "disturbed", settings=settings) as stack:
        report = await collect(stack, rows, schedule, limit=300)
    report.wrong += [f"the run was over before: {fault}" for fault in single if fault not in report.struck]
    if full:
        ratio = report.seconds / undisturbed
        report.noted.append(f"{report.seconds:.1f} s, undisturbed {undisturbed:.1f} s: {ratio:.2f} times")
        if ratio > _SLOWER_AT_MOST:
            report.wrong.append(f"too slow: {report.noted[-1]}")
    return report


async def everything(folder: Path, seed: int, size: Size) -> Report:
    """All kinds of rollouts, all kinds of faults."""
    full = size is Size.FULL
    rows = workload.mixed(seed, 1000, 2) if full else workload.mixed(seed, 180, 2)
    gpu, remote = _GPU if full else _GPU[:3], () if network.why_not() else ("gpu1",)
    cpu, often = ("cpu1", "cpu2") if full else ("cpu1",), 1.0 if full else 0.5
    recipes = [
        Recipe("kill", gpu, 12.0 * often),
        Recipe("kill", cpu, 30.0 * often),
        Recipe("kill", ("beat", COORDINATOR), 20.0 * often),
        Recipe("terminate", (*gpu, *cpu), 20.0 * often),
        Recipe("freeze", (*gpu, *cpu, "beat"), 15.0 * often, (1.0, 8.0)),
        Recipe("freeze", ("redis",), 40.0 * often, (0.5, 3.0)),
        Recipe("stop redis", ("in order", "killed", "with the mains"), 25.0 * often, (0.0, 3.0)),
        Recipe("fill redis", ("",), 40.0 * often, (0.5, 3.0)),
        Recipe("disconnect", ("",), 20.0 * often),
        Recipe("empty the queues", ("",), 20.0 * often),
        *(Recipe("cut the cable", (name,), 20.0 * often, (1.0, 8.0)) for name in remote),
    ]
    schedule = draw(seed, recipes, 90.0 if full else 25.0)
    # A worker that is back before a deadline cannot tell how much of it was left to the environment.
    settings = {"GYM_QUEUE_MAX_ATTEMPTS": 4, "GYM_QUEUE_CONCURRENCY": 4, "GYM_QUEUE_TOOL_TIMEOUT": 10}
    async with Stack(folder / "stack", gpu=len(gpu), cpu=len(cpu), remote=remote, settings=settings) as stack:
        return await collect(stack, rows, schedule, limit=400 if full else 120)


async def failover(folder: Path, seed: int, _size: Size) -> Report:
    """A worker with 200 claims is killed: with a timeout of 3 s, all run elsewhere within 8 s."""
    rows = workload.draw(seed, {"gated": 200})
    async with Stack(folder / "stack", gpu=1, settings=_PATIENT) as stack:
        stack.submit(rows)
        await async_wait_until(partial(stack.owns, "gpu1", 200), 30, what="gpu1 to own all")
        stack.start_worker("gpu2")
        await async_wait_until(stack.leased, 30, what="gpu2 to be ready")
        stack.part("gpu1").wanted = False
        killed = await stack.clock()
        stack.part("gpu1").end(signal.SIGKILL)
        await async_wait_until(partial(stack.owns, "gpu2", 200), 60, what="gpu2 to own all")
        seconds = await stack.clock() - killed
        stack.part("gpu1").wanted = True
        stack.open_gate("gate")
        report = await finish(stack, rows, limit=60)
    report.noted.append(f"200 rollouts ran elsewhere {seconds:.1f} s after their worker was killed")
    if seconds > _FAILOVER_AT_MOST:
        report.wrong.append(f"too slow: {report.noted[-1]}")
    report.wrong += _attempts(report, {2})
    return report


def _attempts(report: Report, wanted: Collection[int]) -> list[str]:
    wrong = [row["rollout_id"] for row in report.succeeded if row["attempt"] not in wanted]
    return (
        [f"{len(wrong)} rollouts were not written by attempt {wanted}, such as {wrong[0]}"] if wrong else []
    )


async def frozen(folder: Path, seed: int, _size: Size) -> Report:
    """A worker is stopped beyond the timeout, then goes on: its late commits are refused, and it pulls."""
    async with Stack(folder / "stack", gpu=1, settings=_PATIENT) as stack:
        freeze = partial(stack.part("gpu1").send, signal.SIGSTOP)
        return await _comes_back(stack, seed, freeze, partial(stack.part("gpu1").send, signal.SIGCONT))


async def cut_off(folder: Path, seed: int, _size: Size) -> Report:
    """The same for a worker that cannot reach Redis for longer than the timeout."""
    async with Stack(folder / "stack", gpu=1, remote=("gpu1",), settings=_PATIENT) as stack:
        return await _comes_back(stack, seed, stack.cable.cut, stack.cable.heal)


async def _comes_back(
    stack: Stack, seed: int, leave: Callable[[], object], come_back: Callable[[], object]
) -> Report:
    """gpu1, with all claims, is away until gpu2 has taken them over. What it then writes of 40 is late: gpu2
    still works on these. It must take over the other 20 as soon as gpu2 gives them up.
    """
    rows = workload.draw(seed, {"gated": 40, "gated last": 20})
    stack.submit(rows)
    await async_wait_until(partial(stack.owns, "gpu1", 60), 30, what="gpu1 to own all")
    stack.start_worker("gpu2")
    await async_wait_until(stack.leased, 30, what="gpu2 to be ready")
    zombie = await stack.worker("gpu1")
    leave()
    await async_wait_until(partial(stack.owns, "gpu2", 60), 30, what="gpu2 to own all")
    # It would be told to drop them, perhaps before it has written; here that is lost, and the fence is alone.
    assert len(await stack.ledger.revoked(zombie, 100)) == 60
    stack.open_gate("gate", only="gpu1")
    come_back()
    await async_wait_until(stack.leased, 30, what="gpu1 to be back")
    await async_wait_until(
        lambda: stack.status and stack.status.refused, 30, what="a late write to be refused"
    )
    assert await stack.owns("gpu2", 60), "a late write was taken"
    stack.open_gate("gate")
    await async_wait_until(partial(stack.owns, "gpu2", 20), 30, what="gpu2 to end 40")
    stack.part("gpu2").wanted = False
    stack.part("gpu2").end(signal.SIGTERM)
    await async_wait_until(partial(stack.owns, "gpu1", 20), 30, what="gpu1 to take over what gpu2 hands back")
    stack.part("gpu2").wanted = True
    stack.open_gate("last")
    report = await finish(stack, rows, limit=30)
    refused = stack.status.refused if stack.status else 0
    report.noted.append(f"{refused} late writes were refused")
    report.wrong += (
        [] if "given up" in stack.part("gpu1").log.read_text() else ["gpu1 did not say what had happened"]
    )
    return report


async def poison(folder: Path, seed: int, size: Size) -> Report:
    """Rollouts that kill whoever generates them are failed; all others succeed, and workers are replaced."""
    full = size is Size.FULL
    counts = {"poison": 50, "sleeps": 950} if full else {"poison": 4, "sleeps": 120}
    rows = workload.draw(seed, counts)
    async with Stack(folder / "stack") as stack:
        report = await collect(stack, rows, limit=600 if full else 90)
        died = sum(death.name.startswith("gpu") and not death.asked for death in stack.processes.deaths)
    report.noted.append(f"{died} workers died of {counts['poison']} rollouts, {report.seconds:.0f} s")
    return report


SCENARIOS: dict[str, Callable[..., Awaitable[Report]]] = {
    "deaths": deaths,
    "everything": everything,
    "failover": failover,
    "frozen": frozen,
    "cut_off": cut_off,
    "poison": poison,
}


async def run(name: str, folder: Path, seed: int, size: Size) -> Report:
    """Play a scenario in an empty folder.

    Raises:
        AssertionError: what went wrong, the faults that struck, and where the logs are.
    """
    problem: BaseException | None = None
    try:
        report = await SCENARIOS[name](folder, seed, size)
        if not report.wrong:
            return report
        said = "\n".join(report.wrong)
    except Exception as error:  # noqa: BLE001 - whatever it was, it has a seed
        said, problem = f"{type(error).__name__}: {error}", error
    logs = "".join(log.read_text() for log in folder.glob("*/driver.log"))  # noqa: ASYNC240 - the end of all
    headline = f"scenario {name} went wrong with seed {seed}, {size}; its folder is {folder}"
    raise AssertionError(f"{headline}\n{logs}{said}") from problem
