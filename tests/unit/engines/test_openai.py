"""The HTTP engine against a real server in this process: requests, answers, retries."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from gym_queue.engines import openai
from gym_queue.engines.openai import OpenAIEngine
from gym_queue.errors import EngineSetupError, EngineUnavailableError, ModelError
from gym_queue.records import Sampling, Usage, Weights
from gym_queue.settings import Settings
from tests.unit.engines.endpoint import ASK, SETTINGS, TOOL, Endpoint, ask, ok


async def test_sends_what_was_asked_and_reads_the_answer(engine: OpenAIEngine, endpoint: Endpoint) -> None:
    endpoint.script = [ok()]
    completion = await ask(engine, sampling=Sampling(temperature=0.5, top_p=0.9, max_tokens=7))
    assert endpoint.requests == [
        {
            "model": "m",
            "messages": list(ASK),
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 7,
            "seed": 5,
            "logprobs": True,
            "return_token_ids": True,
        }
    ]
    assert endpoint.headers == ["Bearer sk-secret"]
    assert completion.message == {"role": "assistant", "content": "4"}
    assert completion.finish_reason == "stop"
    assert completion.usage == Usage(prompt_tokens=3, completion_tokens=1)
    assert (completion.token_ids, completion.logprobs) == (None, None)


@pytest.mark.parametrize("place", ["answer", "choice"])
async def test_token_ids_and_logprobs(engine: OpenAIEngine, endpoint: Endpoint, place: str) -> None:
    """vLLM puts ``prompt_token_ids`` beside the choices, SGLang into the choice."""
    prompt = {"prompt_token_ids": [1, 2]}
    choice = {
        "token_ids": [3, 4],
        "logprobs": {"content": [{"token": "4", "logprob": -0.5}, {"token": "", "logprob": -0.25}]},
        **(prompt if place == "choice" else {}),
    }
    endpoint.script = [ok(choice=choice, **(prompt if place == "answer" else {}))]
    completion = await ask(engine)
    assert completion.prompt_token_ids == (1, 2)
    assert completion.token_ids == (3, 4)
    assert completion.logprobs == (-0.5, -0.25)


async def test_logprobs_that_do_not_pair_with_ids_are_left_out(
    engine: OpenAIEngine, endpoint: Endpoint
) -> None:
    choice = {"token_ids": [3, 4], "logprobs": {"content": [{"token": "4", "logprob": -0.5}]}}
    endpoint.script = [ok(choice=choice)]
    completion = await ask(engine)
    assert completion.token_ids == (3, 4)
    assert completion.logprobs is None


async def test_tools_go_out_and_calls_come_back(engine: OpenAIEngine, endpoint: Endpoint) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    endpoint.script = [ok(choice={"message": message, "finish_reason": "stop"}), ok()]
    completion = await ask(engine, tools=[TOOL])
    assert endpoint.requests[0]["tools"] == [TOOL]
    assert completion.message == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert completion.finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": "c1", "content": "4"}
    await engine.generate((*ASK, completion.message, result), sampling=Sampling(), seed=None)
    assert endpoint.requests[1]["messages"][1:] == [completion.message, result]
    assert "seed" not in endpoint.requests[1]
    assert "tools" not in endpoint.requests[1]


async def test_the_first_served_model_is_asked_for_once(endpoint: Endpoint) -> None:
    endpoint.script = [ok()]
    engine = OpenAIEngine(endpoint.base + "/", SETTINGS)
    await asyncio.gather(*(ask(engine) for _ in range(5)))
    await engine.close()
    assert endpoint.models == 1
    assert {request["model"] for request in endpoint.requests} == {"served"}


@pytest.mark.parametrize("suffix", ["?model=Qwen/Qwen3-8B", "#Qwen/Qwen3-8B", "/?model=Qwen%2FQwen3-8B"])
async def test_the_name_may_stand_behind_the_address(endpoint: Endpoint, suffix: str) -> None:
    endpoint.script = [ok()]
    engine = OpenAIEngine(endpoint.base + suffix, SETTINGS)
    await ask(engine)
    await engine.close()
    assert endpoint.requests[0]["model"] == "Qwen/Qwen3-8B"
    assert endpoint.models == 0


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_what_may_pass_is_tried_again(
    engine: OpenAIEngine, endpoint: Endpoint, slept: list[float], status: int
) -> None:
    endpoint.script = [web.Response(status=status), web.Response(status=status), ok()]
    completion = await ask(engine)
    assert completion.message["content"] == "4"
    assert len(endpoint.requests) == 3
    assert len(slept) == 2
    assert 0 <= slept[0] <= 0.5
    assert 0 <= slept[1] <= 1.0


async def test_a_dropped_connection_is_tried_again(engine: OpenAIEngine, endpoint: Endpoint) -> None:
    async def drop(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    endpoint.script = [drop, ok()]
    await ask(engine)
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_honoured(
    engine: OpenAIEngine, endpoint: Endpoint, slept: list[float], status: int
) -> None:
    endpoint.script = [web.Response(status=status, headers={"Retry-After": "7"}), ok()]
    await ask(engine)
    assert len(slept) == 1
    assert 7.0 <= slept[0] <= 7.5


def test_retry_after_may_be_a_date() -> None:
    assert openai._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert openai._retry_after("Wed, 21 Oct 2195 07:28:00 GMT") > 1e9
    assert openai._retry_after("soon") == 0.0
    assert openai._retry_after("") == 0.0


async def test_a_wait_longer_than_our_patience_is_not_begun(
    engine: OpenAIEngine, endpoint: Endpoint, slept: list[float]
) -> None:
    endpoint.script = [web.Response(status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(EngineUnavailableError, match="answered 429"):
        await ask(engine)
    assert slept == []


async def test_an_endpoint_down_for_good_ends_as_unavailable(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai, "PATIENCE", 0.05)
    engine = OpenAIEngine("http://127.0.0.1:9/v1?model=m", SETTINGS)
    with pytest.raises(EngineUnavailableError, match=r"cannot be reached \(Connection refused\)"):
        await ask(engine)
    await engine.close()
    endpoint.script = [web.Response(status=500, text="out of memory")]
    engine = OpenAIEngine(f"{endpoint.base}?model=m", SETTINGS)
    with pytest.raises(EngineUnavailableError, match="answered 500: out of memory"):
        await ask(engine)
    await engine.close()


async def test_an_answer_that_takes_too_long_is_left_to_the_ledger(endpoint: Endpoint) -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        del request
        await asyncio.Event().wait()
        return web.Response()

    endpoint.script = [hang]
    engine = OpenAIEngine(f"{endpoint.base}?model=m", Settings(http_client_timeout=0.05))
    with pytest.raises(EngineUnavailableError, match=r"did not answer within 0.05 s"):
        await ask(engine)
    await engine.close()
    assert len(endpoint.requests) == 1


async def test_a_refused_request_is_never_tried_again(
    engine: OpenAIEngine, endpoint: Endpoint, slept: list[float]
) -> None:
    long = "context length\n exceeded " * 100
    endpoint.script = [ok(), web.json_response({"error": {"message": long}}, status=400)]
    await ask(engine)
    with pytest.raises(ModelError, match="answered 400: context length exceeded context") as caught:
        await ask(engine)
    assert len(endpoint.requests) == 2
    assert slept == []
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error", "hint"),
    [
        (401, EngineSetupError, "GYM_QUEUE_API_KEY"),
        (404, EngineSetupError, "/v1"),
        (413, ModelError, "413"),
    ],
)
async def test_other_client_errors_keep_their_meaning(
    engine: OpenAIEngine, endpoint: Endpoint, status: int, error: type[Exception], hint: str
) -> None:
    endpoint.script = [web.json_response({"message": "no: sk-secret"}, status=status)]
    with pytest.raises(error, match=hint) as caught:
        await ask(engine)
    assert "sk-secret" not in str(caught.value)
    assert "no: ***" in str(caught.value)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("unwanted", [["return_token_ids"], ["return_token_ids", "logprobs"]])
async def test_optional_fields_are_given_up_once_and_remembered(
    engine: OpenAIEngine, endpoint: Endpoint, unwanted: list[str]
) -> None:
    async def strict(request: web.Request) -> web.StreamResponse:
        extra = [name for name in unwanted if name in await request.json()]
        return web.json_response({"detail": f"unknown {extra}"}, status=422) if extra else ok()

    endpoint.script = [strict]
    await ask(engine)
    first = len(endpoint.requests)
    await ask(engine)
    assert first == 1 + len(unwanted)
    assert len(endpoint.requests) == first + 1
    assert ("logprobs" in endpoint.requests[-1]) == ("logprobs" not in unwanted)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"<html>login</html>",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"message": "4"}]}',
        b'{"choices": [{"message": {"content": "4"}, "token_ids": ["four"]}]}',
    ],
)
async def test_malformed_answers_are_the_models_failure(
    engine: OpenAIEngine, endpoint: Endpoint, raw: bytes
) -> None:
    endpoint.script = [web.Response(body=raw)]
    with pytest.raises(ModelError, match=r"not JSON|not a chat completion"):
        await ask(engine)
    assert len(endpoint.requests) == 1


async def test_a_dropped_generation_is_worth_another_attempt(
    engine: OpenAIEngine, endpoint: Endpoint
) -> None:
    endpoint.script = [ok(choice={"finish_reason": "abort"})]
    with pytest.raises(EngineUnavailableError, match="aborted"):
        await ask(engine)


@pytest.mark.parametrize(
    ("reported", "version"),
    [({}, 4), ({"metadata": {"weight_version": "7"}}, 7), ({"metadata": {"weight_version": "0"}}, 0)]
    + [({"metadata": {"weight_version": text}}, 4) for text in ("default", "step-7", None)]
    + [({"metadata": None}, 4), ({"metadata": {}}, 4)],
)
async def test_a_completion_carries_the_version_that_is_reported_else_the_announced_one(
    engine: OpenAIEngine, endpoint: Endpoint, reported: dict[str, object], version: int
) -> None:
    async def announced_meanwhile(_: web.Request) -> web.StreamResponse:
        await engine.load(Weights(model="m", version=5))
        return ok(**reported)

    endpoint.script = [announced_meanwhile]
    await engine.load(Weights(model="m", version=4))
    await engine.load(Weights(model="m", version=3))
    assert (await ask(engine)).weight_version == version
