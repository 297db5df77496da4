"""Where payloads lie that are too large for the ledger: files in a folder, or objects behind a URL.

``<url>/run-<run id>/<name>``, each written once and never changed. A name says what it is, of which rollout,
how long and with which digest, so that whoever reads it notices a file that is torn or gone. Whoever opens a
run leaves a note in its folder (``about.json``); where that note is missing, a folder is not the run's: it is
not shared between the machines, or not mounted. All methods block: call them in a thread.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote, unquote

from gym_queue.durable import replacement, sync_directory
from gym_queue.errors import (
    GymQueueError,
    LedgerError,
    PayloadLostError,
    PayloadsNotSharedError,
    UsageError,
)
from gym_queue.redis_address import without_password
from gym_queue.settings import variable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ABOUT = "about.json"
_FOLDER = "run-"
"""So that no run id, whatever it is, names another folder than its own."""

SETTING = variable("payload_url")


class Files(Protocol):
    """What keeps the bytes. Raises whatever its file system raises; ``FileNotFoundError`` for what is not
    there.
    """

    def make(self, folder: str) -> None:
        """Create a folder, if it does not exist yet."""
        ...

    def write(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Write files; they are durable when this returns."""
        ...

    def read(self, folder: str, names: Sequence[str]) -> list[bytes | Exception]:
        """Read files, as many at once as may be; for each its bytes or why there are none."""
        ...

    def delete(self, folder: str, names: Sequence[str]) -> None:
        """Delete files; some may be gone already."""
        ...

    def remove(self, folder: str) -> None:
        """Delete a folder and all that is in it, if it exists."""
        ...

    def folders(self) -> list[str]:
        """Return the names of all folders."""
        ...


def length_of(name: str) -> int:
    """Return how many bytes a payload has, by its name."""
    return int(name.split("-")[2])


