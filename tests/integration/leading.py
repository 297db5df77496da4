"""A process that leads, without the HTTP of a head: ``python -m tests.integration.leading``.

It reads the settings as a head does, and ends on SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

from gym_queue import assembly
from gym_queue.coordinator.driver import Means
from gym_queue.coordinator.leader import Leader
from gym_queue.coordinator.muster import Muster
from gym_queue.maintenance.cancel import cancel_run, cancel_samples
from gym_queue.settings import Settings
from gym_queue.telemetry.logging import configure


async def lead() -> None:
    settings = Settings()
    ledger, publisher = assembly.make_ledger(settings), assembly.make_broker(settings)
    means = Means(
        ledger=ledger,
        publisher=publisher,
        muster=Muster(ledger, settings.num_expected_workers),
        window=settings.window,
        environments=assembly.make_environment,
        cancel=partial(cancel_run, ledger, reason="the run was cancelled"),
        cancel_samples=partial(cancel_samples, ledger),
    )
    leading = asyncio.create_task(Leader(Path(settings.runs_dir), means, asyncio.Event()).run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leading.cancel)
    with suppress(asyncio.CancelledError):
        await leading
    await publisher.close()
    await ledger.close()


if __name__ == "__main__":
    configure("INFO", "head")
    asyncio.run(lead())
