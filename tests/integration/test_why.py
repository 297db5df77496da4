"""``gym-queue why`` on a real Redis, in every kind of situation (G7). The sentences have unit tests."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from redis import Redis

from gym_queue.coordinator.archive import Archive
from gym_queue.embedded.redis import RedisServer
from gym_queue.ledger.base import Generated, Retry
from gym_queue.records import FailureClass, RunState
from tests.integration.scene import RUN, SAMPLES, Scene, answer, gym_queue, refusal, staged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def scene(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    async with staged(redis_url, tmp_path, monkeypatch) as scene:
        yield scene


# --- what waits -------------------------------------------------------------------------------------------


@pytest.mark.guarantee("G7")
async def test_g7_what_is_queued(scene: Scene) -> None:
    await scene.accept(0, 1)
    assert "no GPU worker is alive" in await answer("why", f"{RUN}.0.0")
    await scene.beat("gpu-a")
    assert "with a free slot, no ticket has waited longer; it is failed" in await answer("why", f"{RUN}.0.0")
    assert "with a free slot, 1 ticket is ahead" in await answer("why", f"{RUN}.1.1")


async def test_g7_what_is_tried_again(scene: Scene) -> None:
    (ticket,) = await scene.accept(0)
    one, two = (await scene.claim(ticket)).samples
    await scene.ledger.commit(one.fence, Retry(delay=30.0, reason="connection refused"))
    await scene.ledger.commit(two.fence, Retry(reason="worker gpu-a died", lost=True))
    assert await answer("why", f"{RUN}.0.0") == (
        "waits _ more before attempt 2 (attempt 1 ended: connection refused)\n"
    )
    assert (await answer("why", f"{RUN}.0.1")).endswith("; attempt 1 ended: worker gpu-a died\n")


async def test_g7_what_waits_for_its_verdict(scene: Scene) -> None:
    (ticket,) = await scene.accept(0)
    one, two = (await scene.claim(ticket)).samples
    verify = (await scene.ledger.commit(one.fence, Generated(payload=b"{}"))).ticket
    assert verify is not None
    assert "verify_queued for _ (attempt 1): no CPU worker is alive" in await answer("why", f"{RUN}.0.0")
    await scene.claim(verify, "cpu-b")
    assert "verifying for _ (attempt 1) on cpu-b, whose last heartbeat was _ ago; deadline in _, then" in (
        await answer("why", f"{RUN}.0.0")
    )
    assert "generating for" in await answer("why", f"{RUN}.0.{two.fence.sample_index}")


async def test_g7_a_paused_run(scene: Scene) -> None:
    await scene.accept(0)
    await scene.ledger.set_run_state(RUN, RunState.PAUSED)
    assert "nothing new starts until gym-queue runs resume" in await answer("why", f"{RUN}.0.0")


# --- what a worker has ------------------------------------------------------------------------------------


@pytest.mark.guarantee("G7")
async def test_g7_what_is_generated(scene: Scene) -> None:
    (ticket,) = await scene.accept(0)
    await scene.claim(ticket)
    assert await answer("why", f"{RUN}.0.0") == (
        "generating for _ (attempt 1) on gpu-a, whose last heartbeat was _ ago; "
        "deadline in _, then it is failed as timeout\n"
    )


async def test_g7_a_silent_worker(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    (ticket,) = await scene.accept(0)
    await scene.claim(ticket)
    scene.silence("gpu-a", 45.0)
    assert "whose last heartbeat was _ ago" in await answer("why", f"{RUN}.0.0")
    monkeypatch.setenv("WORKER_HEARTBEAT_INTERVAL", "10")
    monkeypatch.setenv("WORKER_TIMEOUT", "60")
    assert "which has been silent for _; it is given up at 1 min and" in await answer("why", f"{RUN}.0.0")
    scene.silence("gpu-a", 20.0)
    assert "silent for _: the next sweep gives it up" in await answer("why", f"{RUN}.0.0")


# --- what is not accepted, or has ended -------------------------------------------------------------------


async def test_g7_what_is_not_accepted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    await scene.accept(0)
    said = "cursor is at example 1, and 2 of its rollouts are accepted and not yet archived, in a window of"
    assert f"{said} 1,536 for all runs" in await answer("why", f"{RUN}.5.0")
    monkeypatch.setenv("GYM_QUEUE_WINDOW", "16")
    assert f"{said} 16 for all runs" in await answer("why", f"{RUN}.5.0")


async def test_g7_who_coordinates_is_seen_on_its_machine(scene: Scene) -> None:
    scene.local()
    await scene.accept(0)
    assert "cursor is at example 1 of 9, and no coordinator is at work" in await answer("why", f"{RUN}.5.0")
    with Archive(scene.out, SAMPLES).open():
        assert "cursor is at example 1 of 9, and 2 of its rollouts" in await answer("why", f"{RUN}.5.0")


async def test_g7_what_has_ended(scene: Scene) -> None:
    scene.local()
    (ticket,) = await scene.accept(0)
    one, two = (await scene.claim(ticket)).samples
    await scene.end(two.fence)
    succeeded = "ended: succeeded 42 s after it was accepted (attempt 1, reward 0.5); its row"
    failed = "ended: failed 42 s after it was accepted (attempt 3, timeout at generate: error 0); its row"
    assert await answer("why", f"{RUN}.0.1") == f"{succeeded} waits to be written to the output\n"
    await scene.end(one.fence, FailureClass.TIMEOUT)
    assert await answer("why", f"{RUN}.0.0") == f"{failed} waits to be written to the output\n"
    await scene.archive()
    assert await answer("why", f"{RUN}.0.1") == f"{succeeded} is in {scene.out}\n"
    failures = scene.out.with_name("out.failures.jsonl")
    assert await answer("why", f"{RUN}.0.0") == f"{failed} is in {failures}\n"


async def test_g7_what_has_ended_and_is_archived_elsewhere(scene: Scene) -> None:
    (ticket,) = await scene.accept(0)
    for sample in (await scene.claim(ticket)).samples:
        await scene.end(sample.fence)
    await scene.archive()  # not where the run says
    assert await answer("why", f"{RUN}.0.0") == (
        "ended, and archived: its row is in far-away:/runs/out.jsonl, which cannot be read from here\n"
    )


async def test_output_of_another_machine_or_run_is_not_taken_for_ours(scene: Scene) -> None:
    elsewhere = await scene.accept(0, output=f"far-away:{scene.out}")
    scene.write_manifest()
    await scene.end((await scene.claim(elsewhere[0])).samples[0].fence)
    await scene.archive()
    assert "it has ended, and its row is on its way to the output" in await answer("why", f"{RUN}.0.0")
    scene.local()
    await scene.accept(0, run_id="run-2")
    assert "queued for _" in await answer("why", "run-2.0.0")
    assert "cursor is at example 1, and" in await answer("why", "run-2.5.0"), "the length is another run's"


# --- the run's own stack, and files alone -----------------------------------------------------------------


@pytest.mark.parametrize("folder", ["short", "long" * 25])
async def test_the_redis_of_the_runs_own_stack_is_asked(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GYM_QUEUE_REDIS_URL", raising=False)
    home = tmp_path / folder
    home.mkdir()
    monkeypatch.chdir(home)
    with RedisServer(home / "out.run" / "redis") as server:
        async with Scene(server.url, home) as scene:
            scene.local()
            (ticket,) = await scene.accept(0)
            await scene.claim(ticket)
            for path in ("out.jsonl", scene.out):
                assert "generating for _" in await answer("why", f"{RUN}.0.0", "--output", path)
            await scene.end((await scene.ledger.owned("gpu-a", None, 9))[0].fence)
            await scene.archive()
    assert await answer("why", f"{RUN}.0.1", "--output", "out.jsonl") == (
        "it has not ended, and nobody works on it: the run broke off; submit-rollouts … --resume goes on\n"
    )
    assert "its row is in out.jsonl" in await answer("why", f"{RUN}.0.0", "--output", "out.jsonl")
    with Archive(scene.out, SAMPLES).open(resume=True):
        assert await answer("why", f"{RUN}.0.1", "--output", "out.jsonl") == (
            "it has not ended; the run's coordinator is at work, but the run stands in no Redis that "
            "answers\n"
        )


async def test_files_answer_while_redis_is_away(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.local()
    (ticket,) = await scene.accept(0)
    await scene.end((await scene.claim(ticket)).samples[0].fence)
    await scene.archive()
    monkeypatch.setenv("GYM_QUEUE_REDIS_URL", "redis://127.0.0.1:1/0")
    result = await gym_queue("why", f"{RUN}.0.0", "--output", scene.out)
    assert result.exit_code == 0
    assert "does not answer" in result.stderr
    assert result.stderr.endswith("; what follows is from the files alone\n")
    assert f"its row is in {scene.out}" in result.stdout


# --- what cannot be answered ------------------------------------------------------------------------------


async def test_bad_questions(scene: Scene, tmp_path: Path) -> None:
    scene.local()
    await scene.accept(0)
    assert "'run-1.5' is no rollout id: RUN.EXAMPLE.SAMPLE" in await refusal("why", f"{RUN}.5")
    assert "there is no run 'run-2'; did you mean run-1?; one that has ended is found by" in (
        await refusal("why", "run-2.0.0")
    )
    assert await refusal("why", f"{RUN}.0.2") == "run run-1 has no sample 2: it has 0 to 1"
    assert await refusal("why", f"{RUN}.9.0") == "run run-1 has no example 9: it has 0 to 8"
    assert f"belongs to run {RUN}, not to run-2" in await refusal("why", "run-2.0.0", "-o", scene.out)
    (tmp_path / "other.jsonl").touch()
    assert await refusal("why", f"{RUN}.0.0", "-o", "other.jsonl") == (
        "other.jsonl is no output of submit-rollouts: there is no other.run/manifest.json"
    )


async def test_files_that_are_no_rows(scene: Scene) -> None:
    scene.local()
    await scene.accept(1)
    scene.out.write_text('{"rollout_id":"run-1.0.0", but then\n')
    assert "out.jsonl holds a line that is no rollout's row: {" in await refusal("why", f"{RUN}.0.0")


async def test_a_redis_that_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GYM_QUEUE_REDIS_URL", "redis://127.0.0.1:1/0")
    away = await refusal("why", f"{RUN}.0.0")
    assert away.startswith("the Redis at redis://127.0.0.1:1/0 does not answer")
    with RedisServer(tmp_path / "redis") as server:
        with Redis.from_url(server.url) as client:
            client.config_set("requirepass", "open sesame")
        monkeypatch.setenv("GYM_QUEUE_REDIS_URL", server.url)
        assert "needs a password: set GYM_QUEUE_REDIS_URL to" in await refusal("why", f"{RUN}.0.0")
    shutil.rmtree(tmp_path / "redis")
    monkeypatch.setenv("WORKER_TIMEOUT", "soon")
    assert "the setting WORKER_TIMEOUT cannot be used" in await refusal("why", f"{RUN}.0.0")
