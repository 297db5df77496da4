"""A Docker engine for the tests of this folder: the one that runs here, or one of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gym_queue.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gym-queue"
BASE_IMAGE = "gym-queue-test-base:latest"


class MissingError(Exception):
    """What these tests need is not here."""


class Engine:
    """A Docker engine, and how to talk to it."""

    def __init__(self, variables: dict[str, str] | None = None) -> None:
        self.variables = {**os.environ, **(variables or {}), "DOCKER_BUILDKIT": "0", "COMPOSE_ANSI": "never"}

    def run(self, *argv: str, check: bool = True, timeout: float = 600, **variables: str) -> str:
        """Run a command that talks to the engine; return what it says."""
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env=self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{' '.join(argv)} ended with {done.returncode}: {done.stdout}"
        )
        return done.stdout

    def answers(self) -> bool:
        """Tell whether the engine is there."""
        asked = [found("docker"), "version", "--format", "{{.Server.Version}}"]
        return subprocess.run(asked, env=self.variables, capture_output=True, check=False).returncode == 0

    def import_base(self) -> None:
        """Have the image to build on, from the file that ``prepare.sh`` left."""
        base = CACHE / "base.tar"
        if not base.exists():
            msg = f"there is no {base}"
            raise MissingError(msg)
        known = self.run(found("docker"), "images", "--quiet", BASE_IMAGE).strip()
        if not known:
            self.run(found("docker"), "import", str(base), BASE_IMAGE)


def found(program: str) -> str:
    """Return the path of a program."""
    path = shutil.which(program)
    if path is None:
        msg = f"there is no {program}"
        raise MissingError(msg)
    return path


def compose() -> list[str]:
    """Return the command that is docker-compose here: the program, or docker's plugin."""
    path = shutil.which("docker-compose")
    return [path] if path else [found("docker"), "compose"]


@contextmanager
def running() -> Iterator[Engine]:
    """Give the engine that runs here; or start one, whose images are kept for the next time, and stop it.

    Raises:
        MissingError: a program is not here, or this is not root.
    """
    for program in ("docker", "chromium"):
        found(program)
    engine = Engine()
    if engine.answers():
        yield engine
        return
    if os.getuid() != 0:
        msg = "no Docker engine runs here, and only root can start one"
        raise MissingError(msg)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gq-docker-") as folder, (CACHE / "dockerd.log").open("w") as log:
        at = f"unix://{folder}/docker.sock"
        argv = [
            found("dockerd"),
            "--host",
            at,
            "--data-root",
            str(CACHE / "docker"),
            "--exec-root",
            f"{folder}/exec",
        ]
        argv += ["--pidfile", f"{folder}/docker.pid", "--bridge", "none", "--log-level", "warn"]
        daemon = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        try:
            engine = Engine({"DOCKER_HOST": at})
            wait_until(lambda: daemon.poll() is not None or engine.answers(), 60, what="dockerd")
            assert daemon.poll() is None, f"dockerd ended: {(CACHE / 'dockerd.log').read_text()[-2000:]}"
            yield engine
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(60)
