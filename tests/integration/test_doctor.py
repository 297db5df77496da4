"""``gym-queue doctor`` against a real Redis, real workers and a real beat."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import redis
from click.testing import CliRunner

from gym_queue import names
from gym_queue.cli.main import main
from gym_queue.embedded.preflight import last_beat
from gym_queue.testing import async_wait_until
from tests.integration.fleet import Fleet

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def doctor(url: str, *arguments: str) -> tuple[int, str]:
    said = CliRunner().invoke(main, ["doctor", *arguments], env={"GYM_QUEUE_REDIS_URL": url})
    return said.exit_code, said.output


def test_a_redis_without_a_fleet(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = doctor(redis_url)
    assert status == 0, said
    assert f"ok    redis: {redis_url} answers, version " in said
    assert "ok    clock: " in said
    assert "warn  beat: nobody sends sweeps, which find dead workers: celery -A beat beat" in said
    assert "warn  workers: 0 gpu workers healthy, 1 expected: start celery -A workers.gpu worker" in said
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("appendonly", "no")
        try:
            assert "warn  redis: it keeps no append-only file" in doctor(redis_url)[1]
        finally:
            client.config_set("appendonly", "yes")


def test_a_redis_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"unix://{tmp_path}/nobody.sock?db=0"
    for arguments in ((), ("--quick",), ("--quick", "--role", "gpu"), ("--quick", "--role", "beat")):
        status, said = doctor(url, *arguments)
        assert status == 1, said
        assert "fail  " in said
        assert "Traceback" not in said


def test_how_long_ago_beat_was_heard(redis_url: str) -> None:
    assert doctor(redis_url, "--quick", "--role", "beat")[0] == 1
    with redis.Redis.from_url(redis_url) as client:
        client.set(names.beat_key(), "far", px=(names.BEAT_REMEMBERED - 20) * 1000)
        status, said = doctor(redis_url, "--quick", "--role", "beat")
        assert (status, said) == (0, "ok    beat: far sent the last sweep 20 s ago\n")
        client.set(names.beat_key(), "far", px=(names.BEAT_REMEMBERED - 60) * 1000)
        status, said = doctor(redis_url, "--quick", "--role", "beat")
        assert status == 1
        assert "one is due every 15 s: start celery -A beat beat again" in said


async def test_real_parts_are_well(redis_url: str, tmp_path: Path) -> None:
    async with Fleet(redis_url, tmp_path) as fleet:
        for name, command in (("gpu", "worker"), ("cpu", "worker")):
            fleet.launch(name, f"workers.{name}", command, "-n", f"{name}@%h")
        fleet.launch("beat", "beat", "beat")
        await async_wait_until(lambda: last_beat(redis_url), 60, what="a word from beat")
        for role in ("gpu", "cpu", "beat", "redis"):

            async def is_well(role: str = role) -> bool:
                return (await asyncio.to_thread(doctor, redis_url, "--quick", "--role", role))[0] == 0

            await async_wait_until(is_well, 60, what=f"a healthy {role}")
        status, said = await asyncio.to_thread(doctor, redis_url, "--role", "gpu")
        assert status == 0
        assert "warn" not in said, said


def test_a_health_check_costs_little(redis_url: str) -> None:
    before = os.times()
    command = [sys.executable, "-m", "gym_queue.cli.main", "doctor", "--quick", "--role", "redis"]
    variables = os.environ | {"GYM_QUEUE_REDIS_URL": redis_url}
    subprocess.run(command, env=variables, check=True, capture_output=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 2.0, "CPU seconds; half of one is usual"
