"""Where the parts are put together: which module serves a model, an environment, a ledger. Imports each when
it is needed.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gym_queue.errors import EngineSetupError, unknown_name

if TYPE_CHECKING:
    from gym_queue.celery_app import CeleryBroker
    from gym_queue.engines.base import Engine
    from gym_queue.environments.base import Environment
    from gym_queue.ledger.base import Ledger
    from gym_queue.settings import Settings

ENGINES = {
    "http": "gym_queue.engines.openai",
    "https": "gym_queue.engines.openai",
    "hf": "gym_queue.engines.transformers",
    "stub": "gym_queue.engines.stub",
}

ENVIRONMENTS = {
    "rows": "gym_queue.environments.rows",
    "reasoning_gym": "gym_queue.environments.reasoning_gym",
    "python": "gym_queue.environments.python",
}


def make_ledger(settings: Settings, *, patient: bool = True) -> Ledger:
    """Return the ledger that the settings name. One that is not ``patient`` gives up soon where Redis is
    away.
    """
    from gym_queue.ledger.redis import RedisLedger  # noqa: PLC0415

    return RedisLedger(settings.redis_url, patient=patient)


def make_broker(settings: Settings) -> CeleryBroker:
    """Return a way to send tickets to the workers."""
    from gym_queue.celery_app import CeleryBroker, make_app  # noqa: PLC0415

    return CeleryBroker(make_app("gym_queue", settings))


def make_engine(model: str, settings: Settings) -> Engine:
    """Return a new engine for a model. Cheap: an engine loads when it is first used. Raises
    ``EngineSetupError``.
    """
    engine: Engine = _engine_module(model).create(model, settings)
    return engine


def check_model(model: str, settings: Settings) -> None:
    """Fail early, with one sentence, for a model that cannot work. Loads no weights.

    Raises:
        EngineSetupError, EngineUnavailableError: see ``Engine``.
    """
    _engine_module(model).check(model, settings)


def make_environment(name: str) -> Environment:
    """Return the environment of a name; the same object each time. Raises ``UsageError`` that names the near
    ones.
    """
    return _environment(name)


@cache
def _environment(name: str) -> Environment:
    scheme = name.partition(":")[0]
    if scheme not in ENVIRONMENTS:
        raise unknown_name(scheme, ENVIRONMENTS, kind="environment")
    module = import_module(ENVIRONMENTS[scheme])
    environment: Environment
    if scheme == "rows":
        from gym_queue.verification.rewards import VERIFIERS  # noqa: PLC0415

        environment = module.create(name, VERIFIERS)
    else:
        environment = module.create(name)
    return environment


def _engine_module(model: str) -> Any:
    scheme, colon, _ = model.partition(":")
    if not colon or scheme not in ENGINES:
        msg = (
            f"unknown model {model!r}; a model begins with one of {', '.join(f'{name}:' for name in ENGINES)}"
        )
        raise EngineSetupError(msg)
    return import_module(ENGINES[scheme])
