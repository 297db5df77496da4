"""What every ledger must do with the weights that trainers announce."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gym_queue.ledger.base import Generated
from gym_queue.records import Example, Group, RunSpec, Weights

if TYPE_CHECKING:
    from gym_queue.ledger.base import Claim, Ledger
    from gym_queue.records import Ticket

MODEL = "hf:models/tiny"


def weights(version: int, uri: str = "", model: str = MODEL) -> Weights:
    return Weights(model=model, version=version, uri=uri)


async def accepted(
    ledger: Ledger, run_id: str = "run-1", model: str = MODEL, groups: int = 1
) -> list[Ticket]:
    await ledger.open_run(RunSpec(run_id=run_id, model=model, samples=1), run_id)
    example = Example(id="e", environment="rows", row={})
    some = [Group(example_index=index, samples=(0,), example=example) for index in range(groups)]
    return await ledger.accept(run_id, 0, groups, some)


async def claim(ledger: Ledger, ticket: Ticket | None) -> Claim:
    assert ticket is not None
    claimed = await ledger.claim(ticket, "worker", 60.0)
    assert claimed is not None
    return claimed


async def test_only_newer_weights_become_the_newest(ledger: Ledger) -> None:
    assert await ledger.weights(MODEL) is None
    assert await ledger.announce(weights(3, "file:///weights/a b"))
    for late in (weights(2, "older"), weights(3, "the same again"), weights(0)):
        assert not await ledger.announce(late)
    assert await ledger.weights(MODEL) == weights(3, "file:///weights/a b")
    assert await ledger.announce(weights(10))
    assert await ledger.weights(MODEL) == weights(10)
    assert await ledger.weights("hf:models/other") is None


async def test_versions_may_be_times_in_nanoseconds(ledger: Ledger) -> None:
    at = 1_785_000_000_000_000_001
    assert await ledger.announce(weights(at))
    assert not await ledger.announce(weights(at - 1))
    assert not await ledger.announce(weights(999_999_999_999_999_999))
    assert await ledger.announce(weights(at + 1))
    assert await ledger.weights(MODEL) == weights(at + 1)


async def test_of_many_at_once_one_announces_a_version(ledger: Ledger) -> None:
    uris = [f"from {trainer}" for trainer in range(8)]
    answers = await asyncio.gather(*(ledger.announce(weights(1, uri)) for uri in uris))
    assert answers.count(True) == 1
    assert await ledger.weights(MODEL) == weights(1, uris[answers.index(True)])


async def test_a_claim_names_the_newest_weights_of_its_runs_model(ledger: Ledger) -> None:
    first, second, third = await accepted(ledger, groups=3)
    (other,) = await accepted(ledger, "run-2", "hf:models/other")
    assert (await claim(ledger, first)).weights is None
    await ledger.announce(weights(1, "one"))
    assert (await claim(ledger, second)).weights == weights(1, "one")
    await ledger.announce(weights(2))
    assert (await claim(ledger, third)).weights == weights(2)
    assert (await claim(ledger, other)).weights is None


async def test_what_is_only_verified_needs_no_weights(ledger: Ledger) -> None:
    await ledger.announce(weights(1))
    (ticket,) = await accepted(ledger)
    (sample,) = (await claim(ledger, ticket)).samples
    receipt = await ledger.commit(sample.fence, Generated(payload=b"trajectory"))
    assert (await claim(ledger, receipt.ticket)).weights is None


@pytest.mark.parametrize("model", ["stub:?text=%20", "http://host:1/v1#ein Modell", "hf:größe"])
async def test_any_model_and_uri(ledger: Ledger, model: str) -> None:
    announced = weights(0, "s3://bucket/ü?a=1 2|3", model)
    (ticket,) = await accepted(ledger, model=model)
    await ledger.announce(announced)
    assert (await claim(ledger, ticket)).weights == announced == await ledger.weights(model)


async def test_weights_outlive_the_run(ledger: Ledger) -> None:
    await accepted(ledger)
    await ledger.announce(weights(4))
    await ledger.forget_run("run-1")
    assert not await ledger.announce(weights(4))
    assert await ledger.weights(MODEL) == weights(4)
