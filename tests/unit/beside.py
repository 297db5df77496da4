"""What tests of payloads by reference share: a road whose ledger keeps what is large in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gym_queue.ledger.by_reference import ByReference
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.ledger.payloads import Payloads
from gym_queue.records import Example, Group
from tests.unit.road import RUN, Road, World

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gym_queue.ledger.base import Ledger
    from gym_queue.records import Fence, Ticket

LARGE = "x" * 5000


class Beside(Road):
    """A road whose ledger keeps what is longer than ``threshold`` in a folder."""

    def __init__(self, folder: Path, *, threshold: int = 4000, inline: bool = False) -> None:
        self.inner = MemoryLedger()
        self.payloads = Payloads(str(folder), "")
        self.folder = folder / f"run-{RUN}"
        ledger = ByReference(self.inner, self.payloads, threshold, patience=0.0)
        super().__init__(world=World(inline=inline), ledger=ledger)

    def kept(self, kind: str = "") -> list[str]:
        """Return what lies beside the ledger, as kind and place."""
        names = sorted(path.name for path in self.folder.iterdir() if path.name != "about.json")
        return ["-".join(name.split("-")[:2]) for name in names if name.startswith(kind)]

    def path(self, kind: str) -> Path:
        (path,) = [path for path in self.folder.iterdir() if path.name.startswith(kind)]
        return path

    async def acknowledge_all(self) -> None:
        await self.ledger.acknowledge(RUN, (await self.events())[-1].position)


def large_group(index: int, samples: Sequence[int] = (0, 1), **extra: Any) -> Group:
    example = Example(id=f"e{index}", environment="world", row={"prompt": LARGE}, extra=extra)
    return Group(example_index=index, samples=tuple(samples), example=example)


async def claimed(ledger: Ledger, ticket: Ticket | None) -> Fence:
    assert ticket is not None
    claim = await ledger.claim(ticket, "cpu", 60)
    assert claim is not None
    return claim.samples[0].fence
