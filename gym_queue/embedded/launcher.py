"""Become a program that dies with its parent: ``launcher.py PARENT_PID SIGNAL_NUMBER PROGRAM ARGUMENTS...``.

The kernel is asked for a signal at the parent's death (prctl(2), PR_SET_PDEATHSIG), which survives the exec.
This runs as a program of its own, not as a ``preexec_fn``: Python code between fork and exec may deadlock in
a process with threads. It imports nothing of gym_queue, so that it starts in milliseconds (``-I -S``).
Elsewhere than on Linux it only execs.
"""

from __future__ import annotations

import os
import sys

_PR_SET_PDEATHSIG = 1


def _die_with_parent(parent: int, signal_number: int) -> None:
    import ctypes  # noqa: PLC0415 - not needed, and not always there, elsewhere than on Linux

    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the parent was gone before this process could ask to die with it")


def main(argv: list[str]) -> None:
    """Ask for the signal, then exec the program (found on PATH)."""
    if sys.platform == "linux":
        _die_with_parent(int(argv[1]), int(argv[2]))
    os.execvp(argv[3], argv[3:])  # noqa: S606 - the very purpose; no shell wanted


if __name__ == "__main__":
    main(sys.argv)
