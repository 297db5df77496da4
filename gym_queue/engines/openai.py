"""The engine behind ``http(s)://HOST[:PORT]/v1``: chat completions of any OpenAI-compatible endpoint.

The served model's name follows as ``?model=NAME`` or ``#NAME``; without it the first of ``GET /v1/models`` is
used. The bearer token comes from ``GYM_QUEUE_API_KEY`` and is never shown.

**Token ids and logprobs** are asked for with ``logprobs`` and ``return_token_ids`` and taken where the
endpoint has them: vLLM (0.10.2 and later) answers with ``prompt_token_ids`` beside ``choices`` and
``token_ids`` in the choice, SGLang with both in the choice. An endpoint that refuses an unknown field is
asked again without it, and remembered. vLLM's logprobs are of the raw logits unless it was started with
``--logprobs-mode processed_logprobs``.

**Retries** (tenacity: exponential backoff with full jitter, plus what ``Retry-After`` asks for) follow
connection errors and 5xx for half a minute, so an endpoint may restart, and 429 for ``HTTP_CLIENT_TIMEOUT``,
because an endpoint that answers 429 is alive. Then ``EngineUnavailableError`` hands the rollout back to the
ledger, which counts attempts. Any other 4xx would come again, so it is not asked for again. (aiohttp-retry
cannot tell these patiences apart; stamina has no full jitter.)

**New weights** are the trainer's to bring to the endpoint, before it announces them. A completion carries the
version that the endpoint reports (SGLang does, as ``metadata.weight_version``; what is no number there is
ignored), else the one that was the newest when it was asked for (vLLM reports none).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from gym_queue import open_files
from gym_queue.engines.chat_answer import completion_in, first_model, message_in
from gym_queue.errors import EngineSetupError, EngineUnavailableError, ModelError
from gym_queue.telemetry.story import outside

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tenacity import RetryCallState

    from gym_queue.engines.base import Completion
    from gym_queue.records import Message, Sampling, Weights
    from gym_queue.settings import Settings

PATIENCE = 30.0
"""Seconds for which an endpoint that is down is asked again."""

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 8.0
_CONNECT_TIMEOUT = 30.0
"""Long: when thousands connect at once, a full backlog makes the kernel repeat a SYN after 1, 3, 7, 15 s."""
_PROBE_TIMEOUT = 10.0
_DNS_CACHE = 300
_REFUSED = frozenset({400, 422})
_SETUP = frozenset({401, 403, 404})
_BUSY = frozenset({408, 425, 429})
_SERVER_ERROR = 500

_OPTIONAL: tuple[dict[str, Any], ...] = ({"logprobs": True, "return_token_ids": True}, {"logprobs": True}, {})
"""What is asked for beyond the common fields, from the most to the least that an endpoint may accept."""


class _AgainError(Exception):
    """One try failed in a way that may pass; ``patience``: seconds to go on, ``after``: to wait."""

    def __init__(self, reason: str, patience: float, after: float = 0.0) -> None:
        super().__init__(reason)
        self.patience = patience
        self.after = after


class _RefusedError(ModelError):
    """The endpoint refused the request as such."""


class OpenAIEngine:
    """See the module's docstring. One HTTP session an engine, opened in the loop that first calls it."""

    def __init__(
        self, model: str, settings: Settings, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._base, self._name = _address(model)
        self._settings = settings
        self._sleep = sleep
        self._session: aiohttp.ClientSession | None = None
        self._naming: asyncio.Task[str] | None = None
        self._version = 0
        self._level = 0
        self._level_is_known = False

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        seed: int | None,
        tools: Sequence[dict[str, Any]] = (),
        prefix: tuple[int, ...] = (),
    ) -> Completion:
        """Ask for one completion. ``prefix`` is not used: the endpoint applies its own template."""
        del prefix
        body: dict[str, Any] = {
            "model": await self._served_name(),
            "messages": list(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        if seed is not None:
            body["seed"] = seed
        if tools:
            body["tools"] = list(tools)
        version = self._version
        return completion_in(await self._complete(body), version)

    async def load(self, weights: Weights) -> None:
        """Note the version: the endpoint has it already."""
        self._version = max(self._version, weights.version)

    async def probe(self) -> None:
        """Ask once for the served models; raise one clear sentence where a run could not start."""
        timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT)
        try:
            self._name = self._name or first_model(
                await self._once("GET", "/models", None, timeout), self._base
            )
        except _AgainError as error:
            raise EngineUnavailableError(str(error)) from error

    async def close(self) -> None:
        """Close the session and its connections."""
        if self._naming is not None:
            self._naming.cancel()
        if self._session is not None:
            await self._session.close()

    async def _complete(self, body: dict[str, Any]) -> Any:
        """Post a request with as many optional fields as the endpoint is known, or hoped, to accept.

        A refusal is blamed on the optional fields only until the first request has succeeded with them.
        """
        level = self._level
        while True:
            try:
                answer = await self._exchange("POST", "/chat/completions", body | _OPTIONAL[level])
            except _RefusedError:
                if self._level_is_known or level + 1 == len(_OPTIONAL):
                    raise
                level += 1
            else:
                self._level, self._level_is_known = level, True
                return answer

    async def _served_name(self) -> str:
        if self._name is None:
            if self._naming is None or self._naming.done():  # done and still no name: it failed, so ask again
                self._naming = outside(self._ask_name())
                self._naming.add_done_callback(_mark_as_seen)
            self._name = await asyncio.shield(self._naming)
        return self._name

    async def _ask_name(self) -> str:
        return first_model(await self._exchange("GET", "/models", None), self._base)

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Send a request, again where that may help, and return the decoded answer."""
        retrying = AsyncRetrying(
            sleep=self._sleep,
            wait=_wait,
            stop=_is_out_of_patience,
            retry=retry_if_exception_type(_AgainError),
            reraise=True,
        )
        timeout = aiohttp.ClientTimeout(
            total=self._settings.http_client_timeout, sock_connect=_CONNECT_TIMEOUT
        )
        try:
            return await retrying(self._once, method, path, body, timeout)
        except _AgainError as error:
            raise EngineUnavailableError(str(error)) from error

    async def _once(
        self, method: str, path: str, body: dict[str, Any] | None, limits: aiohttp.ClientTimeout
    ) -> Any:
        try:
            async with self._opened().request(
                method, self._base + path, json=body, timeout=limits
            ) as response:
                raw = await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            msg = f"{self._base} cannot be reached (no connection within {limits.sock_connect:g} s)"
            raise _AgainError(msg, PATIENCE) from error
        except (
            TimeoutError
        ) as error:  # it had its full time; whether it gets it again is the ledger's decision
            msg = f"{self._base} did not answer within {limits.total:g} s"
            raise _AgainError(msg, patience=0.0) from error
        except aiohttp.ClientError as error:
            msg = f"{self._base} cannot be reached ({_reason(error)})"
            raise _AgainError(msg, PATIENCE) from error
        if response.status >= 400:  # noqa: PLR2004 - HTTP's own number
            raise self._refusal(response, raw)
        try:
            return json.loads(raw)
        except ValueError as error:
            msg = f"{self._base} answered with something that is not JSON"
            raise ModelError(msg) from error

    def _refusal(self, response: aiohttp.ClientResponse, raw: bytes) -> Exception:
        """Translate an HTTP error into the error whose class says what to do about it."""
        status, text = response.status, message_in(raw)
        if self._settings.api_key:
            text = text.replace(self._settings.api_key, "***")
        msg = f"{self._base} answered {status}{': ' if text else ''}{text}"
        after = _retry_after(response.headers.get("Retry-After", ""))
        if status in _BUSY or (status >= _SERVER_ERROR and after):
            return _AgainError(msg, self._settings.http_client_timeout, after)
        if status >= _SERVER_ERROR:
            return _AgainError(msg, PATIENCE)
        if status in _SETUP:
            return EngineSetupError(f"{msg} ({_SETUP_HINTS[status]})")
        return _RefusedError(msg) if status in _REFUSED else ModelError(msg)

    def _opened(self) -> aiohttp.ClientSession:
        """Return the session; without a limit, so that requests wait for the model, not for each other."""
        if self._session is None:
            open_files.allow_many()
            key = self._settings.api_key
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=_DNS_CACHE),
                headers={"Authorization": f"Bearer {key}"} if key else None,
            )
        return self._session


_SETUP_HINTS = {
    401: "is GYM_QUEUE_API_KEY right?",
    403: "is GYM_QUEUE_API_KEY allowed to use this model?",
    404: "does the address end in /v1, and is the model served there?",
}


def create(model: str, settings: Settings) -> OpenAIEngine:
    """Make the engine for an endpoint; nothing is asked yet."""
    return OpenAIEngine(model, settings)


def check(model: str, settings: Settings) -> None:
    """Ask the endpoint for its models, once. Synchronous: call it where no event loop runs."""
    asyncio.run(_probe(OpenAIEngine(model, settings)))


def _mark_as_seen(task: asyncio.Task[str]) -> None:
    """Keep asyncio from reporting an error that nobody waits for any more (all callers were cancelled)."""
    if not task.cancelled():
        task.exception()


async def _probe(engine: OpenAIEngine) -> None:
    try:
        await engine.probe()
    finally:
        await engine.close()


def _address(model: str) -> tuple[str, str | None]:
    """Split a model string into the endpoint's base URL and the served model's name."""
    try:
        parts = urlsplit(model)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        name = options.pop("model", None) or parts.fragment or None
        is_wrong = not parts.hostname or parts.port == 0
    except ValueError:
        is_wrong, options, name = True, {}, None
    if is_wrong or options:
        msg = f"the model {model!r} is not understood; write http(s)://HOST:PORT/v1 or …/v1?model=NAME"
        raise EngineSetupError(msg)
    if parts.username or parts.password:
        msg = "a model address must not carry a password, it would stand in every row; set GYM_QUEUE_API_KEY"
        raise EngineSetupError(msg)
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", name


def _reason(error: aiohttp.ClientError) -> str:
    """Say why no connection came about, in the words of the system and not of the library."""
    cause = getattr(error, "os_error", None)
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
    return str(error) or type(error).__name__


def _retry_after(value: str) -> float:
    """Return the seconds that a ``Retry-After`` header (a number, or a date: RFC 9110, 10.2.3) asks for."""
    with contextlib.suppress(ValueError):  # not a number: a date, then
        return max(0.0, float(value))
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


_JITTER = wait_random_exponential(multiplier=_FIRST_DELAY, max=_LONGEST_DELAY)


def _error_of(state: RetryCallState) -> _AgainError:
    error = state.outcome.exception() if state.outcome is not None else None
    if not isinstance(error, _AgainError):
        msg = "only an _AgainError is ever tried again"
        raise TypeError(msg)
    return error


def _wait(state: RetryCallState) -> float:
    return _error_of(state).after + _JITTER(state)


def _is_out_of_patience(state: RetryCallState) -> bool:
    return (state.seconds_since_start or 0.0) + state.upcoming_sleep > _error_of(state).patience
