"""What the head and its clients say to each other: the bodies of ``docs/reference/head.md``, as records."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator

from gym_queue.records import Freshness, GroupPolicy, Record, RunSpec, RunState, Sampling

Name = Annotated[str, Field(min_length=1, max_length=2000)]
"""The name of a model or an environment; it may be a URL or a path."""

GroupOutcome = Literal["complete", "short", "uniform", "stale"]
"""How a group was decided (``GroupPolicy``): only ``complete`` ones are for the trainer. ``short``: too few
samples succeeded; ``uniform``: all rewards are equal; ``stale``: the weights that sampled it are too old.
"""


class MixPart(Record):
    """One environment of a mix that brings its own examples: ``size`` of them, drawn by ``weight``."""

    name: Name
    size: int = Field(ge=1, le=1_000_000_000)
    weight: float = Field(default=1.0, gt=0, le=1e9)
    seed: int = Field(default=0, ge=0, lt=2**63)


class RunRequest(Record):
    """A run to be created.

    ``limits`` are those of ``Limits`` that differ from the head's settings. ``environment`` is for examples
    that name none. With ``environments`` the run brings its own examples, and takes no others.
    """

    model: Name
    samples: int = Field(default=1, ge=1, le=10_000)
    sampling: Sampling = Sampling()
    limits: dict[str, Any] = Field(default_factory=dict, max_length=100)
    priority: int = Field(default=0, ge=-1_000_000, le=1_000_000)
    weight: float = Field(default=1.0, gt=0, le=1e9)
    groups: GroupPolicy = GroupPolicy()
    freshness: Freshness | None = None
    environment: Name = "rows"
    environments: tuple[MixPart, ...] = Field(default=(), max_length=1000)


class GroupCounts(Record):
    """Decided groups of a run by outcome."""

    complete: int = 0
    short: int = 0
    uniform: int = 0
    stale: int = 0


class RunView(Record):
    """A run as the head shows it. Counts are rollouts, but for ``examples`` and ``groups``.

    ``closed``: no more examples will come. ``waiting_for`` is a sentence while the run cannot begin.
    """

    run_id: str
    state: RunState
    closed: bool
    examples: int
    accepted: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    queued: int = 0
    in_flight: int = 0
    archived: int = 0
    groups: GroupCounts = GroupCounts()
    reward_mean: float | None = None
    waiting_for: str | None = None
    spec: RunSpec


class GroupRow(Record):
    """A decided group as the feed shows it; ``rollouts`` are output rows, none unless it is ``complete``.

    ``weight_version`` is the oldest that sampled a token of it, ``None`` where nobody knows.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    run_id: str
    example_id: str
    example_index: int
    outcome: GroupOutcome
    weight_version: int | None = None
    rollouts: tuple[dict[str, Any], ...] = ()


class ServerRequest(Record):
    """A server that wants to be found by its name: a model, an environment, a verifier.

    ``kind`` says what it is (NeMo Gym's words: ``responses_api_models``, ``resources_servers``,
    ``responses_api_agents``; any other is taken too). ``capacity`` is how many requests it likes at once.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", examples=["policy"])
    kind: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", examples=["responses_api_models"])
    url: str = Field(max_length=2000, examples=["http://node-7:8000"])
    node: str = Field(default="", max_length=255)
    versions: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=255)]] = Field(
        default_factory=dict, max_length=32
    )
    capacity: int = Field(default=1, ge=1, le=1_000_000)

    @field_validator("url")
    @classmethod
    def _is_plain(cls, url: str) -> str:
        parts = urlsplit(url)  # raises ValueError itself, as does a port that is none
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            msg = "a server's address is http(s)://HOST[:PORT][/PATH]"
            raise ValueError(msg)
        if parts.username is not None or parts.query or parts.fragment or not url.isprintable() or " " in url:
            msg = "a server's address has no user, no password, no query and no blanks: all may read it"
            raise ValueError(msg)
        return url.rstrip("/")


class ServerView(ServerRequest):
    """A server as the head shows it. ``age`` is seconds since it was last heard of, ``healthy`` that it has
    not missed more than one heartbeat. ``registered_at`` is a Unix time on the head's clock.
    """

    id: str
    age: float
    healthy: bool
    registered_at: float
