"""How kombu is told where Redis is, and what it takes for a lost connection."""

from __future__ import annotations

import pytest
from kombu.connection import Connection
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from gym_queue import transport
from gym_queue.celery_app import make_app
from gym_queue.settings import Settings


@pytest.mark.parametrize(
    ("redis_url", "broker_url"),
    [
        ("redis://:pw@host:6380/2", "redis://:pw@host:6380/2"),
        ("unix:///run/redis.sock?db=3", "redis+socket:///run/redis.sock?virtual_host=3"),
        ("unix://user:pw@/run/redis.sock", "redis+socket://user:pw@/run/redis.sock?virtual_host=0"),
        (
            "sentinel://u:p%40w@one,[::1]:27000/4?master=main",
            "sentinel://u:p%40w@one:26379/4;sentinel://u:p%40w@[::1]:27000/4",
        ),
    ],
)
def test_an_address_is_spelled_as_kombu_wants_it(redis_url: str, broker_url: str) -> None:
    assert transport.broker_url(redis_url) == broker_url


def test_sentinels_are_asked_once_and_with_their_own_password() -> None:
    options = transport.options("sentinel://:pw@one,two/0?master=main&sentinel_password=other")
    assert options["master_name"] == "main"
    assert options["sentinel_kwargs"]["password"] == "other"  # noqa: S105
    assert options["sentinel_kwargs"]["retry"].get_retries() == 0, "another one knows as much"


@pytest.mark.parametrize("url", ["redis://host/0", "unix:///run/redis.sock", "sentinel://one/0?master=main"])
def test_whatever_redis_answers_is_a_lost_connection(url: str) -> None:
    """Celery connects again after those, and gives up, or leaves the connection deaf, after all others."""
    app = make_app("test", Settings(redis_url=url))
    with app.connection_for_read() as connection:
        assert isinstance(connection, Connection)
        for error in (ReadOnlyError, OutOfMemoryError, ResponseError):
            assert issubclass(error, connection.connection_errors)
    assert transport.options(url)["ack_emulation"] is False
