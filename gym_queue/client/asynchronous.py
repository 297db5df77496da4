"""``gym_queue.AsyncClient``: the head from an event loop."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Required, Self, TypedDict, Unpack
from urllib.parse import quote

from pydantic import ValidationError

from gym_queue.api import RunRequest
from gym_queue.client.connection import Connection
from gym_queue.client.run import AsyncRun, run_path, view_of
from gym_queue.errors import ConflictError, UsageError
from gym_queue.records import Weights
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from gym_queue.api import MixPart, RunView
    from gym_queue.client.batches import Examples
    from gym_queue.records import Freshness, GroupPolicy, Sampling

PATIENCE = 30.0
"""Seconds that a head which is away is asked again, unless the caller says otherwise."""

SILENCE = 30.0
"""Seconds without a byte after which an answer is broken; the head sends a sign of life every ten."""


class RunFields(TypedDict, total=False):
    """The fields of ``RunRequest``; records may be given as dictionaries."""

    model: Required[str]
    samples: int
    sampling: Sampling | Mapping[str, Any]
    limits: Mapping[str, Any]
    priority: int
    weight: float
    groups: GroupPolicy | Mapping[str, Any]
    freshness: Freshness | Mapping[str, Any] | None
    environment: str
    environments: Sequence[MixPart | Mapping[str, Any]]


class AsyncClient:
    """A client of one head. For one event loop; ``async with`` closes it.

    Args:
        url: the head's, as ``http://head:11000``; by default that of ``HEAD_SERVER_URL``.
        token: by default that of ``GYM_QUEUE_AUTH_TOKEN``.
        patience: seconds that a call tries again while the head is away. Feeds and the appending of examples
            wait without end once the head has answered for the first time.
        silence: seconds without a byte after which an answer is broken and asked for again.

    Raises:
        UsageError: no head is named, or not by a URL.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        patience: float = PATIENCE,
        silence: float = SILENCE,
    ) -> None:
        settings = _settings()
        self._connection = Connection(
            settings.head_server_url if url is None else url,
            settings.auth_token if token is None else token,
            patience=patience,
            silence=silence,
        )
        self._submitted: list[AsyncRun] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.flush()
        finally:
            await self.close()

    @property
    def connection(self) -> Connection:
        """What this client's requests go through."""
        return self._connection

    async def submit(
        self,
        *,
        examples: Examples | None = None,
        idempotency_key: str | None = None,
        **request: Unpack[RunFields],
    ) -> AsyncRun:
        """Create a run; its examples follow in the background, and then it is closed.

        Args:
            examples: rows (an iterable, asynchronous or not), or the path of a JSONL file. ``None``: give
                them to the run's ``append``, and end with its ``close``; or name ``environments`` that bring
                their own.
            idempotency_key: the same key with the same request is the same run, however often it is
                submitted. By default a new one, so that a request whose answer was lost makes one run.
            request: see ``RunRequest``.

        Raises:
            UsageError: the request is none.
            ConflictError: the key was used for another request.
            HeadAwayError, UnauthorizedError, RequestRefusedError: see ``Connection.call``.
        """
        body = _request(request)
        if body.environments and examples is not None:
            msg = "environments bring their own examples: give either, not both"
            raise UsageError(msg)
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        answer = await self._connection.call(
            "POST", "/v1/runs", json=body.model_dump(mode="json"), headers=headers
        )
        view = view_of(answer)
        run = AsyncRun(self._connection, view)
        if examples is not None and not view.closed:
            run.feed(examples)
            self._submitted.append(run)
        return run

    async def run(self, run_id: str) -> AsyncRun:
        """Take up a run that was submitted before, here or elsewhere. Raises ``NotFoundError``."""
        return AsyncRun(self._connection, view_of(await self._connection.call("GET", run_path(run_id))))

    async def runs(self, state: str | None = None, limit: int | None = None) -> list[RunView]:
        """List runs, the newest first, all or those in one state (open, paused, cancelled, ended)."""
        wanted = {"state": state, "limit": None if limit is None else str(limit)}
        params = {name: value for name, value in wanted.items() if value is not None}
        answer = await self._connection.call("GET", "/v1/runs", params=params)
        return [view_of(run) for run in answer["runs"]]

    async def announce(self, model: str, version: int, uri: str = "") -> Weights:
        """Announce weights of a model: workers load them, and later rollouts are sampled from them.

        Announcing the same weights again changes nothing.

        Raises:
            ConflictError: the model has newer weights, or others of this version.
        """
        weights = Weights(model=model, version=version, uri=uri)
        path = "/v1/models/versions"
        try:
            await self._connection.call("POST", path, json=weights.model_dump(mode="json"))
        except ConflictError:
            known = await self._connection.call("GET", path, params={"model": model})
            if weights.model_dump(mode="json") not in known["versions"]:
                raise
        return weights

    async def workers(self) -> list[dict[str, Any]]:
        """List the workers that hold a lease, each as it describes itself."""
        answer = await self._connection.call("GET", "/v1/workers")
        workers: list[dict[str, Any]] = answer["workers"]
        return workers

    async def why(self, rollout_id: str) -> str:
        """Say in one sentence what a rollout is waiting for, or how it ended."""
        answer = await self._connection.call("GET", f"/v1/rollouts/{quote(rollout_id, safe='')}/why")
        return str(answer["why"])

    async def flush(self) -> None:
        """Wait until the head has all examples of all runs. Raises what went wrong first."""
        for run in self._submitted:
            await run.flush()

    async def close(self) -> None:
        """Stop appending and close all connections. The runs go on. Safe to repeat."""
        for run in self._submitted:
            await run.stop()
        await self._connection.close()


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        msg = f"the setting {'.'.join(map(str, first['loc']))} cannot be used: {first['msg']}"
        raise UsageError(msg) from error


def _request(fields: RunFields) -> RunRequest:
    try:
        return RunRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        msg = f"the run cannot be submitted: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UsageError(msg) from error
