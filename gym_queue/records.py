"""The nouns of the project (frozen, versioned pydantic models): what travels between processes and into
files.

Every record is immutable: a change is a new record. JSON is the only encoding. ``SCHEMA_VERSION`` is written
into each output row and each run, so that a reader can tell which layout it sees.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from itertools import compress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

SCHEMA_VERSION = 1

Message = dict[str, Any]
"""One chat message in the OpenAI layout: ``role``, ``content`` and, where they apply, ``tool_calls``,
``tool_call_id``.
"""


class Record(BaseModel):
    """Base of all records: immutable, and strict about unknown fields, so a typing error never passes
    silently.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Stage(StrEnum):
    """The two pieces of work a rollout is made of; each has its own queue, attempts and deadline."""

    GENERATE = "generate"
    VERIFY = "verify"


class FailureClass(StrEnum):
    """Why a rollout failed. Only some classes are worth another attempt: see ``lifecycle.RETRYABLE``."""

    MODEL = "model"
    ENVIRONMENT = "environment"
    VERIFIER = "verifier"
    TIMEOUT = "timeout"
    INFRASTRUCTURE = "infrastructure"
    STALE = "stale"
    INVALID = "invalid"


class Failure(Record):
    """A failure as data: its class, the stage it happened in, and one sentence for a person."""

    failure_class: FailureClass
    stage: Stage
    error: str


class Sampling(Record):
    """How the engine draws tokens.

    ``seed`` is the run's; an engine that takes a seed per request gets ``seed + ordinal of the rollout``.
    """

    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_tokens: int = Field(default=512, ge=1)
    seed: int | None = None


class Limits(Record):
    """How long a stage of a rollout may take (seconds, from the stage's start) and how often it is tried.

    ``queue_timeout`` is for each wait for a worker, ``store_timeout`` for handing an outcome to the ledger,
    and ``rollout_timeout`` for the whole, from acceptance to the end.
    """

    max_attempts: int = Field(default=3, ge=1)
    max_turns: int = Field(default=32, ge=1)
    queue_timeout: float = Field(default=86_400.0, gt=0)
    generate_timeout: float = Field(default=600.0, gt=0)
    tool_timeout: float = Field(default=120.0, gt=0)
    verify_timeout: float = Field(default=120.0, gt=0)
    store_timeout: float = Field(default=60.0, gt=0)
    rollout_timeout: float = Field(default=172_800.0, gt=0)
    retry_base_delay: float = Field(default=1.0, ge=0)
    retry_max_delay: float = Field(default=60.0, ge=0)


class Example(Record):
    """One row of the dataset.

    ``row`` is what the environment needs to rebuild the task (for JSONL input: the row as it was read; for
    reasoning_gym: dataset, config, seed, index). ``extra`` are fields that we do not know; they come back in
    the output.
    """

    id: str
    environment: str
    row: dict[str, Any]
    extra: dict[str, Any] = Field(default_factory=dict)


class GroupPolicy(Record):
    """When a group is done, and which groups count.

    ``usable``: as soon as so many samples of a group have succeeded, the others are cancelled and the group
    is complete with those. ``None``: it is complete if all its samples succeed.
    ``drop_uniform``: a group whose rewards are all equal has no advantage to learn from (GRPO): it is
    dropped.
    ``wanted``: complete groups that the run delivers; each that is dropped or falls short is replaced by one
    fresh example. ``None``: every example gets its group, and nothing is replaced.
    ``oversample``: groups begun beyond those that are wanted, so that a slow one delays nobody.
    """

    usable: int | None = Field(default=None, ge=1)
    drop_uniform: bool = False
    wanted: int | None = Field(default=None, ge=1)
    oversample: int = Field(default=0, ge=0)


class Freshness(Record):
    """How old the weights that sampled a rollout may be, in versions of the model.

    At most ``(version - first version + max_staleness + 1) * groups_per_version`` groups, dropped ones not
    counted, are begun, so that none is begun that would be too old when its turn comes (the rule of AReaL: Fu
    et al. 2025, "AReaL: A Large-Scale Asynchronous Reinforcement Learning System for Language Reasoning",
    arXiv:2505.24298). What is too old all the same when it ends is failed as ``stale``.
    """

    max_staleness: int = Field(ge=0)
    groups_per_version: int = Field(ge=1)


class Weights(Record):
    """A version of a model's weights. ``uri`` says where they lie; empty: the engine has them already."""

    model: str
    version: int = Field(ge=0)
    uri: str = ""


class RunSpec(Record):
    """One submission: examples x samples, one model, one set of limits. Written once, never changed.

    Runs of equal ``priority`` share the fleet by their ``weight``. ``output`` says where the rows go
    (``HOST:PATH``), for people and for the commands that read them.
    """

    version: int = SCHEMA_VERSION
    run_id: str
    model: str
    samples: int = Field(ge=1)
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    priority: int = 0
    weight: float = Field(default=1.0, gt=0)
    groups: GroupPolicy = GroupPolicy()
    freshness: Freshness | None = None
    input_fingerprint: str = ""
    output: str = ""

    def identity(self) -> str:
        """Digest of everything that must be equal for two submissions to be the same run (all but its id and
        output).
        """
        return hashlib.sha256(self.model_dump_json(exclude={"run_id", "output"}).encode()).hexdigest()


