"""``docs/reference/head.md`` has an example of each route; each can be typed, and answers what is shown."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from gym_queue.head.app import create_app
from gym_queue.settings import Settings
from tests.integration.fleet import Fleet
from tests.integration.head_process import HeadProcess

if TYPE_CHECKING:
    import httpx2 as httpx

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "head.md").read_text()
SECTIONS = re.findall(r"^### (\S+ \S+)\n(.*?)(?=^###? |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^```console\n\$ (curl .*?)\n(.*?)```$", flags=re.MULTILINE | re.DOTALL)
EXACT = {"state", "status", "outcome", "type", "examples", "closed", "healthy", "name", "host", "port"}
"""What must be as shown; of all else the type must be."""


def curl(head: HeadProcess, command: str, variables: dict[str, str]) -> httpx.Response:
    """Do what this command does."""
    words = iter(shlex.split(Template(command).substitute(HEAD="", **variables))[1:])
    method, url, headers, content = "", "", {}, None
    for word in words:
        match word:
            case "-s" | "-sN":
                pass
            case "-X":
                method = next(words)
            case "-H":
                name, _, value = next(words).partition(": ")
                headers[name] = value
            case "-d" | "--data-binary":
                content, method = next(words), method or "POST"
            case _:
                assert word.startswith("/"), word
                url = word
    return head.client.request(method or "GET", url, headers=headers, content=content)


def assert_alike(shown: Any, real: Any, where: str) -> None:
    if isinstance(shown, dict):
        assert isinstance(real, dict), where
        names = shown.keys() - {"…"}
        assert names <= real.keys() if "…" in shown else names == real.keys(), where
        for name in names:
            assert_alike(shown[name], real[name], f"{where} {name}")
            if name in EXACT and not isinstance(shown[name], dict):
                assert shown[name] == real[name], (where, name)
    elif isinstance(shown, list):
        assert len(shown) == len(real), where
        for one, other in zip(shown, real, strict=True):
            assert_alike(one, other, where)
    elif shown is not None and real is not None:
        assert type(shown) is type(real), where


def test_each_route_has_a_section() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, found in paths.items() for method in found}
    assert sorted(heading for heading, _ in SECTIONS) == sorted(routes)


async def test_each_example_answers_what_is_shown(redis_url: str, tmp_path: Path) -> None:
    variables = {"RUN": "", "SERVER": ""}
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu")
        with HeadProcess(tmp_path, fleet.variables) as head:
            for heading, text in SECTIONS:
                found = EXAMPLE.search(text)
                assert found, f"{heading} has no example"
                answer = curl(head, found[1], variables)
                shown = [json.loads(line) for line in found[2].splitlines()]
                assert answer.is_success == ('"error"' not in found[2]), (heading, answer.text)
                if heading == "GET /metrics" or not shown:
                    continue
                real = [json.loads(line) for line in answer.text.splitlines() if line]
                assert_alike(shown, real, heading)
                variables["RUN"] = variables["RUN"] or real[0].get("run_id", "")
                variables["SERVER"] = real[0]["id"] if heading == "POST /v1/servers" else variables["SERVER"]
