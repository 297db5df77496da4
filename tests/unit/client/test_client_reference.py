"""``docs/reference/client.md``: its examples run, and it names all that there is."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from gym_queue import Client, errors
from gym_queue.client.synchronous import Run
from tests.unit.client.fake_head import TOKEN

if TYPE_CHECKING:
    import pytest

    from tests.unit.client.fake_head import FakeHead

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "reference" / "client.md").read_text()
EVALUATION, *EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_examples_run(
    head_beside: FakeHead, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEAD_SERVER_URL", head_beside.url)
    monkeypatch.setenv("GYM_QUEUE_AUTH_TOKEN", TOKEN)
    names: dict[str, Any] = {"__name__": "client_reference"}
    for example in EXAMPLES:
        exec(compile(example, "client.md", "exec", dont_inherit=True), names)  # noqa: S102 - ours
    names["client"].close()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"sum-0 {[0.0, 1.0] * 4} 1"
    assert printed[-1] == str([0.0, 1.0] * 6)
    assert asyncio.run(asked(names["ask"])) == "{'heard': '42'}"


async def asked(ask: Any) -> Any:
    """Run the last example against a server of its own."""

    async def act(request: web.Request) -> web.Response:
        return web.json_response({"heard": (await request.json())["answer"]})

    app = web.Application()
    app.router.add_post("/act", act)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        return await ask(f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


def test_the_evaluation_is_the_very_file() -> None:
    assert (ROOT / "examples" / "evaluate.py").read_text() == EVALUATION


def test_every_method_is_named() -> None:
    named = set(re.findall(r"`(\w+)\(", PAGE))
    for kind in (Client, Run):
        assert {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"} <= named


def test_errors_are_those_there_are() -> None:
    named = re.findall(r"^\| `(\w+Error)` \|", PAGE, flags=re.MULTILINE)
    assert len(named) == 10
    assert [name for name in named if not hasattr(errors, name)] == []
