"""Offices: one holder at a time, by the ledger's clock."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gym_queue.ledger.memory import MemoryLedger
from gym_queue.testing import async_wait_until
from tests.contract.ledgers import leftovers

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger


async def test_an_office_has_one_holder(ledger: Ledger) -> None:
    assert await ledger.lead("coordinator", "a", 60.0)
    assert not await ledger.lead("coordinator", "b", 60.0)
    assert await ledger.lead("coordinator", "a", 60.0)
    assert await ledger.lead("janitor", "b", 60.0)


async def test_of_many_who_want_an_office_at_once_one_gets_it(ledger: Ledger) -> None:
    answers = await asyncio.gather(*(ledger.lead("coordinator", f"{number}", 60.0) for number in range(20)))
    assert sum(answers) == 1


async def test_who_resigns_is_followed_at_once(ledger: Ledger) -> None:
    assert await ledger.lead("coordinator", "a", 60.0)
    await ledger.resign("coordinator", "b")
    await ledger.resign("janitor", "a")
    assert not await ledger.lead("coordinator", "b", 60.0)
    await ledger.resign("coordinator", "a")
    assert await ledger.lead("coordinator", "b", 60.0)
    await ledger.resign("coordinator", "a")  # too late: it is another's
    assert not await ledger.lead("coordinator", "a", 60.0)


async def test_who_does_not_renew_is_followed_when_the_term_is_over(ledger: Ledger) -> None:
    assert await ledger.lead("coordinator", "a", 0.05)

    async def follows() -> bool:
        return await ledger.lead("coordinator", "b", 60.0)

    await async_wait_until(follows, what="the term to end")
    assert not await ledger.lead("coordinator", "a", 60.0)


async def test_a_term_counts_from_its_last_renewal(ledger: Ledger) -> None:
    assert await ledger.lead("coordinator", "a", 60.0)
    assert await ledger.lead("coordinator", "a", 0.05)  # a shorter one counts as well

    async def follows() -> bool:
        return await ledger.lead("coordinator", "b", 60.0)

    await async_wait_until(follows, what="the term to end")


async def test_offices_leave_nothing_that_lasts(ledger: Ledger) -> None:
    await ledger.lead("coordinator", "a", 60.0)
    assert await leftovers(ledger) == []


async def test_in_memory_a_term_is_counted_to_the_moment() -> None:
    now = 100.0
    ledger = MemoryLedger(lambda: now)
    assert await ledger.lead("coordinator", "a", 5.0)
    now = 104.9
    assert not await ledger.lead("coordinator", "b", 5.0)
    now = 105.0
    assert await ledger.lead("coordinator", "b", 5.0)
