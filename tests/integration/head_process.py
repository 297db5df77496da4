"""``gym-queue head`` in a process of its own, as users start it, and what they ask it."""

from __future__ import annotations

import json
import re
import signal
import sys
from typing import TYPE_CHECKING, Any, Self

import httpx2 as httpx

from gym_queue.embedded.children import kill_session, last_words, spawn
from gym_queue.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

COMMAND = (sys.executable, "-m", "gym_queue.cli.main", "head")
TOKEN = "the-token-of-the-test"  # noqa: S105 - it guards nothing
SETTINGS = {"GYM_QUEUE_AUTH_TOKEN": TOKEN, "GYM_QUEUE_RATE_LIMIT": "0"}


class HeadProcess:
    """Starts a head on a port that is free, and ends it."""

    def __init__(self, folder: Path, environment: Mapping[str, str], name: str = "head") -> None:
        self.log = folder / f"{name}.log"
        self.process = spawn(
            [*COMMAND, "--port", "0"], self.log, environment=dict(environment) | SETTINGS, cwd=folder
        )
        wait_until(self._listens, 30, what=f"a head that listens; it says {last_words(self.log)}")
        self.client = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60.0, trust_env=False
        )
        wait_until(lambda: self.client.get("/ready").status_code == 200, 30, what="a head that is ready")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        kill_session(self.process)

    def _listens(self) -> bool:
        assert self.process.poll() is None, last_words(self.log)
        found = re.search(r"listens on (http://\S+)", self.log.read_text())
        self.url = found[1] if found else ""
        return found is not None

    def stop(self) -> int:
        """Ask it to end, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        """Post JSON, or lines; the answer must be a success."""
        content = body if isinstance(body, bytes) else None
        payload = None if content is not None else body
        answer = self.client.post(path, json=payload, content=content, **options)
        assert answer.is_success, answer.text
        return answer.json()

    def get(self, path: str, **params: Any) -> Any:
        """Get JSON; the answer must be a success."""
        answer = self.client.get(path, params=params)
        assert answer.is_success, answer.text
        return answer.json()

    def follow(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Yield the lines of a feed while they come."""
        with self.client.stream("GET", path, params={"follow": "true"} | params) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line:
                    yield json.loads(line)
