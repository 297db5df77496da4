"""``docs/reference/output.md`` describes the fields of the output files: all of them, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gym_queue.coordinator.latency import Latency
from gym_queue.coordinator.metrics import (
    STAGES,
    ExampleCounts,
    Healed,
    RewardMetrics,
    RolloutCounts,
    RunMetrics,
    TokenCounts,
)
from gym_queue.output import ROW_FIELDS, FailedRow, RolloutRow, SucceededRow
from gym_queue.records import FailureClass, Timings, Tokens, Usage

if TYPE_CHECKING:
    from pydantic import BaseModel

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "output.md").read_text()

SECTIONS: dict[str, type[BaseModel]] = {
    "Every row": RolloutRow,
    "Rows of succeeded rollouts": SucceededRow,
    "Rows of failed and cancelled rollouts": FailedRow,
    "trajectory": Tokens,
    "usage": Usage,
    "timings": Timings,
    "Metrics": RunMetrics,
    "rollouts": RolloutCounts,
    "examples": ExampleCounts,
    "reward": RewardMetrics,
    "tokens": TokenCounts,
    "healed": Healed,
    "latency": Latency,
}


def documented(section: str) -> list[str]:
    """Return the fields in the table of a section."""
    match = re.search(rf"^##+ {section}\n(.*?)(?=^##+ |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert match, f"no section {section}"
    return re.findall(r"^\| `(\w+)` \| \w[^|]* \| \S[^|]* \|$", match[1], flags=re.MULTILINE)


def fields(record: type[BaseModel]) -> list[str]:
    """Return the names of a record's fields as JSON has them, without those that every row has."""
    common = RolloutRow.model_fields if record is not RolloutRow and issubclass(record, RolloutRow) else {}
    return [field.alias or name for name, field in record.model_fields.items() if name not in common]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_is_documented_and_every_documented_field_exists(section: str) -> None:
    assert sorted(documented(section)) == sorted(fields(SECTIONS[section]))


def test_every_section_with_fields_is_compared() -> None:
    sections = re.findall(r"^##+ (.+)\n(?:(?!#).*\n)*?\| field \|", PAGE, flags=re.MULTILINE)
    assert sections == list(SECTIONS)


def test_every_failure_class_and_stage_is_documented() -> None:
    for name in (*FailureClass, *STAGES):
        assert f"`{name}`" in PAGE


def test_rows_reserve_their_names_in_both_files() -> None:
    names = {name for record in (RolloutRow, SucceededRow, FailedRow) for name in fields(record)}
    assert names | {"failure_class"} == ROW_FIELDS
