"""Our log lines go to stderr once, and nobody else's loggers change."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.coordinator.feeder import _say_accepted
from gym_queue.records import Fence, Stage, Ticket
from gym_queue.settings import Settings
from gym_queue.telemetry.logging import configure, configure_process
from gym_queue.telemetry.secrets import secrets_of
from gym_queue.telemetry.story import about, names, outside, speak_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gym_queue.telemetry.story import Subject

NAMES = ("", "gym_queue", "celery", "kombu")


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    before = {
        name: (log.handlers, log.level, log.propagate) for name in NAMES if (log := logging.getLogger(name))
    }
    yield
    for name, (handlers, level, propagate) in before.items():
        log = logging.getLogger(name)
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def test_lines_go_to_stderr_with_level_and_role(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "gpu")
    logging.getLogger("gym_queue.somewhere").info("hello %s", "there")
    logging.getLogger("gym_queue.somewhere").debug("quiet")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert " INFO gpu[" in shown.err
    assert shown.err.endswith("gym_queue.somewhere: hello there\n")
    assert "quiet" not in shown.err


def test_configuring_again_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO")
    configure("DEBUG")
    logging.getLogger("gym_queue").debug("once")
    assert capsys.readouterr().err.count("once") == 1


def test_celery_is_heard_when_it_warns(capsys: pytest.CaptureFixture[str]) -> None:
    configure("DEBUG")
    logging.getLogger("celery.worker").info("chatter")
    logging.getLogger("celery.worker").warning("connection lost")
    shown = capsys.readouterr().err
    assert "connection lost" in shown
    assert "chatter" not in shown


def test_the_root_logger_is_left_alone() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    configure("DEBUG")
    assert (list(root.handlers), root.level) == before


def test_a_process_of_ours_shows_what_others_warn_of(capsys: pytest.CaptureFixture[str]) -> None:
    configure_process(Settings(log_format="json"), "gpu")
    logging.getLogger("somebody.elses.environment").warning("the puzzle is odd")
    logging.getLogger("somebody.elses.environment").info("chatter")
    (line,) = lines(capsys)
    assert (line["logger"], line["message"]) == ("somebody.elses.environment", "the puzzle is odd")


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", "cpu", form="json")
    before = datetime.now(UTC)
    logging.getLogger("gym_queue.somewhere").info("two\nlines and a %r", "ü")
    (line,) = lines(capsys)
    assert abs(datetime.fromisoformat(line.pop("ts")) - before) < timedelta(minutes=1)
    assert line == {
        "level": "INFO",
        "role": "cpu",
        "pid": os.getpid(),
        "logger": "gym_queue.somewhere",
        "message": "two\nlines and a 'ü'",
    }


def test_times_are_utc(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", form="json")
    logging.getLogger("gym_queue").info("now")
    assert lines(capsys)[0]["ts"].endswith("+00:00")


def test_a_traceback_is_one_string(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", form="json")
    try:
        int("no such task")
    except ValueError:
        logging.getLogger("gym_queue").exception("it failed")
    (line,) = lines(capsys)
    assert line["message"] == "it failed"
    assert line["error"].startswith("Traceback")
    assert line["error"].endswith("'no such task'")


FENCE = Fence(
    stage=Stage.VERIFY, run_id="run", example_index=7, sample_index=1, attempt=2, worker="cpu-1", losses=0
)
SUBJECTS: dict[str, tuple[Subject, dict[str, Any], str]] = {
    "a run": ("run", {"run_id": "run"}, " [run]"),
    "a ticket": (
        Ticket(stage=Stage.GENERATE, run_id="run", example_index=7, samples=(0, 1), attempt=1),
        {"run_id": "run", "attempt": 1, "stage": "generate"},
        " [run generate attempt 1]",
    ),
    "an attempt": (
        FENCE,
        {"run_id": "run", "rollout_id": "run.7.1", "attempt": 2, "stage": "verify", "worker": "cpu-1"},
        " [run.7.1 verify attempt 2]",
    ),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_line_says_whose_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    subject, fields, brackets = SUBJECTS[name]
    log = logging.getLogger("gym_queue")
    configure("INFO", form="json")
    with about(subject):
        log.info("inside")
    log.info("outside")
    inside, outside_ = lines(capsys)
    assert {key: value for key, value in inside.items() if key not in outside_} == fields
    configure("INFO")
    with about(subject):
        log.info("inside")
    log.info("outside")
    text = capsys.readouterr().err.splitlines()
    assert text[0].endswith(f"gym_queue: inside{brackets}")
    assert text[1].endswith("gym_queue: outside")


async def test_tasks_and_threads_of_an_attempt_carry_its_name_and_no_others_do() -> None:
    seen: dict[str, Any] = {}

    async def note(where: str) -> None:
        seen[where] = names().get("rollout_id")

    with about(FENCE):
        await asyncio.gather(note("task"), asyncio.to_thread(lambda: asyncio.run(note("thread"))))
        await outside(note("for all"))
    await note("afterwards")
    assert seen == {"task": "run.7.1", "thread": "run.7.1", "for all": None, "afterwards": None}


@pytest.mark.parametrize("form", ["text", "json"])
def test_secrets_are_starred_out_wherever_they_occur(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(
        redis_url="redis://me:p%40ss%22word@host/0",
        auth_token="the-token",  # noqa: S106 - made up
        api_key="sk-123456",
        payload_url="s3://key:s3cret@bucket/x",
    )
    configure("INFO", form=form, secrets=secrets_of(settings))
    log = logging.getLogger("gym_queue")
    log.info("%s %s", settings.redis_url, settings)
    log.info('p@ss"word, Bearer %s', "the-token")
    with about("run-of-the-token"):
        log.info("sk-123456 %s", settings.payload_url)
    try:
        int("sk-123456")
    except ValueError:
        log.exception("oh")
    shown = capsys.readouterr().err
    for secret in ("p%40ss", "p@ss", "sk-123456", "s3cret", "Bearer the-token"):
        assert secret not in shown
    assert "redis://me:***@host/0" in shown


def test_nothing_is_starred_out_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", secrets=secrets_of(Settings(redis_url="redis://:abc@host/0")))  # too short to be one
    logging.getLogger("gym_queue").info("the abc of it")
    assert "the abc of it" in capsys.readouterr().err


def test_the_reference_lists_the_keys_of_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", form="json")
    with about(FENCE):
        try:
            int("no")
        except ValueError:
            logging.getLogger("gym_queue").exception("oh")
    (line,) = lines(capsys)
    page = (Path(__file__).parents[2] / "docs" / "reference" / "logs.md").read_text()
    table = page[page.index("| key |") : page.index("Lines of engines")]
    listed = re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.splitlines() if "|" in row))
    assert sorted(line) == sorted(listed)


def test_what_is_accepted_is_said_of_each_rollout(capsys: pytest.CaptureFixture[str]) -> None:
    configure("DEBUG", form="json")
    _say_accepted([Ticket(stage=Stage.GENERATE, run_id="run", example_index=7, samples=(0, 2), attempt=1)])
    assert [(line["message"], line["rollout_id"], line.get("worker")) for line in lines(capsys)] == [
        ("accepted", "run.7.0", None),
        ("accepted", "run.7.2", None),
    ]


async def test_a_task_may_speak_of_a_run_from_now_on(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", form="json")

    async def coordinate() -> None:
        speak_of("run")
        await asyncio.create_task(say())

    async def say() -> None:
        logging.getLogger("gym_queue").info("something")

    await asyncio.create_task(coordinate())
    await say()
    assert [line.get("run_id") for line in lines(capsys)] == ["run", None]
