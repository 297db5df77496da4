"""What real workers show of themselves: numbers on their ports while they are busy, and the life of a rollout
in their logs.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
import socket
import textwrap
import urllib.error
import urllib.request
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import redis

from gym_queue.embedded.redis import RedisServer
from gym_queue.maintenance.survey import FleetMetrics
from gym_queue.telemetry.tracing import trace_id_of
from gym_queue.testing import async_wait_until
from tests.integration.collector import Collector
from tests.integration.fleet import IMPATIENT, Fleet
from tests.unit.prometheus import samples

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(90)

ATTEMPTS = "gym_queue_worker_attempts_total{{outcome={},stage={}}}"
COUNT = "gym_queue_worker_stage_seconds_count{{stage={}}}"


def free_port() -> int:
    """Return a port with some free ones behind it, most likely."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        number: int = probe.getsockname()[1]
    return min(number, 65_000)


async def get(url: str) -> tuple[int, bytes]:
    def ask() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    return await asyncio.to_thread(ask)


async def numbers(url: str) -> dict[str, float]:
    status, text = await get(f"{url}/metrics")
    assert status == 200
    return samples(text)


async def ports(fleet: Fleet) -> dict[str, str]:
    """Return where the workers serve, by kind, as their leases say."""
    return {lease.info["kind"]: lease.info["metrics"] for lease in await fleet.ledger.leases()}


async def test_workers_show_what_they_do_while_they_are_saturated(redis_url: str, tmp_path: Path) -> None:
    variables = IMPATIENT | {
        "WORKER_TIMEOUT": 60,
        "GYM_QUEUE_METRICS_PORT": free_port(),
        "GYM_QUEUE_CONCURRENCY": 4,
    }
    async with Fleet(redis_url, tmp_path, **variables) as fleet:
        metrics = FleetMetrics(fleet.ledger, fleet.broker)
        await fleet.start("gpu", "cpu")
        urls = await ports(fleet)
        assert len(set(urls.values())) == 2  # one machine, one setting, a port for each
        inline = await fleet.submit([{"wait": True}] * 9, samples=1, run_id="inline")
        await fleet.in_flight("gpu", 4)
        assert (await get(f"{urls['gpu']}/ready"))[0] == 200
        gpu = await numbers(urls["gpu"])
        assert gpu["gym_queue_worker_slots{state=used}"] == 4
        assert gpu["gym_queue_worker_slots{state=free}"] == 0
        assert gpu["gym_queue_ready{role=gpu}"] == 1
        assert gpu[COUNT.format("generate")] == 0

        async def saturated() -> bool:
            shown = samples(await metrics.render())
            return shown["gym_queue_slots{kind=gpu,state=used}"] == 4

        await async_wait_until(saturated, what="a heartbeat that says so")
        shown = samples(await metrics.render())
        assert shown["gym_queue_rollouts{state=queued}"] == 5
        assert shown["gym_queue_rollouts{state=in_flight}"] == 4
        assert shown["gym_queue_workers{kind=gpu}"] == shown["gym_queue_workers{kind=cpu}"] == 1

        blocked = await fleet.submit([{"block": True}], run_id="blocked")
        fleet.gate.touch()
        await fleet.collect(inline)
        await fleet.collect(blocked)
        queued = await fleet.submit([{"queued": True}] * 7, samples=2, run_id="queued")
        await fleet.collect(queued)

        async def counted() -> bool:
            shown = await numbers(urls["cpu"])
            return shown[ATTEMPTS.format("succeeded", "verify")] == 14

        await async_wait_until(counted, what="the verifiers' children to have counted")
        gpu, cpu = await numbers(urls["gpu"]), await numbers(urls["cpu"])
        assert gpu[ATTEMPTS.format("succeeded", "generate")] == 10
        assert gpu[ATTEMPTS.format("generated", "generate")] == 14
        assert [gpu[COUNT.format(stage)] for stage in ("queued", "generate", "verify", "total")] == [
            *(24, 24, 10, 10)
        ]
        assert [cpu[COUNT.format(stage)] for stage in ("queued", "generate")] == [0, 0]
        assert [cpu[COUNT.format(stage)] for stage in ("verify_queued", "verify", "total")] == [14] * 3
        usage = [row.usage for run in (inline, blocked, queued) for row in run.rows()]
        assert gpu["gym_queue_worker_tokens_total{kind=prompt}"] == sum(one.prompt_tokens for one in usage)
        for run in (inline, blocked, queued):
            await fleet.ledger.forget_run(run.spec.run_id)
        shown = samples(await FleetMetrics(fleet.ledger, fleet.broker).render())
        assert shown["gym_queue_rollouts_ended_total{state=succeeded}"] == 24
        assert shown["gym_queue_tokens_total{kind=prompt}"] == sum(one.prompt_tokens for one in usage)
        assert shown["gym_queue_rollouts{state=queued}"] == shown["gym_queue_rollouts{state=in_flight}"] == 0


