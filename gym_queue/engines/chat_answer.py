"""Reads what OpenAI-compatible endpoints answer."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from gym_queue.engines.base import Completion
from gym_queue.errors import EngineSetupError, EngineUnavailableError, ModelError
from gym_queue.records import Usage

_LONGEST_ERROR = 300


def completion_in(answer: Any, version: int) -> Completion:
    """Read a chat completion. ``version`` is that of its weights where the answer does not say.

    Raises:
        ModelError: something is missing.
        EngineUnavailableError: the endpoint dropped the generation.
    """
    try:
        choice = answer["choices"][0]
        message = {key: value for key, value in choice["message"].items() if value not in (None, [])}
        reason = choice.get("finish_reason") or "stop"
        token_ids = choice.get("token_ids")
        prompt = answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
        entries = (choice.get("logprobs") or {}).get("content") or []
        usage = answer.get("usage") or {}
        completion = Completion(
            message={"role": "assistant", "content": "", **message},
            finish_reason="tool_calls" if "tool_calls" in message and reason != "length" else reason,
            usage=Usage(
                prompt_tokens=usage.get("prompt_tokens") or len(prompt or ()),
                completion_tokens=usage.get("completion_tokens") or len(token_ids or ()),
            ),
            prompt_token_ids=prompt,
            token_ids=token_ids,
            logprobs=_logprobs(entries, token_ids),
            weight_version=_reported_version(answer, version),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValidationError) as error:
        msg = f"the endpoint's answer is not a chat completion ({type(error).__name__} while reading it)"
        raise ModelError(msg) from error
    if completion.finish_reason == "abort":  # SGLang's and vLLM's word for a generation that they dropped
        msg = "the endpoint aborted the generation"
        raise EngineUnavailableError(msg)
    return completion


def _logprobs(entries: list[dict[str, Any]], token_ids: list[int] | None) -> tuple[float, ...] | None:
    """Return one logprob for each id, or nothing where they do not pair up."""
    if token_ids is None or len(entries) != len(token_ids):
        return None
    return tuple(entry["logprob"] for entry in entries)


def _reported_version(answer: dict[str, Any], otherwise: int) -> int:
    """Return the version that an endpoint says its weights have: any text at SGLang, ``default`` at first."""
    text = str((answer.get("metadata") or {}).get("weight_version"))
    return int(text) if text.isascii() and text.isdigit() else otherwise


def first_model(answer: Any, base: str) -> str:
    """Return the first of the served models. Raises ``EngineSetupError``."""
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        msg = f"{base} names no model; write ?model=NAME behind the address"
        raise EngineSetupError(msg) from error


def message_in(raw: bytes) -> str:
    """Find what an endpoint says about an error (OpenAI, vLLM and FastAPI put it in different places)."""
    text = raw.decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = "" if "<html" in text.lower() else text
    while isinstance(body, dict):
        body = body.get("error") or body.get("message") or body.get("detail") or ""
    words = " ".join((body if isinstance(body, str) else json.dumps(body)).split())
    return words if len(words) <= _LONGEST_ERROR else words[:_LONGEST_ERROR] + "…"
