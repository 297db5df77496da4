from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.embedded.redis import RedisServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to be hurt."""
    with RedisServer(tmp_path / "redis") as running:
        yield running
