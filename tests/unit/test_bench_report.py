"""What the benchmark makes of its samples, and how it finds what a peer runs on."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.contenders import NEMO
from benchmarks.parts import Results
from benchmarks.processes import environment_of, memory_in_all, name_of
from benchmarks.report import table, verdicts
from benchmarks.virtualenvs import NotInstalledError, interpreter_of, sections

if TYPE_CHECKING:
    from pathlib import Path

_GONE = 2**22 + 1  # above the kernel's greatest number of a process


def sample(rate: float, **megabytes: float) -> dict[str, Any]:
    return {"rate": rate, "in_all": megabytes}


def beside_nemo(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    results = Results({NEMO: theirs, "road, groups of 8": ours})
    return [line for line in verdicts({"noop": results}) if "NeMo Gym" in line]


def test_nemo_gym_is_compared_within_a_round_and_by_the_memory_of_all_processes() -> None:
    ours = [sample(3000, redis=10, workers=190), sample(9000, redis=10, workers=190), sample(3200, redis=200)]
    theirs = [sample(100, ray=500, agent=500), sample(300, ray=500, agent=700), sample(80, ray=1000)]
    rate, memory = beside_nemo(ours, theirs)
    assert rate == "met     groups of 8, times NeMo Gym: 30 (wanted: at least 30)"
    assert memory == (
        "met     groups of 8, memory in all as a share of NeMo Gym's: 0.2 (wanted: at most 0.2)"
    )


def test_what_nemo_gym_does_better_than_wanted_is_said() -> None:
    rate, memory = beside_nemo([sample(2900, redis=201)], [sample(100, ray=1000)])
    assert rate.startswith("MISSED")
    assert memory.startswith("MISSED")


def test_nothing_is_said_of_nemo_gym_where_it_was_not_measured() -> None:
    assert beside_nemo([sample(3000, redis=10)], []) == []


def test_the_table_shows_the_memory_of_all_processes() -> None:
    shown = table("noop", Results({NEMO: [sample(100, ray=700, agent=300.4)]}))
    assert shown.splitlines()[0].split("  ")[-1] == "MB in all"
    assert shown.splitlines()[1].split()[-1] == "1,000"


def test_an_interpreter_that_does_not_run_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim, real = tmp_path / "python-shim", tmp_path / "python-real"
    shim.write_text("#!/bin/sh\nexit 127\n")
    real.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for one in (shim, real):
        one.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert interpreter_of("BENCHMARK_TEST_PYTHON", "python-none", shim.name, real.name) == sys.executable


def test_an_interpreter_that_was_asked_for_is_the_only_one_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHMARK_TEST_PYTHON", "/nowhere/python")
    with pytest.raises(NotInstalledError, match="/nowhere/python does not run; BENCHMARK_TEST_PYTHON"):
        interpreter_of("BENCHMARK_TEST_PYTHON", sys.executable)


def test_every_section_has_exact_pins() -> None:
    assert {"queues", "ray", "nemo"} <= set(sections())
    assert all("==" in pin for pins in sections().values() for pin in pins)


def test_a_process_is_seen_as_the_kernel_sees_it() -> None:
    argv = ["/bin/sh", "-c", "echo up; read line"]
    variables = {**os.environ, "BENCHMARK_MARK": "a=b"}
    with subprocess.Popen(argv, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stdout.readline() == b"up\n"
        assert environment_of(child.pid)["BENCHMARK_MARK"] == "a=b"
        assert name_of(child.pid) == "sh"
        child.communicate()
    assert (name_of(_GONE), environment_of(_GONE)) == ("", {})


_FORK = """
import os, sys
kept = bytes(range(256)) * 2**18
os.fork()
os.write(1, b"%8d" % os.getpid())
sys.stdin.read()
"""


def test_memory_in_all_counts_what_processes_share_once() -> None:
    argv = [sys.executable, "-c", _FORK]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        pids = [int(parent.stdout.read(8)) for _ in range(2)]
        one, both = memory_in_all({"one": pids[:1]}), memory_in_all({"two": pids, "gone": [_GONE]})
        parent.communicate()
    assert 67 < both["two"] < 100  # 64 MiB are there once
    assert one["one"] == pytest.approx(both["two"] / 2, rel=0.2)
    assert both["files"] == pytest.approx(one["files"], rel=0.2)
    assert both["gone"] == 0
