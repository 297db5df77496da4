"""Verifies rollouts and keeps house: one per CPU node. Prefork, so that a hung verifier can be killed."""

from collections.abc import Sequence

from gym_queue import names
from gym_queue.maintenance.audit import audit
from gym_queue.maintenance.reap import reap
from gym_queue.records import Stage
from gym_queue.worker import TicketTask, Worker, ticket

worker = Worker("cpu", [names.MAINTENANCE_QUEUE, names.VERIFY_QUEUE])
app = worker.app


@app.task(name=names.VERIFY_TASK, base=TicketTask)
def verify(run_id: str, example_index: int, samples: Sequence[int], attempt: int) -> None:
    """Verify the samples of one ticket."""
    worker.run(worker.pipeline.verify(ticket(Stage.VERIFY, run_id, example_index, samples, attempt)))


@app.task(name=names.SWEEP_TASK)
def sweep() -> None:
    """Look for dead workers, due retries and lost tickets."""
    worker.run(reap(worker.ledger, worker.broker, worker.settings.worker_timeout))
    worker.run(audit(worker.ledger, worker.broker, worker.broker, worker.settings.sweep_interval))
