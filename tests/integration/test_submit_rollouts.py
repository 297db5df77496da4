"""``submit-rollouts`` from flags to files and exit status, with the stack and the coordinator played.

Input, output, manifest, metrics and signals are real.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pytest
from click.testing import CliRunner, Result

from gym_queue import assembly, endings
from gym_queue.cli import execution
from gym_queue.cli.submit import main
from gym_queue.coordinator.run import Interrupted, Progress
from gym_queue.embedded import stack as stack_module
from gym_queue.endings import Draft, Place
from gym_queue.errors import EngineUnavailableError, StackError, StorageError
from gym_queue.ledger.base import Ended, Event
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import (
    Failure,
    FailureClass,
    RunSpec,
    RunState,
    RunStatus,
    Stage,
    Timings,
    Trajectory,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from gym_queue.coordinator.metrics import RunMetrics
    from gym_queue.records import Ticket
    from gym_queue.settings import Settings


class FakeStack:
    """A stack without processes."""

    trouble: ClassVar[Exception | None] = None
    never_ready: ClassVar[bool] = False

    own_redis = True
    pids: ClassVar[set[int]] = set()

    def __init__(
        self, settings: Settings, run_dir: Path, *, workers: int, verifiers: int, fresh: bool
    ) -> None:
        self.settings = settings
        (run_dir / "redis").mkdir(parents=True, exist_ok=True)
        self.asked = (workers, verifiers, fresh)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def wait_ready(self, _ready: Callable[[], Awaitable[set[int]]]) -> None:
        if self.never_ready:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()

    async def supervise(self, _died: Callable[[int], object]) -> None:
        if self.trouble:
            await asyncio.sleep(0)
            raise self.trouble
        await asyncio.Event().wait()


class FakeCoordinator:
    """Ends every rollout that the archive does not hold, as told by the class."""

    failing: ClassVar[set[int]] = set()
    stop_after: ClassVar[int | None] = None
    then: ClassVar[Callable[[FakeCoordinator], Awaitable[None]] | None] = None

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)
        self.parts = parts
        self.interrupted = asyncio.Event()

    def interrupt(self) -> None:
        self.interrupted.set()

    async def run(self) -> RunMetrics:
        archive, spec, metrics = self.parts["archive"], self.parts["spec"], self.parts["metrics"]
        ended = 0
        for index, example in enumerate(self.parts["source"].examples(0)):
            for sample in range(spec.samples):
                ordinal = index * spec.samples + sample
                if archive.is_done(ordinal):
                    continue
                if ended == self.stop_after and (then := type(self).then) is not None:
                    await then(self)
                place = Place(spec=spec, example=example, example_index=index, sample_index=sample)
                end = self.end(place, failed=ordinal in self.failing)
                [event] = archive.append([Event(position=str(ordinal), summary=end.summary, row=end.row)])
                metrics.add(event.summary)
                ended += 1
                self.parts["on_progress"](
                    Progress(
                        total=0, succeeded=archive.count, failed=0, cancelled=0, in_flight=1, reward_mean=0.5
                    )
                )
        return metrics.snapshot(accepted=archive.count)  # type: ignore[no-any-return]

    @staticmethod
    def end(place: Place, *, failed: bool) -> Ended:
        timings = Timings(accepted_at=1.0, ended_at=3.0, queued=0.5, generate=1.0)
        if failed:
            failure = Failure(
                failure_class=FailureClass.VERIFIER, stage=Stage.VERIFY, error="no idea\nat all"
            )
            return endings.failed(place, failure, 1, timings)
        trajectory = Trajectory(messages=({"role": "assistant", "content": "4"},), finish_reason="stop")
        draft = Draft(attempt=1, trajectory=trajectory, queued=0.5, generate=1.0)
        return endings.succeeded(place, draft, Verdict(reward=float(place.sample_index % 2)), timings)


class FakePublisher:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        self.tickets.extend(tickets)

    async def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Play the stack and the coordinator; stand in the folder of the input."""
    monkeypatch.chdir(tmp_path)
    for name in ("GYM_QUEUE_REDIS_URL", "HEAD_SERVER_URL", "LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(execution, "EmbeddedStack", FakeStack)
    monkeypatch.setattr(execution, "Coordinator", FakeCoordinator)
    monkeypatch.setattr(execution, "configure", lambda *_: None)
    monkeypatch.setattr(assembly, "make_ledger", lambda _: MemoryLedger())
    monkeypatch.setattr(assembly, "make_broker", lambda _: FakePublisher())
    for owner, values in (
        (FakeStack, {"trouble": None, "never_ready": False}),
        (FakeCoordinator, {"failing": set(), "stop_after": None, "then": None}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(owner, name, value)
    rows = [{"prompt": f"{number} + 1?", "answer": str(number + 1), "colour": "red"} for number in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def submit(*arguments: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(
        main, ["in.jsonl", "--model", "stub:", "--samples", "2", "-o", "out.jsonl", *arguments]
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_succeeds(tmp_path: Path) -> None:
    result = submit()
    assert result.exit_code == 0, result.output
    assert "3 examples x 2 samples with stub:; logs are in out.run/logs" in result.stderr
    assert result.stdout.startswith("6 rollouts: 6 succeeded, 0 failed\nmean reward 0.5000 ± ")
    assert "pass@1 0.5000, pass@2 1.0000\n" in result.stdout
    assert result.stdout.endswith("rollouts: out.jsonl\nmetrics:  out.metrics.json\n")
    assert [(row["example_index"], row["sample_index"]) for row in rows(tmp_path / "out.jsonl")] == [
        (example, sample) for example in range(3) for sample in range(2)
    ]
    assert {row["colour"] for row in rows(tmp_path / "out.jsonl")} == {"red"}
    metrics = json.loads((tmp_path / "out.metrics.json").read_text())
    assert metrics["complete"] is True
    assert metrics["reward"]["mean"] == 0.5
    assert not (tmp_path / "out.run" / "redis").exists(), "its records are in the files"
    manifest = json.loads((tmp_path / "out.run" / "manifest.json").read_text())
    assert manifest["command"] == ["in.jsonl", "--model", "stub:", "--samples", "2", "-o", "out.jsonl"]


def test_some_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCoordinator, "failing", {1, 4})
    result = submit()
    assert result.exit_code == 1
    assert "6 rollouts: 4 succeeded, 2 failed" in result.stdout
    assert "2 failed by verifier, such as: no idea at all" in result.stdout
    assert "failures: out.failures.jsonl" in result.stdout


def test_ctrl_c_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait_for_ctrl_c(coordinator: FakeCoordinator) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await coordinator.interrupted.wait()
        raise Interrupted

    monkeypatch.setattr(FakeCoordinator, "stop_after", 3)
    monkeypatch.setattr(FakeCoordinator, "then", wait_for_ctrl_c)
    result = submit("--seed", "7")
    assert result.exit_code == 130
    assert "rollouts in flight have 10 s to end (Ctrl-C again stops at once)" in result.stderr
    continuation = "submit-rollouts in.jsonl --model stub: --samples 2 -o out.jsonl --seed 7 --resume"
    assert "3 of 6 rollouts are in out.jsonl and out.failures.jsonl" in result.stderr
    assert result.stderr.endswith(f"Go on with: {continuation}\n")
    assert json.loads((tmp_path / "out.metrics.json").read_text())["complete"] is False
    run_id = rows(tmp_path / "out.jsonl")[0]["run_id"]

    monkeypatch.setattr(FakeCoordinator, "then", None)
    result = submit("--seed", "7", "--resume")
    assert result.exit_code == 0, result.output
    assert "6 rollouts: 6 succeeded" in result.stdout
    assert len(rows(tmp_path / "out.jsonl")) == 6
    assert {row["run_id"] for row in rows(tmp_path / "out.jsonl")} == {run_id}


def test_ctrl_c_twice_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never_end(coordinator: FakeCoordinator) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await coordinator.interrupted.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    monkeypatch.setattr(FakeCoordinator, "stop_after", 1)
    monkeypatch.setattr(FakeCoordinator, "then", never_end)
    result = submit()
    assert result.exit_code == 130
    assert "1 of 6 rollouts are in out.jsonl" in result.stderr


def test_ctrl_c_while_the_stack_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStack, "never_ready", True)
    result = submit()
    assert result.exit_code == 130
    assert "0 of 6 rollouts" in result.stderr


def test_a_finished_run_is_only_summed_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit().exit_code == 0
    monkeypatch.setattr(execution, "EmbeddedStack", None)
    result = submit("--resume")
    assert result.exit_code == 0, result.output
    assert "6 rollouts: 6 succeeded, 0 failed" in result.stdout


def test_a_full_disk_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(_: FakeCoordinator) -> None:
        msg = "out.jsonl cannot be written: No space left on device"
        raise StorageError(msg)

    monkeypatch.setattr(FakeCoordinator, "stop_after", 2)
    monkeypatch.setattr(FakeCoordinator, "then", full)
    result = submit()
    assert result.exit_code == 1
    assert "No space left on device; nothing that had ended is lost: 2 of 6 rollouts" in result.stderr
    assert "--resume" in result.stderr
    monkeypatch.setattr(FakeCoordinator, "then", None)
    assert submit("--resume").exit_code == 0


def test_a_stack_that_breaks_down_during_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(_: FakeCoordinator) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(FakeStack, "trouble", StackError("gpu1 keeps dying"))
    monkeypatch.setattr(FakeCoordinator, "stop_after", 0)
    monkeypatch.setattr(FakeCoordinator, "then", wait)
    result = submit()
    assert result.exit_code == 1
    assert "gpu1 keeps dying; nothing that had ended is lost" in result.stderr


def test_a_stack_that_does_not_start_is_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStack, "__aenter__", _raising(StackError("no redis-server was found")))
    result = submit()
    assert result.exit_code == 2
    assert result.stderr.endswith("submit-rollouts: no redis-server was found\n")


def _raising(error: Exception) -> Callable[..., Awaitable[None]]:
    async def enter(_: object) -> None:
        raise error

    return enter


def test_output_that_exists_is_kept(tmp_path: Path) -> None:
    assert submit().exit_code == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    result = submit()
    assert result.exit_code == 2
    assert "out.jsonl exists already" in result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_resume_refuses_another_run() -> None:
    assert submit().exit_code == 0
    result = submit("--resume", "--temperature", "0.5")
    assert result.exit_code == 2
    assert "cannot be continued with these settings: temperature was 1.0, now 0.5" in result.stderr


def test_resume_refuses_output_that_nobody_explains(tmp_path: Path) -> None:
    assert submit().exit_code == 0
    (tmp_path / "out.run" / "manifest.json").unlink()
    result = submit("--resume")
    assert result.exit_code == 2
    assert "out.run does not say what run it belongs to" in result.stderr


def test_resume_of_nothing_is_a_run() -> None:
    assert submit("--resume").exit_code == 0


def test_resume_does_again_what_is_missing_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows deleted by hand: the ledger thinks that they are safe, so its idea of the run is dropped."""
    assert submit().exit_code == 0
    manifest = json.loads((tmp_path / "out.run" / "manifest.json").read_text())
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(lines[:2]))
    forgotten: list[str] = []

    class Ledger(MemoryLedger):
        async def run(self, run_id: str) -> RunStatus | None:
            spec = RunSpec.model_validate(manifest["spec"])
            assert run_id == spec.run_id
            return RunStatus(spec=spec, state=RunState.OPEN, accepted=6, succeeded=6, archived=6)

        async def forget_run(self, run_id: str) -> None:
            forgotten.append(run_id)

    monkeypatch.setattr(assembly, "make_ledger", lambda _: Ledger())
    assert submit("--resume").exit_code == 0
    assert forgotten == [manifest["spec"]["run_id"]]


def test_an_endpoint_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: object) -> None:
        msg = "http://nowhere/v1 does not answer"
        raise EngineUnavailableError(msg)

    monkeypatch.setattr(assembly, "check_model", check)
    result = submit()
    assert result.exit_code == 2
    assert result.stderr == "submit-rollouts: http://nowhere/v1 does not answer\n"
    assert not (tmp_path / "out.jsonl").exists(), "nothing was started"


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    async def buggy(_: FakeCoordinator) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(FakeCoordinator, "stop_after", 0)
    monkeypatch.setattr(FakeCoordinator, "then", buggy)
    assert isinstance(submit().exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"HEAD_SERVER_URL": "http://head:11000"}, "submitting to a head is not possible in this version"),
        ({"GYM_QUEUE_WINDOW": "many"}, "the setting window cannot be used: "),
        ({"LOG_LEVEL": "LOUD"}, "LOG_LEVEL cannot be used: LOUD is no level"),
    ],
)
def test_wrong_variables(variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = submit()
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_settings_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "gym_queue.toml").write_text("window = = 3")
    result = submit()
    assert result.exit_code == 2
    assert "gym_queue.toml is not TOML" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--head", "http://head"], "submitting to a head is not possible in this version"),
        (["--size", "3"], "--size is for an environment's own examples"),
        (["--samples", "0"], "Invalid value for '--samples'"),
        (["--top-p", "0"], "Invalid value for '--top-p'"),
    ],
)
def test_wrong_flags(arguments: list[str], sentence: str) -> None:
    result = submit(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_without_input_an_environment_must_make_the_examples() -> None:
    result = CliRunner().invoke(
        main, ["--environment", "reasoning_gym:chain_sum", "--model", "stub:", "-o", "x.jsonl"]
    )
    assert result.exit_code == 2
    assert "give an INPUT file, or --environment and --size" in result.stderr


def test_an_environments_own_examples(tmp_path: Path) -> None:
    arguments = ["--environment", "reasoning_gym:chain_sum", "--size", "4", "--limit", "3", "--seed", "1"]
    result = CliRunner().invoke(main, [*arguments, "--model", "stub:", "-o", str(tmp_path / "own.jsonl")])
    assert result.exit_code == 0, result.output
    assert len(rows(tmp_path / "own.jsonl")) == 3
    assert {row["environment"] for row in rows(tmp_path / "own.jsonl")} == {"reasoning_gym:chain_sum"}


def test_the_stack_is_as_large_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, bool]] = []

    class Counting(FakeStack):
        async def __aenter__(self) -> Self:
            asked.append(self.asked)
            assert self.settings.concurrency == 9
            return self

    monkeypatch.setattr(execution, "EmbeddedStack", Counting)
    assert submit("--workers", "3", "--verifiers", "2", "--concurrency", "9").exit_code == 0
    assert asked == [(3, 2, True)]


def test_the_names_played_here_exist() -> None:
    assert {"supervise", "wait_ready", "__aenter__", "__aexit__"} <= set(dir(stack_module.EmbeddedStack))
