"""``docs/reference/settings.md`` says what ``Settings`` are, neither more nor less."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gym_queue.settings import Settings, environment, variable

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "settings.md"
ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<default>`[^`]*`|empty) \| (?P<meaning>.+) \|$", re.MULTILINE)


def shown(default: object) -> str:
    """Return a default as the page writes it."""
    if default in ("", None):
        return "empty"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


@pytest.mark.parametrize("field", list(Settings.model_fields))
def test_a_setting_is_documented_with_its_default_and_meaning(field: str) -> None:
    rows = {row["name"]: row for row in ROW.finditer(PAGE.read_text())}
    assert variable(field) in rows, f"{variable(field)} is missing in {PAGE.name}"
    row = rows[variable(field)]
    info = Settings.model_fields[field]
    assert row["default"] == shown(info.default)
    assert info.description is not None
    assert row["meaning"].startswith(info.description), "the page and the field's description must agree"


def test_no_setting_is_made_up() -> None:
    named = {row["name"] for row in ROW.finditer(PAGE.read_text())}
    assert named == {variable(field) for field in Settings.model_fields}


def test_a_child_process_reads_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Settings(
        redis_url="unix:///tmp/a b/redis.sock?db=0",
        concurrency=7,
        sweep_interval=0.5,
        tokenizer_trust_remote_code=True,
        log_level="DEBUG",
        api_key="secret",
    )
    for name, value in environment(ours).items():
        monkeypatch.setenv(name, value)
    assert Settings() == ours
