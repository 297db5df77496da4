"""The appended input of a run: all or nothing, once, in order, whoever dies (G3, G8)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.coordinator import inbox, inbox_index
from gym_queue.coordinator.example_rows import ExampleRows
from gym_queue.coordinator.inbox import AppendedSource, Inbox
from gym_queue.environments.base import Environment
from gym_queue.errors import ConflictError, DiskFullError, UsageError, unknown_name
from tests.unit.test_source import _Rows

if TYPE_CHECKING:
    from pathlib import Path


def environments(name: str) -> Environment:
    known: dict[str, Environment] = {"rows": _Rows(), "whole": Environment()}
    if name not in known:
        raise unknown_name(name, known, kind="environment")
    return known[name]


def example_rows() -> ExampleRows:
    return ExampleRows("rows", environments)


def opened(folder: Path) -> Inbox:
    return Inbox(folder, example_rows())


def source_of(folder: Path) -> AppendedSource:
    return AppendedSource(folder, example_rows())


def body(*prompts: str, **fields: Any) -> bytes:
    return b"".join(json.dumps({"prompt": prompt} | fields).encode() + b"\n" for prompt in prompts)


def named(*ids: str) -> bytes:
    return b"".join(json.dumps({"id": name, "prompt": "x"}).encode() + b"\n" for name in ids)


def prompts(source: AppendedSource, start: int = 0) -> list[str]:
    return [example.row["prompt"] for example in source.examples(start)]


def test_what_is_appended_is_read_in_order_from_any_start(tmp_path: Path) -> None:
    writer, source = opened(tmp_path), source_of(tmp_path)
    assert (source.count, source.closed, prompts(source) if source.count else []) == (0, False, [])
    assert writer.append(body("a", "b"), None) == 2
    assert source.count == 2
    assert writer.append(b"\n  \n" + body("c", level=3).rstrip() + b"\n\n" + body("d"), None) == 4
    assert (source.count, source.closed) == (4, False)
    assert [(example.id, example.row, example.extra) for example in source.examples(1)] == [
        ("row-2", {"prompt": "b"}, {}),
        ("row-3", {"prompt": "c"}, {"level": 3}),
        ("row-4", {"prompt": "d"}, {}),
    ]
    assert writer.close() == writer.close() == 4
    assert (source.closed, source.count) == (True, 4)
    assert list(source.examples(4)) == []


def test_an_input_that_is_closed_is_not_looked_at_again(tmp_path: Path) -> None:
    writer, source = opened(tmp_path), source_of(tmp_path)
    writer.append(body("a", "b"), None)
    writer.close()
    assert source.closed
    (tmp_path / "examples.index").unlink()
    assert (source.closed, source.count, prompts(source)) == (True, 2, ["a", "b"])


def test_an_iteration_ends_with_what_was_there_when_it_began(tmp_path: Path) -> None:
    writer, source = opened(tmp_path), source_of(tmp_path)
    writer.append(body("a", "b"), None)
    examples = source.examples(0)
    assert next(examples).id == "row-1"
    writer.append(body("c"), None)
    assert [example.id for example in examples] == ["row-2"]


@pytest.mark.guarantee("G8")
def test_a_call_with_an_offset_that_is_repeated_appends_once(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    assert writer.append(body("a", "b"), 0) == 2
    assert writer.append(body("c", "d"), 2) == 4
    for again in (writer, opened(tmp_path)):
        assert again.append(body("c", "d"), 2) == 4
        assert again.append(body("a", "b"), 0) == 4
        assert again.append(b"", 4) == 4
    assert writer.append(body("d", "e"), 3) == 5  # in part there already
    assert prompts(source_of(tmp_path)) == ["a", "b", "c", "d", "e"]


def test_a_gap_another_row_and_a_closed_run_are_conflicts(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    writer.append(body("a", "b"), None)
    with pytest.raises(ConflictError, match=r"^the run has 2 examples: rows from 3 on would leave a gap$"):
        writer.append(body("c"), 3)
    with pytest.raises(ConflictError, match=r"^line 3: the run has another example 1 already$"):
        writer.append(body("a") + b"\n" + body("c"), 0)
    writer.close()
    assert writer.append(body("a", "b"), 0) == 2  # a repeated call is answered all the same
    with pytest.raises(ConflictError, match="the run is closed: it has 2 examples and takes no more"):
        writer.append(body("a", "b", "c"), 0)
    with pytest.raises(ConflictError, match="the run is closed"):
        writer.append(body("c"), None)
    assert prompts(source_of(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"prompt": "x"', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[1]", "must be a JSON object"),
        (b'{"level": 3}', "the row has no 'prompt'"),
        (b'{"prompt": "x", "environment": "row"}', "no environment 'row'; did you mean rows"),
        (b'{"prompt": "x", "id": "first"}', "the id 'first' is taken by example 0 of the run"),
        (b'{"prompt": "x", "id": "row-3"}', "the id 'row-3' is taken by line 1"),
        (b'{"prompt": "x", "id": "row-2"}', "the id 'row-2' is taken by example 1 of the run"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_nothing_is_taken(
    tmp_path: Path, line: bytes, sentence: str
) -> None:
    writer = opened(tmp_path)
    writer.append(named("first") + body("y"), None)
    for one in (writer, opened(tmp_path)):  # which has to learn first what ids there are
        with pytest.raises(UsageError, match=sentence) as caught:
            one.append(body("new") + b"\n" + line + b"\n" + body("newer"), None)
        assert str(caught.value).startswith("line 3: ")
    assert prompts(source_of(tmp_path)) == ["x", "y"]
    assert writer.append(body("new"), None) == 3


def test_ids_that_share_a_place_in_the_table_are_not_taken_for_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "_LEAST_BITS", 32)
    monkeypatch.setattr(inbox, "_MOST_BITS", 32)
    writer = opened(tmp_path)
    for number in range(50):
        writer.append(named(f"a{number}"), number)
    with pytest.raises(UsageError, match="line 2: the id 'a17' is taken by example 17 of the run"):
        writer.append(named("b", "a17"), None)
    assert source_of(tmp_path).count == 50


class Killed(BaseException):
    """Nothing of the process goes on after this."""


class Death:
    """Kills the process at its ``moment``-th write or sync, a write when ``share`` of it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, moment: int, share: float) -> None:
        self.left, self.share = moment, share
        self.pwrite, self.sync = os.pwrite, os.fdatasync
        monkeypatch.setattr(os, "pwrite", self.dying_write)
        monkeypatch.setattr(os, "fdatasync", self.dying_sync)

    def dying_write(self, descriptor: int, data: memoryview, place: int) -> int:
        self.left -= 1
        if self.left == 0:
            self.pwrite(descriptor, data[: int(len(data) * self.share)], place)
            raise Killed
        return self.pwrite(descriptor, data, place)

    def dying_sync(self, descriptor: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed
        self.sync(descriptor)


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_a_writer_that_dies_at_any_write_leaves_all_or_nothing(
    tmp_path: Path, moment: int, share: float
) -> None:
    """And the client, who has no answer, repeats its call."""
    opened(tmp_path).append(body("a", "b"), 0)
    with pytest.MonkeyPatch.context() as patches:
        Death(patches, moment, share)
        with pytest.raises(Killed):
            opened(tmp_path).append(body("c", "d", "e"), 2)
    source = source_of(tmp_path)
    assert source.count in {2, 5}
    assert prompts(source) == ["a", "b", "c", "d", "e"][: source.count]
    assert opened(tmp_path).append(body("c", "d", "e"), 2) == 5
    assert opened(tmp_path).append(body("f"), 5) == 6
    for reader in (source, source_of(tmp_path)):
        assert (reader.count, prompts(reader)) == (6, ["a", "b", "c", "d", "e", "f"])


def test_the_moments_of_death_are_all_there_are(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patches:
        Death(patches, 5, 0.0)
        assert opened(tmp_path).append(body("c"), 0) == 1


def test_a_disk_that_is_full_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = opened(tmp_path)
    writer.append(body("a"), None)
    with monkeypatch.context() as patches:
        patches.setattr(os, "fdatasync", _full)
        with pytest.raises(DiskFullError, match=r"examples.jsonl cannot be written: No space left"):
            writer.append(named("b"), None)
    assert source_of(tmp_path).count == 1
    assert writer.append(named("b"), None) == 2


def _full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_record_that_is_damaged_does_not_count(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    writer.append(body("a"), None)
    writer.append(body("b"), None)
    index = tmp_path / "examples.index"
    content = bytearray(index.read_bytes())
    content[inbox_index.RECORD_BYTES] ^= 1
    index.write_bytes(content)
    assert (source_of(tmp_path).count, inbox.standing(tmp_path).rows) == (1, 1)
    assert opened(tmp_path).append(body("c"), 1) == 2
    assert prompts(source_of(tmp_path)) == ["a", "c"]


def test_what_many_processes_append_at_once_is_there_once(tmp_path: Path) -> None:
    """Each appends until all of its rows are in, wherever the others left off, and tells each row twice."""
    program = textwrap.dedent(
        """
        import json, sys
        from pathlib import Path
        from gym_queue.coordinator.inbox import standing
        from gym_queue.errors import ConflictError
        from tests.unit.test_inbox import named, opened

        folder, name = Path(sys.argv[1]), sys.argv[2]
        inbox = opened(folder)
        for number in range(60):
            rows = named(f"{name}-{number}-0", f"{name}-{number}-1")
            while True:
                offset = standing(folder).rows
                try:
                    inbox.append(rows, offset)
                except ConflictError:
                    continue
                inbox.append(rows, offset)
                break
        """
    )
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name]) for name in ("a", "b", "c")
    ]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    ids = [example.id for example in source_of(tmp_path).examples(0)]
    expected = [f"{name}-{number}-{half}" for name in "abc" for number in range(60) for half in (0, 1)]
    assert sorted(ids) == sorted(expected)
    for name in "abc":
        assert [one for one in ids if one.startswith(name)] == [one for one in expected if one[0] == name]


