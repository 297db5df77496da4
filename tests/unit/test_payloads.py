"""Where large payloads lie: in a folder, or behind a URL of fsspec. What is torn or gone is noticed."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gym_queue.assembly import make_payloads
from gym_queue.errors import GymQueueError, LedgerError, PayloadLostError, PayloadsNotSharedError, UsageError
from gym_queue.ledger.payloads import Payloads
from gym_queue.settings import Settings
from tests.contract.ledgers import MEMORY_URL, clear_memory_url

if TYPE_CHECKING:
    from pathlib import Path

RUN = "20260101-120000-abcdef01"
ONE, TWO = ("row", "0.0", b"one"), ("row", "0.1", b"two" * 1000)


@pytest.fixture(params=["folder", "memory", "dir of fsspec"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    clear_memory_url()
    folder = tmp_path / "payloads"
    urls = {"folder": str(folder), "memory": MEMORY_URL, "dir of fsspec": f"dir::file://{folder}"}
    return urls[request.param]


def opened(url: str, run_id: str = RUN, owner: str = "redis:6379/0") -> Payloads:
    payloads = Payloads(url, owner)
    payloads.open(run_id)
    return payloads


def in_folder(folder: Path, run_id: str = RUN) -> set[str]:
    return {path.name for path in (folder / f"run-{run_id}").iterdir()} - {"about.json"}


def only(answers: dict[str, bytes | GymQueueError]) -> bytes | GymQueueError:
    (answer,) = answers.values()
    return answer


def test_what_one_process_keeps_another_reads(url: str) -> None:
    names = opened(url).put(RUN, [ONE, TWO])
    assert Payloads(url, "").get(RUN, names) == dict(zip(names, [b"one", b"two" * 1000], strict=True))


def test_what_is_deleted_is_gone_and_may_be_deleted_again(url: str) -> None:
    payloads = opened(url)
    one, two = payloads.put(RUN, [ONE, TWO])
    payloads.delete(RUN, [one])
    assert isinstance(only(payloads.get(RUN, [one])), PayloadLostError)
    payloads.delete(RUN, [one, two])
    assert isinstance(only(payloads.get(RUN, [two])), PayloadLostError)


def test_a_forgotten_run_leaves_nothing_and_others_keep_theirs(url: str) -> None:
    payloads = opened(url)
    payloads.open("other")
    (name,) = payloads.put("other", [ONE])
    payloads.put(RUN, [ONE, TWO])
    payloads.forget(RUN)
    payloads.forget(RUN)
    assert payloads.opened_before(0.0) == ["other"]
    assert only(payloads.get("other", [name])) == b"one"


def test_what_was_not_opened_here_is_not_shared(url: str) -> None:
    payloads = Payloads(url, "")
    with pytest.raises(PayloadsNotSharedError, match=f"GYM_QUEUE_PAYLOAD_URL is .*{RUN}"):
        payloads.put(RUN, [ONE])
    assert isinstance(only(payloads.get(RUN, ["row-0.0-3-abc"])), PayloadsNotSharedError)
    assert payloads.opened_before(0.0) == []


def test_a_run_that_was_forgotten_takes_no_more(tmp_path: Path) -> None:
    late, coordinator = opened(str(tmp_path)), Payloads(str(tmp_path), "")
    coordinator.forget(RUN)
    with pytest.raises(PayloadsNotSharedError):
        late.put(RUN, [ONE])
    assert list(tmp_path.iterdir()) == []


def test_a_torn_payload_is_noticed(tmp_path: Path) -> None:
    payloads = opened(str(tmp_path))
    (name,) = payloads.put(RUN, [TWO])
    path = tmp_path / f"run-{RUN}" / name
    path.write_bytes(b"two" * 999)
    answer = only(payloads.get(RUN, [name]))
    assert isinstance(answer, PayloadLostError)
    assert f"{path} is damaged (2997 bytes of 3000)" in str(answer)
    path.write_bytes(b"twa" * 1000)
    assert isinstance(only(payloads.get(RUN, [name])), PayloadLostError)


def test_a_run_id_is_never_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "payloads"
    for run_id in ("../../x", "..", "a/b", "a*", ""):
        payloads = opened(str(folder), run_id)
        (name,) = payloads.put(run_id, [ONE])
        assert only(payloads.get(run_id, [name])) == b"one"
        assert payloads.opened_before(0.0) == [run_id]
        payloads.forget(run_id)
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []


def test_no_half_written_file_has_a_name_that_is_read(tmp_path: Path) -> None:
    """The process is killed while it writes: then there is no file of that name."""
    opened(str(tmp_path))
    script = f"""
