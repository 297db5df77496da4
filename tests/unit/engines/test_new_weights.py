"""New weights in the engine with a model in this process: whole, between generations, nothing of the old."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.engines import checkpoint
from gym_queue.engines.transformers import TransformersEngine, create
from gym_queue.errors import EngineUnavailableError
from gym_queue.records import Sampling, Weights
from gym_queue.settings import Settings
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gym_queue.engines.base import Completion

MODEL = str(Path(__file__).parents[3] / "examples" / "tiny-arithmetic" / "model")
QUESTION = "How much is " + " + ".join("12345") + "?"
"""Longer than a block of the cache, so that a second prompt would be answered from the first one's blocks."""


def weights(version: int, uri: object = "") -> Weights:
    return Weights(model=f"hf:{MODEL}", version=version, uri=str(uri))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after a trainer was there: a folder as ``save_pretrained`` writes it."""
    import torch  # noqa: PLC0415 - heavy

    folder = tmp_path_factory.mktemp("trained")
    network = network_in(MODEL)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return folder


def network_in(folder: Path | str) -> Any:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - heavy

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
async def engine() -> AsyncIterator[TransformersEngine]:
    made = create(f"hf:{MODEL}", Settings())
    yield made
    await made.close()


async def ask(engine: TransformersEngine, max_tokens: int = 8) -> Completion:
    messages = ({"role": "user", "content": QUESTION},)
    return await engine.generate(
        messages, sampling=Sampling(max_tokens=max_tokens, temperature=1.5), seed=None
    )


def error(completion: Completion, folder: Path | str) -> float:
    """Return by how much its logprobs differ from those of one forward pass with the weights in a folder."""
    import torch  # noqa: PLC0415 - heavy

    prompt, sampled = completion.prompt_token_ids or (), completion.token_ids or ()
    with torch.no_grad():
        logits = network_in(folder)(input_ids=torch.tensor([prompt + sampled])).logits[0] / 1.5
    expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(sampled)[:, None])[:, 0]
    return float((expected - torch.tensor(completion.logprobs)).abs().max())


EQUAL, CLEARLY = 1e-4, 0.05


@pytest.mark.parametrize("uri", ["{}", "{}/model.safetensors", "file://{}"])
async def test_what_is_generated_next_is_sampled_by_the_new_weights_alone(
    engine: TransformersEngine, trained: Path, uri: str
) -> None:
    before = await ask(engine)
    assert (before.weight_version, error(before, MODEL) < EQUAL) == (0, True)
    assert error(before, trained) > CLEARLY
    await engine.load(weights(3, uri.format(trained)))
    after = await ask(engine)
    assert (after.weight_version, error(after, trained) < EQUAL) == (3, True)
    assert error(after, MODEL) > CLEARLY


async def test_weights_may_come_before_the_first_generation_and_be_of_version_0(
    engine: TransformersEngine, trained: Path
) -> None:
    await engine.load(weights(0, trained))
    completion = await ask(engine)
    assert (completion.weight_version, error(completion, trained) < EQUAL) == (0, True)


async def test_what_was_begun_ends_with_the_weights_it_began_with(
    engine: TransformersEngine, trained: Path
) -> None:
    await ask(engine)
    early = [asyncio.create_task(ask(engine, max_tokens=200)) for _ in range(4)]
    batcher = engine._batcher
    assert batcher is not None
    while len(batcher._waiting) < 4:  # noqa: ASYNC110 - set by calls in this same loop
        await asyncio.sleep(0)
    load = asyncio.create_task(engine.load(weights(1, trained)))
    while not engine._starting.locked():  # noqa: ASYNC110 - the same
        await asyncio.sleep(0)
    late = asyncio.create_task(ask(engine))
    for completion in await asyncio.gather(*early):
        assert (completion.weight_version, error(completion, MODEL) < EQUAL) == (0, True)
    await load
    assert ((await late).weight_version, error(await late, trained) < EQUAL) == (1, True)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where weights were loaded from."""
    uris: list[str] = []
    replace = checkpoint.replace

    def noted(model: checkpoint.Model, uri: str) -> None:
        uris.append(uri)
        replace(model, uri)

    monkeypatch.setattr(checkpoint, "replace", noted)
    return uris


async def test_many_callers_are_one_load_and_older_weights_none(
    engine: TransformersEngine, trained: Path, replaced: list[str]
) -> None:
    await asyncio.gather(*(engine.load(weights(2, trained)) for _ in range(8)))
    await engine.load(weights(1, "older"))
    await engine.load(weights(2, "the same version"))
    assert replaced == [str(trained)]
    assert (await ask(engine)).weight_version == 2


async def test_weights_that_are_old_before_their_turn_comes_are_never_loaded(
    engine: TransformersEngine, trained: Path, replaced: list[str]
) -> None:
    await asyncio.gather(*(engine.load(weights(version, trained)) for version in (1, 3, 2)))
    assert replaced == [str(trained)]
    assert (await ask(engine)).weight_version == 3


async def test_a_caller_that_gives_up_leaves_no_half_of_it(
    engine: TransformersEngine, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    replace = checkpoint.replace

    def slow(model: checkpoint.Model, uri: str) -> None:
        begun.set()
        assert go_on.wait(60)
        replace(model, uri)

    monkeypatch.setattr(checkpoint, "replace", slow)
    load = asyncio.create_task(engine.load(weights(1, trained)))
    await async_wait_until(begun.is_set)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    call = asyncio.create_task(ask(engine))
    await asyncio.sleep(0)
    assert engine._batcher is None  # it must not be answered by a network that is being written
    go_on.set()
    assert ((await call).weight_version, error(await call, trained) < EQUAL) == (1, True)


async def test_empty_uris_are_the_models_own_weights(
    engine: TransformersEngine, trained: Path, replaced: list[str]
) -> None:
    await ask(engine)
    batcher = engine._batcher
    await engine.load(weights(1))
    assert (await ask(engine)).weight_version == 1
    assert (replaced, engine._batcher) == ([], batcher)  # it has them already
    await engine.load(weights(2, trained))
    await engine.load(weights(3))
    completion = await ask(engine)
    assert (completion.weight_version, error(completion, MODEL) < EQUAL) == (3, True)


def torn(trained: Path, folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes((trained / "model.safetensors").read_bytes()[:100_000])
    return file


def without_a_tensor(trained: Path, folder: Path) -> Path:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - heavy

    tensors = load_file(trained / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def deeper(trained: Path, folder: Path) -> Path:
    config = network_in(trained).config
    config.num_hidden_layers += 1
    from transformers import LlamaForCausalLM  # noqa: PLC0415 - heavy

    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda trained, _: trained / "not-there", "no such file or folder"),
        (torn, "cannot be loaded"),
        (without_a_tensor, r"1 tensors are missing, model\.norm\.weight among them"),
        (deeper, "a network of another shape"),
    ],
)
async def test_weights_that_cannot_be_loaded_leave_the_others_in_use(
    engine: TransformersEngine,
    trained: Path,
    tmp_path: Path,
    make: Callable[[Path, Path], Path],
    sentence: str,
) -> None:
    await ask(engine)
    with pytest.raises(EngineUnavailableError, match=sentence) as caught:
        await engine.load(weights(1, make(trained, tmp_path)))
    assert "\n" not in str(caught.value)
    completion = await ask(engine)
    assert (completion.weight_version, error(completion, MODEL) < EQUAL) == (0, True)
    await engine.load(weights(2, trained))
    assert (await ask(engine)).weight_version == 2
