"""The runs of the head: made, fed, steered and shown by any of the heads that share a folder and a ledger.

Nothing here drives a run: that is the leader's (``leader``). What is asked of a run is written into its
folder first, and told to the ledger then, so that it holds whatever dies in between.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from gym_queue.coordinator import run_plan
from gym_queue.coordinator.run_folder import RunFolder, request_of
from gym_queue.coordinator.run_keys import KeyRecord, RunKeys
from gym_queue.coordinator.run_view import view_of
from gym_queue.errors import (
    ConflictError,
    EngineSetupError,
    EngineUnavailableError,
    UnknownRunError,
    UsageError,
)
from gym_queue.records import RunState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from gym_queue.api import RunRequest, RunView
    from gym_queue.coordinator.inbox import Inbox
    from gym_queue.coordinator.manifest import Manifest
    from gym_queue.environments.base import Environment
    from gym_queue.ledger.base import Ledger
    from gym_queue.settings import Settings

_Result = TypeVar("_Result")

_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")

_PLANS = 4096
_FINAL_VIEWS = 4096
_INBOXES = 64
"""Inputs that are remembered between two appends: each takes some bytes an example, 8 MiB at most."""

_QUICK_THREADS = 4
_SLOW_THREADS = 8


class Runs:
    """See the module's docstring. All methods but ``close_threads`` are for one event loop.

    They raise ``UnknownRunError`` for a run that is not there, ``StorageError`` where the folder cannot be
    used, and ``LedgerError`` where the ledger cannot: the same call may be made again then.

    Args:
        ledger: where rollouts stand.
        folder: where all heads keep runs (``RUNS_DIR``); made if it is not there.
        settings: what a run's limits begin with.
        environments: returns the environment of a name, or raises ``UsageError``.
        check_model: raises ``EngineSetupError`` or ``EngineUnavailableError`` for a model that cannot work.
        cancel: ends what is open of a run, which is to be cancelled.

    Attributes:
        folder: the same.
        changed: set when a run was made or something is wished of one; the leader of this process clears it.
        on_examples: called with the id of a run that was given examples; the leader of this process listens.
    """

    def __init__(
        self,
        ledger: Ledger,
        folder: Path,
        settings: Settings,
        *,
        environments: Callable[[str], Environment],
        check_model: Callable[[str], None],
        cancel: Callable[[str], Awaitable[object]],
    ) -> None:
        self.folder = folder
        self.changed = asyncio.Event()
        self.on_examples: Callable[[str], None] = lambda _: None
        self._ledger = ledger
        self._settings = settings
        self._environments = environments
        self._check_model = check_model
        self._cancel = cancel
        self._keys = RunKeys(folder)
        self._plans: _Recent[Manifest] = _Recent(_PLANS)
        self._final: _Recent[RunView] = _Recent(_FINAL_VIEWS)
        self._inboxes: _Recent[tuple[asyncio.Lock, Inbox]] = _Recent(_INBOXES)
        # A look at a run must not wait for those who check an endpoint or wait for another's append.
        self._quick = ThreadPoolExecutor(_QUICK_THREADS, "runs-quick")
        self._slow = ThreadPoolExecutor(_SLOW_THREADS, "runs-slow")

    def close_threads(self) -> None:
        """Let the threads end. Waits for what they do."""
        self._quick.shutdown(cancel_futures=True)
        self._slow.shutdown(cancel_futures=True)

    async def create(self, request: RunRequest, key: str | None = None) -> tuple[RunView, bool]:
        """Make a run, or return the one that was made under this key, and whether it was made now (G8).

        Raises:
            UsageError: the request cannot be used, or its model does not answer.
            ConflictError: the key was used with another request.
        """
        digest = run_plan.digest_of(request)
        record = await self._find(key)
        if record is None:
            with _as_wrong_use():
                await self._in(self._slow, self._check_model, request.model)
            plan = await self._in(
                self._slow, run_plan.plan, request, self._settings, self.folder, self._environments
            )
            record = KeyRecord(request_digest=digest, manifest=plan)
            if key is not None and not await self._in(self._slow, self._keys.take, key, record):
                record = await self._find(key) or record
        run_id = record.manifest.spec.run_id
        if record.request_digest != digest:
            msg = f"idempotency key {key!r} was used for run {run_id} with another request"
            raise ConflictError(msg)
        made = await self._in(self._slow, self._folder(run_id).make, record.manifest)
        if made:
            self.changed.set()
        return await self.show(run_id), made

    async def append(self, run_id: str, body: bytes, offset: int | None = None) -> int:
        """Append examples (see ``Inbox.append``) and return how many there are.

        Raises:
            UsageError: a row cannot be used.
            ConflictError: ``offset`` leaves a gap or other rows stand there; or the run takes no more.
        """
        plan = await self._plan(run_id)
        if request_of(plan).environments:
            msg = f"run {run_id} brings its own examples, and takes no others"
            raise ConflictError(msg)
        lock, inbox = await self._inbox(plan)
        async with lock:
            count = await self._in(self._slow, self._append, run_id, inbox, body, offset)
        self.on_examples(run_id)
        return count

    async def close(self, run_id: str) -> RunView:
        """Let no more examples come: the run ends when those that are there have. Safe to repeat."""
        plan = await self._plan(run_id)
        if not request_of(plan).environments:
            lock, inbox = await self._inbox(plan)
            async with lock:
                await self._in(self._slow, inbox.close)
        self.changed.set()
        return await self.show(run_id)

    async def cancel(self, run_id: str) -> RunView:
        """End what is open of a run and begin nothing more, for good. A run that has ended stays as it is."""
        view = await self.show(run_id)
        if view.state is RunState.ENDED or run_id in self._final:
            return view
        await self._wish(run_id, RunState.CANCELLED)
        await self._cancel(run_id)
        return await self.show(run_id)

    async def pause(self, run_id: str) -> RunView:
        """Begin nothing more until ``resume``. Raises ``ConflictError`` for a run that is over."""
        await self._refuse_over(run_id)
        await self._wish(run_id, RunState.PAUSED)
        await self._ledger.set_run_state(run_id, RunState.PAUSED)
        return await self.show(run_id)

    async def resume(self, run_id: str) -> RunView:
        """Go on after ``pause``. Raises ``ConflictError`` for a run that is over."""
        await self._refuse_over(run_id)
        await self._wish(run_id, RunState.OPEN)
        status = await self._ledger.run(run_id)
        if status is not None and status.state is RunState.PAUSED:
            await self._ledger.set_run_state(run_id, RunState.OPEN)
        return await self.show(run_id)

    async def show(self, run_id: str) -> RunView:
        """Return how a run stands: some small files and one question to the ledger, none once it is over."""
        if (known := self._final.get(run_id)) is not None:
            return known
        plan = await self._plan(run_id)
        files = await self._in(self._quick, self._folder(run_id).files)
        status = None if files.written.final else await self._ledger.run(run_id)
        view = view_of(plan, files, status)
        if files.written.final:
            self._final.put(run_id, view)
        return view

    async def list(self, state: RunState | None = None, limit: int = 100) -> list[RunView]:
        """Return runs, of one state or of all, the newest first, at most ``limit``."""
        found: list[RunView] = []
        for run_id in await self._in(self._quick, known_runs, self.folder):
            if len(found) >= limit:
                break
            try:
                view = await self.show(run_id)
            except UnknownRunError:  # deleted meanwhile
                continue
            if state is None or view.state is state:
                found.append(view)
        return found

    def _folder(self, run_id: str) -> RunFolder:
        if not _NAME.fullmatch(run_id):
            raise _unknown(run_id)
        return RunFolder(self.folder / run_id)

    def _append(self, run_id: str, inbox: Inbox, body: bytes, offset: int | None) -> int:
        """Append unless the run is over. Blocks."""
        folder = self._folder(run_id)
        written = folder.written()
        state = written.state if written.final else folder.wish()
        over = state in {RunState.ENDED, RunState.CANCELLED}
        refusal = f"run {run_id} is {state}: it takes no more examples" if over else ""
        return inbox.append(body, offset, refusal=refusal)

    async def _plan(self, run_id: str) -> Manifest:
        plan = self._plans.get(run_id)
        if plan is None:
            plan = await self._in(self._quick, self._folder(run_id).manifest)
            if plan is None:
                raise _unknown(run_id)
            self._plans.put(run_id, plan)
        return plan

    async def _find(self, key: str | None) -> KeyRecord | None:
        return None if key is None else await self._in(self._quick, self._keys.find, key)

    async def _inbox(self, plan: Manifest) -> tuple[asyncio.Lock, Inbox]:
        run_id = plan.spec.run_id
        known = self._inboxes.get(run_id)
        if known is None:
            folder = self._folder(run_id)
            inbox = await self._in(self._slow, folder.inbox, request_of(plan), self._environments)
            known = self._inboxes.get(run_id) or (asyncio.Lock(), inbox)
            self._inboxes.put(run_id, known)
        return known

    async def _refuse_over(self, run_id: str) -> None:
        view = await self.show(run_id)
        if view.state in {RunState.ENDED, RunState.CANCELLED}:
            msg = f"run {run_id} is {view.state}: that is for good"
            raise ConflictError(msg)

    async def _wish(self, run_id: str, wish: RunState) -> None:
        await self._in(self._quick, self._folder(run_id).set_wish, wish)
        self.changed.set()

    async def _in(
        self, threads: ThreadPoolExecutor, do: Callable[..., _Result], /, *arguments: Any
    ) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(threads, do, *arguments)


def known_runs(folder: Path) -> list[str]:
    """Return the ids of all runs in a folder of runs, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _unknown(run_id: str) -> UnknownRunError:
    return UnknownRunError(f"there is no run {run_id!r}")


@contextmanager
def _as_wrong_use() -> Iterator[None]:
    try:
        yield
    except (EngineSetupError, EngineUnavailableError) as error:
        raise UsageError(str(error)) from error


class _Recent(OrderedDict[str, _Result]):
    """The newest so many of something, by run."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def put(self, run_id: str, value: _Result) -> None:
        """Remember one, and forget the one that was put longest ago if there are too many."""
        self[run_id] = value
        self.move_to_end(run_id)
        if len(self) > self._most:
            self.popitem(last=False)