class Payloads:
    """The payloads of all runs under one URL.

    Args:
        url: a folder, or a URL that fsspec knows (``s3://…``).
        owner: the ledger that refers to them. Only the sweep of the same one deletes what it forgot.

    Raises:
        UsageError: nothing can be kept under this URL.
    """

    def __init__(self, url: str, owner: str) -> None:
        self.url = without_password(url)
        self._owner = owner
        self._files = _files(url)
        self._shared: set[str] = set()

    def check(self) -> None:
        """Try it out. Raises ``UsageError`` if nothing can be kept under this URL."""
        probe = f"check-{uuid.uuid4().hex}"
        try:
            self.open(probe)
            self.forget(probe)
        except LedgerError as error:
            msg = f"{SETTING} cannot be used: {error}"
            raise UsageError(msg) from error

    def open(self, run_id: str) -> None:
        """Make the folder of a run: the first that happens to it here, and safe to repeat. Raises
        ``LedgerError``.
        """
        about = json.dumps({"owner": self._owner, "opened_at": time.time()}).encode()
        try:
            self._files.make(_folder(run_id))
            self._files.write(_folder(run_id), {_ABOUT: about})
        except Exception as error:
            raise self._trouble(error) from error
        self._shared.add(run_id)

    def put(self, run_id: str, payloads: Sequence[tuple[str, str, bytes]]) -> list[str]:
        """Keep payloads, each given by its kind, its place and its bytes, and return their names.

        Raises:
            PayloadsNotSharedError: whoever opened the run did it elsewhere.
            LedgerError: they could not be written; waiting may help.
        """
        if run_id not in self._shared and not self._is_shared(run_id):
            raise self._not_shared(run_id)
        files = {f"{kind}-{place}-{len(data)}-{_digest(data)}": data for kind, place, data in payloads}
        try:
            self._files.write(_folder(run_id), files)
        except FileNotFoundError as error:  # the run is forgotten, or the folder no longer mounted
            self._shared.discard(run_id)
            raise self._not_shared(run_id) from error
        except Exception as error:
            raise self._trouble(error) from error
        return [*files]

    def get(self, run_id: str, names: Sequence[str]) -> dict[str, bytes | GymQueueError]:
        """Return payloads by name, or why there is none: ``PayloadLostError``, ``PayloadsNotSharedError``, or
        ``LedgerError`` where waiting may help.
        """
        answers: dict[str, bytes | GymQueueError] = {}
        for name, found in zip(names, self._read(run_id, names), strict=True):
            if isinstance(found, bytes) and name.endswith(f"-{_digest(found)}"):
                answers[name] = found
            elif isinstance(found, bytes):
                what = f"is damaged ({len(found)} bytes of {length_of(name)})"
                answers[name] = PayloadLostError(f"{self.url}/{_folder(run_id)}/{name} {what}")
            elif isinstance(found, FileNotFoundError):
                answers[name] = self._missing(run_id, name)
            else:
                answers[name] = self._trouble(found)
        return answers

    def delete(self, run_id: str, names: Sequence[str]) -> None:
        """Delete payloads that nobody will ask for. Raises ``LedgerError``."""
        try:
            self._files.delete(_folder(run_id), names)
        except Exception as error:
            raise self._trouble(error) from error

    def forget(self, run_id: str) -> None:
        """Delete all of a run's. Safe to repeat. Raises ``LedgerError``."""
        self._shared.discard(run_id)
        try:
            self._files.remove(_folder(run_id))
        except Exception as error:
            raise self._trouble(error) from error

    def opened_before(self, age: float) -> list[str]:
        """Return the runs of this ledger that were opened at least ``age`` seconds ago. Raises
        ``LedgerError``.
        """
        try:
            folders = [folder for folder in self._files.folders() if folder.startswith(_FOLDER)]
            notes = [(folder, self._files.read(folder, [_ABOUT])[0]) for folder in folders]
        except Exception as error:
            raise self._trouble(error) from error
        abouts = [(folder, json.loads(note)) for folder, note in notes if isinstance(note, bytes)]
        latest = time.time() - age
        return [
            unquote(folder.removeprefix(_FOLDER))
            for folder, about in abouts
            if about["owner"] == self._owner and about["opened_at"] <= latest
        ]

    def _read(self, run_id: str, names: Sequence[str]) -> list[bytes | Exception]:
        try:
            return self._files.read(_folder(run_id), names)
        except Exception as error:  # noqa: BLE001 - every file system has its own
            return [error] * len(names)

    def _is_shared(self, run_id: str) -> bool:
        """Look for the note that the run's opener left. Raises ``LedgerError``."""
        note = self._read(run_id, [_ABOUT])[0]
        if isinstance(note, bytes):
            self._shared.add(run_id)
        elif not isinstance(note, FileNotFoundError):
            raise self._trouble(note) from note
        return isinstance(note, bytes)

    def _missing(self, run_id: str, name: str) -> GymQueueError:
        try:
            shared = self._is_shared(run_id)
        except LedgerError as error:
            return error
        if not shared:
            return self._not_shared(run_id)
        return PayloadLostError(f"{self.url}/{_folder(run_id)}/{name} is gone")

    def _not_shared(self, run_id: str) -> PayloadsNotSharedError:
        return PayloadsNotSharedError(
            f"{SETTING} is {self.url} here, and run {run_id} keeps its payloads elsewhere: all its processes "
            "need the same folder or bucket"
        )

    def _trouble(self, error: Exception) -> LedgerError:
        return LedgerError(f"payloads in {self.url}: {type(error).__name__}: {error}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _folder(run_id: str) -> str:
    return _FOLDER + quote(run_id, safe="")


def _files(url: str) -> Files:
    path = url.removeprefix("file://")
    if "://" not in path and "::" not in path:
        return _Folder(Path(path).absolute())
    from gym_queue.ledger.objects import Objects  # noqa: PLC0415 - fsspec loads slowly

    try:
        return Objects(url)
    except Exception as error:
        msg = f"{SETTING} cannot be used: {error}"
        raise UsageError(msg) from error


class _Folder:
    """``Files`` in a folder of this machine, or one that machines share."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def make(self, folder: str) -> None:
        """See ``Files.make``."""
        (self._root / folder).mkdir(parents=True, exist_ok=True)
        sync_directory(self._root)
        sync_directory(self._root.parent)

    def write(self, folder: str, files: Mapping[str, bytes]) -> None:
        """See ``Files.write``."""
        for name, data in files.items():
            with replacement(self._root / folder / name) as file:
                file.write(data)

    def read(self, folder: str, names: Sequence[str]) -> list[bytes | Exception]:
        """See ``Files.read``."""
        return [_read(self._root / folder / name) for name in names]

    def delete(self, folder: str, names: Sequence[str]) -> None:
        """See ``Files.delete``."""
        for name in names:
            (self._root / folder / name).unlink(missing_ok=True)

    def remove(self, folder: str) -> None:
        """See ``Files.remove``."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self._root / folder)

    def folders(self) -> list[str]:
        """See ``Files.folders``."""
        return [entry.name for entry in self._root.iterdir()] if self._root.exists() else []


def _read(path: Path) -> bytes | Exception:
    try:
        return path.read_bytes()
    except OSError as error:
        return error
