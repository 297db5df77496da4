"""``gym-queue runs failures`` and ``runs retry``: the dead letters of a run, and another try."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from gym_queue.cli.main import main
from gym_queue.coordinator.archive import Archive
from gym_queue.records import FailureClass
from tests.integration.played_stack import FakeCoordinator, play, rows, submit
from tests.integration.scene import RUN, SAMPLES, Scene, answer, gym_queue, refusal, staged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from click.testing import Result

TIMEOUT, INFRASTRUCTURE = FailureClass.TIMEOUT, FailureClass.INFRASTRUCTURE


@pytest.fixture
async def scene(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    async with staged(redis_url, tmp_path, monkeypatch) as scene:
        yield scene


async def some_failures(scene: Scene) -> None:
    """Two timeouts in the file, one of them in the stream as well; two more failures there; one cancelled."""
    done, half, new, _ = await scene.accept(0, 1, 2, 3)
    one, two = (await scene.claim(done)).samples
    await scene.end(one.fence, TIMEOUT)
    await scene.end(two.fence)
    await scene.archive()
    one, two = (await scene.claim(half)).samples
    await scene.end(one.fence, TIMEOUT)
    events = await scene.ledger.events(RUN, "", 10, 0.0)
    with Archive(scene.out, SAMPLES).open(resume=True) as archive:
        archive.append(events)  # and dies before it acknowledges
    await scene.end(two.fence, INFRASTRUCTURE)
    for sample in (await scene.claim(new)).samples:
        await scene.end(sample.fence, INFRASTRUCTURE if sample.fence.sample_index else None)
    await answer("cancel", f"{RUN}.3.0")


def listed(text: str) -> list[list[str]]:
    return [line.split(maxsplit=4) for line in text.splitlines() if line.startswith(RUN)]


async def test_failures_of_file_and_stream_each_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.local()
    await some_failures(scene)
    said = await answer("runs", "failures", RUN)
    assert said.splitlines()[0].split() == ["ROLLOUT", "CLASS", "STAGE", "ATTEMPT", "ERROR"]
    assert listed(said) == [
        [f"{RUN}.0.0", "timeout", "generate", "3", "error 0"],
        [f"{RUN}.1.0", "timeout", "generate", "3", "error 1"],
        [f"{RUN}.1.1", "infrastructure", "generate", "3", "error 1"],
        [f"{RUN}.2.1", "infrastructure", "generate", "3", "error 2"],
    ]
    assert said.splitlines()[-1] == "4 failed (2 by timeout, 2 by infrastructure), 1 cancelled"
    assert await answer("runs", "failures", "out.jsonl") == said
    monkeypatch.setattr("gym_queue.cli.rows._BATCH", 1)
    assert await answer("runs", "failures", RUN) == said


async def test_failures_of_some_classes(scene: Scene) -> None:
    scene.local()
    await some_failures(scene)
    said = await answer("runs", "failures", RUN, "--class", "infrastructure, verifier")
    assert [row[0] for row in listed(said)] == [f"{RUN}.1.1", f"{RUN}.2.1"]
    assert said.splitlines()[-1] == "2 failed (2 by infrastructure)"
    cancelled = await answer("runs", "failures", RUN, "--class", "cancelled")
    assert listed(cancelled) == [[f"{RUN}.3.0", "cancelled", "-", "0", "gym-queue cancel"]]
    assert cancelled.splitlines()[-1] == "0 failed, 1 cancelled"
    assert await refusal("runs", "failures", RUN, "--class", "time-out") == (
        "there is no failure class 'time-out'; did you mean timeout?"
    )


async def test_no_more_failures_than_asked_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.local()
    await some_failures(scene)
    said = await answer("runs", "failures", RUN, "--limit", "3")
    assert len(listed(said)) == 3
    assert said.splitlines()[-2:] == [
        "… and 1 more (--limit)",
        "4 failed (2 by timeout, 2 by infrastructure), 1 cancelled",
    ]
    monkeypatch.setattr("gym_queue.cli.failures._SHOWN", 2)
    assert len(listed(await answer("runs", "failures", RUN))) == 2
    assert len((await answer("runs", "failures", RUN, "--json")).splitlines()) == 4


async def test_failures_as_json_are_the_rows(scene: Scene) -> None:
    scene.local()
    await some_failures(scene)
    found = [json.loads(line) for line in (await answer("runs", "failures", RUN, "--json")).splitlines()]
    assert [row["rollout_id"] for row in found] == [
        f"{RUN}.{place}" for place in ("0.0", "1.0", "1.1", "2.1")
    ]
    assert found[0] == rows(scene.out.with_name("out.failures.jsonl"))[0]


async def test_failures_whose_file_is_elsewhere(scene: Scene) -> None:
    await some_failures(scene)
    result = await gym_queue("runs", "failures", RUN)
    assert result.exit_code == 0
    assert result.stderr == (
        "gym-queue: what is archived already is in far-away:/runs/out.jsonl, which cannot be read from here\n"
    )
    assert f"{RUN}.0.0" not in result.stdout
    assert f"{RUN}.2.1" in result.stdout


async def test_no_failures(scene: Scene) -> None:
    scene.local()
    assert await answer("runs", "failures", "out.jsonl") == "0 failed\n"


async def test_what_is_being_written_is_not_tried_again(scene: Scene) -> None:
    scene.local()
    await some_failures(scene)
    with Archive(scene.out, SAMPLES).open(resume=True):
        for run in (RUN, "out.jsonl"):
            assert "is being written: a run is tried again when its coordinator is done" in (
                await refusal("runs", "retry", run, "--class", "timeout")
            )


async def test_what_cannot_be_tried_again(scene: Scene, tmp_path: Path) -> None:
    await scene.accept(0)
    elsewhere = await refusal("runs", "retry", RUN, "--class", "timeout")
    assert elsewhere == f"run {RUN} can be tried again only where its output is: far-away:/runs/out.jsonl"
    assert "there is no failure class 'infra'" in await refusal("runs", "retry", RUN, "--class", "infra")
    scene.local()
    await some_failures_in_file(scene)
    scene.write_manifest(("in.jsonl",), str(tmp_path / "gone"))
    assert "gone, which cannot be entered" in (
        (await gym_queue("runs", "retry", "out.jsonl", "--class", "timeout")).stderr
    )


async def some_failures_in_file(scene: Scene) -> None:
    one, _ = (await scene.claim((await scene.accept(1))[0])).samples
    await scene.end(one.fence, TIMEOUT)
    await scene.archive()


def retry(*classes: str) -> Result:
    return CliRunner().invoke(main, ["runs", "retry", "run/out.jsonl", "--class", ",".join(classes)])


def test_retry_is_the_runs_own_command_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    play(tmp_path / "run", monkeypatch)
    monkeypatch.setattr(FakeCoordinator, "failing", {1, 4})
    assert submit("--seed", "7").exit_code == 1
    failed = [row["rollout_id"] for row in rows(tmp_path / "run" / "out.failures.jsonl")]
    kept = rows(tmp_path / "run" / "out.jsonl")
    monkeypatch.setattr(FakeCoordinator, "failing", set())

    monkeypatch.chdir(tmp_path)  # not where it was submitted
    result = retry("timeout", "infrastructure")
    assert result.exit_code == 0
    assert (
        result.stdout
        == "nothing to do: run/out.failures.jsonl has no row of class timeout or infrastructure\n"
    )

    result = retry("verifier", "timeout")
    assert result.exit_code == 0, result.output
    again = "submit-rollouts in.jsonl --model stub: --samples 2 -o out.jsonl --seed 7"
    flags = "--resume --retry verifier,timeout"
    assert f"gym-queue: in {tmp_path / 'run'}: {again} {flags}\n" in result.stderr
    assert "6 rollouts: 6 succeeded, 0 failed" in result.stdout
    assert rows(tmp_path / "run" / "out.failures.jsonl") == []
    done = rows(tmp_path / "run" / "out.jsonl")
    assert len(done) == 6
    assert {row["rollout_id"] for row in done} >= set(failed)
    assert [row for row in done if row["rollout_id"] not in failed] == kept

    monkeypatch.setattr(FakeCoordinator, "failing", {0})
    monkeypatch.chdir(tmp_path)
    assert retry("verifier").stdout.startswith("nothing to do"), "the earlier --retry is not repeated"
