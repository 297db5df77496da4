"""A played head, in the test's own event loop or in a thread beside it, and clients of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue import AsyncClient, Client
from tests.unit.client.fake_head import TOKEN, FakeHead, playing, playing_beside

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture
async def head() -> AsyncIterator[FakeHead]:
    async with playing() as played:
        yield played


@pytest.fixture
async def client(head: FakeHead) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(head.url, TOKEN, patience=10.0) as made:
        yield made


@pytest.fixture
def head_beside() -> Iterator[FakeHead]:
    """A head in a thread of its own."""
    with playing_beside() as played:
        yield played


@pytest.fixture
def sync_client(head_beside: FakeHead) -> Iterator[Client]:
    with Client(head_beside.url, TOKEN, patience=10.0) as made:
        yield made
