"""What ``gym-queue doctor`` says of what it finds; what it talks to is played."""

from __future__ import annotations

import fcntl
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from gym_queue.cli import checkup, pulse
from gym_queue.cli.checkup import examine
from gym_queue.cli.findings import Finding, Level, says
from gym_queue.cli.main import main
from gym_queue.ledger.base import Lease
from gym_queue.settings import Settings
from gym_queue.telemetry.machine import machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN = "open sesame"  # noqa: S105 - of nothing
SETTINGS = Settings(worker_heartbeat_interval=10.0, worker_timeout=60.0)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GYM_QUEUE_REDIS_URL", "HEAD_SERVER_URL", "GYM_QUEUE_AUTH_TOKEN", "GYM_QUEUE_PAYLOAD_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def lease(age: float, kind: str = "gpu", pid: int | None = None, where: str | None = None) -> Lease:
    info = {"kind": kind, "machine": where or machine(), "pid": str(pid or os.getpid())}
    return Lease(worker=f"{kind}-x", age=age, info=info | {"slots": "8", "used": "3"})


def level_of(subject: str, **settings: Any) -> Level:
    (found,) = [finding for finding in examine(Settings(**settings)) if finding.subject == subject]
    return found.level


@contextmanager
def web(status: int, body: str = "", asks_token: str = "") -> Iterator[str]:
    """Serve one answer to everything; to ``/v1`` without the token 401."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = not asks_token or self.headers["Authorization"] == f"Bearer {asks_token}"
            self.send_response(status if allowed or not self.path.startswith("/v1") else 401)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_worker_lives_that_renews_its_lease() -> None:
    found = pulse.worker(
        "gpu", [lease(3.0), lease(900.0, kind="cpu"), lease(900.0, where="elsewhere")], SETTINGS
    )
    assert found == (Level.OK, "gpu", "gpu-x renewed its lease 3 s ago, 3 of 8 slots used")


def test_a_worker_that_is_silent_is_not_well() -> None:
    found = pulse.worker("gpu", [lease(3.0), lease(40.0)], SETTINGS)
    assert found == (Level.FAIL, "gpu", "gpu-x renewed its lease 40 s ago, and should every 10 s")


def test_what_others_renew_does_not_count() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    known = [lease(1.0, kind="cpu"), lease(1.0, where="elsewhere"), lease(1.0, pid=gone.pid)]
    found = pulse.worker("gpu", known, SETTINGS)
    assert found.level is Level.FAIL
    assert "no worker on this machine holds a lease" in found.sentence


def test_a_server_says_how_it_is(unused_tcp_port: int) -> None:
    with web(200) as url:
        assert pulse.server("head", url, "/health") == (Level.OK, "head", f"{url} answers")
    with web(503, "about to stop") as url:
        assert pulse.server("head", url, "/ready").sentence == f"{url}/ready answers 503: about to stop"
    gone = pulse.server("head", f"http://127.0.0.1:{unused_tcp_port}", "/health")
    assert gone.level is Level.FAIL
    assert "does not answer: [Errno 111] Connection refused" in gone.sentence
    assert "no http:// or https:// URL" in pulse.server("head", "head:11000", "/health").sentence


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:7"), ("::", "http://[::1]:7"), ("10.0.0.9", "http://10.0.0.9:7")],  # noqa: S104
)
def test_the_head_of_this_machine_is_asked_where_it_listens(host: str, url: str) -> None:
    assert pulse.head_here(Settings(head_host=host, head_port=7)) == url


def test_a_head_far_away_is_asked_with_the_token() -> None:
    with web(200, asks_token=TOKEN) as url:
        assert level_of("head", head_server_url=url, auth_token=TOKEN) is Level.OK
        heads = [
            one
            for one in examine(Settings(head_server_url=url, auth_token=TOKEN[:-1]))
            if one.subject == "head"
        ]
        assert [one.level for one in heads] == [Level.OK, Level.FAIL]
        assert heads[1].sentence == f"{url} does not know this token: set GYM_QUEUE_AUTH_TOKEN to the head's"
        (*_, asked) = [one for one in examine(Settings(head_server_url=url)) if one.subject == "head"]
        assert asked.sentence == f"{url} asks for a token: set GYM_QUEUE_AUTH_TOKEN to the head's"


def test_a_folder_of_runs_must_be_writable_and_keep_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert level_of("runs", runs_dir=str(tmp_path)) is Level.OK
    assert level_of("runs", runs_dir=str(tmp_path / "new")) is Level.OK
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"
    assert "runs" not in {one.subject for one in examine(Settings(), role="gpu")}, "heads alone keep runs"
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert level_of("runs", runs_dir=str(tmp_path)) is Level.FAIL
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert level_of("runs", runs_dir=str(tmp_path / "new")) is Level.FAIL
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", _refuse)
    assert level_of("runs", runs_dir=str(tmp_path)) is Level.FAIL


def _refuse(**_: Any) -> Any:
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(("free", "level"), [(50 << 30, "ok"), (1 << 30, "warn"), (1 << 20, "fail")])
def test_a_disk_that_is_almost_full(monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert level_of("disk") == level


def test_payloads_must_be_writable(tmp_path: Path) -> None:
    assert level_of("payloads") is Level.OK
    assert level_of("payloads", payload_url=str(tmp_path)) is Level.OK
    (tmp_path / "file").touch()
    assert level_of("payloads", payload_url=str(tmp_path / "file")) is Level.FAIL


@pytest.mark.parametrize(
    ("info", "level", "words"),
    [
        ({"aof_enabled": 1, "aof_last_write_status": "ok"}, None, ""),
        ({}, Level.WARN, "CONFIG SET appendonly yes"),
        ({"aof_enabled": 1, "aof_last_write_status": "err"}, Level.FAIL, "cannot write its append-only file"),
        (
            {"aof_enabled": 1, "aof_last_write_status": "ok", "maxmemory_policy": "volatile-lru"},
            Level.WARN,
            "CONFIG SET maxmemory-policy noeviction",
        ),
        (
            {"aof_enabled": 1, "aof_last_write_status": "ok", "maxmemory": 10, "used_memory": 9},
            Level.WARN,
            "90% of its maxmemory is used",
        ),
    ],
)
def test_a_redis_that_could_forget(info: dict[str, Any], level: Level | None, words: str) -> None:
    found = list(checkup._durability(info))
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(words in finding.sentence for finding in found)


def test_clocks_that_go_apart() -> None:
    assert checkup._clock(0.4).level is Level.OK
    assert checkup._clock(-61.0).level is Level.WARN
    assert "1 min 1 s behind this machine's" in checkup._clock(-61.0).sentence


def test_workers_that_are_silent_or_missing() -> None:
    found = list(checkup._workers([lease(3.0), lease(40.0, kind="cpu")], SETTINGS))
    assert [(one.level, one.sentence) for one in found] == [
        (Level.WARN, "cpu-x is silent, last heard of 40 s ago: it is given up in 20 s"),
        (Level.OK, "1 gpu worker healthy"),
        (Level.WARN, "0 cpu workers healthy, 1 expected: start celery -A workers.cpu worker"),
    ]
    more = Settings(num_expected_workers=2)
    assert "1 gpu worker healthy, 2 expected" in next(iter(checkup._workers([lease(3.0)], more))).sentence


class Nvml:
    """NVIDIA's library with two devices; ``broken`` names the call that fails."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.shut = False

    def __getattr__(self, call: str) -> Any:
        if call == self.broken:
            raise self.NVMLError("gone")
        answers = {
            "nvmlDeviceGetCount": 2,
            "nvmlDeviceGetName": "H100",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(free=80 << 30),
            "nvmlSystemGetDriverVersion": "580",
        }
        return lambda *_: answers.get(call)

    def nvmlShutdown(self) -> None:  # noqa: N802 - NVIDIA's name
        self.shut = True


