"""Decides groups from what the archive holds: as soon as it can be said, each at most once.

The samples that count are the first that succeeded, in the order of the archive's file: so whoever decides
again after a crash comes to the same groups. Memory: what is known of groups that are not decided, and one
byte an example.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, get_args

from pydantic_core import from_json

from gym_queue.api import GroupCounts, GroupOutcome
from gym_queue.coordinator.allowance import fresh_allowance, smallest, wanted_allowance
from gym_queue.coordinator.archive import Place
from gym_queue.coordinator.group_log import GroupLine, GroupLog, first_version
from gym_queue.coordinator.rows import read_summary, read_weight_version
from gym_queue.errors import UsageError
from gym_queue.records import FailureClass

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gym_queue.coordinator.archive import Archive
    from gym_queue.ledger.base import Event
    from gym_queue.records import GroupPolicy, RunSpec, Summary

_OUTCOMES: tuple[GroupOutcome, ...] = get_args(GroupOutcome)

_PREFIX = 4096
"""Bytes of a row in which its example's id is found, unless the id is very long."""


@dataclass(slots=True)
class Sample:
    """A succeeded sample: where its row lies, and what decides about its group."""

    place: Place
    reward: float | None
    weight_version: int | None


@dataclass(slots=True)
class OpenGroup:
    """A group that is not decided: its succeeded samples in order, how many ended otherwise, and how many of
    those because they were too old.
    """

    succeeded: list[Sample] = field(default_factory=list)
    others: int = 0
    stale: int = 0

    def add(self, summary: Summary, place: Place) -> None:
        """Take in one ended sample."""
        if summary.state == "succeeded":
            self.succeeded.append(Sample(place, summary.reward, summary.weight_version))
        else:
            self.others += 1
            self.stale += summary.failure_class is FailureClass.STALE


def needed(policy: GroupPolicy, samples: int) -> int:
    """Return how many samples of a group must succeed."""
    return policy.usable or samples


def oldest_of(samples: Sequence[Sample]) -> int | None:
    """Return the oldest version of the weights that sampled any of them, ``None`` where nobody knows."""
    return min((one.weight_version for one in samples if one.weight_version is not None), default=None)


def judge(group: OpenGroup, policy: GroupPolicy, samples: int, oldest: int | None) -> GroupOutcome | None:
    """Decide a group of ``samples`` samples, or return ``None`` while more must end.

    ``oldest`` is the oldest version of the weights that is not too old, ``None``: none is.
    """
    spare = samples - needed(policy, samples)
    if group.others > spare:
        return "short" if group.others - group.stale > spare else "stale"
    used = group.succeeded[: samples - spare]
    if len(used) < samples - spare:
        return None
    version = oldest_of(used)
    if oldest is not None and version is not None and version < oldest:
        return "stale"
    if policy.drop_uniform and len({one.reward for one in used}) == 1:
        return "uniform"
    return "complete"


