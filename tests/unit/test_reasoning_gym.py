"""Every dataset of reasoning_gym: the same items wherever they are built, scored by its own scorer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS, create_dataset

from gym_queue.environments import reasoning_gym
from gym_queue.environments.reasoning_gym import UNSTABLE, create
from gym_queue.errors import EnvironmentFailedError, InvalidExampleError, UsageError, VerifierError
from gym_queue.records import Example, Trajectory

_SEED = 11
_OPTIONS = {
    "composite": '?datasets=[{"name":"chain_sum","weight":1,"config":{}},'
    '{"name":"ransom_note","weight":1,"config":{}}]'
}
"""composite has no default configuration: it is a mixture of others."""

_SLOW = {
    "futoshiki",
    "intermediate_integration",
    "knight_swap",
    "puzzle24",
    "quantum_lock",
    "rearc",
    "simple_integration",
    "sokoban",
    "sudoku",
    "word_ladder",
    "zebra_puzzles",
}
"""An item takes 20 ms to 2 s: compare fewer of them."""

_DIGESTS = """
import contextlib, hashlib, io, json, sys
from reasoning_gym.factory import create_dataset
digests = {}
with contextlib.redirect_stdout(io.StringIO()):
    for name, size in json.loads(sys.argv[1]).items():
        dataset = create_dataset(name, seed=5, size=size)
        items = [(item["question"], item["answer"]) for item in map(dataset.__getitem__, range(size))]
        digests[name] = hashlib.sha256(repr(items).encode()).hexdigest()
