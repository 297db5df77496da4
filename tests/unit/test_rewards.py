"""Verifiers by name: what counts as equal, and when they refuse to say."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from gym_queue.errors import VerifierError
from gym_queue.verification.base import answer_in
from gym_queue.verification.rewards import VERIFIERS, exact, math_verify


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (" plain \n", "plain"),
        ("so <answer> 4 </answer>", "4"),
        ("<answer>3</answer> no: <answer>\n4\n</answer> done", "4"),
        ("<answer>never closed", "<answer>never closed"),
        ("", ""),
    ],
)
def test_the_answer_is_what_the_last_tag_holds_or_the_whole_text(text: str, content: str) -> None:
    assert answer_in(text) == content


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("New  York", " new\tyork\n", 1.0),
        ("STRASSE", "straße", 1.0),
        ("4", "I think <answer>4</answer>", 1.0),
        ("4", "I think 4", 0.0),
        ("4", "", 0.0),
        ("newyork", "new york", 0.0),
    ],
)
def test_exact_folds_white_space_and_case_and_nothing_else(answer: str, text: str, reward: float) -> None:
    assert exact(answer, text).reward == reward


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("1/2", r"It is \boxed{0.5}", 1.0),
        (r"\frac{1}{2}", "<answer>1/2</answer>", 1.0),
        ("x+1", "<answer>1 + x</answer>", 1.0),
        ("x+1", "so it is $x + 1$", 1.0),
        ("3, 5", r"\boxed{5}", 0.0),
        ("3, 5", r"\boxed{5, 3}", 1.0),
        ("42", "I do not know", 0.0),
        ("42", "", 0.0),
        ("$7$", "7", 1.0),
    ],
)
def test_math_verify_compares_meaning(answer: str, text: str, reward: float) -> None:
    assert math_verify(answer, text).reward == reward


def test_a_reference_that_cannot_be_read_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(VerifierError, match="cannot read the reference answer"):
        math_verify("$$", "4")


def test_a_comparison_without_end_is_an_error_even_under_a_running_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gym_queue.verification.rewards._MATH_TIMEOUT", 1)
    before = signal.getsignal(signal.SIGALRM)

    async def score() -> None:
        math_verify("42", r"\boxed{9^{9^{9}}}")

    with pytest.raises(VerifierError, match="took longer than 1 s"):
        asyncio.run(score())
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert math_verify("42", "42").reward == 1.0


def test_math_verify_in_another_thread_is_an_error_and_not_a_zero() -> None:
    raised: list[BaseException] = []

    def score() -> None:
        try:
            math_verify("42", "42")
        except VerifierError as error:
            raised.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    thread.join(30)
    assert "thread" in str(raised[0])


def test_only_the_cheap_verifier_is_inline() -> None:
    assert {name: verifier.inline for name, verifier in VERIFIERS.items()} == {
        "exact": True,
        "math_verify": False,
    }