class Groups:
    """The groups of one run.

    Args:
        spec: the run.
        run_dir: where its log of decided groups lies (``OUT.run``).

    Attributes:
        version: of the newest weights that are known; whoever looks for newer ones sets it.
        stragglers: why samples that are still open are not wanted any more, by the index of their example.
            They stay here until the archive holds a row of each.
    """

    def __init__(self, spec: RunSpec, run_dir: Path) -> None:
        self._spec = spec
        self._policy = spec.groups
        self._needed = needed(spec.groups, spec.samples)
        _refuse_impossible(spec)
        self._run_dir = run_dir
        self._log = GroupLog(run_dir)
        self._archive: Archive | None = None
        self._counts: Counter[str] = Counter()
        self._decided = bytearray()  # by example: 0 = not yet, else 1 + which outcome
        self._open: dict[int, OpenGroup] = {}
        self._undone: list[GroupLine] = []
        self._first_version: int | None = None
        self.version = 0
        self.stragglers: dict[int, str] = {}

    def open(self, archive: Archive) -> Self:
        """Read which groups are decided, and what the archive, which must be open, holds of others. Blocks.

        Raises:
            UsageError: the log cannot be read.
            StorageError: a file cannot be read or repaired.
        """
        self._archive = archive
        self._log.open(self._read_line)
        try:
            for index in range(archive.examples):
                if outcome := self.outcome(index):
                    self._note_stragglers(index, outcome)
                elif done := archive.done_samples(index):
                    self._open[index] = self._read_group(index, done)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Close the log. Safe to repeat."""
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def notes(self) -> list[str]:
        """Sentences for the user about what ``open`` repaired."""
        return self._log.notes

    @property
    def length(self) -> int:
        """Bytes of the log that are on disk."""
        return self._log.length

    @property
    def counts(self) -> GroupCounts:
        """Decided groups by outcome."""
        return GroupCounts(**self._counts)

    @property
    def enough(self) -> bool:
        """Whether as many groups are complete as are wanted: then no other is decided any more."""
        return self._policy.wanted is not None and self._counts["complete"] >= self._policy.wanted

    def outcome(self, example_index: int) -> GroupOutcome | None:
        """Return how a group was decided, ``None``: it was not."""
        code = self._decided[example_index] if example_index < len(self._decided) else 0
        return _OUTCOMES[code - 1] if code else None

    @property
    def versions(self) -> int:
        """How many versions of the weights were announced since the run began."""
        return max(0, self.version - (self._first_version or 0))

    def allowance(self) -> int | None:
        """Return how many examples may be begun, ``None``: all."""
        counts = self.counts
        fresh = fresh_allowance(self._spec.freshness, counts, self.versions)
        return smallest(wanted_allowance(self._policy, counts), fresh)

    def settle(self) -> None:
        """Decide what can be decided of what ``open`` found: their coordinator died before it did. Blocks.

        Raises:
            StorageError: a row cannot be read.
        """
        for index, group in list(self._open.items()):
            if outcome := self._judge(group):
                first, *_ = self._held.done_samples(index)
                self._decide(index, outcome, self._held.read(index, first)[1])

    def add(self, events: Sequence[Event]) -> None:
        """Take in ended samples that the archive has just stored, in its order, and decide their groups."""
        for event in events:
            index, sample = event.summary.example_index, event.summary.sample_index
            if self.outcome(index):
                if index in self.stragglers and self._is_whole(index):
                    del self.stragglers[index]
            elif not self.enough:
                group = self._open.setdefault(index, OpenGroup())
                group.add(event.summary, Place(*self._held.place(index, sample), len(event.row)))
                if outcome := self._judge(group):
                    self._decide(index, outcome, event.row)

    def store(self) -> None:
        """Write what was decided; it is on disk when this returns. Blocks.

        The first call of a run's first coordinator notes with which weights the run began: it must come
        before anything is fed, and after ``version`` was set.

        Raises:
            StorageError: it is not. The same call may be tried again.
        """
        if self._spec.freshness and self._first_version is None:
            self._first_version = first_version(self._run_dir, self.version)
        if self._undone:
            self._log.append(self._undone)
            self._undone.clear()

    @property
    def _held(self) -> Archive:
        if self._archive is None:
            msg = f"the groups of {self._run_dir} are not open"
            raise ValueError(msg)
        return self._archive

    def _read_line(self, line: GroupLine) -> None:
        self._mark(line.example_index, line.outcome)

    def _read_group(self, example_index: int, samples: Sequence[int]) -> OpenGroup:
        """Read the rows of a group in the order in which they were written."""
        rows = [self._held.read(example_index, sample) for sample in samples]
        group = OpenGroup()
        for place, row in sorted(rows):
            summary = read_summary(row)
            version = read_weight_version(row) if summary.state == "succeeded" else None
            group.add(summary.model_copy(update={"weight_version": version}), place)
        return group

    def _judge(self, group: OpenGroup) -> GroupOutcome | None:
        if self.enough:
            return None
        freshness = self._spec.freshness
        oldest = self.version - freshness.max_staleness if freshness else None
        return judge(group, self._policy, self._spec.samples, oldest)

    def _decide(self, example_index: int, outcome: GroupOutcome, row: bytes) -> None:
        """Note a decision, to be stored; ``row`` is any row of the group."""
        used = self._open.pop(example_index).succeeded[: self._needed]
        line = GroupLine(
            run_id=self._spec.run_id,
            example_id=_example_id(row),
            example_index=example_index,
            outcome=outcome,
            weight_version=oldest_of(used),
            rows=tuple(one.place for one in used) if outcome == "complete" else (),
        )
        self._undone.append(line)
        self._mark(example_index, outcome)
        self._note_stragglers(example_index, outcome)
        if self.enough:
            self._open.clear()

    def _mark(self, example_index: int, outcome: GroupOutcome) -> None:
        self._decided.extend(bytes(max(0, example_index + 1 - len(self._decided))))
        self._decided[example_index] = 1 + _OUTCOMES.index(outcome)
        self._counts[outcome] += 1

    def _is_whole(self, example_index: int) -> bool:
        return len(self._held.done_samples(example_index)) == self._spec.samples

    def _note_stragglers(self, example_index: int, outcome: GroupOutcome) -> None:
        """Where groups are all that is wanted, what is left of a decided one is not."""
        groups_only = self._policy.usable is not None or self._policy.wanted is not None
        if groups_only and not self._is_whole(example_index):
            share = f"{self._needed} of {self._spec.samples}"
            self.stragglers[example_index] = {
                "complete": f"its group has {share}",
                "short": f"its group cannot have {share} any more",
                "uniform": "its group is dropped: its rewards are all equal",
                "stale": "its group is dropped: its weights are too old",
            }[outcome]


def _example_id(row: bytes) -> str:
    """Return the id of a row's example, which stands near the row's begin."""
    try:
        return str(from_json(row[:_PREFIX], allow_partial=True)["example_id"])
    except (KeyError, ValueError):  # a very long id, or one cut in the middle of a letter
        return str(from_json(row)["example_id"])


def _refuse_impossible(spec: RunSpec) -> None:
    """Raise ``UsageError`` for a policy under which no group could ever be complete."""
    policy = spec.groups
    if policy.usable is not None and policy.usable > spec.samples:
        msg = f"{policy.usable} usable samples of a group are not possible: it has {spec.samples}"
        raise UsageError(msg)
    if policy.drop_uniform and needed(policy, spec.samples) == 1:
        msg = "groups of one usable sample have equal rewards: with drop_uniform, all would be dropped"
        raise UsageError(msg)
