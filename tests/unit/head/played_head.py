"""Runs that are played, for a head whose routes, limits and errors are real."""

from __future__ import annotations

from gym_queue.api import RunRequest, RunView
from gym_queue.errors import ConflictError, UnknownRunError
from gym_queue.records import RunSpec, RunState

TOKEN = "a-token-of-the-test"  # noqa: S105 - it guards nothing
HERE = "http://127.0.0.1:11000"


class PlayedRuns:
    """Runs in memory, which never begin."""

    def __init__(self) -> None:
        self.views: dict[str, RunView] = {}
        self.requests: dict[str, tuple[str, RunRequest]] = {}
        self.failure: Exception | None = None

    async def create(self, request: RunRequest, key: str) -> tuple[RunView, bool]:
        if self.failure:
            raise self.failure
        if key in self.requests:
            run_id, known = self.requests[key]
            if known != request:
                raise ConflictError
            return self.views[run_id], False
        run_id = f"run-{len(self.views)}"
        spec = RunSpec(run_id=run_id, model=request.model, samples=request.samples)
        self.views[run_id] = RunView(run_id=run_id, state=RunState.OPEN, closed=False, examples=0, spec=spec)
        self.requests[key] = run_id, request
        return self.views[run_id], True

    async def append(self, run_id: str, body: bytes, offset: int | None) -> int:
        view = await self.show(run_id)
        count = view.examples + len(body.splitlines())
        self.views[run_id] = view.model_copy(update={"examples": count})
        return count

    async def show(self, run_id: str) -> RunView:
        if run_id not in self.views:
            msg = f"there is no run {run_id!r}"
            raise UnknownRunError(msg)
        return self.views[run_id]

    async def list(self, state: RunState | None, limit: int) -> list[RunView]:
        found = [view for view in self.views.values() if state in (None, view.state)]
        return found[:limit]

    async def close(self, run_id: str) -> RunView:
        return await self.show(run_id)

    cancel = pause = resume = close
