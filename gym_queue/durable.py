"""Files that survive a crash: atomic replacement, synced directories, errors in one clear sentence."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gym_queue.errors import DiskFullError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO


_FULL = {errno.ENOSPC, errno.EDQUOT}


def refusal(sentence: str, error: OSError) -> StorageError:
    """Return the error for a file that cannot be written: ``DiskFullError`` where waiting for room helps."""
    return DiskFullError(sentence) if error.errno in _FULL else StorageError(sentence)


@contextmanager
def storage_errors(sentence: str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a ``StorageError``: ``sentence``, then the system's reason."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        msg = f"{sentence}: {error.strerror or error}{where}"
        raise refusal(msg, error) from error


def sync_directory(directory: Path) -> None:
    """Make names created or replaced in ``directory`` durable (fsync of a file does not cover its name)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacement(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of ``path`` when the block ends, durably and all at once.

    Whatever fails, ``path`` is either the whole old file or the whole new one. A symbolic link stays a link:
    its target is replaced.

    Raises:
        OSError: the new file could not be written; ``path`` is as it was.
    """
    target = path.resolve()
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """Return where ``replacement`` writes; a process killed in the middle leaves this file behind."""
    target = path.resolve()
    return target.with_name(target.name + ".tmp")


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``; a disk that fills up takes a part first and fails on the rest."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
