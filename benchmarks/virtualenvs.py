"""Virtualenvs of the peers, one a section of ``peers.txt``: made once, again only when their pins change."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_name("peers.txt")
_PATIENCE = 900.0
_GLANCE = 30.0


class NotInstalledError(Exception):
    """A peer could not be installed; the message is what pip said last."""


def cache() -> Path:
    """Return the folder of the virtualenvs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "gym_queue-bench"


def sections() -> dict[str, list[str]]:
    """Return the pins by section."""
    found: dict[str, list[str]] = {}
    for line in PINS.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if name := re.fullmatch(r"\[(\w+)\]", text):
            pins = found[name.group(1)] = []
        elif text:
            pins.append(text)
    return found


def python_of(section: str, interpreter: str = sys.executable) -> str:
    """Return the interpreter of a section's virtualenv, made if need be.

    Raises:
        NotInstalledError: it cannot be made.
    """
    pins = sections()[section]
    folder = cache() / section
    python, stamp = folder / "bin" / "python", folder / "pins"
    wanted = hashlib.sha256("\n".join([interpreter, *pins]).encode()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"installing {', '.join(pins)} into {folder}", file=sys.stderr, flush=True)
    _run([interpreter, "-m", "venv", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", *pins])
    stamp.write_text(wanted)
    return str(python)


def interpreter_of(variable: str, *names: str) -> str:
    """Return the interpreter that an environment variable names, or else the first of ``names`` that runs: a
    version manager may have put something on the PATH that stands for nothing.

    Raises:
        NotInstalledError: there is none.
    """
    if chosen := os.environ.get(variable):
        names = (chosen,)
    for name in names:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            argv = [name, "-c", "import sys; print(sys.executable)"]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_GLANCE, check=True)  # noqa: S603
            return done.stdout.strip()
    msg = f"{' or '.join(names)} does not run; {variable} may name another"
    raise NotInstalledError(msg)


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_PATIENCE, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalledError(str(error)) from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalledError((errors or [done.stderr.strip()[-200:]])[0])
