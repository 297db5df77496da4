"""``gym-queue``, the operator's command: a thin group; each family of commands has a file of its own."""

from __future__ import annotations

import sys

import click

from gym_queue.cli.doctor import doctor
from gym_queue.cli.flags import VERSION
from gym_queue.cli.head import head
from gym_queue.cli.overview import status, workers
from gym_queue.cli.rollouts import cancel, why
from gym_queue.cli.runs import runs
from gym_queue.cli.status import INTERRUPTED, OPERATOR, WRONG_USE, say
from gym_queue.cli.up import up
from gym_queue.errors import GymQueueError

_EPILOG = """\
RUN is a run's id, looked up in the ledger of GYM_QUEUE_REDIS_URL, or the path of its output OUT.jsonl: then
the Redis of the run's own stack is asked while that is up, and else the files. ROLLOUT is
RUN.EXAMPLE.SAMPLE, the rollout_id in the output's rows.

Exit status: 0 answered or done, 2 wrong use, nobody knows the run, or nobody can be asked.
"""


class _Plain(click.Group):
    """Answers what cannot be done with one sentence."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except GymQueueError as error:
            say(str(error), OPERATOR)
            sys.exit(WRONG_USE)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


@click.group(
    cls=_Plain,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@VERSION
def main() -> None:
    """See what runs, rollouts and workers do, and steer them."""


for command in (why, cancel, runs, workers, status, doctor, head, up):
    main.add_command(command)


if __name__ == "__main__":
    main(prog_name=OPERATOR)
