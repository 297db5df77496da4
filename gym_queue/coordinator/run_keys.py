"""Idempotency keys of the head's runs, as files: they outlive processes, Redis, and the end of the run (G8).

``RUNS_DIR/.keys`` has a file a key, named by its digest. It is there, whole, before the run's folder is; so
whoever finds a key without a folder makes the folder from what the key says, and goes on where another died.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from typing import TYPE_CHECKING

from pydantic import ValidationError

from gym_queue.coordinator.manifest import Manifest
from gym_queue.durable import storage_errors, sync_directory
from gym_queue.errors import StorageError
from gym_queue.records import Record

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = ".keys"
UNFINISHED = ".new-"
"""What the name of a file begins with while it is being written."""


class KeyRecord(Record):
    """What a key was used for: the digest of the request, and what the run is to be."""

    request_digest: str
    manifest: Manifest


class RunKeys:
    """The keys of one folder of runs. Methods block, and raise ``StorageError``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def find(self, key: str) -> KeyRecord | None:
        """Return what a key was used for, ``None``: it was not."""
        path = self._path(key)
        with storage_errors(f"{path} cannot be read"):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                return None
        try:
            return KeyRecord.model_validate_json(content)
        except ValidationError as error:
            msg = f"{path} is damaged or from another version of gym_queue"
            raise StorageError(msg) from error

    def take(self, key: str, record: KeyRecord) -> bool:
        """Use a key, durably. Returns false if it was used before."""
        path = self._path(key)
        with storage_errors(f"{path} cannot be written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            new = self._folder / f"{UNFINISHED}{secrets.token_hex(8)}"
            try:
                with new.open("wb") as file:
                    file.write(record.model_dump_json().encode())
                    file.flush()
                    os.fsync(file.fileno())
                path.hardlink_to(new)
            except FileExistsError:
                return False
            finally:
                new.unlink(missing_ok=True)
            sync_directory(self._folder)
            sync_directory(self._folder.parent)
        return True

    def _path(self, key: str) -> Path:
        return self._folder / hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
