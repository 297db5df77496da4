"""Verifiers for rows with a reference answer, by name: ``exact`` and ``math_verify``.

Both look at the content of the last ``<answer>…</answer>`` where the text has one, else at the whole text. A
reward is 1.0 or 0.0; where a verifier cannot say, it raises ``VerifierError``.
"""

from __future__ import annotations

import re

from gym_queue.errors import VerifierError
from gym_queue.records import Verdict
from gym_queue.verification.base import Verifier, answer_in

_MATH_TIMEOUT = 5
"""Seconds for each parse and each comparison (math-verify takes whole seconds: it uses ``signal.alarm``)."""

_MATHS_MODE = re.compile(r"\$|\\boxed|\\\(|\\\[|\\begin\{")


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()


def exact(answer: str, text: str) -> Verdict:
    """Reward 1.0 if both are equal after collapsing white space, stripping the ends and folding case."""
    return Verdict(reward=float(_fold(answer_in(text)) == _fold(answer)))


def _in_maths_mode(answer: str) -> str:
    r"""Wrap a bare formula in ``\boxed{}``: without, math-verify reads ``3, 5`` as 5, ``x+1`` not at all."""
    return answer if _MATHS_MODE.search(answer) else rf"\boxed{{{answer}}}"


def math_verify(answer: str, text: str) -> Verdict:
    """Reward 1.0 if both are the same mathematical object for the package math-verify, with its defaults.

    Call it in the main thread: the package guards each of its steps with ``SIGALRM``.

    Raises:
        VerifierError: the reference answer cannot be read, a step took too long, or the package failed.
    """
    from math_verify import parse, verify  # noqa: PLC0415 - sympy takes half a second to import
    from math_verify.errors import TimeoutException  # noqa: PLC0415

    said = answer_in(text)
    if said != text.strip():
        said = _in_maths_mode(said)
    try:
        gold = parse(_in_maths_mode(answer), parsing_timeout=_MATH_TIMEOUT, raise_on_error=True)
        claim = parse(said, parsing_timeout=_MATH_TIMEOUT, raise_on_error=True)
        equal = bool(gold) and verify(gold, claim, timeout_seconds=_MATH_TIMEOUT, raise_on_error=True)
    except TimeoutException as error:  # derives from BaseException
        msg = f"math_verify took longer than {_MATH_TIMEOUT} s for one step"
        raise VerifierError(msg) from error
    except Exception as error:
        msg = f"math_verify failed: {type(error).__name__}: {error}"
        raise VerifierError(msg) from error
    if not gold:
        msg = f"math_verify cannot read the reference answer {answer!r}"
        raise VerifierError(msg)
    return Verdict(reward=float(equal))


VERIFIERS: dict[str, Verifier] = {
    "exact": Verifier(score=exact, inline=True),
    "math_verify": Verifier(score=math_verify, inline=False),
}
"""What an input row may name in its field ``verifier``."""
