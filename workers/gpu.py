"""Generates rollouts: one per GPU node, thousands of rollouts at once on one event loop."""

from collections.abc import Sequence

from gym_queue import names
from gym_queue.asyncio_pool import FollowPrefetch
from gym_queue.records import Stage
from gym_queue.settings import Settings
from gym_queue.worker import TicketTask, Worker, ticket

worker = Worker(
    "gpu", [names.ROLLOUT_QUEUE], pool="gym_queue.asyncio_pool:AsyncioPool", slots=Settings().concurrency
)
app = worker.app
app.steps["consumer"].add(FollowPrefetch)


@app.task(name=names.GENERATE_TASK, base=TicketTask)
async def generate(run_id: str, example_index: int, samples: Sequence[int], attempt: int) -> None:
    """Generate the samples of one ticket."""
    await worker.pipeline.generate(ticket(Stage.GENERATE, run_id, example_index, samples, attempt))