def test_a_far_row_is_found_without_reading_from_the_beginning(tmp_path: Path) -> None:
    rows = 5 * inbox._STRIDE
    opened(tmp_path).append(body(*map(str, range(rows))), None)
    lines = inbox.AppendedRows(tmp_path / "examples.jsonl", tmp_path / "examples.index")
    with lines.lines(0, rows) as found:
        assert sum(1 for _ in found) == rows
    with (tmp_path / "examples.jsonl").open("r+b") as file:
        file.write(b"\n" * 1000)  # whoever reads here would see other lines
    with lines.lines(rows - 2, rows) as found:
        assert [(number, json.loads(line)["prompt"]) for number, line in found] == [
            (rows - 1, str(rows - 2)),
            (rows, str(rows - 1)),
        ]
    assert len(lines._marks) <= 1 + rows // inbox._STRIDE


def test_only_new_records_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, source = opened(tmp_path), source_of(tmp_path)
    for number in range(10):
        writer.append(body(str(number)), None)
    assert source.count == 10
    with monkeypatch.context() as patches:
        patches.setattr(inbox_index, "decode", pytest.fail)
        assert source.count == 10
    writer.append(body("new"), None)
    assert source.count == 11


def test_repeated_ids_are_found_while_the_table_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "_LEAST_BITS", 64)
    writer, sizes = opened(tmp_path), set()
    for number in range(200):
        writer.append(named(f"a{number}"), number)
        sizes.add(writer._ids._size)
        assert writer._ids._size >= 64 * (number + 1)
        with pytest.raises(UsageError, match=f"the id 'a{number // 2}' is taken by example {number // 2} "):
            writer.append(named(f"a{number // 2}"), None)
    assert len(sizes) == 3  # now and then, not each time


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the table, which grows up to its size."""
    monkeypatch.setattr(inbox, "_MOST_BITS", 1 << 19)

    def peak(folder: Path, rows: int) -> int:
        folder.mkdir()
        writer = opened(folder)
        for start in range(0, rows, 100):
            writer.append(named(*(f"{start + number}" for number in range(100))), None)
        tracemalloc.start()
        try:
            opened(folder).append(named("x"), None)
            assert sum(1 for _ in source_of(folder).examples(0)) == rows + 1
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(tmp_path / "long", 10_000) < peak(tmp_path / "short", 200) + 200_000


def test_threads_may_share_an_inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller may go away while its thread still works, and the next one come."""
    writer, together, most = opened(tmp_path), 0, 0
    append = writer._append

    def watched(lines: list[Any], offset: int | None, refusal: str) -> int:
        nonlocal together, most
        together += 1
        most = max(most, together)
        total = append(lines, offset, refusal)
        together -= 1
        return total

    monkeypatch.setattr(writer, "_append", watched)
    with ThreadPoolExecutor(8) as threads:
        totals = list(threads.map(lambda number: writer.append(named(f"a{number}"), None), range(100)))
    assert sorted(totals) == list(range(1, 101))
    assert most == 1
    for number in (0, 50, 99):
        with pytest.raises(UsageError, match="is taken by example"):
            writer.append(named(f"a{number}"), None)
