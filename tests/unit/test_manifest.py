from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.coordinator import manifest
from gym_queue.coordinator.manifest import Manifest
from gym_queue.errors import StorageError, UsageError
from gym_queue.records import Freshness, GroupPolicy, Limits, Record, RunSpec, Sampling

if TYPE_CHECKING:
    from pathlib import Path

SPEC = RunSpec(run_id="one", model="stub:", samples=4, input_fingerprint="a" * 64)
MANIFEST = Manifest(spec=SPEC, examples=64, command=("submit-rollouts", "in.jsonl"))


def changed(**spec: object) -> Manifest:
    return MANIFEST.model_copy(update={"spec": SPEC.model_copy(update=spec)})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "out.run"
    assert manifest.read(run_dir) is None
    manifest.write(run_dir, MANIFEST)
    assert manifest.read(run_dir) == MANIFEST
    assert [path.name for path in run_dir.iterdir()] == ["manifest.json"]


def test_differences_are_sentences() -> None:
    other = changed(
        samples=8, model="hf:x", sampling=Sampling(seed=7, temperature=0.5), input_fingerprint="b" * 64
    ).model_copy(update={"examples": 65})
    assert manifest.differences(MANIFEST, other) == [
        "model was stub:, now hf:x",
        "samples was 4, now 8",
        "the content of the input changed",
        "temperature was 1.0, now 0.5",
        "seed was not set, now 7",
        "examples was 64, now 65",
    ]


def test_another_command_line_place_or_run_id_is_no_difference() -> None:
    other = changed(run_id="two", output="elsewhere:/out.jsonl").model_copy(
        update={"command": ("in.jsonl", "--workers", "3"), "directory": "/elsewhere"}
    )
    assert manifest.differences(MANIFEST, other) == []


@pytest.mark.parametrize(
    "field",
    sorted(set(RunSpec.model_fields) - {"run_id", "output", "sampling", "limits", "groups", "freshness"}),
)
def test_every_setting_that_identifies_a_run_is_compared(field: str) -> None:
    value: Any = getattr(SPEC, field)
    assert len(manifest.differences(MANIFEST, changed(**{field: value + type(value)(1)}))) == 1


FRESH = Freshness(max_staleness=1, groups_per_version=8)


@pytest.mark.parametrize(
    ("name", "part"),
    [("sampling", Sampling()), ("limits", Limits()), ("groups", GroupPolicy()), ("freshness", FRESH)],
)
def test_every_nested_setting_is_compared(name: str, part: Record) -> None:
    before = changed(**{name: part})
    for field in type(part).model_fields:
        value = getattr(part, field)
        other = part.model_copy(update={field: not value if value is False else (value or 0) + 1})
        assert len(manifest.differences(before, changed(**{name: other}))) == 1, field


def test_a_run_may_begin_to_ask_for_fresh_weights() -> None:
    assert manifest.differences(MANIFEST, changed(freshness=FRESH)) == [
        "max_staleness was not set, now 1",
        "groups_per_version was not set, now 8",
    ]


@pytest.mark.parametrize("content", ["", "{", '{"spec": {}}'])
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UsageError, match=r"manifest\.json is damaged or from another version"):
        manifest.read(tmp_path)


def test_a_manifest_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "out.run").write_text("")
    with pytest.raises(StorageError, match=r"manifest\.json cannot be written: "):
        manifest.write(tmp_path / "out.run", MANIFEST)
