"""Where examples come from: every bad line has its sentence, every good one arrives once, from any start."""

from __future__ import annotations

import json
import tracemalloc
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from gym_queue.coordinator.source import EnvironmentSource, JsonlSource
from gym_queue.environments.base import Environment
from gym_queue.errors import UsageError, unknown_name
from gym_queue.records import Example

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class _Rows(Environment):
    row_fields: ClassVar[frozenset[str] | None] = frozenset({"prompt"})

    def check(self, example: Example) -> None:
        if "prompt" not in example.row:
            msg = "the row has no 'prompt'"
            raise UsageError(msg)


class _Counted(Environment):
    def __init__(self, brings: int) -> None:
        self._brings = brings

    def examples(self, size: int, seed: int) -> Iterator[Example]:
        for index in range(min(size, self._brings)):
            yield Example(id=f"{seed}-{index}", environment="?", row={"index": index})


def _environments(name: str) -> Environment:
    known: dict[str, Environment] = {"rows": _Rows(), "whole": Environment()}
    if name not in known:
        raise unknown_name(name, known, kind="environment")
    return known[name]


def _source(path: Path, content: str | bytes, limit: int | None = None) -> JsonlSource:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return JsonlSource(path, default_environment="rows", environments=_environments, limit=limit)


def _lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "input.jsonl"


def test_rows_become_examples_with_ids_and_extras(path: Path) -> None:
    rows: list[dict[str, Any]]
    rows = [{"id": "a", "prompt": "x", "level": 3}, {"id": 7, "prompt": "y"}, {"id": None, "prompt": "z"}]
    source = _source(path, "\ufeff" + _lines(rows[0]) + "\n   \n" + _lines(*rows[1:]))
    assert list(source.examples(0)) == [
        Example(id="a", environment="rows", row={"prompt": "x"}, extra={"level": 3}),
        Example(id="7", environment="rows", row={"prompt": "y"}),
        Example(id="row-5", environment="rows", row={"prompt": "z"}),
    ]
    assert source.count == 3
    assert [example.id for example in source.examples(2)] == ["row-5"]
    assert list(source.examples(3)) == []


def test_a_row_may_belong_to_another_environment_that_takes_it_whole(path: Path) -> None:
    source = _source(path, _lines({"id": "a", "environment": "whole", "prompt": "x", "level": 3}))
    expected = Example(id="a", environment="whole", row={"prompt": "x", "level": 3})
    assert list(source.examples(0)) == [expected]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"prompt": "x"', "not JSON"),
        (b"[1]", r"must be a JSON object, not \[1\]"),
        (b'"text"', "must be a JSON object"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "x", "level": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "x", "level": 1e999}', "1e999 is no JSON number"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": ' + b"[" * 100_000, "not JSON that can be used"),
        (b'{"prompt": "x", "level": ' + b'[{"a": ' * 60 + b"1" + b"}]" * 60 + b"}", "more than 100 deep"),
        (b'{"level": 3}', "the row has no 'prompt'"),
        (b'{"prompt": "x", "id": true}', "'id' must be text or a number, not true"),
        (b'{"prompt": "x", "id": ""}', "'id' must be text or a number"),
        (b'{"prompt": "x", "environment": 3}', "'environment' must be a name, not 3"),
        (b'{"prompt": "x", "environment": "row"}', "no environment 'row'; did you mean rows"),
        (b'{"prompt": "x", "id": "first"}', "the id 'first' is taken by line 1"),
        (b'{"prompt": "x", "id": "row-2"}', "the id 'row-2' is taken by line 2"),
    ],
)
def test_a_bad_line_is_named_with_file_number_and_reason(path: Path, line: bytes, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        _source(path, _lines({"id": "first", "prompt": "x"}, {"prompt": "y"}).encode() + b"\n" + line)
    assert str(caught.value).startswith(f"{path} line 4: ")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(path: Path, content: str) -> None:
    with pytest.raises(UsageError, match="is empty"):
        _source(path, content)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "absent", "cannot read .+: No such file"),
        (tmp_path, "cannot read .+: Is a directory"),
    ):
        with pytest.raises(UsageError, match=reason):
            JsonlSource(path, default_environment="rows", environments=_environments)


