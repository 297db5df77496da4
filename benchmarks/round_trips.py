"""How often a worker's pipeline writes to Redis for each ticket: the ledger's round trips, not Celery's.

The real pipeline and ledger in this process, no Celery around them; what is counted are the packets that the
driver sends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from redis.asyncio.connection import AbstractConnection

from benchmarks.measurement import add_arguments
from gym_queue import assembly
from gym_queue.pipeline import Pipeline
from gym_queue.records import Example, Group, RunSpec
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.measurement import Sample
    from gym_queue.engines.base import Engine
    from gym_queue.records import Ticket

_sent = 0


def _count_packets() -> None:
    """Count what connections send from now on."""
    send = AbstractConnection.send_packed_command

    async def counted(self: Any, *args: Any, **options: Any) -> None:
        global _sent  # noqa: PLW0603 - a counter of the whole process
        _sent += 1
        await send(self, *args, **options)

    AbstractConnection.send_packed_command = counted  # type: ignore[method-assign]


class _Nowhere:
    async def publish(self, tickets: Sequence[Ticket]) -> None:
        """Nothing follows a rollout that is verified inline."""


async def measure(tickets: int, samples: int) -> Sample:
    """Return the round trips a ticket: one ticket at a time, and all at once."""
    settings = Settings()
    ledger = assembly.make_ledger(settings)
    engines: dict[str, Engine] = {}

    async def engine(model: str) -> Engine:
        return engines.setdefault(model, assembly.make_engine(model, settings))

    pipeline = Pipeline(ledger, _Nowhere(), engine, assembly.make_environment, "worker", slots=10_000)
    spec = RunSpec(run_id=f"trips-{time.time_ns()}", model="stub:", samples=samples)
    await ledger.open_run(spec, spec.run_id)
    row = {"prompt": "What is 6 * 7?", "answer": "ok"}
    groups = [
        Group(
            example_index=index,
            samples=tuple(range(samples)),
            example=Example(id=str(index), environment="rows", row=row),
        )
        for index in range(2 * tickets + 1)
    ]
    first, *waiting = await ledger.accept(spec.run_id, 0, len(groups), groups)
    await pipeline.generate(first)  # connects, loads the scripts and asks for the run
    begun = _sent
    for ticket in waiting[:tickets]:
        await pipeline.generate(ticket)
    alone = _sent
    await asyncio.gather(*map(pipeline.generate, waiting[tickets:]))
    together = _sent
    await ledger.close()
    return {"one_at_a_time": (alone - begun) / tickets, "all_at_once": (together - alone) / tickets}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, required=True, help="tickets")
    parser.add_argument("--samples", type=int, default=1)
    add_arguments(parser)
    options = parser.parse_args()
    _count_packets()
    print(json.dumps(asyncio.run(measure(options.tasks, options.samples))))


if __name__ == "__main__":
    main()
