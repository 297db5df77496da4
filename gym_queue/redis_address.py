"""How the address of a Redis is spelled: redis-py's forms, and one of our own for Redis Sentinel.

``sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/DB?master=NAME``: the hosts are Sentinels, user and
password those of the Redis that they name. Sentinels with a password of their own: ``&sentinel_password=``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from gym_queue.errors import UsageError

_SENTINEL = "sentinel"
_SENTINEL_PORT = 26379


@dataclass(frozen=True)
class RedisAddress:
    """Where Redis is. Without ``sentinels``, ``url`` says it all, in redis-py's form; they know
    where the ``master`` is.
    """

    url: str = field(repr=False)
    sentinels: tuple[tuple[str, int], ...] = ()
    master: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_password: str | None = field(default=None, repr=False)


def parse(url: str) -> RedisAddress:
    """Read an address. Raises ``UsageError``, without showing passwords."""
    parts = urlsplit(url)
    if parts.scheme != _SENTINEL:
        return RedisAddress(url=url)
    user, _, hosts = parts.netloc.rpartition("@")
    username, _, password = user.partition(":")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    master = options.pop("master", "")
    sentinel_password = options.pop("sentinel_password", None)
    database = parts.path.strip("/") or "0"
    if not master:
        raise _unusable(url, "it names no master (?master=NAME)")
    if options:
        raise _unusable(url, f"it knows no option {next(iter(options))!r}")
    if not database.isdecimal():
        raise _unusable(url, f"the number of a database was expected, not {database!r}")
    return RedisAddress(
        url=url,
        sentinels=tuple(_host_and_port(url, host) for host in hosts.split(",")),
        master=master,
        db=int(database),
        username=unquote(username) or None,
        password=unquote(password) or None,
        sentinel_password=sentinel_password,
    )


def _host_and_port(url: str, text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _unusable(url, f"of the Sentinel {text!r}: {error}") from error
    if not host:
        raise _unusable(url, "a Sentinel has no host")
    return host, port or _SENTINEL_PORT


def _unusable(url: str, why: str) -> UsageError:
    return UsageError(f"the Redis URL {without_password(url)} cannot be used: {why}")


def without_password(url: str) -> str:
    """Return the URL as it may be shown: passwords, where one is read from it, are starred out."""
    url = re.sub(r"(://[^/@]*?:)[^/]*@", r"\1***@", url)
    return re.sub(r"([?&](?:sentinel_)?password=)[^&]*", r"\1***", url)
