"""Verifies rollouts and keeps house: one per CPU node. Prefork, so that a hung verifier can be killed."""

from collections.abc import Sequence

from gym_queue import names
from gym_queue.celery_app import decode
from gym_queue.records import Stage
from gym_queue.worker.process import CpuWorker
from gym_queue.worker.tickets import TicketTask

worker = CpuWorker()
app = worker.app


@app.task(name=names.VERIFY_TASK, base=TicketTask)
def verify(run_id: str, example_index: int, samples: Sequence[int], attempt: int, losses: int) -> None:
    """Verify the samples of one ticket."""
    worker.verify(decode(Stage.VERIFY, run_id, example_index, samples, attempt, losses))