import os
from gym_queue import durable
from gym_queue.ledger.payloads import Payloads
os.fsync = lambda descriptor: os.kill(os.getpid(), 9)
Payloads({str(tmp_path)!r}, "").put({RUN!r}, [("row", "0.0", b"one")])
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    (left,) = in_folder(tmp_path)
    assert left.endswith(".tmp")
    assert {*opened(str(tmp_path)).put(RUN, [ONE])} == in_folder(tmp_path)


def test_a_store_that_cannot_be_written_is_worth_waiting_for(tmp_path: Path) -> None:
    payloads = opened(str(tmp_path / "payloads"))
    (name,) = payloads.put(RUN, [ONE])
    run = tmp_path / "payloads" / f"run-{RUN}"
    run.rename(tmp_path / "away")
    run.write_text("a file where a folder was")  # as root, no permission is missing
    for call in (
        lambda: payloads.put(RUN, [TWO]),
        lambda: payloads.delete(RUN, [name]),
        lambda: payloads.open(RUN),
        lambda: payloads.forget(RUN),
    ):
        with pytest.raises(LedgerError, match=str(tmp_path / "payloads")):
            call()
    assert isinstance(only(payloads.get(RUN, [name])), LedgerError)
    run.unlink()
    (tmp_path / "away").rename(run)
    assert only(payloads.get(RUN, [name])) == b"one"


def test_only_its_own_ledger_knows_a_run(url: str) -> None:
    opened(url, owner="other-redis:6379/0")
    mine = Payloads(url, "redis:6379/0")
    assert mine.opened_before(0.0) == []
    mine.open("mine")
    assert mine.opened_before(0.0) == ["mine"]
    assert mine.opened_before(60.0) == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense://bucket", "Protocol not known: nonsense"),
        ("memory://a[1]", r"has one of \* \? \[ in it"),
        ("s3://bucket/payloads", "s3fs"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_the_settings_name(url: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"GYM_QUEUE_PAYLOAD_URL cannot be used: .*{reason}"):
        Payloads(url, "")


def test_checking_finds_a_folder_that_cannot_be_written_and_leaves_nothing(url: str, tmp_path: Path) -> None:
    payloads = Payloads(url, "")
    payloads.check()
    assert payloads.opened_before(0.0) == []
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="GYM_QUEUE_PAYLOAD_URL cannot be used"):
        Payloads(str(tmp_path / "file"), "").check()


def test_no_password_is_shown() -> None:
    assert "secret" not in Payloads("memory://user:secret@host/path", "").url


def test_without_a_url_there_are_none() -> None:
    assert make_payloads(Settings(payload_url="")) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("redis://:secret@host:6379/0", "redis://:other@host:6379/0", True),
        ("redis://host:6379/0", "redis://host:6379/1", False),
        ("redis://host:6379/0", "redis://other:6379/0", False),
        ("sentinel://a:1,b:2/0?master=m", "sentinel://a:1,b:2/0?master=n", False),
        ("unix:///a/redis.sock?db=0", "unix:///b/redis.sock?db=0", False),
    ],
)
def test_a_ledger_is_known_by_its_redis(one: str, other: str, same: bool, tmp_path: Path) -> None:  # noqa: FBT001
    stores = [make_payloads(Settings(payload_url=str(tmp_path), redis_url=url)) for url in (one, other)]
    assert stores[0]
    assert stores[1]
    stores[0].open(RUN)
    assert (stores[1].opened_before(0.0) == [RUN]) is same
    assert "secret" not in (tmp_path / f"run-{RUN}" / "about.json").read_text()


def test_a_redis_of_another_machine_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(payload_url=str(tmp_path), redis_url="redis://localhost:6379/0")
    mine = make_payloads(settings)
    monkeypatch.setattr("platform.node", lambda: "another-machine")
    theirs = make_payloads(settings)
    assert mine
    assert theirs
    mine.open(RUN)
    assert (mine.opened_before(0.0), theirs.opened_before(0.0)) == ([RUN], [])


def test_a_folder_needs_no_fsspec(tmp_path: Path) -> None:
    """Importing fsspec takes a tenth of a second and 17 MB."""
    script = f"""
import sys
from gym_queue.assembly import make_ledger, make_payloads
from gym_queue.settings import Settings
settings = Settings(payload_url={str(tmp_path)!r})
make_ledger(settings)
make_payloads(settings).open("run")
assert "fsspec" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