def test_gpus_are_named() -> None:
    good, bad = says(Level.OK, "gpu"), says(Level.WARN, "gpu")
    nvml = Nvml()
    assert (
        checkup._devices(nvml, good, bad).sentence
        == "driver 580: H100 with 80 GiB free, H100 with 80 GiB free"
    )
    assert nvml.shut
    assert checkup._devices(Nvml("nvmlDeviceGetName"), good, bad).level is Level.WARN
    assert checkup._devices(Nvml("nvmlInit"), good, bad).level is Level.OK, "no driver, no GPU"


def test_exit_status_and_look(tmp_path: Path) -> None:
    fine = CliRunner().invoke(main, ["doctor"], color=True)
    assert fine.exit_code == 0, fine.output
    assert "\x1b[32mok  \x1b[0m  runs: " in fine.output
    plain = CliRunner().invoke(main, ["doctor"])
    assert "\nok    runs: runs/head does not exist yet and can be made\n" in plain.output
    (tmp_path / "file").touch()
    amiss = CliRunner().invoke(main, ["doctor"], env={"GYM_QUEUE_PAYLOAD_URL": str(tmp_path / "file")})
    assert amiss.exit_code == 1
    assert "\nfail  payloads: " in amiss.output


def test_a_finding_is_one_line() -> None:
    assert str(Finding(Level.OK, "x", "two\n  lines")).endswith("  x: two lines")


def test_a_health_check_loads_no_more_than_it_needs() -> None:
    program = (
        "import sys; from gym_queue.cli.main import main\n"
        "try: main(['doctor', '--quick', '--role', 'flower'])\n"
        "except SystemExit: pass\n"
        "print(*{'celery', 'fastapi', 'aiohttp', 'torch', 'redis', 'uvicorn'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[1:] == [""]
