"""Each guarantee has tests that try to break it: those with its mark. ``guarantees.md`` names the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "guarantees.md").read_text()
SECTIONS = re.findall(r"^## (G\d) .*?\n(.*?)(?=^## )", PAGE, flags=re.MULTILINE | re.DOTALL)


def marked() -> list[tuple[str, str]]:
    """Return guarantee and test of each mark, for all tests there are."""
    return [
        (ast.literal_eval(name), f"{path.relative_to(ROOT)}::{test.name}")
        for path in sorted(ROOT.glob("tests/**/test_*.py"))
        for test in ast.walk(ast.parse(path.read_text()))
        if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef)
        for mark in test.decorator_list
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.guarantee"
        for name in mark.args
    ]


def test_each_guarantee_has_tests_and_the_page_names_them() -> None:
    named = [(name, test) for name, text in SECTIONS for test in re.findall(r"`(tests/\S+?)`", text)]
    assert sorted(named) == sorted(marked())
    assert {name for name, _ in named} == {f"G{number}" for number in range(1, 10)}


def test_what_is_said_to_hold_them_is_there() -> None:
    for name, text in SECTIONS:
        files = [file for file in re.findall(r"`([\w/]+\.(?:py|lua))`", text) if not file.startswith("tests")]
        assert files, name
        assert [file for file in files if not (ROOT / "gym_queue" / file).exists()] == []
