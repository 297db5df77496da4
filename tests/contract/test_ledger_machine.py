"""Random histories of a ledger: whatever happens in whatever order, G1 and G2 hold after every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import redis
from hypothesis import settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from gym_queue import names
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.ledger.redis import RedisLedger
from gym_queue.ledger.references import KEY, decode
from gym_queue.lifecycle import TERMINAL
from gym_queue.records import Example
from tests.contract.ledger_machine import LedgerMachine
from tests.contract.ledger_model import RUN
from tests.contract.ledgers import MEMORY_URL, by_reference, clear_memory_url, leftovers

if TYPE_CHECKING:
    from pathlib import Path


class MemoryMachine(LedgerMachine):
    def __init__(self) -> None:
        super().__init__(MemoryLedger())

    def check_that_nothing_is_left(self) -> None:
        left = {name: value for name, value in vars(self.ledger).items() if isinstance(value, dict)}
        assert left.pop("_gone")["accepted"] == len(self.model.rollouts)  # meant to stay: the totals
        del left["_weights"]  # they outlive runs
        assert not any(left.values()), left


class RedisMachine(LedgerMachine):
    def __init__(self, server: Any, url: str) -> None:
        server.flushdb()
        self.server = server
        super().__init__(RedisLedger(url))

    def check_that_nothing_is_left(self) -> None:
        totals = names.totals_key()
        assert int(self.server.hget(totals, "accepted")) == len(self.model.rollouts)
        lasting = {key.decode() for key in self.server.keys("*") if self.server.ttl(key) == -1}
        assert lasting <= {names.weights_key(), totals}  # they outlive runs

    @invariant()
    def only_what_is_needed_is_kept(self) -> None:
        """G5: payloads go with their rollouts, groups with their last one; open samples are counted right."""
        claims = sum(self.server.zcard(key) for key in self.server.keys("gq:claims:*"))
        assert claims == len(self.model.claims)
        groups = {index for index, _ in self.model.open_places()}
        assert {int(index) for index in self.server.zrange("gq:groups:" + RUN, 0, -1)} == groups
        assert len(self.server.keys("gq:group:*")) == len(groups)
        for key in self.server.keys("gq:group:*"):
            index = int(key.rsplit(b":", 1)[1])
            record = self.server.hgetall(key)
            rollouts = {p[1]: r for p, r in self.model.rollouts.items() if p[0] == index}
            kept = {int(name[2:]) for name in record if name.startswith(b"p:")}
            reasons = {int(name[2:]) for name in record if name.startswith(b"e:")}
            assert reasons == {sample for sample, rollout in rollouts.items() if rollout.reason}
            assert kept == {sample for sample, rollout in rollouts.items() if rollout.payload is not None}
            assert int(record[b"open"]) == sum(r.state not in TERMINAL for r in rollouts.values())


@pytest.mark.timeout(400)  # seconds; to make a failing history short may take five minutes
def test_random_histories_in_memory() -> None:
    run_state_machine_as_test(MemoryMachine)


@pytest.mark.guarantee("G1", "G2")
@pytest.mark.timeout(400)
def test_random_histories_on_redis(redis_server: str) -> None:
    with redis.Redis.from_url(redis_server) as server:
        machine: Any = lambda: RedisMachine(server, redis_server)  # noqa: E731 - typed as a class, called once
        run_state_machine_as_test(machine)


FEWER = settings(max_examples=30)
"""The ledgers inside have had theirs."""


class MemoryByReferenceMachine(LedgerMachine):
    def __init__(self) -> None:
        clear_memory_url()
        super().__init__(by_reference(MemoryLedger(), MEMORY_URL))

    def check_that_nothing_is_left(self) -> None:
        assert self.run(leftovers(self.ledger)) == []


class RedisByReferenceMachine(RedisMachine):
    def __init__(self, server: Any, url: str, folder: Path) -> None:
        super().__init__(server, url)
        self.ledger = by_reference(self.ledger, str(folder))

    def check_that_nothing_is_left(self) -> None:
        assert self.run(leftovers(self.ledger)) == []

    @invariant()
    def all_that_is_large_is_elsewhere(self) -> None:
        """G5: what Redis keeps of examples, trajectories and rows are references."""
        for key in self.server.keys("gq:group:*"):
            for name, value in self.server.hgetall(key).items():
                assert name != b"example" or KEY in Example.model_validate_json(value).row
                assert name[:2] != b"p:" or decode(value)
        for _, fields in self.server.xrange("gq:results:" + RUN):
            assert decode(fields[b"r"])


@pytest.mark.timeout(400)
def test_random_histories_in_memory_by_reference() -> None:
    run_state_machine_as_test(MemoryByReferenceMachine, settings=FEWER)


@pytest.mark.timeout(400)
def test_random_histories_on_redis_by_reference(redis_server: str, tmp_path: Path) -> None:
    with redis.Redis.from_url(redis_server) as server:
        machine: Any = lambda: RedisByReferenceMachine(server, redis_server, tmp_path)  # noqa: E731 - the same
        run_state_machine_as_test(machine, settings=FEWER)
