"""Durations, counts and tables as a person reads them."""

from __future__ import annotations

import pytest

from gym_queue.cli.wording import columns, count, cut, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 s"),
        (0.04, "0 s"),
        (3.24, "3.2 s"),
        (9.96, "10 s"),
        (12.4, "12 s"),
        (59.7, "1 min"),
        (60.0, "1 min"),
        (560.0, "9 min 20 s"),
        (3599.8, "1 h"),
        (3601.0, "1 h"),
        (86_399.0, "23 h 59 min"),
        (86_400.0, "1 d"),
        (183_600.0, "2 d 3 h"),
        (8_640_061.0, "100 d"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_counts() -> None:
    assert [count(number, "ticket") for number in (0, 1, 2, 2000)] == [
        "0 tickets", "1 ticket", "2 tickets", "2,000 tickets",
    ]  # fmt: skip


def test_a_long_text_is_cut_on_one_line() -> None:
    assert cut("one\ntwo  three", 20) == "one two three"
    assert cut("one\ntwo  three", 8) == "one two…"


def test_numbers_stand_to_the_right_and_all_else_to_the_left() -> None:
    rows = [("a", 2000, ""), ("long", 7, "x")]
    assert list(columns(("NAME", "N", "NOTE"), rows)) == [
        "NAME      N  NOTE",
        "a     2,000",
        "long      7  x",
    ]


def test_a_table_without_rows_is_its_head() -> None:
    assert list(columns(("NAME", "N"), [])) == ["NAME  N"]
