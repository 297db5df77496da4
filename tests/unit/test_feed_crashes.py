"""Coordinators die at any step between row and acknowledgement; readers meet each row and each group once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.coordinator.archive import paths
from gym_queue.coordinator.feed import Feed
from gym_queue.records import GroupPolicy, RunState
from gym_queue.testing import wait_until
from tests.unit.output_rows import ended
from tests.unit.written_run import SAMPLES, Stream, Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gym_queue.ledger.base import Event

ROOT = Path(__file__).parents[2]
POLICY = GroupPolicy(usable=2, drop_uniform=True)
EXAMPLES = 12


class Killed(BaseException):
    """The process is no more."""


class Reader:
    """Reads both feeds, in pages of any size, and remembers nothing but its cursors between them."""

    def __init__(self, out: Path, chance: random.Random) -> None:
        self._out = out
        self._chance = chance
        self.cursors = ["", ""]
        self.rollouts: list[bytes] = []
        self.groups: list[bytes] = []
        self.ended: RunState | None = None

    def read(self) -> None:
        """Read what there is now."""
        while True:
            feed, limit = Feed(self._out), self._chance.randint(1, 5)  # a client that comes back
            rollouts = feed.rollouts(self.cursors[0], limit)
            groups = feed.groups(self.cursors[1], limit, dropped=True)
            if not rollouts.items and not groups.items:
                self.ended = rollouts.ended
                assert groups.ended is rollouts.ended
                return
            kept = self._chance.randint(1, limit)  # it may die in the middle of a page
            for number, (page, found) in enumerate([(rollouts, self.rollouts), (groups, self.groups)]):
                found += [item.data for item in page.items[:kept]]
                if page.items:
                    self.cursors[number] = page.items[:kept][-1].cursor


def some_rollouts(chance: random.Random) -> list[Event]:
    """Return the rollouts of a run as they end, the samples of an example in any order."""
    places = [(example, sample) for example in range(EXAMPLES) for sample in range(SAMPLES)]
    places.sort(key=lambda place: place[0] + 4 * chance.random())
    return [
        ended(
            example,
            sample,
            state=chance.choice(["succeeded", "succeeded", "succeeded", "failed"]),
            reward=float(chance.randint(0, 1)),
            padding="x" * chance.randint(0, 300),
        )
        for example, sample in places
    ]


@contextmanager
def death_at(step: int, stream: Stream, chance: random.Random) -> Iterator[None]:
    """Let the process die at the ``step``-th step that it takes on the disk or in the ledger, in the middle
    or behind it.
    """
    left = step

    def deadly(real: Any, half: Any = None) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left > 0:
                return real(*arguments, **options)
            if chance.random() < 0.5:
                real(*arguments, **options)
            elif half is not None:
                half(*arguments, **options)
            raise Killed

        return call

    async def acknowledge(run_id: str, position: str) -> int:
        nonlocal left
        left -= 1
        if left <= 0 and chance.random() < 0.5:
            raise Killed
        count = await Stream.acknowledge(stream, run_id, position)
        if left <= 0:
            raise Killed
        return count

    write, write_bytes = os.write, Path.write_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", deadly(write, lambda file, data: write(file, data[: len(data) // 2])))
        patch.setattr(os, "fdatasync", deadly(os.fdatasync))
        patch.setattr(Path, "replace", deadly(Path.replace))
        patch.setattr(
            Path,
            "write_bytes",
            deadly(write_bytes, lambda path, data: write_bytes(path, data[: len(data) // 2])),
        )
        patch.setattr(stream, "acknowledge", acknowledge)
        yield


async def live(writer: Writer, step: int, chance: random.Random) -> None:
    """Live once: to the end of the run, or to the ``step``-th step."""
    async with writer:
        with death_at(step, writer.stream, chance):
            await writer.begin()
            while writer.stream.unread:
                writer.stream.batch = chance.randint(1, 8)
                await writer.aggregator.step(0.0)
            await writer.finish(RunState.ENDED)


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("seed", range(25))
async def test_readers_with_a_cursor_meet_each_row_and_group_once(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    out = tmp_path / "rollouts.jsonl"
    events = some_rollouts(chance)
    stream, reader, deaths = Stream(events), Reader(out, chance), 0
    while reader.ended is None:
        try:
            await live(Writer(out, stream, POLICY), chance.randint(1, 30), chance)
        except Killed:
            deaths += 1
        reader.read()
    assert deaths
    check(out, reader, events)


def check(out: Path, reader: Reader, events: list[Event]) -> None:
    """Each ended rollout was met once, and each group, which is what its rows say."""
    assert sorted(reader.rollouts) == sorted(event.row for event in events)
    places = [place_of(row) for path in paths(out)[:2] for row in path.read_bytes().splitlines()]
    assert sorted(places) == [(example, sample) for example in range(EXAMPLES) for sample in range(SAMPLES)]
    groups = [json.loads(group) for group in reader.groups]
    assert sorted(group["example_index"] for group in groups) == list(range(EXAMPLES))
    order = [json.loads(row) for row in out.read_bytes().splitlines()]
    for group in groups:
        used = [row for row in order if row["example_index"] == group["example_index"]][: POLICY.usable]
        uniform = len({row["reward"] for row in used}) == 1
        expected = "short" if len(used) < (POLICY.usable or 0) else "uniform" if uniform else "complete"
        assert group["outcome"] == expected
        assert group["rollouts"] == (used if expected == "complete" else [])


def place_of(row: bytes) -> tuple[int, int]:
    fields = json.loads(row)
    return fields["example_index"], fields["sample_index"]


PROGRAM = """
import asyncio, random, sys
from pathlib import Path
from gym_queue.records import RunState
from tests.unit.test_feed_crashes import POLICY, some_rollouts
from tests.unit.written_run import Stream, Writer

async def main() -> None:
    out = Path(sys.argv[1])
    stream = Stream(some_rollouts(random.Random(0)), batch=1)  # all of them again: nothing was acknowledged
    async with Writer(out, stream, POLICY) as writer:
        await writer.begin()
        while stream.unread:
            await writer.aggregator.step(0.0)
        print("done", flush=True)
        if sys.stdin.readline():
            await writer.finish(RunState.ENDED)

asyncio.run(main())
"""


@pytest.mark.guarantee("G3")
def test_a_process_that_is_killed_in_the_middle_of_its_writing(tmp_path: Path) -> None:
    chance = random.Random(0)
    out = tmp_path / "rollouts.jsonl"
    events = some_rollouts(chance)
    reader = Reader(out, chance)
    for target in (1, 9, 20, len(events)):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(out)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with process:

            def met(count: int = target) -> bool:
                reader.read()
                return len(reader.rollouts) >= count

            wait_until(met, 60.0)
            if target < len(events):
                process.send_signal(signal.SIGKILL)
            else:
                process.communicate(b"\n", timeout=60)
    reader.read()
    assert reader.ended is RunState.ENDED
    check(out, reader, events)
