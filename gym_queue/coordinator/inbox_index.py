"""Which part of a run's appended input counts: a small file of fixed records beside the rows.

Each append ends with one record: so many rows, so many bytes, closed or not. The newest whole record is the
truth; what stands behind it in either file is left of a writer that died, and the next writer cuts it off. So
an append is taken whole or not at all, and a reader looks at a few bytes, whatever the length of the input.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_RECORD = struct.Struct("<QQL")  # rows, bytes, closed; then the checksum of these
_CHECKSUM = struct.Struct("<L")
RECORD_BYTES = _RECORD.size + _CHECKSUM.size
_CHUNK = RECORD_BYTES * 4096


class Standing(NamedTuple):
    """How far an input has come: ``rows`` of it, in ``length`` bytes; ``closed``: no more will come."""

    rows: int = 0
    length: int = 0
    closed: bool = False


def encode(standing: Standing) -> bytes:
    """Return the record that says this."""
    content = _RECORD.pack(standing.rows, standing.length, standing.closed)
    return content + _CHECKSUM.pack(zlib.crc32(content))


def decode(record: bytes) -> Standing | None:
    """Return what a record says, ``None`` if it is torn."""
    if len(record) != RECORD_BYTES:
        return None
    content, checksum = record[: _RECORD.size], record[_RECORD.size :]
    if _CHECKSUM.unpack(checksum)[0] != zlib.crc32(content):
        return None
    rows, length, closed = _RECORD.unpack(content)
    return Standing(rows, length, bool(closed))


def newest(descriptor: int) -> tuple[Standing, int]:
    """Return what the newest whole record says, and where it ends in the file (both 0 if there is none)."""
    end = os.fstat(descriptor).st_size // RECORD_BYTES * RECORD_BYTES
    while end:
        record = os.pread(descriptor, RECORD_BYTES, end - RECORD_BYTES)
        if (standing := decode(record)) is not None:
            return standing, end
        end -= RECORD_BYTES
    return Standing(), 0


def read(path: Path) -> Standing:
    """Return how far an input has come; nothing yet if there is no such file. Raises ``OSError``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Standing()
    try:
        return newest(descriptor)[0]
    finally:
        os.close(descriptor)


def records(path: Path, start: int) -> Iterator[Standing]:
    """Yield what the whole records from byte ``start`` on say; nothing if there is no such file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            for place in range(0, len(chunk), RECORD_BYTES):
                standing = decode(chunk[place : place + RECORD_BYTES])
                if standing is None:
                    return
                yield standing
