"""A ledger that keeps what is large beside the ledger it wraps, and in it a reference only (G5).

Trajectories between the stages, rows that wait for the archive and examples of open groups go by reference if
they are longer than a threshold. A payload is written before the ledger's step that refers to it, and deleted
after the step that drops it, so a crash leaves at most a payload that nobody refers to; it goes with its run.

When are they deleted? A rollout's row and trajectory once the archive holds the row (not when the rollout
ends: a Redis that fails over may forget that it did), an example with the last row of its group, the rest
with the run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from gym_queue.errors import GymQueueError, LedgerError, PayloadsNotSharedError
from gym_queue.ledger.base import Ended, Generated
from gym_queue.ledger.payloads import SETTING, length_of
from gym_queue.ledger.references import (
    KEY,
    MARK,
    Reference,
    decode,
    name_if_cut,
    name_in,
    small_fields,
    stand_in,
)
from gym_queue.ledger.restoration import whole_attempt, whole_claim, whole_event, whole_rollout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.ledger.base import (
        Claim,
        Event,
        Ledger,
        OpenRollout,
        Outcome,
        OwnedAttempt,
        Receipt,
    )
    from gym_queue.ledger.payloads import Payloads
    from gym_queue.records import Fence, Group, RunSpec, RunStatus, Ticket

_log = logging.getLogger(__name__)

_LARGEST_READ = 32 * 2**20
"""Bytes of rows handed to the archive at once, about: they are all in memory."""

_PATIENCE = 5.0
"""Seconds that a claim waits for payloads that cannot be read for now."""

_SHARE = 16
"""Part of the threshold up to which the fields of an example that rows show stay in the ledger."""

_MAY_HEAL = LedgerError, PayloadsNotSharedError
"""A folder that is not shared may be one that is not mounted yet."""

_Position = tuple[int, ...]


@dataclass
class _Unarchived:
    """What this process knows of a run's payloads that go when the archive holds its rows.

    ``rows``: by position, example and sample index, and what goes with the row. ``examples``: by index, the
    payload and the samples whose rows must be archived before it goes (a ledger that fell back to an older
    state may show a row twice).
    """

    rows: dict[_Position, tuple[int, int, list[str]]] = field(default_factory=dict)
    examples: dict[int, tuple[str, set[int]]] = field(default_factory=dict)

    def expect(self, index: int, name: str, samples: Sequence[int]) -> None:
        """Note an example that was sent by reference."""
        _, missing = self.examples.get(index, (name, set()))
        self.examples[index] = name, missing | set(samples)

    def archived(self, last: _Position) -> list[str]:
        """Return the payloads that go when the archive holds all rows up to a position."""
        names: list[str] = []
        for position in [position for position in self.rows if position <= last]:
            index, sample, of_row = self.rows.pop(position)
            names += of_row
            name, missing = self.examples.get(index, ("", {sample}))
            missing.discard(sample)
            if name and not missing:
                del self.examples[index]
                names.append(name)
        return names


class ByReference:
    """``gym_queue.ledger.base.Ledger`` around another one.

    Args:
        inner: the ledger.
        payloads: where to; ``None``: nothing goes by reference, and what others sent so cannot be read.
        threshold: bytes above which a payload goes by reference.
        patience: seconds that a claim waits for payloads that cannot be read for now.
    """

    def __init__(
        self, inner: Ledger, payloads: Payloads | None, threshold: int, patience: float = _PATIENCE
    ) -> None:
        self._inner = inner
        self._payloads = payloads
        self._threshold = threshold
        self._patience = patience
        self._unarchived: dict[str, _Unarchived] = {}
        self._trajectories: WeakKeyDictionary[Fence, str] = WeakKeyDictionary()  # while someone holds them
        self._said: set[str] = set()
        self.run = inner.run
        self.runs = inner.runs
        self.set_run_state = inner.set_run_state
        self.revoked = inner.revoked
        self.whereabouts = inner.whereabouts
        self.count_republished = inner.count_republished
        self.promote_due = inner.promote_due
        self.waiting = inner.waiting
        self.heartbeat = inner.heartbeat
        self.leases = inner.leases
        self.claimed = inner.claimed
        self.drop_lease = inner.drop_lease
        self.probe = inner.probe
        self.answer_probe = inner.answer_probe
        self.census = inner.census
        self.lead = inner.lead
        self.resign = inner.resign
        self.announce = inner.announce
        self.weights = inner.weights
        self.close = inner.close

    async def open_run(self, spec: RunSpec, idempotency_key: str) -> RunStatus:
        """See ``Ledger.open_run``."""
        standing = await self._inner.open_run(spec, idempotency_key)
        if self._payloads is not None:
            await asyncio.to_thread(self._payloads.open, standing.spec.run_id)
        return standing

    async def forget_run(self, run_id: str) -> None:
        """See ``Ledger.forget_run``."""
        await self._inner.forget_run(run_id)
        self._unarchived.pop(run_id, None)
        if self._payloads is not None:
            try:
                await asyncio.to_thread(self._payloads.forget, run_id)
            except LedgerError as error:  # the sweep will try again
                _log.warning("payloads of run %s are left behind: %s", run_id, error)

    async def accept(
        self, run_id: str, cursor: int, next_cursor: int, groups: Sequence[Group]
    ) -> list[Ticket]:
        """See ``Ledger.accept``."""
        if self._payloads is not None:
            groups = await self._shorten_examples(run_id, groups)
        return await self._inner.accept(run_id, cursor, next_cursor, groups)

    async def claim(self, ticket: Ticket, worker: str, lease: float) -> Claim | None:
        """See ``Ledger.claim``."""
        claim = await self._inner.claim(ticket, worker, lease)
        if claim is None:
            return None
        names = [name_in(claim.example)]
        for sample in claim.samples:
            if reference := decode(sample.payload):
                self._trajectories[sample.fence] = reference.name
                names.append(reference.name)
        if names == [""]:
            return claim
        return whole_claim(claim, await self._get(ticket.run_id, names, min(self._patience, lease / 4)))

    async def commit(self, fence: Fence, outcome: Outcome, *, revoke: bool = False) -> Receipt:
        """See ``Ledger.commit``."""
        trajectory = self._trajectories.get(fence, "") if self._trajectories else ""
        if isinstance(outcome, Generated) and self._is_large(outcome.payload):
            place = f"{fence.example_index}.{fence.sample_index}"
            names = await self._keep(fence.run_id, [("trajectory", place, outcome.payload)])
            if names:
                outcome = Generated(payload=Reference(name=names[0]).encode())
        elif isinstance(outcome, Ended):
            outcome = await self._shorten_row(fence.run_id, outcome, trajectory)
        return await self._inner.commit(fence, outcome, revoke=revoke)

    async def end(self, run_id: str, ended: Ended, *, waiting_attempt: int | None = None) -> bool:
        """See ``Ledger.end``."""
        short = await self._shorten_row(run_id, ended, "")
        return await self._inner.end(run_id, short, waiting_attempt=waiting_attempt)

    async def open_rollouts(
        self, run_id: str, limit: int, examples: Sequence[int] | None = None
    ) -> list[OpenRollout]:
        """See ``Ledger.open_rollouts``. An example that cannot be read shows its id and environment only."""
        rollouts = await self._inner.open_rollouts(run_id, limit, examples)
        found = await self._get(run_id, [name_if_cut(rollout.example) for rollout in rollouts])
        return [
            whole_rollout(rollout, found) if name_in(rollout.example) else rollout for rollout in rollouts
        ]

    async def owned(self, worker: str, overdue_by: float | None, limit: int) -> list[OwnedAttempt]:
        """See ``Ledger.owned``. An example that cannot be read shows its id and environment only, a payload
        is ``None``.
        """
        attempts = await self._inner.owned(worker, overdue_by, limit)
        wanted: dict[str, list[str]] = {}
        for attempt in attempts:
            names = wanted.setdefault(attempt.fence.run_id, [])
            names.append(name_if_cut(attempt.example))
            if reference := decode(attempt.payload):
                self._trajectories[attempt.fence] = reference.name
                names.append(reference.name)
        found: dict[str, bytes | GymQueueError] = {}
        for run_id, names in wanted.items():
            found |= await self._get(run_id, names)
        return [whole_attempt(attempt, found) for attempt in attempts]

    async def events(self, run_id: str, after: str, limit: int, wait: float) -> list[Event]:
        """See ``Ledger.events``. Fewer than there are, where they are large. A row that is lost is one of a
        failure instead.

        Raises:
            PayloadsNotSharedError: the rows are where this process cannot read them.
        """
        events = await self._inner.events(run_id, after, limit, wait)
        unarchived = self._unarchived.get(run_id, _Unarchived())
        references: list[Reference | None] = []
        size = 0
        for event in events:
            reference = decode(event.row)
            size += length_of(reference.name) if reference else 0
            if reference and references and size > _LARGEST_READ:
                break
            references.append(reference)
            names = [reference.name, reference.trajectory] if reference else []
            index, sample = event.summary.example_index, event.summary.sample_index
            if names or index in unarchived.examples:
                names = [name for name in names if name]
                unarchived.rows[_position(event.position)] = index, sample, names
                self._unarchived[run_id] = unarchived
        found = await self._get(run_id, [reference.name for reference in references if reference])
        return [
            whole_event(run_id, event, reference, found)
            for event, reference in zip(events, references, strict=False)
        ]

    async def acknowledge(self, run_id: str, position: str) -> int:
        """See ``Ledger.acknowledge``."""
        count = await self._inner.acknowledge(run_id, position)
        unarchived = self._unarchived.get(run_id)
        names = unarchived.archived(_position(position)) if unarchived and unarchived.rows else []
        if names and self._payloads is not None:
            try:
                await asyncio.to_thread(self._payloads.delete, run_id, names)
            except LedgerError as error:  # they go with the run
                _log.warning("%d payloads of run %s are left behind: %s", len(names), run_id, error)
        return count

    def _is_large(self, data: bytes) -> bool:
        return self._payloads is not None and (len(data) > self._threshold or data.startswith(MARK))

    async def _keep(self, run_id: str, payloads: Sequence[tuple[str, str, bytes]]) -> list[str]:
        """Keep payloads (kind, place, bytes) and return their names; none where this process cannot: then
        they stay in the ledger.
        """
        if self._payloads is None:
            return []
        try:
            return await asyncio.to_thread(self._payloads.put, run_id, payloads)
        except PayloadsNotSharedError as error:
            self._say_once(f"what is large stays in Redis: {error}")
            return []

    async def _shorten_examples(self, run_id: str, groups: Sequence[Group]) -> Sequence[Group]:
        large = await asyncio.to_thread(self._large_examples, groups)
        names = await self._keep(run_id, large) if large else []
        if not names:
            return groups
        by_index = {int(place): name for (_, place, _), name in zip(large, names, strict=True)}
        unarchived = self._unarchived.setdefault(run_id, _Unarchived())
        short = {}
        for group in groups:
            index = group.example_index
            if index in by_index:
                unarchived.expect(index, by_index[index], group.samples)
                short[index] = {
                    "example": stand_in(group.example, by_index[index], self._threshold // _SHARE)
                }
        return [group.model_copy(update=short.get(group.example_index)) for group in groups]

    def _large_examples(self, groups: Sequence[Group]) -> list[tuple[str, str, bytes]]:
        encoded = [
            ("example", str(group.example_index), group.example.model_dump_json().encode(), group.example.row)
            for group in groups
        ]
        return [
            (kind, place, data)
            for kind, place, data, row in encoded
            if len(data) > self._threshold or KEY in row
        ]

    async def _shorten_row(self, run_id: str, ended: Ended, trajectory: str) -> Ended:
        """Send a row by reference if it is large or its trajectory went so: its reference says what goes
        with it.
        """
        if not trajectory and not self._is_large(ended.row):
            return ended
        place = f"{ended.summary.example_index}.{ended.summary.sample_index}"
        names = await self._keep(run_id, [("row", place, ended.row)])
        if not names:
            return ended
        fields = await asyncio.to_thread(small_fields, ended.row)
        reference = Reference(name=names[0], trajectory=trajectory, row=fields)
        return Ended(summary=ended.summary, row=reference.encode())

    async def _get(
        self, run_id: str, names: Sequence[str], patience: float = 0.0
    ) -> dict[str, bytes | GymQueueError]:
        """Return payloads, or why there are none, after ``patience`` seconds."""
        wanted = list(dict.fromkeys(name for name in names if name))
        if self._payloads is None:
            error = PayloadsNotSharedError(
                f"{SETTING} is not set here, and run {run_id} keeps payloads outside Redis: all of its "
                "processes need the same setting"
            )
            if wanted:
                self._say_once(str(error))
            return dict.fromkeys(wanted, error)
        found: dict[str, bytes | GymQueueError] = {}
        pause, give_up = 0.1, time.monotonic() + patience
        while wanted:
            found |= await asyncio.to_thread(self._payloads.get, run_id, wanted)
            wanted = [name for name in wanted if isinstance(found[name], _MAY_HEAL)]
            if not wanted or time.monotonic() + pause > give_up:
                break
            await asyncio.sleep(pause)
            pause *= 2
        for answer in found.values():
            if isinstance(answer, PayloadsNotSharedError):
                self._say_once(str(answer))
        return found

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            _log.warning(sentence)


def _position(position: str) -> _Position:
    """Return what positions are ordered by."""
    return tuple(map(int, position.split("-")))