async def test_the_round_trip_to_a_worker_grows_while_it_does_not_answer(
    redis_url: str, tmp_path: Path
) -> None:
    variables = IMPATIENT | {"WORKER_TIMEOUT": 60, "GYM_QUEUE_CONCURRENCY": 2}
    async with Fleet(redis_url, tmp_path, **variables) as fleet:
        await fleet.start("gpu", "cpu", "beat")
        run = await fleet.submit([{"wait": True}] * 8)  # saturated all the while
        await fleet.in_flight("gpu", 2)
        worker = await fleet.worker("gpu")
        sample = f"gym_queue_worker_round_trip_seconds{{kind=gpu,worker={worker}}}"

        async def shown() -> float:
            numbers = samples(await FleetMetrics(fleet.ledger, fleet.broker).render())
            return numbers.get(sample, math.nan)

        async def answered() -> bool:
            return await shown() < 1.9

        async def overdue() -> bool:
            return await shown() > 2.0  # its caretaker looks once a second

        await async_wait_until(answered, 30, what="a probe to be answered")
        fleet.signal("gpu", signal.SIGSTOP)
        await async_wait_until(overdue, 30, what="a probe to stay unanswered")
        fleet.signal("gpu", signal.SIGCONT)
        await async_wait_until(answered, 30, what="the next probe to be answered")
        fleet.gate.touch()
        await fleet.collect(run)


async def test_a_worker_whose_event_loop_is_blocked_answers(redis_url: str, tmp_path: Path) -> None:
    variables = {"GYM_QUEUE_METRICS_PORT": free_port(), "GYM_QUEUE_CONCURRENCY": 2}
    async with Fleet(redis_url, tmp_path, **variables) as fleet:
        await fleet.start("gpu")
        url = (await ports(fleet))["gpu"]
        run = await fleet.submit([{"block": True}] * 4)
        await async_wait_until(fleet.blocked.exists, 30, what="a rollout that blocks the event loop")
        for page in ("health", "ready", "metrics"):
            assert (await get(f"{url}/{page}"))[0] == 200
        assert (await numbers(url))["gym_queue_worker_slots{state=used}"] == 2
        fleet.gate.touch()
        await fleet.collect(run)


async def test_ready_follows_the_broker_and_beat_has_a_port_too(tmp_path: Path) -> None:
    first = free_port()
    with RedisServer(tmp_path / "redis") as server:
        variables = IMPATIENT | {"GYM_QUEUE_METRICS_PORT": first}
        async with Fleet(server.url, tmp_path, **variables) as fleet:
            await fleet.start("gpu")
            gpu = (await ports(fleet))["gpu"]
            fleet.launch("beat", "beat", "beat")
            await async_wait_until(lambda: fleet.log("beat", containing="/health, /ready"), 30, what="beat")
            beat = fleet.log("beat", containing="/health, /ready")[0].split(" on ")[-1]

            async def ready(url: str, status: int) -> bool:
                return (await get(f"{url}/ready"))[0] == status

            for url in (gpu, beat):
                await async_wait_until(partial(ready, url, 200), 30, what=f"{url} to be ready")
            assert (await numbers(beat))["gym_queue_beat_sweeps_total{outcome=sent}"] >= 1
            assert server.process is not None
            server.process.kill()
            server.process.wait()
            for url in (gpu, beat):
                await async_wait_until(partial(ready, url, 503), 30, what=f"{url} to notice")
                because = json.loads((await get(f"{url}/ready"))[1])["because"]
                assert any("broker" in sentence for sentence in because)
                assert (await get(f"{url}/health"))[0] == 200


