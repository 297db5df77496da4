"""``docs/reference/command.md`` says what ``gym-queue --help`` says, and its examples can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from gym_queue.cli.main import main
from gym_queue.cli.status import OPERATOR

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "command.md").read_text()
PAGES = PAGE + (ROOT / "README.md").read_text()


def commands(context: click.Context) -> Iterator[click.Context]:
    """Yield a context for each command below a group."""
    group = context.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, parent=context, info_name=name)
        yield inner
        if isinstance(command, click.Group):
            yield from commands(inner)


CONTEXTS = {context.command_path: context for context in commands(click.Context(main, info_name=OPERATOR))}
EXAMPLES = sorted(set(re.findall(r"^\$ gym-queue (.*)$", PAGES, flags=re.MULTILINE)))


def heading(context: click.Context) -> str:
    arguments = [p.make_metavar(context) for p in context.command.params if isinstance(p, click.Argument)]
    return " ".join([context.command_path, *arguments])


def section(context: click.Context) -> str:
    """Return what the page says of a command."""
    found = re.search(rf"^## {re.escape(heading(context))}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"no section {heading(context)}"
    return found[1]


@pytest.mark.parametrize("path", CONTEXTS)
def test_a_command_is_described_as_its_help_does(path: str) -> None:
    text, context = section(CONTEXTS[path]), CONTEXTS[path]
    first = (context.command.help or "").split("\n\n")[0].replace("\n", " ")
    assert text.lstrip().startswith(f"{first}\n")
    assert f"$ {path} " in text or f"$ {path}\n" in text, "it has an example"


@pytest.mark.parametrize("path", CONTEXTS)
def test_a_commands_flags_are_described_as_its_help_does(path: str) -> None:
    context = CONTEXTS[path]
    records = [
        record
        for parameter in context.command.params
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context))
    ]
    told = {flags.rpartition("--")[2]: meaning for flags, meaning in records}
    rows = re.findall(r"^\| `--([^`]+)` \| (.+) \|$", section(context), flags=re.MULTILINE)
    assert {flag.replace("--", ""): meaning for flag, meaning in rows} == told


def test_no_command_is_made_up() -> None:
    assert sorted(re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)) == sorted(
        heading(context) for context in CONTEXTS.values()
    )


@pytest.mark.parametrize("words", EXAMPLES)
def test_an_example_can_be_typed(words: str) -> None:
    context, rest = click.Context(main, info_name=OPERATOR), shlex.split(words)
    while isinstance(context.command, click.Group) and rest:
        name, command, rest = context.command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, rest, parent=context)
        rest = [*context._protected_args, *context.args] if isinstance(command, click.Group) else []
