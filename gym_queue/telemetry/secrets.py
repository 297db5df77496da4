"""What must not be read in any log: passwords and tokens of the settings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gym_queue.settings import Settings

_SHORTEST = 4
"""Characters. What is shorter occurs in words by chance, and protects nothing."""

STARS = "***"


def secrets_of(settings: Settings) -> frozenset[str]:
    """Return the passwords and tokens of the settings, as they are and as URLs spell them."""
    found = {settings.auth_token, settings.api_key}
    for url in (settings.redis_url, settings.payload_url, settings.head_server_url):
        user, at, _ = urlsplit(url).netloc.rpartition("@")
        if at:
            found.add(user.partition(":")[2])
        found.update(value for name, value in parse_qsl(urlsplit(url).query) if name.endswith("password"))
    found |= {unquote(secret) for secret in found}
    return frozenset(secret for secret in found if len(secret) >= _SHORTEST)


class Censor:
    """Stars secrets out of what is said."""

    def __init__(self, secrets: Iterable[str]) -> None:
        longest_first = sorted(secrets, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, text: str) -> str:
        """Return the text without secrets."""
        return self._pattern.sub(STARS, text) if self._pattern else text
