"""gym_queue: collect rollouts for RL post-training on many machines, each ending exactly once.

``Client`` and ``AsyncClient`` talk to a head; they are loaded when they are asked for (PEP 562), so that
importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gym_queue.client.asynchronous import AsyncClient
    from gym_queue.client.synchronous import Client

__all__ = ["AsyncClient", "Client"]

_LAZY = {"AsyncClient": "gym_queue.client.asynchronous", "Client": "gym_queue.client.synchronous"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_LAZY[name]), name)
