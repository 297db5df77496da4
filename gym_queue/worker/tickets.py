"""What Celery is told of a ticket: a task that knows how many rollouts it covers, a request that knows how
its child ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Task
from celery.worker.request import Request
from celery.worker.state import task_ready

from gym_queue.worker.prefork_pool import ChildEndedError

if TYPE_CHECKING:
    from collections.abc import Sequence


class TicketRequest(Request):
    """A ticket in a worker's hands."""

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> None:
        """Tell the worker when a child of its pool ended in the middle of this. Runs in the parent."""
        error = exc_info.exception
        error = getattr(error, "exc", error)
        if not isinstance(error, ChildEndedError):
            super().on_failure(exc_info, *args, **kwargs)
            return
        task_ready(self)
        self.acknowledge()
        self.send_event("task-failed", exception=repr(error), traceback="")
        self.app.gym_queue_worker.child_ended(error)


class TicketTask(Task):
    """A task whose arguments are a ticket's: run id, example index, samples, attempt, losses."""

    Request = f"{__name__}:{TicketRequest.__qualname__}"

    def slots(
        self, _run_id: str, _example_index: int, samples: Sequence[int], _attempt: int, _losses: int
    ) -> int:
        """Return how many rollouts the ticket covers."""
        return len(samples)
