"""The contract of a verifier: compares a reference answer with what the model said."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gym_queue.records import Verdict

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Verifier:
    """A way to score a text against a reference answer, chosen by name in an input row.

    ``score(answer, text)`` returns a verdict, or raises ``VerifierError`` where it cannot say. ``inline``
    verifiers take microseconds and are safe on an event loop; the others run in the verify queue, in the main
    thread of a process that can be killed.
    """

    score: Callable[[str, str], Verdict]
    inline: bool


def answer_in(text: str) -> str:
    """Return, stripped, the content of the last ``<answer>…</answer>``, or the whole text if none."""
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text).strip()
