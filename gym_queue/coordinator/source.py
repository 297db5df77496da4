"""Where the examples of a run come from: a JSONL file, or an environment that brings its own.

A source is read twice and maybe again after an interruption, and must say the same each time: once when it is
made (the whole input is checked before anything starts), once by the feeder. It keeps no example in memory.
"""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from gym_queue.coordinator.example_rows import ExampleRows, id_of, parse
from gym_queue.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gym_queue.environments.base import Environment
    from gym_queue.records import Example

_DIGEST_BYTES = 8
_SEEN_BITS = 26
"""Size of the table that looks for repeated ids: 2**26 bits are 8 MiB, of which short inputs touch little."""


class Source(Protocol):
    """Examples in a fixed order. Reading may block (files, generators): not for an event loop's thread.
    ``count`` and ``closed`` are asked for often, by one, and must be quick.
    """

    @property
    def closed(self) -> bool:
        """Whether ``count`` will never grow again. Once true, always true."""
        ...

    @property
    def count(self) -> int:
        """Number of examples. While the source is not closed it may grow; it never shrinks."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content and everything that chooses it; equal for equal examples."""
        ...

    def examples(self, start: int) -> Iterator[Example]:
        """Yield the examples from index ``start`` on: all that ``count`` counts at the first step, and
        perhaps what comes later.
        """
        ...


class JsonlSource:
    """One example a line: ``{"id"?, "environment"?, …}``; the rest of the row is read by the row's
    environment.

    Blank lines do not count. A row without ``id`` is called ``row-LINE``. Fields that are not the
    environment's go to ``Example.extra``.

    Args:
        path: the file; UTF-8, a byte order mark is skipped.
        default_environment: for rows that name none.
        environments: returns the environment of a name, or raises ``UsageError``. Called once a name.
        limit: read only so many rows, at least 1.

    Raises:
        UsageError: with the line number, for the first row that cannot be used; or the file is empty or
        unreadable.
    """

    closed = True

    def __init__(
        self,
        path: Path,
        *,
        default_environment: str,
        environments: Callable[[str], Environment],
        limit: int | None = None,
    ) -> None:
        self._path = path
        self._rows = ExampleRows(default_environment, environments)
        self._limit = limit
        digest = hashlib.sha256(json.dumps(["jsonl", default_environment]).encode())
        self.count = 0
        repeated = _Repeated()
        self._stamp = self._now()
        for number, line in self._lines(0):
            example = self._read(number, line)
            repeated.add(example.id)
            digest.update(line + b"\n")
            self.count += 1
        if not self.count:
            msg = f"{path} is empty: there is no row to run"
            raise UsageError(msg)
        self.fingerprint = digest.hexdigest()
        if repeated.suspects:
            self._refuse_repeated(repeated)

    def examples(self, start: int) -> Iterator[Example]:
        """Yield the examples from index ``start`` on.

        Raises:
            UsageError: the file is no longer what was checked.
        """
        if self._now() != self._stamp:
            msg = f"{self._path} has changed since it was checked"
            raise UsageError(msg)
        for number, line in self._lines(start):
            yield self._read(number, line)

    def _now(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return status.st_size, status.st_mtime_ns

    def _unreadable(self, error: OSError) -> UsageError:
        return UsageError(f"cannot read {self._path}: {error.strerror or error}")

    def _lines(self, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield number and content of the filled lines, from the ``start``-th of them to the limit."""
        try:
            with self._path.open("rb") as file:
                filled = ((number, line.strip()) for number, line in enumerate(file, start=1) if line.strip())
                yield from islice(filled, start, self._limit)
        except OSError as error:
            raise self._unreadable(error) from error

    def _read(self, number: int, line: bytes) -> Example:
        try:
            return self._rows.example(number, parse(line))
        except UsageError as error:
            msg = f"{self._path} line {number}: {error}"
            raise UsageError(msg) from error

    def _refuse_repeated(self, repeated: _Repeated) -> None:
        """Read again and compare the ids that may be repeated themselves, not their digests."""
        first: dict[str, int] = {}
        for number, line in self._lines(0):
            identity = id_of(parse(line), number)
            if _digest_of(identity) not in repeated.suspects:
                continue
            if identity in first:
                msg = f"{self._path} line {number}: the id {identity!r} is taken by line {first[identity]}"
                raise UsageError(msg)
            first[identity] = number


class EnvironmentSource:
    """Examples that an environment brings itself.

    The fingerprint covers the parameters and the first example, not all of them: some are costly to make.

    Args:
        environment: its ``examples`` must be the same for the same size and seed.
        name: how workers find the environment again; every example carries it.
        size: how many examples to ask the environment for.
        seed: which ones.
        limit: use only so many of them, at least 1.

    Raises:
        UsageError: the environment brings no examples, or refuses the size.
    """

    closed = True

    def __init__(
        self, environment: Environment, name: str, *, size: int, seed: int, limit: int | None = None
    ) -> None:
        self._environment = environment
        self._name = name
        self._size = size
        self._seed = seed
        self.count = size if limit is None else min(size, limit)
        try:
            first = next(self.examples(0))
        except NotImplementedError as error:
            msg = f"environment {name}: {error}"
            raise UsageError(msg) from error
        parameters = ["environment", name, size, seed, self.count, first.model_dump(mode="json")]
        self.fingerprint = hashlib.sha256(json.dumps(parameters).encode()).hexdigest()

    def examples(self, start: int) -> Iterator[Example]:
        """Yield the examples from index ``start`` on.

        Raises:
            UsageError: the environment ended before ``size`` examples.
        """
        index = start
        for example in islice(self._environment.examples(self._size, self._seed), start, self.count):
            yield example.model_copy(update={"environment": self._name})
            index += 1
        if index < self.count:
            msg = f"environment {self._name} was asked for {self._size} examples and brought only {index}"
            raise UsageError(msg)


class _Repeated:
    """Looks for repeated ids in fixed memory: one bit an id, at a place that its digest gives.

    ``suspects`` are digests whose bit was set already, by the same id or (rarely) by another.
    """

    def __init__(self) -> None:
        self._bits = bytearray(1 << (_SEEN_BITS - 3))
        self.suspects: set[int] = set()

    def add(self, identity: str) -> None:
        digest = _digest_of(identity)
        place, bit = divmod(digest % (1 << _SEEN_BITS), 8)
        if self._bits[place] & (1 << bit):
            self.suspects.add(digest)
        self._bits[place] |= 1 << bit


def _digest_of(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=_DIGEST_BYTES).digest(), "big")
