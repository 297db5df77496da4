"""What ``submit-rollouts`` makes of flags, variables and earlier output; stack and coordinator played."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Self

import pytest
from click.testing import CliRunner

from gym_queue import assembly
from gym_queue.cli import execution
from gym_queue.cli.submit import main
from gym_queue.coordinator.run import Interrupted
from gym_queue.embedded import stack as stack_module
from gym_queue.errors import EngineUnavailableError
from gym_queue.records import Limits
from tests.integration.played_stack import FakeCoordinator, FakeStack, play, rows, submit

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(tmp_path, monkeypatch)


def test_output_that_exists_is_kept(tmp_path: Path) -> None:
    assert submit().exit_code == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    result = submit()
    assert result.exit_code == 2
    assert "out.jsonl exists already" in result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.guarantee("G9")
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


def test_retry_does_rollouts_of_a_class_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCoordinator, "failing", {1, 4})  # class verifier
    assert submit().exit_code == 1
    monkeypatch.setattr(FakeCoordinator, "failing", set())
    result = submit("--resume", "--retry", "infrastructure,timeout")
    assert result.exit_code == 1
    assert "4 succeeded, 2 failed" in result.stdout
    result = submit("--resume", "--retry", "verifier, infrastructure")
    assert result.exit_code == 0, result.output
    assert "2 rollouts of out.failures.jsonl are done again: 2 verifier" in result.stderr
    assert "6 succeeded, 0 failed" in result.stdout
    assert (tmp_path / "out.failures.jsonl").read_bytes() == b""
    manifest = json.loads((tmp_path / "out.run" / "manifest.json").read_text())
    assert manifest["command"] == ["in.jsonl", "--model", "stub:", "--samples", "2", "-o", "out.jsonl"]
    assert manifest["directory"] == str(tmp_path)
    assert manifest["spec"]["output"] == f"{platform.node()}:{tmp_path / 'out.jsonl'}"


def test_an_interrupted_retry_goes_on_without_retrying_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(_: FakeCoordinator) -> None:
        raise Interrupted

    monkeypatch.setattr(FakeCoordinator, "failing", {1, 4})
    assert submit().exit_code == 1
    monkeypatch.setattr(FakeCoordinator, "stop_after", 1)
    monkeypatch.setattr(FakeCoordinator, "then", stop)
    result = submit("--resume", "--retry=verifier")
    assert result.exit_code == 130
    assert result.stderr.endswith(
        "submit-rollouts in.jsonl --model stub: --samples 2 -o out.jsonl --resume\n"
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("QUEUE_TIMEOUT", 5.0), ("STORE_TIMEOUT", 6.0), ("ROLLOUT_TIMEOUT", 7.0), ("VERIFY_TIMEOUT", 8.0)],
)
def test_limits_are_settings_and_part_of_the_runs_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: float
) -> None:
    before = Limits().model_dump()[setting.lower()]
    monkeypatch.setenv(f"GYM_QUEUE_{setting}", str(value))
    assert submit().exit_code == 0
    manifest = json.loads((tmp_path / "out.run" / "manifest.json").read_text())
    assert manifest["spec"]["limits"][setting.lower()] == value
    monkeypatch.delenv(f"GYM_QUEUE_{setting}")
    result = submit("--resume")
    assert result.exit_code == 2
    assert f"these settings: {setting.lower()} was {value}, now {before}\n" in result.stderr


@pytest.mark.guarantee("G9")
def test_resume_refuses_other_input(tmp_path: Path) -> None:
    assert submit().exit_code == 0
    (tmp_path / "in.jsonl").write_text((tmp_path / "in.jsonl").read_text().replace("red", "blue"))
    result = submit("--resume")
    assert result.exit_code == 2
    assert "cannot be continued with these settings: the content of the input changed\n" in result.stderr


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
        ({"HEAD_SERVER_URL": "head:11000"}, "'head:11000' is no address of a head"),
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
        (["--size", "3"], "--size is for an environment's own examples"),
        (["--retry", "timeout"], "--retry is for output that is there: give --resume as well"),
        (
            ["--resume", "--retry", "timeout,infrastucture"],
            "there is no failure class 'infrastucture'; did you mean infrastructure?",
        ),
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


@pytest.mark.parametrize(("workers", "verifiers"), [("0", "0"), ("0", "1"), ("1", "0")])
def test_no_worker_of_ones_own_needs_a_redis_where_others_are(
    workers: str, verifiers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--workers", workers, "--verifiers", verifiers]
    result = submit(*arguments)
    assert result.exit_code == 2
    flag = "--workers" if workers == "0" else "--verifiers"
    assert f"{flag} 0 leaves that work to workers elsewhere: set GYM_QUEUE_REDIS_URL" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setenv("GYM_QUEUE_REDIS_URL", "redis://elsewhere:6379/0")
    result = submit(*arguments)
    assert result.exit_code == 0, result.output
    assert ("no worker is started here" in result.stderr) == (workers == verifiers)


def test_the_names_played_here_exist() -> None:
    played = {"supervise", "could_start", "wait_ready", "__aenter__", "__aexit__"}
    assert played <= set(dir(stack_module.EmbeddedStack))
