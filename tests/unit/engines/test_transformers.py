"""The engine with a model in this process: a tiny random one, on the CPU."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.agents.loop import act
from gym_queue.engines import checkpoint
from gym_queue.engines import transformers as engine_module
from gym_queue.engines.transformers import TransformersEngine, check, create
from gym_queue.environments.base import Environment, Observation
from gym_queue.errors import EngineSetupError, EngineUnavailableError, ModelError
from gym_queue.records import Example, RunSpec, Sampling
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gym_queue.engines.base import Completion
    from gym_queue.records import Message

SETTINGS = Settings()
ASK = ({"role": "user", "content": "2+2"},)


@pytest.fixture
async def engine(tiny_model: str) -> AsyncIterator[TransformersEngine]:
    made = create(tiny_model, SETTINGS)
    yield made
    await made.close()


async def ask(engine: TransformersEngine, text: str = "2+2", **sampling: Any) -> Completion:
    messages = ({"role": "user", "content": text},)
    return await engine.generate(messages, sampling=Sampling(**{"max_tokens": 8, **sampling}), seed=None)


def scores(model: str, completion: Completion, temperature: float) -> Any:
    """Log-probabilities of every next token, from one separate forward pass."""
    import torch  # noqa: PLC0415 - heavy
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - heavy

    assert completion.prompt_token_ids is not None
    assert completion.token_ids is not None
    network = AutoModelForCausalLM.from_pretrained(model.removeprefix("hf:"))
    ids = completion.prompt_token_ids + completion.token_ids
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([ids])).logits[0].float() / temperature
    return logits.log_softmax(-1)[len(completion.prompt_token_ids) - 1 : -1]


async def test_token_ids_and_logprobs_of_what_was_sampled(
    engine: TransformersEngine, tiny_model: str
) -> None:
    completion = await ask(engine, temperature=0.7)
    assert completion.prompt_token_ids is not None
    assert completion.token_ids is not None
    assert completion.logprobs is not None
    expected = scores(tiny_model, completion, 0.7)
    for place, (token, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        assert logprob == pytest.approx(expected[place, token].item(), abs=1e-4)
    assert completion.finish_reason == "length"
    assert completion.usage.prompt_tokens == len(completion.prompt_token_ids)
    assert completion.usage.completion_tokens == len(completion.token_ids) == 8


async def test_concurrent_calls_share_batches_and_get_their_own_answers(
    engine: TransformersEngine, tiny_model: str
) -> None:
    """Greedy answers equal the likeliest tokens of a pass of their own, for prompts of many lengths."""
    completions = await asyncio.gather(*(ask(engine, "x" * n, temperature=0.0) for n in range(1, 13)))
    for completion in completions:
        likeliest = scores(tiny_model, completion, 1.0).argmax(-1).tolist()
        assert list(completion.token_ids or ()) == likeliest
        assert completion.logprobs == (0.0,) * 8
    steps = engine._batcher._manager.current_batch  # type: ignore[union-attr]
    assert steps < 12 * 8 / 2  # one after the other they would take 12 x 8


async def test_a_group_of_samples_differs(engine: TransformersEngine) -> None:
    completions = await asyncio.gather(*(ask(engine, temperature=3.0) for _ in range(8)))
    assert len({completion.token_ids for completion in completions}) > 1


async def test_stopping_and_being_cut_off(stopping_model: str) -> None:
    engine = create(stopping_model, SETTINGS)
    completions = await asyncio.gather(*(ask(engine, max_tokens=4) for _ in range(40)))
    await engine.close()
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert completion.token_ids is not None
        assert len(completion.token_ids) == len(completion.logprobs or ()) <= 4
        is_stopped = completion.finish_reason == "stop"
        assert is_stopped == (completion.token_ids[-1] % 2 == 1)
        assert all(token % 2 == 0 for token in completion.token_ids[:-1])


async def test_max_tokens_is_each_requests_own(engine: TransformersEngine) -> None:
    completions = await asyncio.gather(*(ask(engine, max_tokens=n) for n in (1, 5, 9)))
    assert [len(completion.token_ids or ()) for completion in completions] == [1, 5, 9]


async def test_top_p_and_temperature_are_each_requests_own(engine: TransformersEngine) -> None:
    """A nucleus smaller than any token's share leaves only the likeliest one; the others stay free."""
    await ask(engine)  # built without top-p first, and again with it for the next
    narrow, greedy, *free = await asyncio.gather(
        ask(engine, top_p=1e-6),
        ask(engine, temperature=0.0),
        *(ask(engine, temperature=3.0) for _ in range(8)),
    )
    assert narrow.token_ids == greedy.token_ids
    assert len({completion.token_ids for completion in free}) > 1


async def test_the_context_cuts_max_tokens_and_refuses_long_prompts(engine: TransformersEngine) -> None:
    completion = await ask(engine, max_tokens=10_000)
    assert completion.usage.prompt_tokens + completion.usage.completion_tokens <= 256
    assert completion.finish_reason == "length"
    with pytest.raises(ModelError, match="leaves no room in a context of 256"):
        await ask(engine, "x" * 300)
    assert (await ask(engine)).finish_reason == "length"


