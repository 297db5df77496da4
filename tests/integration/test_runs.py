"""``gym-queue runs``, ``cancel``, ``workers`` and ``status`` on a real Redis."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from redis import Redis

from gym_queue import assembly
from gym_queue.coordinator.archive import Archive
from gym_queue.embedded.redis import RedisServer
from gym_queue.records import FailureClass, RunState, Stage
from tests.integration.scene import RUN, SAMPLES, Scene, answer, gym_queue, refusal, staged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def scene(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    async with staged(redis_url, tmp_path, monkeypatch) as scene:
        yield scene


async def a_run_at_work(scene: Scene) -> None:
    """One example succeeded and failed, one is generated, two are queued."""
    done, begun, *_ = await scene.accept(0, 1, 2, 3)
    one, two = (await scene.claim(done)).samples
    await scene.end(one.fence)
    await scene.end(two.fence, FailureClass.TIMEOUT)
    await scene.claim(begun)


# --- looking ----------------------------------------------------------------------------------------------


async def test_runs_are_listed_highest_priority_first(scene: Scene) -> None:
    assert await answer("runs") == "no runs\n"
    await a_run_at_work(scene)
    await scene.accept(0, run_id="urgent", priority=5, model="http://" + "very-long/" * 9)
    head, urgent, normal = (await answer("runs")).splitlines()
    assert head.split() == [
        *("RUN", "STATE", "ACCEPTED", "ENDED", "SUCCEEDED", "FAILED", "CANCELLED", "IN", "FLIGHT"),
        *("QUEUED", "MODEL", "OUTPUT"),
    ]
    assert urgent.split()[:2] == ["urgent", "open"]
    assert urgent.split()[-2].endswith("…")
    out = "far-away:/runs/out.jsonl"
    assert normal.split() == [RUN, "open", "8", "2", "1", "1", "0", "2", "4", "stub:", out]


async def test_runs_as_json(scene: Scene) -> None:
    await a_run_at_work(scene)
    [run] = map(json.loads, (await answer("runs", "--json")).splitlines())
    assert run["run_id"] == RUN
    assert (run["state"], run["accepted"], run["ended"], run["in_flight"], run["queued"]) == (
        "open",
        8,
        2,
        2,
        4,
    )
    assert run["spec"]["model"] == "stub:"


async def test_a_run_is_shown(scene: Scene) -> None:
    scene.local()
    await a_run_at_work(scene)
    shown = dict(line.split(maxsplit=1) for line in (await answer("runs", "show", RUN)).splitlines())
    assert shown["state"] == "open, no coordinator is at work"
    assert shown["work"] == "9 examples x 2 samples, priority 0"
    assert shown["output"] == str(scene.out)
    assert shown["accepted"] == "8 (the cursor is at example 4)"
    assert shown["ended"] == "2: 1 succeeded, 1 failed, 0 cancelled; 0 are archived"
    assert shown["open"] == "2 in flight, 4 queued"
    assert shown["healed"] == "0 retried, 0 lost, 0 refused, 0 republished, 0 dropped"
    with Archive(scene.out, SAMPLES).open():
        assert "open, a coordinator is at work\n" in await answer("runs", "show", scene.out)


async def test_a_run_is_shown_from_its_files_alone(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.local()
    scene.write_manifest(("in.jsonl", "-o", "out 1"), "/home/me")
    await a_run_at_work(scene)
    await scene.archive()
    monkeypatch.delenv("GYM_QUEUE_REDIS_URL")
    broken = (await answer("runs", "show", "out.jsonl")).splitlines()
    assert "state       broken off, no coordinator is at work" in broken
    assert "go on with  (in /home/me) submit-rollouts in.jsonl -o 'out 1' --resume" in broken
    assert "rows        1 succeeded, 1 failed or cancelled, of 18" in broken
    row = scene.out.read_bytes()
    scene.out.write_bytes(row * 17 + row[:9])  # all rows, and a torn one
    assert "state   ended\n" in await answer("runs", "show", "out.jsonl")


async def test_workers(scene: Scene) -> None:
    assert await answer("workers") == "no workers\n"
    await scene.beat("gpu-a", used=1)
    await scene.beat("cpu-b")
    await scene.ledger.heartbeat("odd-c", {})
    scene.silence("cpu-b", 90.0)
    lines = (await answer("workers")).splitlines()
    assert lines[0].split() == [
        "WORKER",
        "KIND",
        "NODE",
        "LAST",
        "HEARTBEAT",
        "SLOTS",
        "USED",
        "FREE",
        "STATE",
    ]
    assert {tuple(line.split()[:3] + line.split()[-4:]) for line in lines[1:]} == {
        ("gpu-a", "gpu", "node-1", "4", "1", "3", "healthy"),
        ("cpu-b", "cpu", "node-1", "4", "4", "0", "silent"),
        ("odd-c", "?", "?", "?", "?", "?", "healthy"),
    }
    told = {
        line["worker"]: line for line in map(json.loads, (await answer("workers", "--json")).splitlines())
    }
    assert told["gpu-a"]["slots"] == "4"
    assert [told[name]["silent"] for name in ("gpu-a", "cpu-b")] == [False, True]
    assert told["cpu-b"]["age"] > 89.0


async def test_status_is_one_screen(scene: Scene) -> None:
    await a_run_at_work(scene)
    scene.silence("gpu-a", 90.0)
    broker = assembly.make_broker(scene.settings)
    _, [ticket, _] = await scene.ledger.waiting(Stage.GENERATE, 0.0, 2)
    await broker.publish([ticket])
    await broker.close()
    said = await answer("status")
    assert said.startswith(f"Redis at {scene.url} answers\n1 run, 1 worker (1 silent)\n")
    assert f"\n{RUN}  open " in said
    assert "\ngpu-a " in said
    assert [line.split() for line in said.splitlines()[-2:]] == [["generate", "2", "1"], ["verify", "0", "0"]]


async def test_status_shows_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RedisServer(tmp_path / "redis") as server:
        with Redis.from_url(server.url) as client:
            client.config_set("requirepass", "sesame")
        monkeypatch.setenv("GYM_QUEUE_REDIS_URL", server.url.replace("unix://", "unix://:sesame@"))
        said = await answer("status")
    assert said.startswith("Redis at unix://:***@/")
    assert "sesame" not in said


async def test_the_runs_own_stack_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GYM_QUEUE_REDIS_URL", raising=False)
    with RedisServer(tmp_path / "out.run" / "redis") as server:
        async with Scene(server.url, tmp_path) as scene:
            scene.local()
            await a_run_at_work(scene)
            for command in ("runs", "workers", "status"):
                assert (RUN if command == "runs" else "gpu-a") in await answer(command, "-o", "out.jsonl")
    down = await refusal("status", "-o", "out.jsonl")
    assert down == "the stack of out.jsonl is down, and GYM_QUEUE_REDIS_URL names no other"
    assert "set GYM_QUEUE_REDIS_URL, or give the path of the run's output" in await refusal(
        "runs", "show", RUN
    )


# --- steering ---------------------------------------------------------------------------------------------


async def test_pause_and_resume(scene: Scene) -> None:
    async with Scene(scene.url, scene.out.parent) as other:
        await other.accept(0, run_id="other")
    await a_run_at_work(scene)
    assert await answer("runs", "pause", RUN) == "paused: 2 in flight go on, 4 queued wait\n"
    assert await scene.state() is RunState.PAUSED
    with Redis.from_url(scene.url) as client:
        client.delete("rollouts.default")  # workers pulled the tickets, were refused, and forgot them
    assert await answer("runs", "resume", RUN) == "resumed: 4 queued may start\n"
    assert await scene.state() is RunState.OPEN
    broker = assembly.make_broker(scene.settings)
    assert await broker.depth(Stage.GENERATE) == 2
    await broker.close()


async def test_resuming_a_run_that_nobody_coordinates_says_so(scene: Scene) -> None:
    scene.local()
    await scene.accept(0)
    await answer("runs", "pause", RUN)
    assert "; but no coordinator is at work on it: submit-rollouts … --resume" in await answer(
        "runs", "resume", RUN
    )


async def test_cancelling_a_run_is_final(scene: Scene) -> None:
    await a_run_at_work(scene)
    assert await answer("runs", "cancel", RUN) == "cancelled: 4 queued, 2 in flight\n"
    status = await scene.ledger.run(RUN)
    assert status is not None
    assert (status.state, status.cancelled, status.ended) == (RunState.CANCELLED, 6, 8)
    assert {len(await scene.ledger.revoked("gpu-a", 10)), len(await scene.ledger.revoked("gpu-a", 10))} == {
        2,
        0,
    }
    for word in ("pause", "resume"):
        assert await refusal("runs", word, RUN) == f"run {RUN} is cancelled, which is final"
    assert "ended: cancelled" in await answer("why", f"{RUN}.1.0")
    assert "(gym-queue runs cancel)" in await answer("why", f"{RUN}.1.0")
    assert await answer("runs", "cancel", RUN) == "cancelled: 0 queued, 0 in flight\n"


async def test_what_is_cancelled_was_queued_or_in_flight(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of what was queued a moment ago ended before it could be cancelled."""

    async def one(*_: object) -> int:
        return 1

    await a_run_at_work(scene)
    monkeypatch.setattr("gym_queue.cli.runs.cancel_run", one)
    assert await answer("runs", "cancel", RUN) == "cancelled: 1 queued, 0 in flight\n"


