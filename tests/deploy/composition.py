"""``compose/compose.yaml``, brought up by an engine, and what its containers do."""

from __future__ import annotations

import json
import secrets
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

from gym_queue.testing import wait_until
from tests.deploy.engine import BASE_IMAGE, ROOT, compose, found

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.deploy.engine import Engine

FILES = ("-f", "compose/compose.yaml", "-f", "tests/deploy/offline.yaml")
IMAGE = "gym-queue-test:latest"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Composition:
    """The containers of one project of docker-compose's."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.name = f"gq{secrets.token_hex(3)}"
        self.redis_password, self.flower_password = secrets.token_hex(16), secrets.token_hex(16)
        self.token = secrets.token_hex(16)
        self.head_port, self.flower_port = free_port(), free_port()
        self._env_file = folder / "env"
        settings = {
            "REDIS_PASSWORD": self.redis_password,
            "FLOWER_PASSWORD": self.flower_password,
            "GYM_QUEUE_AUTH_TOKEN": self.token,
            "HEAD_PORT": self.head_port,
            "FLOWER_PORT": self.flower_port,
            "GYM_QUEUE_IMAGE": IMAGE,
            "BASE_IMAGE": BASE_IMAGE,
            "WHEELHOUSE": "build/wheelhouse",
            "GYM_QUEUE_CONCURRENCY": 8,
            "GYM_QUEUE_SHUTDOWN_GRACE": 20,
            "STOP_GRACE_PERIOD": "40s",
            "WORKER_HEARTBEAT_INTERVAL": 1,
            "WORKER_TIMEOUT": 5,
        }
        self._env_file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    @property
    def head_url(self) -> str:
        """Where the head is, seen from outside the containers."""
        return f"http://127.0.0.1:{self.head_port}"

    @property
    def flower_url(self) -> str:
        return f"http://127.0.0.1:{self.flower_port}"

    def call(self, *arguments: str, **options: Any) -> str:
        """Run docker-compose; return what it says."""
        known = [*compose(), "-p", self.name, "--env-file", str(self._env_file), *FILES]
        return self.engine.run(*known, *arguments, **options)

    def up(self, gpu_workers: int = 1) -> None:
        """Bring all parts up, or change how many workers generate."""
        self.call("up", "--detach", "--no-build", "--scale", f"gpu-worker={gpu_workers}")

    def workers(self, kind: str = "gpu") -> set[str]:
        """Return the names of the workers that the head sees."""
        request = Request(  # noqa: S310 - of our own making
            f"{self.head_url}/v1/workers", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urlopen(request, timeout=10) as answer:  # noqa: S310
            known = json.loads(answer.read())["workers"]
        return {worker["worker"] for worker in known if worker["kind"] == kind}

    def containers(self, service: str = "") -> list[dict[str, Any]]:
        """Return what docker knows of the containers, running or not."""
        ids = self.call("ps", "--quiet", *([service] if service else [])).split()
        found_ = json.loads(self.engine.run(found("docker"), "inspect", *ids)) if ids else []
        return list(found_)

    def unhealthy(self) -> list[str]:
        """Return the names of running containers that are not healthy (yet), with what they say."""
        return [
            f"{one['Name']}: {[check['Output'] for check in one['State']['Health']['Log']][-1:]}"
            for one in self.containers()
            if one["State"]["Running"] and one["State"]["Health"]["Status"] != "healthy"
        ]

    def wait_healthy(self, timeout: float = 180.0) -> None:
        """Wait until all that runs is healthy."""
        try:
            wait_until(lambda: not self.unhealthy(), timeout, what="healthy containers")
        except AssertionError as error:
            msg = f"{error}: {self.unhealthy()}"
            raise AssertionError(msg) from error


@contextmanager
def composed(engine: Engine, folder: Path) -> Iterator[Composition]:
    """Build the image, bring all parts up, and take them down, leaving their logs in ``build/deploy``."""
    composition = Composition(engine, folder)
    composition.call("build", "redis")
    try:
        composition.up()
        yield composition
    finally:
        logs = ROOT / "build" / "deploy"
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "containers.log").write_text(composition.call("logs", "--no-color", check=False))
        composition.call("down", "--volumes", "--timeout", "5", check=False)
        engine.run(found("docker"), "image", "prune", "--force", check=False)
