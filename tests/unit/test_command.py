"""What ``gym-queue`` makes of its arguments before it asks anybody, and how quickly it is there."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from gym_queue.cli.flags import classes
from gym_queue.cli.lookup import Place, is_path, place_of
from gym_queue.cli.main import main
from gym_queue.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("20261120-223109-4eeff0ca.12.3", Place("20261120-223109-4eeff0ca", 12, 3)),
        ("a.run.with.dots.0.0", Place("a.run.with.dots", 0, 0)),
        ("1.2.3", Place("1", 2, 3)),
    ],
)
def test_a_rollout_id(text: str, place: Place) -> None:
    assert place_of(text) == place


@pytest.mark.parametrize(
    "text", ["", "run", "run.1", "run.1.", ".1.2", "run.1.b", "run.1.-2", "run.1.٢", "run.1.2 "]
)
def test_no_rollout_id(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no rollout id: RUN\.EXAMPLE\.SAMPLE"):
        place_of(text)


def test_a_run_is_named_by_id_or_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.run").mkdir()
    assert [is_path(run) for run in ("o.jsonl", "runs/o", "out", "20261120-223109-4eeff0ca")] == [
        *(True, True, True, False),
    ]


def read(text: str | None) -> tuple[str, ...]:
    return classes(None, None, text)  # type: ignore[arg-type]


def test_failure_classes() -> None:
    assert read(None) == read("") == ()
    assert read("infrastructure, timeout,timeout,cancelled") == ("infrastructure", "timeout", "cancelled")
    with pytest.raises(
        UsageError, match=r"no failure class 'infra-structure'; did you mean infrastructure\?"
    ):
        read("timeout,infra-structure")


def test_flags_of_the_list_are_not_for_one_run() -> None:
    result = CliRunner().invoke(main, ["runs", "--json", "show", "run-1"])
    assert result.exit_code == 2
    assert result.stderr == "gym-queue: --output and --json are for the list, not for runs show\n"


def test_the_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("gym-queue")


def test_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gym_queue.cli.overview.load_settings", interrupted)
    result = CliRunner().invoke(main, ["status"])
    assert result.exit_code == 130
    assert result.output == ""


def test_help_loads_nothing_that_submit_rollouts_does_not() -> None:
    program = """
import sys
import gym_queue.cli.submit
before = {name.partition(".")[0] for name in sys.modules}
import gym_queue.cli.main
print(*{name.partition(".")[0] for name in sys.modules} - before - sys.stdlib_module_names)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
