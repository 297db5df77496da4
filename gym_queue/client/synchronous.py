"""``gym_queue.Client``: the same as ``AsyncClient``, for code without an event loop (a trainer, a script).

One thread in the background does the work; every method here waits for its namesake there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, Unpack

from gym_queue.client.asynchronous import PATIENCE, SILENCE, AsyncClient
from gym_queue.client.background import BackgroundLoop
from gym_queue.client.run import FAILURES_SHOWN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from gym_queue.api import RunView
    from gym_queue.client.asynchronous import RunFields
    from gym_queue.client.batches import Examples
    from gym_queue.client.deliveries import Group, Rollout
    from gym_queue.client.run import AsyncRun
    from gym_queue.records import Weights


class Run:
    """One run; see ``AsyncRun``, whose methods these are."""

    def __init__(self, loop: BackgroundLoop, run: AsyncRun) -> None:
        self.run_id = run.run_id
        self._loop = loop
        self._run = run

    def __repr__(self) -> str:
        return repr(self._run).replace("AsyncRun", "Run")

    def status(self) -> RunView:
        """Return where the run stands now."""
        return self._loop.call(self._run.status())

    def metrics(self) -> dict[str, Any]:
        """Return the run's metrics so far, as they stand in ``OUT.metrics.json``."""
        return self._loop.call(self._run.metrics())

    def failures(self, failure_class: str | None = None, limit: int = FAILURES_SHOWN) -> list[dict[str, Any]]:
        """Return which rollouts failed, all or those of a class; see ``AsyncRun.failures``."""
        return self._loop.call(self._run.failures(failure_class, limit))

    def cancel(self) -> RunView:
        """End the run: nothing new is begun, what is open ends as cancelled."""
        return self._loop.call(self._run.cancel())

    def pause(self) -> RunView:
        """Begin nothing new until ``resume``."""
        return self._loop.call(self._run.pause())

    def resume(self) -> RunView:
        """Go on after ``pause``."""
        return self._loop.call(self._run.resume())

    def close(self) -> RunView:
        """Say that no more examples will come: the run ends once all that it has have ended."""
        return self._loop.call(self._run.close())

    def append(self, examples: Examples, *, offset: int | None = None) -> int:
        """Give the run more examples, and return how many it has then; see ``AsyncRun.append``."""
        return self._loop.call(self._run.append(examples, offset=offset))

    def flush(self) -> None:
        """Wait until the head has all examples that ``submit`` was given. Raises what went wrong."""
        self._loop.call(self._run.flush())

    def groups(self, cursor: str | None = None, *, dropped: bool = False) -> Iterator[Group]:
        """Yield each group as it is decided, once, until the run has ended; see ``AsyncRun.groups``."""
        return self._loop.iterate(self._run.groups(cursor, dropped=dropped))

    def rollouts(self, cursor: str | None = None) -> Iterator[Rollout]:
        """Yield each rollout as it ends, once, until the run has ended; see ``AsyncRun.rollouts``."""
        return self._loop.iterate(self._run.rollouts(cursor))


class Client:
    """A client of one head, for threads; ``with`` closes it. Arguments and errors are ``AsyncClient``'s.

    A process that was forked from one with a client makes its own: the old one says so.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        patience: float = PATIENCE,
        silence: float = SILENCE,
    ) -> None:
        self._client = AsyncClient(url, token, patience=patience, silence=silence)
        self._loop = BackgroundLoop(self._client.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self.close()

    def submit(
        self,
        *,
        examples: Examples | None = None,
        idempotency_key: str | None = None,
        **request: Unpack[RunFields],
    ) -> Run:
        """Create a run; its examples follow in the background, and then it is closed.

        See ``AsyncClient.submit``.
        """
        work = self._client.submit(examples=examples, idempotency_key=idempotency_key, **request)
        return Run(self._loop, self._loop.call(work))

    def run(self, run_id: str) -> Run:
        """Take up a run that was submitted before, here or elsewhere. Raises ``NotFoundError``."""
        return Run(self._loop, self._loop.call(self._client.run(run_id)))

    def runs(self, state: str | None = None, limit: int | None = None) -> list[RunView]:
        """List runs, the newest first, all or those in one state (open, paused, cancelled, ended)."""
        return self._loop.call(self._client.runs(state, limit))

    def announce(self, model: str, version: int, uri: str = "") -> Weights:
        """Announce weights of a model; see ``AsyncClient.announce``."""
        return self._loop.call(self._client.announce(model, version, uri))

    def workers(self) -> list[dict[str, Any]]:
        """List the workers that hold a lease, each as it describes itself."""
        return self._loop.call(self._client.workers())

    def why(self, rollout_id: str) -> str:
        """Say in one sentence what a rollout is waiting for, or how it ended."""
        return self._loop.call(self._client.why(rollout_id))

    def flush(self) -> None:
        """Wait until the head has all examples of all runs. Raises what went wrong first."""
        self._loop.call(self._client.flush())

    def close(self) -> None:
        """Stop appending, close all connections and end the thread. The runs go on. Safe to repeat."""
        self._loop.close()