async def test_what_has_ended_is_not_cancelled(scene: Scene) -> None:
    await scene.accept(0)
    await scene.ledger.set_run_state(RUN, RunState.ENDED)
    assert await refusal("runs", "cancel", RUN) == f"run {RUN} has ended"


async def test_cancelling_a_rollout_is_final(scene: Scene) -> None:
    await a_run_at_work(scene)
    assert await answer("cancel", f"{RUN}.1.1") == "cancelled: it was generating\n"
    assert await answer("cancel", f"{RUN}.2.0") == "cancelled: it was queued\n"
    status = await scene.ledger.run(RUN)
    assert status is not None
    assert (status.state, status.cancelled) == (RunState.OPEN, 2)
    assert len(await scene.ledger.revoked("gpu-a", 10)) == 1
    again = await refusal("cancel", f"{RUN}.1.1")
    assert again.startswith(f"{RUN}.1.1 is not open: ended: cancelled ")
    assert "is not open: not accepted yet" in await refusal("cancel", f"{RUN}.8.0")


@pytest.mark.parametrize("words", [("runs", "cancel"), ("runs", "pause"), ("runs", "resume")])
async def test_a_run_that_stands_nowhere_is_not_steered(
    scene: Scene, words: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.local()
    assert "there is no run 'nobody'" in await refusal(*words, "nobody")
    assert f"knows run {RUN}: it has ended" in await refusal(*words, "out.jsonl")
    monkeypatch.setenv("GYM_QUEUE_REDIS_URL", "redis://127.0.0.1:1/0")
    assert "does not answer" in await refusal(*words, RUN)


async def test_a_command_that_is_misspelt() -> None:
    result = await gym_queue("run")
    assert result.exit_code == 2
    assert "Did you mean" in result.stderr
    assert "runs" in result.stderr
