"""The ledgers that must fulfil the contract, and what tests of the contract ask beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fsspec

from gym_queue import names
from gym_queue.ledger.by_reference import ByReference
from gym_queue.ledger.payloads import Payloads
from gym_queue.ledger.redis import RedisLedger

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger

MEMORY_URL = "memory://payloads"


def by_reference(inner: Ledger, url: str) -> ByReference:
    """Return a ledger that keeps everything elsewhere, however small."""
    return ByReference(inner, Payloads(url, "tests"), threshold=0, patience=0.0)


def unwrapped(ledger: Ledger) -> Ledger:
    """Return the ledger that keeps the records."""
    return ledger._inner if isinstance(ledger, ByReference) else ledger


async def lasting_keys(ledger: RedisLedger) -> set[str]:
    """Return the keys that have no expiry: nobody will ever delete them. The newest weights and the totals
    outlive runs.
    """
    meant = {names.weights_key(), names.totals_key()}
    keys = [key async for key in ledger._client.scan_iter() if key.decode() not in meant]
    return {key.decode() for key in keys if await ledger._client.ttl(key) == -1}


async def leftovers(ledger: Ledger) -> list[object]:
    """Return what is left in a ledger that no time will delete, and beside it."""
    inner = unwrapped(ledger)
    left: list[object] = []
    if isinstance(inner, RedisLedger):
        left += await lasting_keys(inner)
    if isinstance(ledger, ByReference):
        assert ledger._payloads is not None
        left += ledger._payloads._files.folders()
        left += [ledger._unarchived] * bool(ledger._unarchived)
    return left


def clear_memory_url() -> None:
    """Delete what other tests left under ``MEMORY_URL``."""
    fs, root = fsspec.url_to_fs(MEMORY_URL)
    if fs.exists(root):
        fs.rm(root, recursive=True)
