"""Celery's prefork pool for verifiers: a child that dies is replaced at once, and one that hangs is killed.

A verifier may run any code, so nothing inside its process can be trusted to stop it. The parent does: each
child writes into memory that they share until when its verifier may run, and the parent looks there, and for
dead children, four times a second. (Celery watches a pipe that closes when a child ends. It closes a moment
before the child can be waited for, so Celery mostly finds it alive, and looks again after 5 seconds.)
"""

from __future__ import annotations

import gc
import logging
import mmap
import os
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from billiard.process import current_process
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool

from gym_queue import names
from gym_queue.celery_app import decode
from gym_queue.deadline import STANDSTILL
from gym_queue.pipeline import attempt_of, attempts_of
from gym_queue.records import FailureClass, Ticket
from gym_queue.worker import shutdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gym_queue.pipeline import Attempt
    from gym_queue.records import Fence

_log = logging.getLogger(__name__)

_CHECK_EVERY = 0.25
"""Seconds."""

_MARGIN = 1.0
"""Seconds that a verifier has, past its deadline, to give up by itself."""

MOST_CHILDREN = 1024
"""More would have no place in memory that is shared."""


class Deadlines:
    """Until when each child's verifier may run (0: there is nothing to watch), and how many seconds that gave
    it. In anonymous memory, which children inherit, and with it a clock: ``time.monotonic()``, which all
    processes share, without the time that the parent stood still.
    """

    def __init__(self, children: int) -> None:
        self._table = memoryview(mmap.mmap(-1, 2 * 8 * (children + 1))).cast("d", (children + 1, 2))
        self._standstill = children, 0

    def _now(self) -> float:
        return time.monotonic() - float(self._table[self._standstill])

    def stood_still(self, seconds: float) -> None:
        """The parent did not run for so long, and most likely neither did its children: they lose nothing."""
        self._table[self._standstill] += seconds

    def write(self, child: int, seconds: float | None) -> None:
        """A verifier has ``seconds`` from now on; ``None``: it is done."""
        if seconds is None:
            self._table[child, 0] = 0.0
        else:
            self._table[child, 1] = seconds
            self._table[child, 0] = self._now() + seconds

    def overdue(self, child: int) -> float | None:
        """Return how many seconds a verifier was given, if it has had them."""
        until, seconds = self._table[child, 0], self._table[child, 1]
        return seconds if until and self._now() > until + _MARGIN else None


DEADLINES = Deadlines(MOST_CHILDREN)


def watch(seconds: float | None) -> None:
    """Ask this process's parent to end it if its verifier is not done in time; ``None``: it is done."""
    DEADLINES.write(current_process().index, seconds)


class ChildEndedError(WorkerLostError):
    """A child of the pool ended in the middle of a ticket."""

    def __init__(self, ticket: Ticket, failure_class: FailureClass, sentence: str) -> None:
        super().__init__(sentence)
        self.ticket = ticket
        self.failure_class = failure_class


class _Reason(NamedTuple):
    failure_class: FailureClass
    sentence: str


class _Children(AsynPool):
    """The processes. Everything here runs on the parent's main thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._reasons: dict[int, _Reason] = {}
        self._looked_at = time.monotonic()
        super().__init__(*args, **kwargs)

    @property
    def timers(self) -> dict[Any, float]:
        """What Celery's event loop calls, and how often."""
        return {self.look_after: _CHECK_EVERY}

    def look_after(self) -> None:
        """Kill children that are overdue; notice and replace those that are dead."""
        gone, self._looked_at = time.monotonic() - self._looked_at, time.monotonic()
        if gone > STANDSTILL:
            DEADLINES.stood_still(gone)
        for process in self._pool:
            if (seconds := DEADLINES.overdue(process.index)) is not None:
                self.end(process.pid, FailureClass.TIMEOUT, f"verifying took longer than {seconds:g} s")
        self.maintain_pool()

    def end(self, pid: int, failure_class: FailureClass, sentence: str) -> None:
        """Kill a child; ``_join_exited_workers`` finds it dead, and the reason here."""
        process, _ = self._process_by_pid(pid)
        if process is not None and pid not in self._reasons:
            self._reasons[pid] = _Reason(failure_class, sentence)
            process._controlled_termination = True  # noqa: SLF001 - so that billiard does not complain
            os.kill(pid, signal.SIGKILL)

    def on_job_process_lost(self, job: Any, pid: int, exitcode: int) -> None:
        """A job's process has ended before the job: say how."""
        if job.ticket is None:
            super().on_job_process_lost(job, pid, exitcode)
            return
        unasked = _Reason(FailureClass.INFRASTRUCTURE, f"the verifier's process {_how(exitcode)}")
        reason = self._reasons.get(pid, unasked)
        try:
            raise ChildEndedError(job.ticket, *reason)  # noqa: TRY301 - billiard wants it raised
        except ChildEndedError:
            job._set(None, (False, ExceptionInfo()))  # noqa: SLF001 - billiard's own way to say so

    def _create_worker_process(self, i: int) -> Any:
        DEADLINES.write(i, None)
        alive = {process.pid for process in self._pool}
        self._reasons = {pid: reason for pid, reason in self._reasons.items() if pid in alive}
        return super()._create_worker_process(i)

    def busy(self) -> list[Any]:
        """Return the jobs that have not ended. Any thread may ask."""
        return list(self._cache.values())

    def kill(self) -> None:
        """End all at once. What they were doing is handed back by whoever knows what they own."""
        for job in self.busy():
            job.discard()
        for process in self._pool:
            process._controlled_termination = True  # noqa: SLF001 - the same
            os.kill(process.pid, signal.SIGKILL)
        self.terminate()


