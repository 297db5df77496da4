"""Who is let in beside whom: suspects few at a time, the condemned alone, and everybody in the end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gym_queue.lifecycle import companions
from gym_queue.quarantine import Quarantine
from gym_queue.records import Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

LIMITS = Limits(max_attempts=3)
CLEAN, SUSPECT, ALONE = 0, 2, 3
SLOTS = 16
FEW = 4  # of 16 slots


@dataclass(eq=False)
class Guest:
    """A ticket at the door of ``house``; it stays inside until it may ``leave``."""

    house: House
    losses: int
    inside: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def visit(self) -> None:
        async with self.house.quarantine.admit(self.losses, LIMITS):
            self.inside = True
            self.house.check()
            try:
                await self.over.wait()
            finally:
                self.inside = False

    def leave(self) -> None:
        self.over.set()


class House:
    """A quarantine with its guests. ``check`` holds after every change."""

    def __init__(self) -> None:
        self.quarantine = Quarantine(SLOTS)
        self.guests: dict[Guest, asyncio.Task[None]] = {}

    async def arrive(self, *losses: int) -> list[Guest]:
        guests = [Guest(self, some) for some in losses]
        for guest in guests:
            self.guests[guest] = asyncio.create_task(guest.visit())
        await settle()
        return guests

    async def leave(self, *guests: Guest) -> None:
        for guest in guests:
            guest.leave()
        await settle()

    async def give_up(self, *guests: Guest) -> None:
        for guest in guests:
            self.guests[guest].cancel()
        await settle()

    def inside(self) -> list[int]:
        return sorted(guest.losses for guest in self.guests if guest.inside)

    def check(self) -> None:
        inside = self.inside()
        for losses in set(inside):
            most = companions(losses, SLOTS, LIMITS)
            assert most is None or inside.count(losses) <= most
            assert most != 1 or len(inside) == 1


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def asynchronous(test: Callable[[House], Awaitable[None]]) -> None:
    async def run() -> None:
        house = House()
        try:
            await test(house)
        finally:
            for task in house.guests.values():
                task.cancel()
            await asyncio.gather(*house.guests.values(), return_exceptions=True)

    asyncio.run(run())


async def test_who_has_no_losses_is_let_in_at_once() -> None:
    house = House()
    await house.arrive(*[CLEAN] * 100)
    assert house.inside() == [CLEAN] * 100


async def test_suspects_are_few_at_once_among_others() -> None:
    house = House()
    suspects = await house.arrive(*[SUSPECT] * 6)
    await house.arrive(CLEAN)
    assert house.inside() == [CLEAN] + [SUSPECT] * FEW
    await house.leave(suspects[0])
    assert house.inside() == [CLEAN] + [SUSPECT] * FEW
    await house.leave(*suspects[1:])
    assert house.inside() == [CLEAN]


async def test_who_must_be_alone_waits_for_all_and_all_wait_for_it() -> None:
    house = House()
    early = await house.arrive(CLEAN, SUSPECT)
    (alone,) = await house.arrive(ALONE)
    late = await house.arrive(CLEAN, SUSPECT)
    assert house.inside() == [CLEAN, SUSPECT]
    assert not any(guest.inside for guest in late)
    await house.leave(early[0])
    assert house.inside() == [SUSPECT]
    await house.leave(early[1])
    assert house.inside() == [ALONE]
    await house.leave(alone)
    assert house.inside() == [CLEAN, SUSPECT]
    assert all(guest.inside for guest in late)


async def test_turns_alone_are_taken_one_after_the_other_before_the_door_opens() -> None:
    house = House()
    (early,) = await house.arrive(CLEAN)
    one, other, late = await house.arrive(ALONE, ALONE, CLEAN)
    await house.leave(early)
    for turn in (one, other):
        assert [guest for guest in house.guests if guest.inside] == [turn]
        await house.leave(turn)
    assert late.inside


async def test_who_comes_to_be_alone_during_a_turn_waits_for_one_round_of_the_others() -> None:
    house = House()
    (first,) = await house.arrive(ALONE)
    (second,) = await house.arrive(ALONE)
    (clean,) = await house.arrive(CLEAN)
    await house.leave(first)
    assert clean.inside
    (late,) = await house.arrive(CLEAN)
    assert not late.inside
    await house.leave(clean)
    assert second.inside
    await house.leave(second)
    assert late.inside


async def test_who_gives_up_its_turn_holds_up_nobody() -> None:
    house = House()
    (early,) = await house.arrive(CLEAN)
    one, other = await house.arrive(ALONE, ALONE)
    late, suspect = await house.arrive(CLEAN, SUSPECT)
    await house.give_up(one)
    assert not late.inside
    await house.give_up(other)
    assert late.inside
    assert suspect.inside
    await house.leave(early, late, suspect)
    assert house.inside() == []


async def test_who_is_stopped_as_it_is_let_in_leaves_its_place() -> None:
    house = House()
    (alone,) = await house.arrive(ALONE)
    (next_one,) = await house.arrive(ALONE)
    (clean,) = await house.arrive(CLEAN)
    alone.leave()
    await asyncio.sleep(0)  # it leaves, and others are let in; none of them has run yet
    house.guests[clean].cancel()
    await settle()
    assert house.inside() == [ALONE]
    assert next_one.inside


async def test_who_gives_up_as_the_door_opens_is_passed_over() -> None:
    house = House()
    (alone,) = await house.arrive(ALONE)
    gone, late = await house.arrive(CLEAN, CLEAN)
    alone.leave()
    await house.give_up(gone)  # in the same step of the event loop, but later
    assert house.guests[alone].exception() is None
    assert [guest for guest in house.guests if guest.inside] == [late]


async def test_who_gives_up_as_its_turn_comes_is_passed_over() -> None:
    house = House()
    (early,) = await house.arrive(CLEAN)
    gone, late = await house.arrive(ALONE, CLEAN)
    early.leave()
    await house.give_up(gone)
    assert [guest for guest in house.guests if guest.inside] == [late]


async def test_a_process_of_one_ticket_needs_no_quarantine() -> None:
    quarantine = Quarantine(None)
    async with quarantine.admit(ALONE, LIMITS), quarantine.admit(ALONE, LIMITS):
        pass


moves = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "arrive", "leave", "give up", "step"]),
        st.sampled_from([CLEAN, SUSPECT, ALONE]),
        st.integers(0, 1000),
    ),
    max_size=60,
)


@given(moves)
def test_never_more_than_allowed_and_everyone_in_the_end(some: list[tuple[str, int, int]]) -> None:
    async def test(house: House) -> None:
        gone: set[Guest] = set()
        for move, losses, number in some:
            inside = [guest for guest in house.guests if guest.inside]
            waiting = [guest for guest in house.guests if guest not in gone and not guest.inside]
            if move == "arrive":
                guest = Guest(house, losses)
                house.guests[guest] = asyncio.create_task(guest.visit())
            elif move == "leave" and inside:
                guest = inside[number % len(inside)]
                guest.leave()
                gone.add(guest)
            elif move == "give up" and (inside or waiting):
                guest = (inside + waiting)[number % len(inside + waiting)]
                house.guests[guest].cancel()
                gone.add(guest)
            else:
                await asyncio.sleep(0)
            house.check()
        await settle()
        rounds = 0
        while left := [guest for guest in house.guests if guest not in gone]:
            inside = [guest for guest in left if guest.inside]
            assert inside, "somebody waits, and nobody is inside"
            gone.update(inside)
            await house.leave(*inside)
            house.check()
            rounds += 1
        await settle()
        assert all(task.done() for task in house.guests.values())
        assert not any(task.exception() for task in house.guests.values() if not task.cancelled())
        quarantine = house.quarantine
        assert (quarantine._inside, quarantine._suspects, quarantine._someone_is_alone) == (0, 0, False)
        assert not any((quarantine._others, quarantine._to_be_alone, quarantine._next_round))  # G5

    asynchronous(test)


@pytest.mark.parametrize("losses", [CLEAN, SUSPECT, ALONE])
async def test_a_rollout_that_raises_leaves_its_place(losses: int) -> None:
    quarantine = Quarantine(SLOTS)
    with pytest.raises(KeyError):
        async with quarantine.admit(losses, LIMITS):
            raise KeyError
    async with quarantine.admit(ALONE, LIMITS):
        pass