def test_an_unknown_default_environment_has_no_line_number(path: Path) -> None:
    path.write_text(_lines({"prompt": "x"}))
    with pytest.raises(UsageError, match=r"^there is no environment 'wholes'; did you mean whole"):
        JsonlSource(path, default_environment="wholes", environments=_environments)


def test_a_limit_reads_and_checks_only_so_many(path: Path) -> None:
    content = _lines({"prompt": "x"}, {"prompt": "y"}) + "not json\n"
    source = _source(path, content, limit=2)
    assert source.count == 2
    assert [example.row["prompt"] for example in source.examples(1)] == ["y"]


def test_the_fingerprint_follows_content_and_parameters_not_the_path(path: Path, tmp_path: Path) -> None:
    content = _lines({"prompt": "x"}, {"prompt": "y"})
    fingerprint = _source(path, content).fingerprint
    assert _source(tmp_path / "other", content + "\n").fingerprint == fingerprint
    assert _source(path, content, limit=1).fingerprint != fingerprint
    assert _source(path, content.replace("y", "z")).fingerprint != fingerprint
    path.write_text(content)
    other = JsonlSource(path, default_environment="whole", environments=_environments)
    assert other.fingerprint != fingerprint


def test_a_file_that_changed_after_the_check_is_refused(path: Path) -> None:
    source = _source(path, _lines({"prompt": "x"}))
    path.write_text(_lines({"prompt": "x"}, {"prompt": "y"}))
    with pytest.raises(UsageError, match="has changed since it was checked"):
        next(source.examples(0))


def test_ids_that_share_a_place_in_the_table_are_not_taken_for_repeated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gym_queue.coordinator.source._SEEN_BITS", 3)
    rows = [{"id": f"a{number}", "prompt": "x"} for number in range(50)]
    assert _source(path, _lines(*rows)).count == 50
    with pytest.raises(UsageError, match="line 51: the id 'a17' is taken by line 18"):
        _source(path, _lines(*rows, {"id": "a17", "prompt": "x"}))


def test_memory_does_not_grow_with_the_rows(path: Path) -> None:
    def peak(rows: int) -> int:
        with path.open("w") as file:
            file.writelines(f'{{"id": "example-{number}", "prompt": "x"}}\n' for number in range(rows))
        tracemalloc.start()
        try:
            JsonlSource(path, default_environment="rows", environments=_environments)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(20_000) < peak(200) + 100_000


def test_an_environments_own_examples_carry_its_full_name() -> None:
    source = EnvironmentSource(_Counted(brings=9), "counted?x=1", size=5, seed=3, limit=4)
    assert [(example.id, example.environment) for example in source.examples(2)] == [
        ("3-2", "counted?x=1"),
        ("3-3", "counted?x=1"),
    ]
    assert source.count == 4


def test_an_environments_fingerprint_follows_its_parameters() -> None:
    def fingerprint(name: str = "n", size: int = 5, seed: int = 3, limit: int | None = None) -> str:
        source = EnvironmentSource(_Counted(brings=9), name, size=size, seed=seed, limit=limit)
        return source.fingerprint

    assert fingerprint() == fingerprint()
    others = {fingerprint(name="m"), fingerprint(size=6), fingerprint(seed=4), fingerprint(limit=2)}
    assert len(others | {fingerprint()}) == 5


def test_an_environment_that_brings_too_few_or_none_is_refused() -> None:
    short = EnvironmentSource(_Counted(brings=3), "short", size=5, seed=0)
    with pytest.raises(UsageError, match="asked for 5 examples and brought only 3"):
        list(short.examples(1))
    with pytest.raises(UsageError, match="brought only 0"):
        EnvironmentSource(_Counted(brings=0), "none", size=5, seed=0)
    with pytest.raises(UsageError, match="environment bare: Environment brings no examples of its own"):
        EnvironmentSource(Environment(), "bare", size=5, seed=0)
