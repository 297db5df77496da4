"""``submit-rollouts --head``: a played head does the work, the command writes the files.

Flags, input, output, manifest, metrics, signals and the client are real.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from gym_queue.cli import execution, following
from gym_queue.cli.submit import main
from gym_queue.coordinator import manifest
from gym_queue.errors import DiskFullError
from gym_queue.testing import wait_until
from tests.unit.client.fake_head import TOKEN, FakeHead, playing_beside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROWS = [{"prompt": f"{number} + 1?", "answer": str(number + 1), "colour": "red"} for number in range(3)]


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHead]:
    """A played head, whose command stands in a folder with the input."""
    monkeypatch.chdir(tmp_path)
    for name in ("GYM_QUEUE_REDIS_URL", "HEAD_SERVER_URL", "LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GYM_QUEUE_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(execution, "configure", lambda *_, **__: None)
    monkeypatch.setattr(following, "PATIENCE", 0.5)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with playing_beside() as played:
        yield played


def submit(head: FakeHead, *arguments: str) -> Result:
    given = ["in.jsonl", "--model", "stub:", "--samples", "2", "-o", "out.jsonl", "--head", head.url]
    return CliRunner().invoke(main, [*given, *arguments])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_succeeds(head: FakeHead, tmp_path: Path) -> None:
    result = submit(head, "--temperature", "0.5", "--priority", "3")
    assert result.exit_code == 0, result.output
    assert f"submit-rollouts: run run-0 is done by the fleet of the head at {head.url}\n" in result.stderr
    assert result.stdout.startswith("6 rollouts: 6 succeeded, 0 failed\nmean reward 0.5000 ± ")
    assert result.stdout.endswith("rollouts: out.jsonl\nmetrics:  out.metrics.json\n")
    assert [(row["example_index"], row["sample_index"]) for row in rows(tmp_path / "out.jsonl")] == [
        (example, sample) for example in range(3) for sample in range(2)
    ]
    metrics = json.loads((tmp_path / "out.metrics.json").read_text())
    assert (metrics["run_id"], metrics["complete"], metrics["reward"]["mean"]) == ("run-0", True, 0.5)
    run = head.runs["run-0"]
    assert (run.request.sampling.temperature, run.request.priority, run.request.limits) == (0.5, 3, {})
    assert run.examples == [{"id": f"row-{n}", "environment": "rows", **row} for n, row in enumerate(ROWS, 1)]
    kept = manifest.read(tmp_path / "out.run")
    assert kept is not None
    assert (kept.spec.run_id, kept.head, head.keys) == ("run-0", head.url, {kept.key: "run-0"})


def test_rows_are_those_of_the_head_byte_by_byte(head: FakeHead, tmp_path: Path) -> None:
    assert submit(head).exit_code == 0
    sent = [line.split(b'"rollout": ', 1)[1].removesuffix(b"}") for line in head.runs["run-0"].rollouts]
    assert (tmp_path / "out.jsonl").read_bytes().splitlines() == sent


def test_the_head_is_a_setting(head: FakeHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["in.jsonl", "--model", "stub:", "-o", "out.jsonl"]
    monkeypatch.setenv("GYM_QUEUE_MAX_TURNS", "4")
    (tmp_path / "gym_queue.toml").write_text(f'head_server_url = "{head.url}"\n')
    assert CliRunner().invoke(main, given).exit_code == 0
    assert head.runs["run-0"].request.limits == {"max_turns": 4}
    (tmp_path / "gym_queue.toml").unlink()
    monkeypatch.setenv("HEAD_SERVER_URL", head.url)
    assert CliRunner().invoke(main, [*given[:-1], "other.jsonl"]).exit_code == 0
    assert len(head.runs) == 2


def test_some_failed(head: FakeHead, tmp_path: Path) -> None:
    failing = [*ROWS, {"prompt": "?", "fails": True}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in failing))
    result = submit(head)
    assert result.exit_code == 1
    assert "8 rollouts: 6 succeeded, 2 failed" in result.stdout
    assert "2 failed by verifier, such as: no idea" in result.stdout
    assert len(rows(tmp_path / "out.failures.jsonl")) == 2


def test_environments_bring_their_examples_at_the_head(head: FakeHead, tmp_path: Path) -> None:
    given = ["--environment", "python:only_there:Env", "--size", "4", "--seed", "9", "--model", "stub:"]
    result = CliRunner().invoke(main, [*given, "-o", str(tmp_path / "own.jsonl"), "--head", head.url])
    assert result.exit_code == 0, result.output
    [part] = head.runs["run-0"].request.environments
    assert (part.name, part.size, part.seed) == ("python:only_there:Env", 4, 9)
    assert len(rows(tmp_path / "own.jsonl")) == 4


def test_an_environment_that_only_the_head_has(head: FakeHead) -> None:
    assert submit(head, "--environment", "python:only_there:Env").exit_code == 0
    assert head.runs["run-0"].request.environment == "python:only_there:Env"
    assert {row["environment"] for row in head.runs["run-0"].examples} == {"python:only_there:Env"}


def interrupted(head: FakeHead, tmp_path: Path, number: signal.Signals = signal.SIGINT) -> Result:
    """Submit, let the first example end, and interrupt the command when its rows are here."""
    head.held = True

    def interrupt() -> None:
        wait_until(lambda: head.runs and len(head.runs["run-0"].examples) == 3, what="all examples")
        head.runs["run-0"].end(0)
        wait_until((tmp_path / "out.run" / "cursor").exists, what="the first rows")
        os.kill(os.getpid(), number)

    beside = threading.Thread(target=interrupt)
    beside.start()
    result = submit(head)
    beside.join()
    return result


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_the_run_to_the_head_and_resume_follows_it(
    head: FakeHead, tmp_path: Path, number: signal.Signals
) -> None:
    result = interrupted(head, tmp_path, number)
    assert result.exit_code == 130, result.output
    assert f"interrupted; the run goes on at {head.url}; nothing that had ended is lost: " in result.stderr
    assert "2 of 6 rollouts are in out.jsonl and out.failures.jsonl. Go on with: " in result.stderr
    assert result.stderr.endswith(f"-o out.jsonl --head {head.url} --resume\n")
    assert head.runs["run-0"].state == "open", "nothing is cancelled"
    assert (tmp_path / "out.run" / "cursor").read_text() == "2-0"
    head.release()
    head.seen.clear()
    result = submit(head, "--resume")
    assert result.exit_code == 0, result.output
    assert "6 rollouts: 6 succeeded" in result.stdout
    assert len(head.runs) == 1
    assert len({row["rollout_id"] for row in rows(tmp_path / "out.jsonl")}) == 6
    assert "POST /v1/runs" not in head.seen
    head.seen.clear()
    assert submit(head, "--resume").exit_code == 0
    assert head.seen == [], "a finished run is only summed up"


def test_resume_gives_the_run_the_examples_that_it_lacks(head: FakeHead, tmp_path: Path) -> None:
    """The command died before the answer to its submission came, and after its first example was taken."""
    assert interrupted(head, tmp_path).exit_code == 130
    run = head.runs["run-0"]
    run.examples, run.closed = run.examples[:1], False
    kept = manifest.read(tmp_path / "out.run")
    assert kept is not None
    spec = kept.spec.model_copy(update={"run_id": kept.key})
    manifest.write(tmp_path / "out.run", kept.model_copy(update={"spec": spec}))
    head.held = False
    assert submit(head, "--resume").exit_code == 0
    assert len(head.runs) == 1
    assert run.bodies == [3, 2]
    assert len({row["rollout_id"] for row in rows(tmp_path / "out.jsonl")}) == 6


@pytest.mark.parametrize("change", ["files", "cursor"])
def test_files_that_were_changed_get_their_rows_again(head: FakeHead, tmp_path: Path, change: str) -> None:
    assert interrupted(head, tmp_path).exit_code == 130
    head.release()
    if change == "files":
        (tmp_path / "out.jsonl").write_bytes(b"")
    else:
        (tmp_path / "out.run" / "cursor").write_text("no-cursor")
        head.wrong_cursors.add("no-cursor")
    result = submit(head, "--resume")
    assert result.exit_code == 0, result.output
    assert len({row["rollout_id"] for row in rows(tmp_path / "out.jsonl")}) == 6


def test_a_head_that_comes_and_goes(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PATIENCE", 30.0)
    head.lost = {"runs", "examples", "close"}
    head.cuts = [0, 1, 0, 2, 1]
    head.statuses = [503, 0, 502]
    result = submit(head)
    assert result.exit_code == 0, result.output
    assert "6 rollouts: 6 succeeded" in result.stdout
    assert len(head.runs) == 1


def test_a_run_that_is_cancelled_at_the_head(head: FakeHead, tmp_path: Path) -> None:
    head.held = True

    def cancel() -> None:
        wait_until(lambda: head.runs and head.runs["run-0"].closed, what="all examples")
        run = head.runs["run-0"]
        run.end(0)
        run.examples = run.examples[:1]
        run.state = type(run.state).CANCELLED

    beside = threading.Thread(target=cancel)
    beside.start()
    result = submit(head)
    beside.join()
    assert result.exit_code == 1
    assert result.stderr.endswith("cancelled: 2 of 6 rollouts are in out.jsonl and out.failures.jsonl\n")
    assert json.loads((tmp_path / "out.metrics.json").read_text())["complete"] is False


def test_an_example_that_the_head_does_not_take(head: FakeHead, tmp_path: Path) -> None:
    bad = [{"prompt": "?"}, {"words": "no question"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    result = submit(head, "--environment", "python:only_there:Env")
    assert result.exit_code == 2
    assert "of examples 0 to 1 none was taken: line 2: the row has neither" in result.stderr
    assert "the run at the head is cancelled; 0 of 4 rollouts are in out.jsonl" in result.stderr
    assert "--resume" not in result.stderr
    assert head.runs["run-0"].state == "cancelled"


def test_a_disk_that_fills_up_is_waited_for(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gym_queue.coordinator import room  # noqa: PLC0415
    from gym_queue.coordinator.archive import Archive  # noqa: PLC0415

    append, full = Archive.append, [True, True]

    def filling(archive: Archive, events: Any) -> Any:
        if full:
            full.pop()
            msg = "out.jsonl cannot be written: No space left on device"
            raise DiskFullError(msg)
        return append(archive, events)

    monkeypatch.setattr(Archive, "append", filling)
    monkeypatch.setattr(room, "_PAUSE", 0.01)
    assert submit(head).exit_code == 0
    assert caplog.text.count("the run pauses: out.jsonl cannot be written") == 1
    assert caplog.text.count("the run goes on: there is room again") == 1


def test_nobody_is_at_that_address(head: FakeHead, tmp_path: Path) -> None:
    head.port = 9
    result = submit(head)
    assert result.exit_code == 2
    assert result.stderr.endswith("the head at http://127.0.0.1:9 cannot be reached (Connection refused)\n")
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_wrong_token(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GYM_QUEUE_AUTH_TOKEN", "wrong")
    result = submit(head)
    assert result.exit_code == 2
    assert "does not take this token; is GYM_QUEUE_AUTH_TOKEN right?" in result.stderr
    assert "wrong" not in result.stderr.replace("GYM_QUEUE_AUTH_TOKEN", "")


def test_a_head_that_does_not_know_the_run(head: FakeHead, tmp_path: Path) -> None:
    assert interrupted(head, tmp_path).exit_code == 130
    head.runs.clear()
    result = submit(head, "--resume")
    assert result.exit_code == 2
    assert f"there is no run 'run-0'; is {head.url} the head that out.jsonl came from?" in result.stderr


def test_a_run_is_continued_where_it_was_begun(head: FakeHead, tmp_path: Path) -> None:
    assert interrupted(head, tmp_path).exit_code == 130
    here = ["in.jsonl", "--model", "stub:", "--samples", "2", "-o", "out.jsonl", "--resume"]
    result = CliRunner().invoke(main, here)
    assert result.exit_code == 2
    assert f"out.jsonl is of a run at the head {head.url}: continue it with --head" in result.stderr
    kept = manifest.read(tmp_path / "out.run")
    assert kept is not None
    manifest.write(tmp_path / "out.run", kept.model_copy(update={"head": "", "key": ""}))
    result = submit(head, "--resume")
    assert result.exit_code == 2
    assert "out.jsonl is of a run on this machine: continue it without --head" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--workers", "1"], "--workers is for work on this machine"),
        (["--verifiers", "0"], "--verifiers is for work on this machine"),
        (["--concurrency", "7"], "--concurrency is for work on this machine"),
        (["--resume", "--retry", "timeout"], "--retry is for work on this machine"),
        (["--head", "head:11000"], "'head:11000' is no address of a head"),
        (["--temperature", "0.25", "--resume"], "temperature was 1.0, now 0.25"),
    ],
)
def test_wrong_flags(head: FakeHead, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    if "--temperature" in arguments:
        assert interrupted(head, tmp_path).exit_code == 130
    result = submit(head, *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_an_environment_at_the_head_is_not_cut_short(head: FakeHead) -> None:
    given = ["--environment", "rows", "--size", "4", "--limit", "2", "--model", "stub:", "-o", "x.jsonl"]
    result = CliRunner().invoke(main, [*given, "--head", head.url])
    assert result.exit_code == 2
    assert "an environment at the head brings --size examples" in result.stderr
    result = CliRunner().invoke(main, ["--model", "stub:", "-o", "x.jsonl", "--head", head.url])
    assert "give an INPUT file, or --environment and --size" in result.stderr


def test_limits_that_were_set_are_part_of_the_run(
    head: FakeHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GYM_QUEUE_MAX_TURNS", "4")
    assert interrupted(head, tmp_path).exit_code == 130
    monkeypatch.delenv("GYM_QUEUE_MAX_TURNS")
    result = submit(head, "--resume")
    assert result.exit_code == 2
    assert "max_turns was 4, now 32" in result.stderr


def test_a_cursor_is_written_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    cursor = following._Cursor(tmp_path / "cursor")
    assert cursor.read() == ""
    cursor.save("1-0")
    cursor.save("2-0")
    assert (tmp_path / "cursor").read_text() == "1-0", "not for each batch"
    cursor.flush()
    assert following._Cursor(tmp_path / "cursor").read() == "2-0"


def test_the_end_of_a_reading_writes_the_cursor(head: FakeHead, tmp_path: Path) -> None:
    head.held = True

    def end_one_by_one() -> None:
        wait_until(lambda: head.runs and head.runs["run-0"].closed, what="all examples")
        for index in range(3):
            head.runs["run-0"].end(index)
            wait_until(partial(written, 2 * index + 2))

    def written(count: int) -> bool:
        return (tmp_path / "out.jsonl").read_bytes().count(b"\n") >= count

    beside = threading.Thread(target=end_one_by_one)
    beside.start()
    assert submit(head).exit_code == 0
    beside.join()
    assert (tmp_path / "out.run" / "cursor").read_text() == "6-0"
