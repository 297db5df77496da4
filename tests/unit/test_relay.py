"""Logs of several parts on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gym_queue.cli import relay as relay_module
from gym_queue.cli.relay import Relay
from gym_queue.embedded.children import last_words

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class Screen:
    """What is shown, without colours."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def lines(self) -> list[str]:
        return click.unstyle(self._capsys.readouterr().out).splitlines()


def append(path: Path, text: bytes) -> None:
    with path.open("ab") as log:
        log.write(text)


def test_each_line_stands_behind_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(capsys)
    append(tmp_path / "gpu1.log", b"of an earlier command\n")
    relay = Relay(tmp_path)
    append(tmp_path / "gpu1.log", b"ready\n\nbusy \xff\n")
    append(tmp_path / "head.log", b"a torn")
    relay.show()
    assert screen.lines() == ["gpu1  | ready", "gpu1  | busy \ufffd"]
    append(tmp_path / "head.log", b" line\n")
    relay.show()
    assert screen.lines() == ["head  | a torn line"]
    relay.show()
    assert screen.lines() == []


def test_parts_have_colours_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(click, "echo", shown.append)
    relay = Relay(tmp_path)
    for part in ("cpu", "gpu1", "cpu"):
        append(tmp_path / f"{part}.log", b"x\n")
        relay.show()
    first, second, third = (line.removesuffix(f"{click.unstyle(line)[:-2]}\x1b[0m x") for line in shown)
    assert first == third == "\x1b[36m"
    assert second == "\x1b[32m", "click takes them out where no terminal is"


def test_a_log_that_was_shown_does_not_grow_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(relay_module, "_LARGEST", 100)
    screen, log = Screen(capsys), tmp_path / "cpu.log"
    relay = Relay(tmp_path)
    with log.open("ab", buffering=0) as process:
        for number in range(50):
            process.write(b"line %d of many\n" % number)
            relay.show()
            assert log.stat().st_size <= 100 + 20
    assert screen.lines() == [f"cpu   | line {number} of many" for number in range(50)]


def test_last_words_are_found_in_a_log_that_was_emptied(tmp_path: Path) -> None:
    log = tmp_path / "cpu.log"
    log.write_text("no GPU\n")
    assert last_words(log, since=1000) == "no GPU"
