"""A feed of the head, followed to its end: whatever breaks in between, each line comes once.

The head sends one JSON object a line, the cursor first: ``{"cursor": C, "rollout": {…}}``, ``"group"``, and
at last ``"end"``; a blank line is a sign of life. A line without its end is not a line: it comes again after
the cursor of the one before.
"""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple

from gym_queue.client.tries import AgainError
from gym_queue.errors import HeadAwayError, HeadFailedError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from aiohttp import StreamReader

    from gym_queue.client.connection import Connection

_LINE = re.compile(  # any JSON of this shape; the body stays as it is
    rb'\{\s*"cursor"\s*:\s*"?([^"{},\s]*)"?\s*,\s*"([a-z]+)"\s*:\s*(\{.*\})\s*\}\s*', re.DOTALL
)


class Line(NamedTuple):
    """One line of a feed. ``body`` is the JSON object of ``kind``, byte by byte as the head sent it."""

    cursor: str
    kind: str
    body: bytes


async def follow(
    connection: Connection, path: str, cursor: str, params: Mapping[str, str]
) -> AsyncGenerator[Line]:
    """Yield the lines after ``cursor``, the end line last.

    Once the head has been met, it is waited for as long as it takes.

    Raises:
        HeadAwayError: it was never met within the connection's patience.
        GymQueueError: it refuses the feed (see ``Connection.call``).
    """
    tries = connection.tries(forever=True)
    while True:
        limit = connection.silence if connection.met else min(connection.silence, max(tries.left, 1.0))
        wanted = {**params, "follow": "true"} | ({"cursor": cursor} if cursor else {})
        try:
            async with (
                connection.stream(path, wanted, limit) as content,
                aclosing(_lines(content)) as lines,
            ):
                tries.forever = True
                async for raw in lines:
                    tries.succeeded()
                    if not raw.strip():
                        continue
                    line = _read(raw, connection)
                    cursor = line.cursor
                    yield line
                    if line.kind == "end":
                        return
            msg = f"the head at {connection.base} ended the feed before its end"
            raise AgainError(HeadAwayError(msg))  # noqa: TRY301 - as what breaks on its own
        except AgainError as again:
            await connection.pause(tries, again)


async def _lines(content: StreamReader) -> AsyncGenerator[bytes]:
    """Yield whole lines of any length; what has no line end is left."""
    rest: list[bytes] = []
    async for chunk in content.iter_any():
        first, *others = chunk.split(b"\n")
        rest.append(first)
        for other in others:
            yield b"".join(rest)
            rest = [other]


def _read(raw: bytes, connection: Connection) -> Line:
    found = _LINE.fullmatch(raw)
    if found is None:
        msg = f"{connection.base} sends a feed that is no head's: {raw[:60].decode(errors='replace')}"
        raise HeadFailedError(msg)
    return Line(found[1].decode(), found[2].decode(), found[3])
