"""The address of a Redis: what is read from it, and what of it may be shown."""

from __future__ import annotations

import pytest

from gym_queue.errors import UsageError
from gym_queue.redis_address import RedisAddress, parse, without_password


@pytest.mark.parametrize("url", ["redis://ann:pw@host:1/2", "rediss://host", "unix:///tmp/r.sock?db=0"])
def test_what_redis_py_understands_is_left_to_it(url: str) -> None:
    assert parse(url) == RedisAddress(url=url)


def test_sentinels_are_read_with_all_that_they_need() -> None:
    url = "sentinel://ann:p%40ss@one:1,two,[::1]:3/4?master=main&sentinel_password=p%26w"
    assert parse(url) == RedisAddress(
        url=url,
        sentinels=(("one", 1), ("two", 26379), ("::1", 3)),
        master="main",
        db=4,
        username="ann",
        password="p@ss",  # noqa: S106 - an example
        sentinel_password="p&w",  # noqa: S106 - the same
    )


def test_little_is_needed() -> None:
    address = parse("sentinel://one?master=main")
    assert (address.sentinels, address.db) == ((("one", 26379),), 0)
    assert (address.username, address.password, address.sentinel_password) == (None, None, None)
    assert parse("sentinel://:pw@one?master=main").username is None


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("sentinel://:secret@one:1/0", "names no master"),
        ("sentinel://:secret@one:1/0?master=", "names no master"),
        ("sentinel://:secret@one:1/zero?master=m", "database was expected, not 'zero'"),
        ("sentinel://:secret@one:1/0?master=m&colour=red", "no option 'colour'"),
        ("sentinel://:secret@one:1,:2/0?master=m", "has no host"),
        ("sentinel://:secret@one:99999/0?master=m", "Port out of range"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_without_the_password(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        parse(url)
    assert str(caught.value).startswith("the Redis URL sentinel://:***@one")
    assert "secret" not in str(caught.value)


def test_a_password_does_not_slip_into_a_log() -> None:
    assert "secret" not in repr(parse("sentinel://ann:secret@one?master=m&sentinel_password=secret"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:se:c@ret@host:1/0", "redis://:***@host:1/0"),
        ("rediss://ann:secret@host/0", "rediss://ann:***@host/0"),
        ("unix:///tmp/r.sock?db=0&password=secret", "unix:///tmp/r.sock?db=0&password=***"),
        ("unix://ann:secret@/tmp/r.sock", "unix://ann:***@/tmp/r.sock"),
        (
            "sentinel://ann:se@cret@a:1,b:2/0?master=m&sentinel_password=secret",
            "sentinel://ann:***@a:1,b:2/0?master=m&sentinel_password=***",
        ),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
