"""The logs of a stack's parts, line by line on one screen, each behind the name of its part."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PAUSE = 0.1
_AT_ONCE = 1 << 20
_LARGEST = 64 << 20
"""Bytes of a log, all of them shown, that are kept at most: a stack may be up for months."""

_COLOURS = ("cyan", "green", "magenta", "blue", "yellow", "bright_cyan", "bright_green", "bright_magenta")
_WIDTH = 5


class Relay:
    """Follows the ``*.log`` files of a folder, from where they end now.

    A part's processes append to its file; so what was shown can be cut off.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shown = {path: path.stat().st_size for path in folder.glob("*.log")}
        self._torn: dict[Path, bytes] = {}
        self._colours: dict[str, str] = {}

    async def follow(self) -> None:
        """Show what comes. Never ends."""
        while True:
            self.show()
            await asyncio.sleep(_PAUSE)

    def show(self) -> None:
        """Show what has come since the last time."""
        for path in sorted(self._folder.glob("*.log")):
            for line in self._new_lines(path):
                click.echo(f"{self._prefix(path.stem)} {line}")

    def _new_lines(self, path: Path) -> Iterator[str]:
        """Yield whole lines; a last one that is torn waits for its end."""
        with path.open("rb") as log:
            log.seek(self._shown.get(path, 0))
            while piece := log.read(_AT_ONCE):
                *lines, self._torn[path] = (self._torn.get(path, b"") + piece).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines if line.strip())
            self._shown[path] = log.tell()
        if self._shown[path] > _LARGEST:
            os.truncate(path, 0)
            self._shown[path] = 0

    def _prefix(self, part: str) -> str:
        colour = self._colours.setdefault(part, _COLOURS[len(self._colours) % len(_COLOURS)])
        return click.style(f"{part:<{_WIDTH}} |", fg=colour)
