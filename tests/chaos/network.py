"""A network namespace of its own for one worker, and a cable that can be pulled (ip-netns(8), veth(4))."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import Self

_FIRST = (198 << 24) + (18 << 16)
"""198.18.0.0/15 is set aside for tests of network devices (RFC 2544): nobody's real addresses."""

_SUBNETS = 2**15


def why_not() -> str:
    """Return what is missing for a network namespace here; empty if nothing is."""
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    if os.geteuid() != 0:
        return "only root may make a network namespace"
    return ""


def _address(number: int) -> str:
    return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=10)  # noqa: S607
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Cable:
    """Two ends: one here, with ``address``, and one in the namespace ``name``.

    Names are made of our process id, so that two drivers on one machine do not meet.
    """

    def __init__(self) -> None:
        number = os.getpid()
        base = _FIRST + 4 * (number % _SUBNETS)
        self.name = f"gq{number}"
        self.address, self._far_address = _address(base + 1), _address(base + 2)
        self._near, self._far = f"gq{number}a", f"gq{number}b"

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self.name)
            _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.name)
            _ip("address", "add", f"{self.address}/30", "dev", self._near)
            _ip("link", "set", self._near, "up")
            inside = ("-netns", self.name)
            _ip(*inside, "address", "add", f"{self._far_address}/30", "dev", self._far)
            _ip(*inside, "link", "set", self._far, "up")
            _ip(*inside, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for arguments in (("link", "delete", self._near), ("netns", "delete", self.name)):
            with contextlib.suppress(
                RuntimeError
            ):  # deleting one end deletes the other, and so may the kernel
                _ip(*arguments)

    def prefix(self) -> list[str]:
        """Return what to put before a command to run it at the far end."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """Pull the cable: packets vanish, and nobody is told."""
        _ip("link", "set", self._near, "down")

    def heal(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self._near, "up")