def _how(exitcode: int) -> str:
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with exit status {exitcode}"


_STAGE_OF_TASK = {task: stage for stage, task in names.TASK_OF_STAGE.items()}


class PreforkPool(TaskPool):
    """See the module's docstring."""

    Pool = _Children
    _pool: Any
    _hub: Any = None

    def on_start(self) -> None:
        """Fork the children. What was imported until now is none of any process's garbage: whoever looks for
        some writes into each object, and so makes a copy of all that the processes share.
        """
        gc.collect()
        gc.freeze()
        super().on_start()
        self.on_apply = self._apply

    def register_with_event_loop(self, loop: Any) -> None:
        """Learn which event loop Celery turns on the main thread. Runs after each (re)connect."""
        self._hub = loop
        super().register_with_event_loop(loop)

    def _apply(self, target: Any, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
        """Hand a job to a child. ``args`` is what Celery gives to its tracer: name, id, request and more."""
        job = self._pool.apply_async(target, args, kwargs or {}, **options)
        if job is not None:  # the pool is not closing
            stage = _STAGE_OF_TASK.get(args[0])
            job.ticket = decode(stage, *args[2]["args"]) if stage else None  # else one of Celery's own tasks
        return job

    def _jobs(self) -> Iterator[Any]:
        return iter(self._pool.busy() if self._pool is not None else ())

    @property
    def used(self) -> int:
        """Tickets in the pool. Any thread may ask."""
        return len(list(self._jobs()))

    def running(self) -> frozenset[Attempt]:
        """Return the attempts whose tickets are in the pool. Any thread may ask."""
        tickets = (getattr(job, "ticket", None) for job in self._jobs())
        return frozenset(attempt for ticket in tickets if ticket for attempt in attempts_of(ticket))

    def drop(self, fences: Iterable[Fence]) -> None:
        """Kill the children that verify these, and nothing else. On the main thread.

        Their end is reported as any other, and changes nothing: what they had is no longer this worker's.
        """
        unwanted = {attempt_of(fence) for fence in fences}
        for job in self._jobs():
            if job.accepted() and job.ticket and unwanted.issuperset(attempts_of(job.ticket)):
                (pid,) = job.worker_pids()
                self._pool.end(pid, FailureClass.INFRASTRUCTURE, "it was taken away from this worker")

    def on_close(self) -> None:
        """Start nothing more; what runs goes on, and is looked after."""
        self._pool._putlock.clear()  # noqa: SLF001 - requests that wait for a free child

    def on_stop(self) -> None:
        """Let verifiers end within the grace period, then kill them: the worker hands their work back."""
        until = time.monotonic() + float(self.app.conf.shutdown_grace)
        if self.used:
            _log.info("%d verifiers at work; waiting up to %g s", self.used, self.app.conf.shutdown_grace)
        turn = self._hub.create_loop() if self._hub else iter(())
        while self.used and time.monotonic() < until and not shutdown.is_urgent():
            try:
                next(turn)
            except StopIteration:
                turn = self._hub.create_loop()
            except Exception as error:  # noqa: BLE001 - the broker may be away; the children matter now
                _log.debug("while waiting for verifiers: %r", error)
                turn = self._hub.create_loop()
                time.sleep(_CHECK_EVERY)
        pool, self._pool = self._pool, None
        pool.kill()

    on_terminate = on_stop
