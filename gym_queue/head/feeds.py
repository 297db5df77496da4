"""What has ended, line by line: a cursor says how far a reader is, and leads it on in any head."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from gym_queue.coordinator import manifest
from gym_queue.coordinator.feed import Feed
from gym_queue.errors import UnknownRunError
from gym_queue.head.errors import responses
from gym_queue.head.services import HeadServices, RunId, Services

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from starlette.types import Receive, Scope, Send

    from gym_queue.coordinator.feed import Item, Page

    _Read = Callable[[str, int], Page]

router = APIRouter(tags=["feeds"])

SIGN_OF_LIFE = 10.0
"""Seconds of silence after which a reader gets a blank line."""

LONGEST_WAIT = 60

_PAGE_BYTES = 1 << 18
"""Bytes that are in memory for one reader at once (or one line, if that is longer)."""

_PAGE_LINES = 1000
_PLAIN_LIMIT = 1000


class FeedResponse(StreamingResponse):
    """Lines of JSON. A client that leaves ends what makes them at once."""

    media_type = "application/x-ndjson"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ``StreamingResponse``."""
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)


def _lines_of(kind: str, example: str) -> dict[int | str, dict[str, Any]]:
    line, last = f'`{{"cursor":"…","{kind}":{{…}}}}`', '`{"cursor":"…","end":{"state":"ended"}}`'
    content = {FeedResponse.media_type: {"schema": {"type": "string"}, "example": example}}
    description = f"Lines {line}; the last one, when all has come, {last}."
    return {200: {"description": description, "content": content}} | responses(404, 422)


Cursor = Annotated[
    str,
    Query(max_length=40, description="The cursor of the last line that was read; none: from the beginning."),
]
Limit = Annotated[
    int | None,
    Query(ge=1, le=1_000_000, description="Most lines; 1,000 where none is given and nothing is followed."),
]
Wait = Annotated[
    float, Query(ge=0, le=LONGEST_WAIT, description="Seconds to wait for something where there is nothing.")
]
Follow = Annotated[
    bool,
    Query(description="Go on until the run has ended. After ten seconds of silence comes a blank line."),
]


@router.get(
    "/v1/runs/{run_id}/rollouts",
    summary="Ended rollouts",
    response_class=Response,  # of no type of its own: that of errors is JSON
    responses=_lines_of("rollout", '{"cursor":"812-0","rollout":{"rollout_id":"…","reward":1.0}}\n'),
)
async def rollouts(
    services: Services,
    run_id: RunId,
    cursor: Cursor = "",
    limit: Limit = None,
    wait: Wait = 0.0,
    follow: Follow = False,
) -> FeedResponse:
    """Ended rollouts in the order in which they were written; each is a row as in the output file."""
    reader = _Reader(services, run_id, "rollout", limit, wait, follow=follow)
    return await reader.answer(reader.feed.rollouts, cursor)


@router.get(
    "/v1/runs/{run_id}/groups",
    summary="Decided groups",
    response_class=Response,  # of no type of its own: that of errors is JSON
    responses=_lines_of(
        "group", '{"cursor":"96","group":{"example_id":"…","outcome":"complete","rollouts":[]}}\n'
    ),
)
async def groups(
    services: Services,
    run_id: RunId,
    cursor: Cursor = "",
    limit: Limit = None,
    wait: Wait = 0.0,
    follow: Follow = False,
    dropped: Annotated[
        bool, Query(description="Also groups that are not for the trainer, without their rollouts.")
    ] = False,
) -> FeedResponse:
    """Groups in the order in which they were decided; complete ones with their rows."""
    reader = _Reader(services, run_id, "group", limit, wait, follow=follow)
    return await reader.answer(
        lambda cursor, limit: reader.feed.groups(cursor, limit, dropped=dropped), cursor
    )


class _Reader:
    """One client that reads one feed of one run."""

    def __init__(
        self, services: HeadServices, run_id: str, kind: str, limit: int | None, wait: float, *, follow: bool
    ) -> None:
        out = services.folder(run_id).paths
        self.feed = Feed(out.rows, page_bytes=_PAGE_BYTES)
        self._services = services
        self._run_id = run_id
        self._run_dir = out.run_dir
        self._kind = kind.encode()
        self._left = limit if limit is not None or follow else _PLAIN_LIMIT
        self._until = time.monotonic() + wait
        self._follow = follow

    async def answer(self, read: _Read, cursor: str) -> FeedResponse:
        """Return the answer. What is wrong with the request is raised here, before it begins."""
        if await self._services.read(manifest.read, self._run_dir) is None:
            msg = f"there is no run {self._run_id!r}"
            raise UnknownRunError(msg)
        page = await self._page(read, cursor)
        return FeedResponse(self._lines(read, page, cursor))

    async def _page(self, read: _Read, cursor: str) -> Page:
        most = _PAGE_LINES if self._left is None else min(self._left, _PAGE_LINES)
        return await self._services.read(read, cursor, most)

    async def _lines(self, read: _Read, page: Page, cursor: str) -> AsyncGenerator[bytes]:
        came, known = False, None
        async with self._services.watchers.of(self._run_dir) as watch:
            while True:
                if page.items:
                    came = True
                    yield b"".join(map(self._line, page.items))
                if page.ended is not None:
                    yield b'{"cursor":"%s","end":{"state":"%s"}}\n' % (
                        page.cursor.encode(),
                        page.ended.encode(),
                    )
                    return
                if self._is_over(len(page.items)):
                    return
                if page.cursor == cursor:  # all has been read that there is
                    seconds = self._patience(came=came)
                    if seconds <= 0:
                        return
                    await watch.beyond(known, seconds)
                    if self._services.stopping.is_set():
                        return
                    if watch.newest == known and seconds == SIGN_OF_LIFE:
                        yield b"\n"
                # In this order: what was written meanwhile is news to whoever waits next.
                known, cursor = watch.newest, page.cursor
                page = await self._page(read, cursor)

    def _line(self, item: Item) -> bytes:
        return b'{"cursor":"%s","%s":%s}\n' % (item.cursor.encode(), self._kind, item.data)

    def _is_over(self, sent: int) -> bool:
        """Tell whether the client has all that it asked for, or must ask another head."""
        if self._left is not None:
            self._left -= sent
        return self._left == 0 or self._services.stopping.is_set()

    def _patience(self, *, came: bool) -> float:
        """Return how long to wait for more before the next sign of life."""
        if self._follow:
            return SIGN_OF_LIFE
        return 0.0 if came else min(SIGN_OF_LIFE, self._until - time.monotonic())
