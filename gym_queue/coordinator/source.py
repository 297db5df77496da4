"""Where the examples of a run come from: a JSONL file, or an environment that brings its own.

A source is read twice and maybe again after an interruption, and must say the same each time: once when it is
made (the whole input is checked before anything starts), once by the feeder. It keeps no example in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from gym_queue.errors import UsageError
from gym_queue.records import Example

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gym_queue.environments.base import Environment

_OURS = frozenset({"id", "environment"})
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
        self._default = default_environment
        self._find = environments
        self._known: dict[str, Environment] = {}
        self._limit = limit
        self._environment(default_environment)
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
            return self._example(number, _parse(line))
        except UsageError as error:
            msg = f"{self._path} line {number}: {error}"
            raise UsageError(msg) from error

    def _example(self, number: int, row: dict[str, Any]) -> Example:
        name = row.get("environment")
        if name is None:
            name = self._default
        elif not isinstance(name, str):
            msg = f"'environment' must be a name, not {json.dumps(name)}"
            raise UsageError(msg)
        environment = self._environment(name)
        wanted = environment.row_fields
        rest = {key: value for key, value in row.items() if key not in _OURS}
        example = Example(
            id=_id_of(row, number),
            environment=name,
            row={key: value for key, value in rest.items() if wanted is None or key in wanted},
            extra={key: value for key, value in rest.items() if wanted is not None and key not in wanted},
        )
        environment.check(example)
        return example

    def _environment(self, name: str) -> Environment:
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _refuse_repeated(self, repeated: _Repeated) -> None:
        """Read again and compare the ids that may be repeated themselves, not their digests."""
        first: dict[str, int] = {}
        for number, line in self._lines(0):
            identity = _id_of(_parse(line), number)
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


def _id_of(row: dict[str, Any], number: int) -> str:
    identity = row.get("id")
    if identity is None:
        return f"row-{number}"
    if isinstance(identity, bool) or not isinstance(identity, str | int | float) or identity == "":
        msg = f"'id' must be text or a number, not {json.dumps(identity)}"
        raise UsageError(msg)
    return str(identity)


def _parse(line: bytes) -> dict[str, Any]:
    """Read a line as a JSON object that can be written as JSON in UTF-8 again."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"not UTF-8 (byte {error.start + 1} of the line: {error.reason})"
        raise UsageError(msg) from error
    try:
        row = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        if "\\ud" in text.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        msg = "not JSON text (half of a surrogate pair)"
        raise UsageError(msg) from error
    except json.JSONDecodeError as error:
        msg = f"not JSON ({error.msg} at column {error.colno})"
        raise UsageError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"not JSON that can be used ({error})"
        raise UsageError(msg) from error
    if not isinstance(row, dict):
        msg = f"the row must be a JSON object, not {text[:40]}"
        raise UsageError(msg)
    return row


def _no_number(text: str) -> float:
    msg = f"{text} is no JSON number"
    raise ValueError(msg)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)