async def test_turns_extend_each_other(engine: TransformersEngine) -> None:
    class Twice(Environment):
        def reset(self, example: Example, session: dict[str, Any]) -> Observation:
            return Observation(messages=ASK)

        def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
            session["turns"] = session.get("turns", 0) + 1
            return Observation(messages=ASK, done=session["turns"] == 3)

    spec = RunSpec(run_id="r", model="hf:", samples=1, sampling=Sampling(max_tokens=4))
    example = Example(id="e", environment="test", row={})
    trajectory = await act(example, Twice(), engine, spec, ordinal=0)
    assert trajectory.tokens is not None
    assert sum(trajectory.tokens.loss_mask) == 12
    assert trajectory.usage.completion_tokens == 12


async def test_cancelling_stops_the_generation(engine: TransformersEngine) -> None:
    await ask(engine)
    call = asyncio.create_task(ask(engine, max_tokens=200))
    batcher = engine._batcher
    assert batcher is not None
    while not batcher._waiting:  # noqa: ASYNC110 - set by a call in this same loop
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not batcher._waiting
    assert not batcher._manager.output_router.result_handlers
    await ask(engine)  # the thread has taken the cancellation by the time it answers this
    assert not batcher._manager.batch_processor.scheduler.active_requests


async def test_concurrent_first_calls_load_once(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = checkpoint.load

    def counted(name: str, settings: Settings) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        loads.append(name)
        return load(name, settings)

    monkeypatch.setattr(checkpoint, "load", counted)
    engine = create(tiny_model, SETTINGS)
    first = asyncio.create_task(ask(engine))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(*(ask(engine) for _ in range(3)))
    await engine.close()
    assert len(loads) == 1


async def test_a_dead_thread_fails_its_calls_and_is_replaced(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(engine)
    batcher = engine._batcher
    assert batcher is not None

    def explode(*_: Any) -> None:
        msg = "out of memory"
        raise RuntimeError(msg)

    monkeypatch.setattr(batcher._manager, "_generation_step", explode)
    with pytest.raises(EngineUnavailableError, match="out of memory"):
        await ask(engine)
    while batcher.is_alive:  # noqa: ASYNC110 - a thread sets no event when it ends
        await asyncio.sleep(0)
    assert (await ask(engine)).finish_reason == "length"
    assert engine._batcher is not batcher


async def test_a_thread_that_dies_without_a_word_fails_its_calls(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(engine)
    batcher = engine._batcher
    assert batcher is not None
    monkeypatch.setattr(batcher, "_watching", None)
    monkeypatch.setattr(engine_module, "_WATCH_INTERVAL", 0.01)
    monkeypatch.setattr(batcher._manager, "_fail_all_remaining_requests", lambda *_: None)
    monkeypatch.setattr(batcher._manager, "_generation_step", lambda: 1 / 0)
    with pytest.raises(EngineUnavailableError, match="generating thread died"):
        await ask(engine)


async def test_close_stops_the_thread_and_fails_what_waits(tiny_model: str) -> None:
    before = set(threading.enumerate())
    engine = create(tiny_model, SETTINGS)
    await ask(engine)
    own = [thread for thread in set(threading.enumerate()) - before if "generation_loop" in thread.name]
    assert len(own) == 1
    assert own[0].daemon
    waiting = asyncio.create_task(ask(engine, max_tokens=200))
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineUnavailableError):
        await waiting
    assert not own[0].is_alive()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
)
def test_check_looks_into_a_folder(
    tiny_model: str, tmp_path: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    folder = copy_of(tiny_model, tmp_path)
    check(f"hf:{folder}", SETTINGS)
    spoil(folder)
    with pytest.raises(EngineSetupError, match=sentence) as caught:
        check(f"hf:{folder}", SETTINGS)
    assert "\n" not in str(caught.value)


def test_check_knows_a_template_in_the_tokenizers_config(tiny_model: str, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    check(f"hf:{folder}", SETTINGS)


@pytest.mark.parametrize("model", ["hf:./nowhere", "hf:/no/where", "hf:a/b/c", "hf:"])
def test_check_refuses_what_is_no_model(model: str) -> None:
    with pytest.raises(EngineSetupError):
        check(model, SETTINGS)


def test_check_leaves_names_of_the_hub_to_the_load() -> None:
    check("hf:Qwen/Qwen3-0.6B", SETTINGS)


async def test_a_load_that_fails_says_why_in_one_sentence(tiny_model: str, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path)
    (folder / "chat_template.jinja").unlink()
    engine = create(f"hf:{folder}", SETTINGS)
    with pytest.raises(EngineSetupError, match="has no chat template"):
        await ask(engine)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(EngineSetupError, match="cannot be loaded") as caught:
        await ask(engine)
    assert "\n" not in str(caught.value)
    await engine.close()


def copy_of(model: str, target: Path) -> Path:
    for file in Path(model.removeprefix("hf:")).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