class RunState(StrEnum):
    """Where a run stands.

    ``paused`` starts nothing new: what was generated may still be verified, what waits goes on waiting.
    ``cancelled`` and ``ended`` are final.
    """

    OPEN = "open"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    ENDED = "ended"


class RunStatus(Record):
    """A run as the ledger sees it. Counters are rollouts, ``cursor`` is the index of the next example to
    accept, ``queued`` are those that no worker has begun. ``opened_at`` is when it was last opened, on the
    ledger's clock.

    The rest counts what was healed: ``retried`` failed attempts tried again, ``lost`` attempts whose worker
    died, ``refused`` late writes, ``republished`` tickets that the broker lacked, ``dropped`` tickets that no
    rollout waited for.
    """

    spec: RunSpec
    state: RunState
    opened_at: float = 0.0
    cursor: int = 0
    accepted: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    archived: int = 0
    queued: int = 0
    retried: int = 0
    lost: int = 0
    refused: int = 0
    republished: int = 0
    dropped: int = 0

    @property
    def ended(self) -> int:
        """Rollouts that reached a terminal state."""
        return self.succeeded + self.failed + self.cancelled

    @property
    def in_flight(self) -> int:
        """Rollouts that a worker has begun and that have not ended."""
        return self.accepted - self.ended - self.queued

    @property
    def open(self) -> int:
        """Rollouts accepted and not yet safe in the archive: what the window counts."""
        return self.accepted - self.archived


class Group(Record):
    """All samples of one example that a run wants: what the feeder hands to the ledger."""

    example_index: int
    samples: tuple[int, ...]
    example: Example


class Ticket(Record):
    """A claim check, not the work itself: which samples of which example, and the only attempt it is good
    for.

    ``losses`` counts the workers that died while they had this rollout at this stage: one of those deaths may
    be its own doing (``lifecycle.companions``).
    """

    stage: Stage
    run_id: str
    example_index: int
    samples: tuple[int, ...]
    attempt: int
    losses: int = 0


class Fence(Record):
    """Names one attempt at one stage of one rollout; the ledger takes a write only while this attempt is the
    newest. ``losses`` is its ticket's.
    """

    stage: Stage
    run_id: str
    example_index: int
    sample_index: int
    attempt: int
    worker: str
    losses: int = 0


class Usage(Record):
    """Tokens as the engine counts them, summed over all turns."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


class Tokens(Record):
    """The conversation as token ids: one entry per token in every list, all of the same length.

    ``loss_mask`` is 1 for tokens that the model sampled, 0 for prompt, tool and environment tokens.
    ``logprobs`` are natural logarithms under the distribution that sampled the token, and 0.0 where the mask
    is 0. ``weight_version`` says which weights sampled the token (-1 where the mask is 0). Ids are the ones
    that the engine sampled, never re-encoded text. ``logprobs`` is ``None`` as a whole when the engine gives
    none.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    loss_mask: tuple[int, ...]
    weight_version: tuple[int, ...]

    @property
    def oldest_version(self) -> int | None:
        """The oldest weights that sampled a token, ``None`` where none was sampled."""
        return min(compress(self.weight_version, self.loss_mask), default=None)


class Trajectory(Record):
    """What a rollout did. ``tokens`` is ``None`` where the engine shows no token ids. ``state`` is the
    environment's own closing record, for its verifier.
    """

    messages: tuple[Message, ...]
    tokens: Tokens | None = None
    finish_reason: str
    usage: Usage = Usage()
    turns: int = 1
    state: dict[str, Any] = Field(default_factory=dict)


class Verdict(Record):
    """What a verifier said. ``reward`` is ``None`` only where nothing was asked (a row without answer or
    verifier).

    A verifier that cannot say raises; it never returns 0 for "could not tell". Not-a-number and infinity are
    refused.
    """

    reward: FiniteFloat | None
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)


class Timings(Record):
    """Seconds that the newest attempt spent in each stage; ``None`` where the stage was not reached.

    ``queued`` and ``verify_queued`` are waits for a worker. ``accepted_at`` and ``ended_at`` are Unix times
    on the ledger's clock; their difference covers all attempts.
    """

    accepted_at: float
    ended_at: float
    queued: float | None = None
    generate: float | None = None
    verify_queued: float | None = None
    verify: float | None = None


class Summary(Record):
    """The few numbers of an ended rollout that metrics and groups need, so that nobody parses whole rows for
    them. ``weight_version`` is the oldest that sampled a token, ``None`` where nobody knows.
    """

    example_index: int
    sample_index: int
    attempt: int
    state: Literal["succeeded", "failed", "cancelled"]
    reward: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    failure_class: FailureClass | None = None
    weight_version: int | None = None
    usage: Usage = Usage()
    turns: int = 0
    timings: Timings


def rollout_id(run_id: str, example_index: int, sample_index: int) -> str:
    """Return the id of a rollout: readable, and the same for the same place in the same run."""
    return f"{run_id}.{example_index}.{sample_index}"
