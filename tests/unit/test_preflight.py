"""Redis servers that cannot carry the ledger."""

from __future__ import annotations

import pytest

from gym_queue.embedded import preflight
from gym_queue.embedded.preflight import check_redis
from gym_queue.errors import StackError


def test_an_unusable_url_is_one_sentence() -> None:
    with pytest.raises(StackError, match=r"^the Redis URL http://:\*\*\*@host cannot be used: .*redis://"):
        check_redis("http://:secret@host")


def test_an_unreachable_redis_is_one_sentence() -> None:
    with pytest.raises(StackError, match=r"^the Redis at unix:///nowhere/redis\.sock does not answer: "):
        check_redis("unix:///nowhere/redis.sock")


@pytest.mark.parametrize("version", ["5.0.14", "6.0.16"])
def test_an_old_redis_is_refused(version: str) -> None:
    with pytest.raises(
        StackError, match=rf"^the Redis at redis://x is {version}, but 6\.2 or newer is needed$"
    ):
        preflight._refuse_unfit("redis://x", {"redis_version": version})


def test_a_redis_that_forgets_is_refused() -> None:
    fit = {"redis_version": "7.0.0", "maxmemory_policy": "noeviction"}
    preflight._refuse_unfit("redis://x", fit)
    with pytest.raises(StackError, match="must be noeviction"):
        preflight._refuse_unfit("redis://x", {**fit, "maxmemory_policy": "allkeys-lru"})