print(json.dumps(digests))
"""


def _name(dataset: str) -> str:
    return f"reasoning_gym:{dataset}{_OPTIONS.get(dataset, '')}"


def _answered(text: str, state: dict[str, Any]) -> Trajectory:
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": text})
    return Trajectory(messages=messages, finish_reason="stop", state=state)


@pytest.mark.filterwarnings("ignore::UserWarning")  # a scorer reads an empty answer with numpy, which warns
@pytest.mark.parametrize("dataset", sorted(DATASETS))
async def test_items_are_rebuilt_equal_and_scored_by_their_own_scorer(dataset: str) -> None:
    environment = create(_name(dataset))
    examples = list(environment.examples(2, _SEED))
    assert [example.id for example in examples] == [f"{dataset}-{_SEED}-0", f"{dataset}-{_SEED}-1"]
    assert list(environment.examples(2, _SEED)) == examples
    for example in examples:
        session: dict[str, Any] = {}
        opening = await environment.reset(example, session)
        assert [message["role"] for message in opening.messages] == ["user"]
        assert opening.messages[0]["content"].strip()
        ending = environment.step(example, session, {"role": "assistant", "content": "?"})

        reasoning_gym._build.cache_clear()
        reasoning_gym._dataset.cache_clear()
        travelled = Example.model_validate_json(example.model_dump_json())
        again = create(_name(dataset))
        assert await again.reset(travelled, {}) == opening
        assert not again.inline(travelled)

        entry = again._entry(travelled)
        text = entry["answer"] or ""
        expected = reasoning_gym._dataset(dataset, *_key(travelled)).score_answer(text, entry)
        for said in (text, f"I thought\n<answer>{text}</answer>"):
            assert again.verify(travelled, _answered(said, ending.state)).reward == expected


def _key(example: Example) -> tuple[str, int, int]:
    return json.dumps(example.row["config"], sort_keys=True), example.row["seed"], example.row["size"]


def test_items_that_are_rebuilt_do_not_depend_on_the_process() -> None:
    sizes = json.dumps({name: 2 if name in _SLOW else 6 for name in sorted(set(DATASETS) - {"composite"})})
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", _DIGESTS, sizes],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for seed in ("1", "2")
    ]
    try:
        one, two = (json.loads(builder.communicate(timeout=120)[0]) for builder in builders)
    finally:
        for builder in builders:
            builder.kill()
            builder.wait()
    assert len(one) == len(DATASETS) - 1
    differ = {name for name in one if one[name] != two[name]}
    assert differ <= UNSTABLE
    assert {"isomorphic_strings", "polynomial_multiplication", "ransom_note"} <= differ


def test_examples_of_a_stable_dataset_are_places_and_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning_gym, "_build", None)
    examples = list(create("reasoning_gym:sokoban").examples(1000, 3))
    row = {"dataset": "sokoban", "config": {}, "seed": 3, "size": 1000, "index": 999}
    assert examples[999].row == row


def test_a_mixture_carries_the_items_of_its_unstable_part_only() -> None:
    rows = [example.row for example in create(_name("composite")).examples(8, _SEED)]
    carried = [row["entry"]["metadata"]["source_dataset"] for row in rows if "entry" in row]
    assert 0 < len(carried) < 8
    assert set(carried) == {"ransom_note"}


def test_a_reader_may_stop_early_and_the_builder_goes() -> None:
    examples = create("reasoning_gym:ransom_note").examples(100_000, 1)
    assert next(examples).row["entry"]["question"]
    examples.close()  # type: ignore[attr-defined]


def test_a_builder_that_dies_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = create("reasoning_gym:ransom_note")
    monkeypatch.setattr(environment, "_name", "reasoning_gym:no_such")
    with pytest.raises(EnvironmentFailedError, match="ended with 1: KeyError: 'no_such'"):
        list(environment.examples(2, 1))


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ("chain_sum?max_terms=4", {"max_terms": 4}),
        ("chain_sum?allow_negation=true", {"allow_negation": True}),
        ("chain_sum?allow_negation=False", {"allow_negation": False}),
        ('basic_arithmetic?operators=["%2B","-"]', {"operators": ["+", "-"]}),
        (
            'basic_arithmetic?operators=["+"]&format_style=natural',
            {"operators": ["+"], "format_style": "natural"},
        ),
        ("rearc?diff_ub=0.3", {"diff_ub": 0.3}),
        ('polynomial_multiplication?variables=["a","b"]', {"variables": ["a", "b"]}),
        ("codeio?difficulty=6", {"difficulty": 6}),
    ],
)
def test_options_have_the_types_of_the_datasets_configuration(options: str, config: dict[str, Any]) -> None:
    example = next(create(f"reasoning_gym:{options}").examples(2, 1))
    assert example.row["config"] == config
    assert example.environment == f"reasoning_gym:{options}"


def test_an_option_reaches_the_dataset() -> None:
    environment = create("reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1")
    example = next(environment.examples(1, 4))
    expected = create_dataset(
        "chain_sum", seed=4, size=1, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    assert environment._entry(example) == expected[0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("chain_sums", "no reasoning_gym dataset 'chain_sums'; did you mean chain_sum"),
        ("", "no reasoning_gym dataset ''; none of the 106 known ones is near"),
        ("chain_sum?max_term=4", "no option of reasoning_gym:chain_sum 'max_term'; did you mean max_terms"),
        ("chain_sum?max_terms=four", "max_terms=four: "),
        ("chain_sum?max_terms=2.5", "max_terms=2.5: input should be a valid integer"),
        ("basic_arithmetic?format_style=odd", "format_style=odd: input should be"),
        ("chain_sum?min_terms=5&max_terms=4", "max_terms must be >= min_terms"),
        ("chain_sum?seed=4", r"'seed' is not an option here; it is given with the run \(--seed\)"),
        ("composite", "Must specify at least one dataset"),
        (
            'composite?datasets=[{"name":"no_such","weight":1,"config":{}}]',
            "Dataset 'no_such' not registered",
        ),
    ],
)
def test_each_mistake_has_its_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        create(f"reasoning_gym:{name}")


_PLACE = {"seed": 1, "size": 4, "index": 3}


@pytest.mark.parametrize(
    ("dataset", "row", "sentence"),
    [
        ("chain_sum", {"seed": 1, "size": 4}, "the row's 'index': field required"),
        ("chain_sum", _PLACE | {"index": 4}, "index 4 is not below its size 4"),
        ("chain_sum", _PLACE | {"dataset": "gcd"}, "the row is of dataset gcd"),
        ("ransom_note", _PLACE, "the row must bring its 'entry'"),
    ],
)
def test_an_input_row_must_name_a_place(dataset: str, row: dict[str, Any], sentence: str) -> None:
    environment = create(f"reasoning_gym:{dataset}")
    example = Example(id="a", environment=f"reasoning_gym:{dataset}", row=row)
    with pytest.raises(UsageError, match=sentence):
        environment.check(example)
    with pytest.raises(InvalidExampleError, match=sentence):
        environment.verify(example, _answered("4", {}))


def test_an_input_row_needs_only_seed_size_and_index() -> None:
    environment = create("reasoning_gym:chain_sum")
    row = Example(id="a", environment="reasoning_gym:chain_sum", row=_PLACE)
    environment.check(row)
    assert environment._entry(row) == environment._entry(list(environment.examples(4, 1))[3])


def test_an_item_rebuilt_differently_is_not_scored() -> None:
    environment = create("reasoning_gym:chain_sum")
    example = next(environment.examples(1, 1))
    with pytest.raises(VerifierError, match="chain_sum-1-0 was rebuilt differently"):
        environment.verify(example, _answered("4", {"digest": "another"}))


async def test_a_scorer_that_raises_is_an_error_and_not_a_zero() -> None:
    environment = create("reasoning_gym:prime_factorization")
    example, session = next(environment.examples(1, 1)), dict[str, Any]()
    await environment.reset(example, session)
    state = environment.step(example, session, {"role": "assistant", "content": "?"}).state
    with pytest.raises(VerifierError, match="scorer of prime_factorization failed"):
        environment.verify(example, _answered("no idea", state))
