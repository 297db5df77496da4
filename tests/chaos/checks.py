"""What must hold when a run has ended, whatever died. Each check says what is wrong, a sentence each."""

from __future__ import annotations

import json
import re
from collections import Counter
from math import isclose
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from tests.chaos.processes import Death
    from tests.chaos.workload import Ending, Workload

Row = dict[str, Any]

ALLOWED_FOREVER = ("_kombu.binding", "gq:totals")
"""Keys that may stay without an expiry. In the first kombu writes down which queues exist: once for each
queue, and it never takes it back. The second has a dozen counters of all runs that there ever were.
"""

_SHOWN = 5
_OFTEN = 50
_LOUD = re.compile("WARNING|ERROR|CRITICAL")
_WHEN = re.compile(r"[\d:., -]+")


def _some(things: Iterable[object]) -> str:
    """Name the first few of many."""
    named = [str(thing) for thing in things]
    return ", ".join(named[:_SHOWN]) + (f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")


def read(path: Path) -> list[Row]:
    """Return the rows of an output file. A torn line raises."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _place(row: Row) -> tuple[int, int]:
    return row["example_index"], row["sample_index"]


def each_once(succeeded: Sequence[Row], failed: Sequence[Row], workload: Workload) -> list[str]:
    """Received = accepted: no place missing, twice or invented, and each file in the order of the input."""
    found = Counter(map(_place, [*succeeded, *failed]))
    wanted = {(row, sample) for row in range(len(workload.rows)) for sample in range(workload.samples)}
    said = []
    if missing := sorted(wanted - set(found)):
        said.append(f"{len(missing)} rollouts are missing: {_some(missing)}")
    if invented := sorted(set(found) - wanted):
        said.append(f"{len(invented)} rollouts that nobody asked for: {_some(invented)}")
    if twice := sorted(place for place, times in found.items() if times > 1):
        said.append(f"{len(twice)} rollouts have more than one row: {_some(twice)}")
    if len({row["rollout_id"] for row in (*succeeded, *failed)}) != len(found):
        said.append("rollout_id is not one to one with (example_index, sample_index)")
    said += [
        f"the {name} are not in the order of the input"
        for name, rows in (("rows", succeeded), ("failures", failed))
        if (places := list(map(_place, rows))) != sorted(places)
    ]
    return said


def _ending(row: Row) -> Ending:
    return row["state"], row.get("class")


def endings(rows: Iterable[Row], workload: Workload, also: Sequence[Ending] = ()) -> list[str]:
    """Each rollout ended as its behaviour makes it end (or in one of ``also``), with its own row's reward."""
    wrong: Counter[str] = Counter()
    for row in rows:
        index = row["example_index"]
        if _ending(row) not in (workload.ending(index), *also):
            error = str(row.get("error"))[:120]
            wrong[f"{workload.kinds[index]}: {row['state']} {row.get('class')} ({error})"] += 1
        elif row["state"] == "succeeded" and row["reward"] != workload.rows[index]["reward"]:
            wrong[f"{workload.kinds[index]}: the reward of another row"] += 1
    return [f"{count} rollouts ended wrongly: {what}" for what, count in wrong.most_common(_SHOWN)]


def metrics(said: dict[str, Any], succeeded: Sequence[Row], failed: Sequence[Row]) -> list[str]:
    """Counters add up: the metrics file agrees with the rows."""
    states = Counter(row["state"] for row in failed)
    total = len(succeeded) + len(failed)
    counts = {"succeeded": len(succeeded), "failed": states["failed"], "cancelled": states["cancelled"]}
    rewards = [row["reward"] for row in succeeded if row["reward"] is not None]
    classes = Counter(row["class"] for row in failed if row["class"] is not None)
    expected = {
        "complete": (said["complete"], True),
        "rollouts": (said["rollouts"], {"accepted": total, "ended": total, **counts}),
        "failures_by_class": (said["failures_by_class"], dict(classes)),
        "reward.count": (said["reward"]["count"], len(rewards)),
    }
    wrong = [
        f"metrics: {name} is {there}, and the rows say {rows}"
        for name, (there, rows) in expected.items()
        if there != rows
    ]
    mean = said["reward"]["mean"]
    if rewards and not (mean is not None and isclose(mean, fmean(rewards), rel_tol=1e-9)):
        wrong.append(f"metrics: the mean reward is {mean}, and the rows say {fmean(rewards)}")
    return wrong


def deaths(died: Iterable[Death], *, poison: bool = False) -> list[str]:
    """Nobody died but those whom a fault killed (and, where rollouts are poison, workers that generate)."""
    surprises = [death for death in died if not death.asked and not (poison and death.name.startswith("gpu"))]
    return (
        [f"{len(surprises)} processes ended that nobody had touched: {_some(surprises)}"] if surprises else []
    )


def logs(said: Mapping[str, str]) -> list[str]:
    """What goes wrong is said once, not a thousand times, and in words. Takes the logs' texts by name."""
    wrong = []
    for name, text in said.items():
        lines = Counter(_WHEN.sub("", line, count=1) for line in text.splitlines() if _LOUD.search(line))
        wrong += [f"{name} says {times} times: {line}" for line, times in lines.items() if times > _OFTEN]
        if tracebacks := re.findall(r"Traceback(?:.*\n)+?(?=\w)(.*)", text):
            wrong.append(f"{name} has {len(tracebacks)} tracebacks, such as: {tracebacks[-1]}")
    return wrong


def keys(left: Iterable[tuple[str, int]]) -> list[str]:
    """No key is left without an expiry. Takes pairs of key and PTTL (-1: none)."""
    forever = sorted(key for key, ttl in left if ttl == -1 and not key.startswith(ALLOWED_FOREVER))
    return [f"{len(forever)} keys are left without an expiry: {_some(forever)}"] if forever else []
