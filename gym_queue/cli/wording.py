"""How numbers and lists are put before a person: durations in words, counts, plain columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """Say how long: its two largest units, as in ``9 min 20 s`` or ``2 d 3 h``; tenths below ten seconds."""
    few = 9.95
    if abs(seconds) < few:
        return f"{round(seconds, 1):g} s"
    rest = round(seconds)
    parts: list[tuple[int, str]] = []
    for unit, size in _UNITS:
        count, rest = divmod(rest, size)
        if parts or count:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count)


def count(number: int, noun: str) -> str:
    """Say how many: ``1 ticket``, ``2,000 tickets``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def cut(text: str, longest: int) -> str:
    """Put a text on one line of at most ``longest`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def columns(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a table: numbers to the right, all else to the left, no blanks at the end."""
    lines = [head, *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [
        all(isinstance(value, int | float) for value in column) for column in zip(*rows, strict=True)
    ] or [False] * len(head)
    for line in lines:
        cells = (
            f"{cell:>{width}}" if right else f"{cell:<{width}}"
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
