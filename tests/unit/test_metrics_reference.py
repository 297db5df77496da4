"""``docs/reference/metrics.md`` says which metrics there are, neither more nor less."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gym_queue.telemetry import catalogue

if TYPE_CHECKING:
    from gym_queue.telemetry.catalogue import Definition

DOCS = Path(__file__).parents[2] / "docs" / "reference"
ROW = re.compile(
    r"^\| `(?P<name>gym_queue_\w+)` \| (?P<kind>\w+) \| (?P<labels>[^|]+) \| (?P<meaning>[^|]+) \|$",
    re.MULTILINE,
)


def row_of(definition: Definition) -> tuple[str, str, str, str]:
    labels = ", ".join(f"`{label}`" for label in definition.labels) or "none"
    return definition.name, definition.kind, labels, definition.meaning


@pytest.mark.parametrize(
    ("title", "definitions"),
    [
        ("Of the whole fleet", catalogue.FLEET),
        ("Of one worker", catalogue.WORKER),
        ("Of beat", catalogue.BEAT),
    ],
)
def test_the_page_lists_what_is_defined(title: str, definitions: tuple[Definition, ...]) -> None:
    (section,) = re.findall(
        rf"^## {title}.*?(?=^## )", (DOCS / "metrics.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert [found.groups() for found in ROW.finditer(section)] == [*map(row_of, definitions)]


def test_every_definition_is_on_one_of_the_lists() -> None:
    defined = {value for value in vars(catalogue).values() if isinstance(value, catalogue.Definition)}
    assert defined == {*catalogue.FLEET, *catalogue.WORKER, *catalogue.BEAT}
    assert len({definition.name for definition in defined}) == len(defined)