TALKER = "python:talker:Talker"
TALKER_SOURCE = textwrap.dedent(
    '''
    """An environment that talks, to its own logger, with all that it should not say."""

    import logging
    import os

    from gym_queue.environments.base import Environment, Observation
    from gym_queue.records import Verdict

    log = logging.getLogger("talker")


    class Talker(Environment):
        def inline(self, example):
            return False

        def reset(self, example, session):
            log.warning("resetting %s with %s", example.id, os.environ["GYM_QUEUE_REDIS_URL"])
            return Observation(messages=({"role": "user", "content": "hello"},))

        def verify(self, example, trajectory):
            log.warning("verifying %s with %s", example.id, os.environ["GYM_QUEUE_AUTH_TOKEN"])
            if example.row.get("fails"):
                raise ValueError(os.environ["GYM_QUEUE_AUTH_TOKEN"])
            return Verdict(reward=1.0)
    '''
)
PASSWORD, TOKEN = "correct-horse-9", "battery-staple-7"


async def test_the_life_of_a_rollout_can_be_followed_and_no_log_tells_a_secret(tmp_path: Path) -> None:
    (tmp_path / "talker.py").write_text(TALKER_SOURCE)
    with RedisServer(tmp_path / "redis") as server, redis.Redis.from_url(server.url) as client:
        client.config_set("requirepass", PASSWORD)
        url = server.url.replace("://", f"://:{PASSWORD}@")
        variables = IMPATIENT | {
            "WORKER_TIMEOUT": 60,
            "LOG_LEVEL": "DEBUG",
            "GYM_QUEUE_LOG_FORMAT": "json",
            "GYM_QUEUE_AUTH_TOKEN": TOKEN,
            "GYM_QUEUE_METRICS_PORT": free_port(),
        }
        async with Fleet(url, tmp_path, **variables) as fleet:
            await fleet.start("gpu", "cpu", "beat")
            run = await fleet.submit([{}, {"fails": True}], environment=TALKER)
            await fleet.collect(run)
            logs = {
                name: [json.loads(line) for line in fleet.text(name).splitlines() if line.startswith("{")]
                for name in ("gpu", "cpu")
            }
            texts = {name: fleet.text(name) for name in fleet.processes}
    life = [
        (line["role"], line["stage"], line["message"])
        for line in sorted((line for log in logs.values() for line in log), key=lambda line: line["ts"])
        if line.get("rollout_id") == "run.0.0"
    ]
    assert life == [
        ("gpu", "generate", "claimed"),
        ("gpu", "generate", f"resetting 0 with {url.replace(PASSWORD, '***')}"),
        ("gpu", "generate", "generated: 1 turns, stop"),
        ("gpu", "generate", "committed: generated"),
        ("cpu", "verify", "claimed"),
        ("cpu", "verify", "verifying 0 with ***"),
        ("cpu", "verify", "committed: succeeded"),
    ]
    said: list[dict[str, Any]] = [line for line in logs["cpu"] if line.get("rollout_id") == "run.1.0"]
    assert "failed as verifier: verifier raised ValueError: ***" in {line["message"] for line in said}
    assert {(line["run_id"], line["attempt"], line["worker"]) for line in said} == {
        ("run", 1, said[0]["worker"])
    }
    for name, text in texts.items():
        assert text, f"{name} said nothing"
        for secret in (PASSWORD, TOKEN):
            assert secret not in text, f"{name} tells a secret"


async def test_spans_of_both_workers_meet_in_one_trace_at_a_collector(redis_url: str, tmp_path: Path) -> None:
    with Collector() as collector:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": 100}
        async with Fleet(redis_url, tmp_path, **variables) as fleet:
            await fleet.start("gpu", "cpu")
            await fleet.collect(await fleet.submit([{"queued": True}] * 3))

            def ended() -> bool:
                return sum(name == "rollout" for _, _, name in list(collector.spans)) == 3

            await async_wait_until(ended, 30, what="the spans of three rollouts")
    for index in range(3):
        trace = f"{trace_id_of(f'run.{index}.0'):032x}"
        found = {(role, name) for role, trace_id, name in collector.spans if trace_id == trace}
        assert {("gpu", "queued"), ("gpu", "generate"), ("cpu", "verify"), ("cpu", "rollout")} <= found
