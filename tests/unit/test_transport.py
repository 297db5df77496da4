"""How kombu is told where Redis is, and what it takes for a lost connection."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.messaging import Consumer
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from gym_queue import transport
from gym_queue.celery_app import make_app
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator


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


@pytest.fixture
def broker(redis_url: str) -> Iterator[Any]:
    with make_app("test", Settings(redis_url=redis_url)).connection_for_read() as connection:
        yield connection


def fill(broker: Any, messages: int) -> Any:
    """Put messages into a queue of its own."""
    queue: Any = Queue("tickets").bind(broker.default_channel)
    queue.declare()
    with broker.Producer() as producer:
        for number in range(messages):
            producer.publish(number, routing_key="tickets", serializer="json")
    return queue


def taken_at_once(broker: Any, queue: Any, room: int) -> list[int]:
    """Return what a consumer with so much room gets when it looks once."""
    taken: list[int] = []
    channel = broker.channel()
    channel.basic_qos(prefetch_count=room)
    with Consumer(channel, [queue], on_message=lambda message: taken.append(message.decode())):
        broker.drain_events(timeout=5)
    return taken


@pytest.mark.parametrize(
    ("waiting", "room", "taken"),
    [(1, 100, 1), (64, 100, 1), (256, 100, 4), (256, 3, 3), (256, 1, 1), (2000, 100, 17)],
)
def test_a_consumer_takes_a_small_share_of_what_waits(
    broker: Any, waiting: int, room: int, taken: int
) -> None:
    """One message, beside it at most a 64th of the others and 16, and never more than it has room for."""
    queue = fill(broker, waiting)
    assert taken_at_once(broker, queue, room) == list(range(taken))
    assert broker.default_channel.client.llen("tickets") == waiting - taken


def test_an_answer_that_is_half_read_is_nobody_elses(broker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = fill(broker, 256)
    channel = broker.channel()
    channel.basic_qos(prefetch_count=100)
    parse = channel.client.parse_response

    def refuse(connection: Any, command: str, **options: Any) -> Any:
        answer = parse(connection, command, **options)
        if command == "BRPOP":
            raise ReadOnlyError
        return answer

    with Consumer(channel, [queue], on_message=lambda _: None):
        with monkeypatch.context() as patch:
            patch.setattr(channel.client, "parse_response", refuse)
            with pytest.raises(ReadOnlyError):
                broker.drain_events(timeout=5)
        assert channel.client.connection._sock is None


def test_sockets_are_registered_once() -> None:
    calls: list[int] = []
    hub = SimpleNamespace(readers={}, add_reader=lambda descriptor, *_: calls.append(descriptor))
    quiet = transport._QuietHub(hub)
    quiet.add_reader(7, print, 7)
    hub.readers[7] = (print, (7,))
    quiet.add_reader(7, print, 7)
    assert calls == [7]
    quiet.add_reader(7, len, 7)
    assert calls == [7, 7], "another connection may have the same number"
