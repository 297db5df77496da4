"""All duties of the sweep, in order. One that fails does not stop the others."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Protocol

from gym_queue.errors import GymQueueError
from gym_queue.maintenance.audit import Broker, audit
from gym_queue.maintenance.cancel import finish_cancelled
from gym_queue.maintenance.expire import expire
from gym_queue.maintenance.prune import Payloads, prune
from gym_queue.maintenance.reap import reap
from gym_queue.pipeline import Publisher

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger
    from gym_queue.settings import Settings

_log = logging.getLogger(__name__)


class SweepBroker(Broker, Publisher, Protocol):
    """What the sweep asks the broker."""


async def sweep(ledger: Ledger, broker: SweepBroker, settings: Settings, payloads: Payloads | None) -> None:
    """Look for dead workers, rollouts that are too old or unwanted, due retries, lost tickets and what
    forgotten runs left behind.

    What is given back first is published last. Many sweeps may run at once: each step is one of the ledger's.
    """
    duties = {
        "reap": partial(reap, ledger, broker, settings.worker_timeout),
        "probe": partial(ledger.probe),
        "expire": partial(expire, ledger),
        "cancel": partial(finish_cancelled, ledger),
        "audit": partial(audit, ledger, broker, broker, settings.sweep_interval),
        "prune": partial(prune, ledger, payloads),
    }
    failed: dict[str, list[str]] = {}
    for name, duty in duties.items():
        try:
            await duty()
        except GymQueueError as error:
            failed.setdefault(str(error), []).append(name)
        except Exception:  # noqa: BLE001 - a bug in one duty must not keep the others from theirs
            _log.exception("the sweep's %s failed", name)
    for sentence, names in failed.items():
        _log.warning("the sweep could not do all (%s): %s", ", ".join(names), sentence)
