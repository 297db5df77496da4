"""How many files and sockets a process may have open."""

from __future__ import annotations

import resource

_MANY = 65_536


def allow_many() -> None:
    """Raise the soft limit of open files (1,024 in most shells): a request or a client that waits is an open
    socket.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY if hard == resource.RLIM_INFINITY else min(hard, _MANY)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
