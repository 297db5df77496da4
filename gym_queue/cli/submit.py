"""``submit-rollouts``: flags in, exit status out. Heavy imports wait until the flags are known to be good."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gym_queue.cli.flags import VERSION
from gym_queue.cli.options import Options
from gym_queue.cli.status import INTERRUPTED, WRONG_USE, say
from gym_queue.errors import GymQueueError

_EPILOG = """\
MODEL is http(s)://.../v1 (an OpenAI-compatible endpoint), hf:PATH_OR_NAME (transformers, in the worker) or
stub: (for tests). ENVIRONMENT is rows (the default for INPUT), reasoning_gym:DATASET or python:MODULE:CLASS.

With --head or HEAD_SERVER_URL, the fleet of that head does the work: nothing is started here, and Ctrl-C
stops following the run, which goes on there; --resume follows it again.

With GYM_QUEUE_REDIS_URL set, every worker on that Redis does its share; --workers 0 --verifiers 0 starts none
here.

Exit status: 0 all rollouts succeeded, 1 some failed or were cancelled or the run broke off, 2 wrong use,
130 interrupted.
"""

_COUNT = click.IntRange(min=1)
_COUNT_OR_NONE = click.IntRange(min=0)


class _Remembering(click.Command):
    """A command that knows its arguments as they were typed, to say them again."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[__name__] = tuple(args)
        return super().parse_args(ctx, args)


@click.command(
    cls=_Remembering,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.argument("input", required=False, type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Which model acts; see below.")
@click.option("--samples", type=_COUNT, default=1, show_default=True, help="Rollouts of each example.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the rollouts go: OUT.jsonl."
)
@click.option("--environment", help="Environment of rows that name none, or of --size examples of its own.")
@click.option("--size", type=_COUNT, help="How many examples an environment shall make.")
@click.option("--resume", is_flag=True, help="Continue what an earlier command left in --output.")
@click.option(
    "--retry",
    metavar="CLASS[,CLASS...]",
    help="With --resume: do the failed rollouts of these classes again (infrastructure, timeout, ...).",
)
@click.option(
    "--head",
    envvar="HEAD_SERVER_URL",
    metavar="URL",
    help="Let the fleet of this head do the work, and write its rows here.",
)
@click.option("--limit", type=_COUNT, help="Use only so many examples.")
@click.option(
    "--concurrency", type=_COUNT, help="Rollouts that one GPU worker holds at once.  [default: 256]"
)
@click.option("--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True)
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True)
@click.option("--max-tokens", type=_COUNT, default=512, show_default=True, help="Longest answer, per turn.")
@click.option(
    "--seed", type=click.IntRange(min=0), help="Same seed: same examples and, if the model can, samples."
)
@click.option("--priority", type=int, default=0, show_default=True, help="Higher goes first among runs.")
@click.option(
    "--workers", type=_COUNT_OR_NONE, default=1, show_default=True, help="Worker processes that generate."
)
@click.option(
    "--verifiers", type=_COUNT_OR_NONE, default=1, show_default=True, help="Worker processes that verify."
)
@VERSION
@click.pass_context
def main(context: click.Context, /, **flags: object) -> None:
    """Collect rollouts: let a model act on every example, verify what it did, and write it down.

    INPUT has one example a line: {"id"?, "messages" | "prompt", "answer"?, "verifier"?, "environment"?, ...}.
    Fields that we do not know are kept and come back. Without INPUT, --environment and --size make examples.
    """
    try:
        options = Options(**flags, command=context.meta[__name__], given=_given(context))  # type: ignore[arg-type]
        options.check()
        from gym_queue.cli.execution import execute  # noqa: PLC0415 - heavy: all else hangs on it

        status = execute(options)
    except GymQueueError as error:
        say(str(error))
        status = WRONG_USE
    except KeyboardInterrupt:
        say("interrupted before anything was started")
        status = INTERRUPTED
    sys.exit(status)


def _given(context: click.Context) -> frozenset[str]:
    """Return the names of the flags that were typed."""
    typed = click.core.ParameterSource.COMMANDLINE
    return frozenset(name for name in context.params if context.get_parameter_source(name) is typed)


if __name__ == "__main__":
    main()
