"""A mix of environments that bring their own examples, interleaved by their weights."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from gym_queue.coordinator.source import EnvironmentSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gym_queue.api import MixPart
    from gym_queue.environments.base import Environment
    from gym_queue.records import Example


class MixSource:
    """Examples of several environments, a ``Source`` that is closed from the start.

    Smooth weighted round robin (the balancer of nginx: Sysoev 2012, commit 52327e0): of weights 2 and 1 comes
    a b a a b a, not a a b. The order depends on weights and sizes only, so it is the same each time. A part
    that is used up leaves the others their shares. With several parts, an example's id is ``PART-ID``, the
    first part being 0: two of them may call an example the same.

    Raises:
        UsageError: there is no such environment, or it brings no examples, or refuses the size.
    """

    closed = True

    def __init__(self, parts: Sequence[MixPart], environments: Callable[[str], Environment]) -> None:
        self._parts = tuple(parts)
        self._sources = [
            EnvironmentSource(environments(part.name), part.name, size=part.size, seed=part.seed)
            for part in parts
        ]
        self.count = sum(part.size for part in parts)
        identity = ["mix", [(part.weight, source.fingerprint) for part, source in self._with_sources()]]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def examples(self, start: int) -> Iterator[Example]:
        """Yield the examples from index ``start`` on. Raises ``UsageError`` if a part ends early."""
        order = self._order()
        begun = [0] * len(self._parts)
        for _, part in zip(range(start), order, strict=False):
            begun[part] += 1
        streams = [source.examples(at) for source, at in zip(self._sources, begun, strict=True)]
        for part in order:
            example = next(streams[part])
            if len(self._parts) > 1:
                example = example.model_copy(update={"id": f"{part}-{example.id}"})
            yield example

    def _order(self) -> Iterator[int]:
        """Yield whose turn it is, to the end."""
        left = {number: part.size for number, part in enumerate(self._parts)}
        credit = [0.0] * len(self._parts)
        while left:
            for number in left:
                credit[number] += self._parts[number].weight
            turn = max(left, key=lambda number: (credit[number], -number))
            credit[turn] -= sum(self._parts[number].weight for number in left)
            left[turn] -= 1
            if not left[turn]:
                del left[turn]
            yield turn

    def _with_sources(self) -> Iterator[tuple[MixPart, EnvironmentSource]]:
        return zip(self._parts, self._sources, strict=True)
