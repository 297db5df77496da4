"""``gym-queue up``: a real service on this machine, used, hurt, and stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from gym_queue.testing import wait_until
from tests.acceptance.commands import ROOT, check_each_once, children, running, submitted, write_input

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Service:
    """A ``gym-queue up`` in a folder, and what it has said."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "said"

    @property
    def said(self) -> str:
        return self._log.read_text()

    def says(self, words: str, timeout: float = 60.0) -> None:
        def heard() -> bool:
            assert self.process.poll() is None or words in self.said, self.said
            return words in self.said

        wait_until(heard, timeout, what=f"it to say {words!r}")

    def parts(self) -> dict[int, str]:
        return children(self.process.pid)

    def pid_of(self, words: str) -> int:
        """Return the process id of a part, by words of its command."""
        return next(pid for pid, command in self.parts().items() if words in command)


@contextmanager
def up(folder: Path, port: int, *arguments: str, **variables: object) -> Iterator[Service]:
    """Bring a service up, and make sure that it is gone in the end."""
    dropped = ("GYM_QUEUE_REDIS_URL", "HEAD_SERVER_URL", "GYM_QUEUE_AUTH_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    ours = {"PYTHONPATH": str(ROOT), "GYM_QUEUE_HEAD_PORT": str(port)}
    with (folder / "said").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gym_queue.cli.main", "up", *arguments],
            cwd=folder,
            env=kept | ours | {name: str(it) for name, it in variables.items()},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield Service(folder, process, port)
    finally:
        parts = children(process.pid) if process.poll() is None else {}
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(running, parts)), 30, what="the end of all parts")


@pytest.mark.parametrize("pattern", ["all-in-one", "separated"])
def test_it_serves_starts_again_what_dies_and_stops_in_order(
    tmp_path: Path, unused_tcp_port: int, pattern: str
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    write_input(work, [{"prompt": f"{number}?", "answer": "ok"} for number in range(20)])
    with up(tmp_path, unused_tcp_port, "--pattern", pattern) as service:
        service.says(f"the head listens on {service.url}: ")
        parts = service.parts()
        assert any("gym_queue.cli.main head" in command for command in parts.values()) == (
            pattern == "separated"
        )
        with submitted(
            work, "--model", "stub:?delay=0.5", "--samples", "4", "--head", service.url
        ) as command:
            command.reach(1)
            os.kill(service.pid_of("workers.gpu"), signal.SIGKILL)
            service.says("gpu1 was killed by SIGKILL; it starts again in 0.5 s")
            if pattern == "separated":
                os.kill(service.pid_of("gym_queue.cli.main head"), signal.SIGKILL)
                service.says("head was killed by SIGKILL; it starts again in 0.5 s")
            assert command.end() == 0
        check_each_once(work, 20, 4)
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 0
        assert "stopping: what is in flight has 10 s" in service.said
        assert service.said.endswith("gym-queue: all parts have stopped\n")
        assert service.said.index("cpu   | worker: Warm shutdown") < service.said.index("redis | ", -2000)
        assert not any(map(running, parts))
    assert "Traceback" not in service.said


def test_a_second_signal_stops_at_once(tmp_path: Path, unused_tcp_port: int) -> None:
    write_input(tmp_path, [{"prompt": "slow", "answer": "ok"}])
    with up(tmp_path, unused_tcp_port, GYM_QUEUE_SHUTDOWN_GRACE=1000) as service:
        service.says("the head listens on")
        parts = service.parts()
        with submitted(tmp_path, "--model", "stub:?delay=500", "--head", service.url) as command:
            command.says("in flight", 60)
            service.process.send_signal(signal.SIGTERM)
            service.says("gpu1  | worker: Warm shutdown")
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(60) == 130
        assert "stopped at once" in service.said
        wait_until(lambda: not any(map(running, parts)), 30, what="the end of all parts")


@pytest.mark.parametrize("pattern", ["all-in-one", "separated"])
def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path, pattern: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with up(tmp_path, port, "--pattern", pattern, "--workers", "0", "--verifiers", "0") as service:
            assert service.process.wait(60) == 2
            assert f"the head cannot listen on 127.0.0.1, port {port}: Address already in use" in service.said
            assert "Traceback" not in service.said


def test_what_cannot_work_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with up(tmp_path, 0) as service:
        assert service.process.wait(60) == 2
        assert "GYM_QUEUE_HEAD_PORT is 0: name a port" in service.said
    with up(tmp_path, 1, GYM_QUEUE_HEAD_HOST="0.0.0.0") as service:  # noqa: S104 - it is refused
        assert service.process.wait(60) == 2
        assert "GYM_QUEUE_AUTH_TOKEN" in service.said
    assert not (tmp_path / "runs").exists()
