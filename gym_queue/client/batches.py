"""Examples as they are sent to the head: NDJSON, in batches of a bounded size."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gym_queue.errors import UsageError

Examples = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]] | str | Path
"""Examples: rows (any iterable, asynchronous or not), or the path of a JSONL file of them."""

MOST_ROWS = 500
MOST_BYTES = 1 << 20


class Batch(NamedTuple):
    """``rows`` rows, a line each."""

    rows: int
    body: bytes


class Batcher:
    """Collects lines until a batch is full. A row of its own size may be larger than ``MOST_BYTES``."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._size = 0

    def add(self, line: bytes) -> Batch | None:
        """Take a line; return the batch that was full without it, if one was."""
        full = len(self._lines) == MOST_ROWS or self._size + len(line) > MOST_BYTES
        batch = self.rest() if full else None
        self._lines.append(line)
        self._size += len(line)
        return batch

    def rest(self) -> Batch | None:
        """Return what was collected, if anything was."""
        lines, self._lines, self._size = self._lines, [], 0
        return Batch(len(lines), b"".join(lines)) if lines else None


def encoded(row: Mapping[str, Any], index: int) -> bytes:
    """Return the line of a row.

    Raises:
        UsageError: it is no JSON object; ``index`` says which one.
    """
    if not isinstance(row, Mapping):
        msg = f"example {index} must be a JSON object, not {type(row).__name__}"
        raise UsageError(msg)
    try:
        text = json.dumps(dict(row), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:  # half of a surrogate pair is a ValueError too
        msg = f"example {index} cannot be written as JSON ({error})"
        raise UsageError(msg) from error


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the filled lines of a JSONL file as they are. Blocks.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            for line in file:
                stripped = line.strip().removeprefix(b"\xef\xbb\xbf")
                if stripped:
                    yield stripped + b"\n"
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise UsageError(msg) from error


def batches(rows: Iterable[Mapping[str, Any]] | str | Path, first: int) -> Generator[Batch]:
    """Yield the rows in batches; the first has index ``first``. Blocks where the rows do.

    Raises:
        UsageError: a row cannot be sent.
    """
    batcher = Batcher()
    for line in lines_of(Path(rows)) if isinstance(rows, str | Path) else _encoded_all(rows, first):
        if batch := batcher.add(line):
            yield batch
    if batch := batcher.rest():
        yield batch


def _encoded_all(rows: Iterable[Mapping[str, Any]], first: int) -> Iterator[bytes]:
    return (encoded(row, index) for index, row in enumerate(rows, first))
