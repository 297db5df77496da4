"""Generates rollouts: one per GPU node, thousands of rollouts at once on one event loop."""

from collections.abc import Sequence

from gym_queue import names
from gym_queue.celery_app import decode
from gym_queue.records import Stage
from gym_queue.worker.process import GpuWorker
from gym_queue.worker.tickets import TicketTask

worker = GpuWorker()
app = worker.app


@app.task(name=names.GENERATE_TASK, base=TicketTask)
async def generate(
    run_id: str, example_index: int, samples: Sequence[int], attempt: int, losses: int
) -> None:
    """Generate the samples of one ticket."""
    await worker.pipeline.generate(decode(Stage.GENERATE, run_id, example_index, samples, attempt, losses))
