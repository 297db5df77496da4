"""All settings in one model: defaults < file < environment < flags. ``docs/reference/settings.md`` explains
each.
"""

from __future__ import annotations

import json
from typing import Literal

from pydantic import AliasChoices, Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

_DEFAULT_FILE = "gym_queue.toml"


def _plain(name: str) -> AliasChoices:
    """Accept a variable under the name that users of such systems know, and the field's own name in code and
    files.
    """
    return AliasChoices(name, name.lower())


class Settings(BaseSettings):
    """Settings of every process. Times are seconds.

    A variable is ``GYM_QUEUE_`` + the field's name, unless an alias gives it the name known from other
    systems.
    """

    model_config = SettingsConfigDict(
        env_prefix="GYM_QUEUE_", frozen=True, extra="forbid", populate_by_name=True, toml_file=_DEFAULT_FILE
    )

    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0", description="Redis that carries ledger and queues.", repr=False
    )
    head_server_url: str = Field(
        default="",
        validation_alias=_plain("HEAD_SERVER_URL"),
        description="Head that commands and clients talk to, as http://head:11000; empty: none.",
    )
    auth_token: str = Field(
        default="", description="Bearer token that the head asks for, and that clients send.", repr=False
    )
    head_host: str = Field(
        default="127.0.0.1",
        description="Address that the head listens on; without a token only this machine.",
    )
    head_port: int = Field(
        default=11_000, ge=0, le=65_535, description="Port that the head listens on; 0: any that is free."
    )
    max_request_bytes: int = Field(
        default=67_108_864,
        ge=1024,
        description="Largest body with examples that the head takes; others end at 1 MiB.",
    )
    rate_limit: float = Field(
        default=1000.0, ge=0, description="Requests a second that the head takes from one address; 0: any."
    )
    runs_dir: str = Field(
        default="runs/head", description="Folder where the heads keep runs; the same for all of them."
    )
    num_expected_workers: int = Field(
        default=1,
        ge=0,
        validation_alias=_plain("NUM_EXPECTED_WORKERS"),
        description="Workers that generate for which the head waits before it starts a run.",
    )
    log_level: str = Field(
        default="INFO", validation_alias=_plain("LOG_LEVEL"), description="Level of every process's log."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Lines of the log: text, or json for one object a line."
    )
    metrics_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port of a worker's or beat's /health, /ready and /metrics; 0: none.",
    )
    metrics_host: str = Field(default="127.0.0.1", description="Address that this port is opened on.")
    concurrency: int = Field(
        default=256, ge=1, description="Rollouts that one GPU worker process holds at once."
    )
    window: int | None = Field(
        default=None, ge=1, description="Rollouts that may be accepted and not yet archived, of all runs."
    )
    payload_url: str = Field(
        default="",
        description="Folder, or URL known to fsspec, for what is too large for Redis; empty: nothing is.",
    )
    payload_threshold: int = Field(
        default=65_536,
        ge=0,
        description="Bytes above which a trajectory, a row or an example is kept there.",
    )
    worker_heartbeat_interval: float = Field(
        default=30.0,
        gt=0,
        validation_alias=_plain("WORKER_HEARTBEAT_INTERVAL"),
        description="Seconds between two renewals of a worker's lease.",
    )
    worker_timeout: float = Field(
        default=300.0,
        gt=0,
        validation_alias=_plain("WORKER_TIMEOUT"),
        description="A worker silent for this long is given up and its rollouts run elsewhere.",
    )
    sweep_interval: float = Field(
        default=15.0,
        gt=0,
        description="Seconds between two sweeps (dead workers, due retries, lost tickets).",
    )
    http_client_timeout: float = Field(
        default=300.0,
        gt=0,
        validation_alias=_plain("HTTP_CLIENT_TIMEOUT"),
        description="Longest wait for one HTTP answer of an endpoint.",
    )
    max_attempts: int = Field(
        default=3, ge=1, description="Attempts at each stage of a rollout before it is failed."
    )
    max_turns: int = Field(
        default=32, ge=1, description="Assistant messages after which a rollout is cut off."
    )
    queue_timeout: float = Field(
        default=86_400.0, gt=0, description="Deadline of each wait of a rollout for a worker."
    )
    generate_timeout: float = Field(default=600.0, gt=0, description="Deadline of one generate attempt.")
    tool_timeout: float = Field(default=120.0, gt=0, description="Deadline of one answer of the environment.")
    verify_timeout: float = Field(default=120.0, gt=0, description="Deadline of one verify attempt.")
    store_timeout: float = Field(
        default=60.0, gt=0, description="How long a worker tries to hand an outcome to the ledger."
    )
    rollout_timeout: float = Field(
        default=172_800.0, gt=0, description="Deadline of a whole rollout, from acceptance to its end."
    )
    api_key: str = Field(default="", description="Bearer token sent to http(s) model endpoints.", repr=False)
    tokenizer_trust_remote_code: bool = Field(
        default=False,
        validation_alias=_plain("TOKENIZER_TRUST_REMOTE_CODE"),
        description="Let a tokenizer or model folder run its own Python code.",
    )
    shutdown_grace: float = Field(
        default=10.0, ge=0, description="How long rollouts in flight may go on after Ctrl-C or SIGTERM."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources, strongest first: flags, environment, file."""
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls))


def variable(name: str) -> str:
    """Return the environment variable that sets the field ``name``."""
    alias = Settings.model_fields[name].validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return f"{Settings.model_config['env_prefix']}{name.upper()}"


def environment(settings: Settings) -> dict[str, str]:
    """Return the settings as environment variables, so that a child process reads the same ones."""
    values = settings.model_dump(mode="json")
    return {
        variable(name): value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if value is not None
    }
