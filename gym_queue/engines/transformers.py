"""The engine behind ``hf:PATH_OR_NAME``: a model of transformers inside the worker, with continuous batching.

All calls of the event loop share the batches of one ``ContinuousBatchingManager``, which generates in one
thread. Token ids and logprobs come with every generation; logprobs are of the distribution that was sampled
from, so after temperature and top-p, and 0 where temperature 0 leaves no choice. There is one random stream
for a whole batch: the ``seed`` of a call cannot be kept, and is not used.

Measured with transformers 5.23: greedy tokens equal those of plain ``generate``, logprobs those of a separate
forward pass within 1e-5 (fp32, CPU).

**New weights** are loaded between generations: nothing is begun until what was begun has ended, the batcher
goes, the weights are copied into the network, and a new batcher goes on. So a completion is of one version as
a whole. The batcher's cache goes with it: new prompts would share blocks of the old weights, and logprobs
were measured to be off by 3.7 then.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import logging
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_queue.engines import checkpoint
from gym_queue.engines.base import Completion
from gym_queue.engines.checkpoint import LONGEST_CONTEXT, NOT_INSTALLED, Model, no_template, sentence
from gym_queue.errors import EngineSetupError, EngineUnavailableError, ModelError
from gym_queue.records import Usage, Weights
from gym_queue.telemetry.story import outside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Message, Sampling
    from gym_queue.settings import Settings


_log = logging.getLogger(__name__)

_PAGE = 16
"""Tokens in one block of the CPU's cache; prompts share whole blocks, and short ones should share too."""
_CPU_CACHE_BYTES = 2**30
_CPU_BATCH_TOKENS = 512
_CPU_BATCH_REQUESTS = 256
_GPU_MEMORY_SHARE = 0.8
_WATCH_INTERVAL = 0.5
_STOP_TIMEOUT = 30.0
_GREEDY_TOP_P = -1.0
"""Below every cumulative probability: only the likeliest token stays, whatever rounding does."""
_ORIGINAL = -1
"""Before any version: the weights that the model came with. What they sample is said to be of version 0."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class TransformersEngine:
    """See the module's docstring. The first call loads the model, in a thread; later calls wait for it."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._name = name
        self._settings = settings
        self._loading: asyncio.Task[Model] | None = None
        self._batcher: _Batcher | None = None
        self._starting = asyncio.Lock()
        self._in_use = self._wanted = Weights.model_construct(model=f"hf:{name}", version=_ORIGINAL, uri="")
        self._replacing: asyncio.Task[None] | None = None

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        seed: int | None,
        tools: Sequence[dict[str, Any]] = (),
        prefix: tuple[int, ...] = (),
    ) -> Completion:
        """Return the next assistant message; ``max_tokens`` is cut to what fits the model's context."""
        del seed
        model = await self._loaded()
        prompt = model.template.prompt_ids(messages, tools, prefix)
        needs_top_p = sampling.top_p < 1.0 or sampling.temperature == 0.0
        batcher = await self._running(model, needs_top_p=needs_top_p)
        version = max(0, self._in_use.version)  # another comes only after this request has ended
        output = await batcher.generate(prompt, sampling, model.stop_ids)
        sampled: list[int] = output.generated_tokens
        is_stopped = bool(sampled) and sampled[-1] in model.stop_ids
        message = model.template.message(
            sampled[:-1] if is_stopped else sampled,
            parse_tools=bool(tools),
            call_prefix=f"call_{len(prompt)}_",
        )
        reason = "tool_calls" if "tool_calls" in message else "stop"
        return Completion(
            message=message,
            finish_reason=reason if is_stopped else "length",
            usage=Usage(prompt_tokens=len(prompt), completion_tokens=len(sampled)),
            prompt_token_ids=tuple(prompt),
            token_ids=tuple(sampled),
            logprobs=tuple(output.logprobs),
            weight_version=version,
        )

    async def load(self, weights: Weights) -> None:
        """Put weights into the network when those in use are done with (see the module's docstring)."""
        if weights.version > self._wanted.version:
            self._wanted = weights
        while self._in_use.version < weights.version:
            if self._replacing is None or self._replacing.done():
                self._replacing = outside(self._replace())
                self._replacing.add_done_callback(_has_failed)  # looked at: asyncio need not report it
            await asyncio.shield(self._replacing)  # a caller that gives up must not leave half of it

    async def _replace(self) -> None:
        model = await self._loaded()
        async with self._starting:
            if (self._wanted.uri or self._in_use.uri) and self._batcher is not None:
                await self._batcher.close(hard=False)
                self._batcher = None
            wanted = self._wanted  # by now
            if wanted.uri or self._in_use.uri:
                await asyncio.to_thread(checkpoint.replace, model, wanted.uri)
            self._in_use = wanted
            _log.info("hf:%s: weights of version %d are in use", self._name, wanted.version)

    async def close(self) -> None:
        """Stop the generating thread and let go of the model."""
        for task in (self._loading, self._replacing):
            if task is not None:
                task.cancel()
        if self._batcher is not None:
            await self._batcher.close(hard=True)
        self._loading = self._replacing = self._batcher = None

    async def _loaded(self) -> Model:
        if self._loading is None or (self._loading.done() and _has_failed(self._loading)):
            load = asyncio.to_thread(checkpoint.load, self._name, self._settings)
            self._loading = outside(load)
            self._loading.add_done_callback(_has_failed)  # looked at: asyncio need not report it
        return await asyncio.shield(self._loading)

    async def _running(self, model: Model, *, needs_top_p: bool) -> _Batcher:
        """Return a batcher that can sample as asked; build one where none is, it died, or it has no top-p.

        There is never more than one, because two would compete for the memory of their caches. Top-p sorts
        the vocabulary for every token, so it is built in only once a run asks for it.
        """
        async with self._starting:
            batcher = self._batcher
            if batcher is None or not batcher.is_alive or (needs_top_p and not batcher.has_top_p):
                if batcher is not None:
                    needs_top_p = needs_top_p or batcher.has_top_p
                    self._batcher = None
                    await batcher.close(hard=False)
                batcher = self._batcher = await asyncio.to_thread(_begin, model, has_top_p=needs_top_p)
            batcher.watch()
            return batcher


class _Batcher:
    """One ``ContinuousBatchingManager`` and the calls that wait for it. Slow to make."""

    def __init__(self, model: Model, *, has_top_p: bool) -> None:
        from transformers import GenerationConfig  # noqa: PLC0415 - heavy, and only where a model runs

        # Values that are not neutral, so that the processors exist; each request brings its own (`generate`).
        generation = GenerationConfig(
            do_sample=True,
            temperature=0.5,
            top_k=0,
            top_p=0.5 if has_top_p else 1.0,
            eos_token_id=list(model.stop_ids) or -1,
        )
        self.has_top_p = has_top_p
        self._manager = model.network.init_continuous_batching(
            generation_config=generation, continuous_batching_config=_batching(model.network)
        )
        self._manager.warmup()
        sizes = self._manager.continuous_batching_config
        self._room = min(model.context, (sizes.num_blocks - 1) * sizes.page_size)
        self._ids = itertools.count()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._watching: asyncio.Task[None] | None = None
        # The manager's thread inherits `daemon` from its starter: without `close`, a worker must still end.
        starter = threading.Thread(target=self._manager.start, daemon=True)
        starter.start()
        starter.join()

    @property
    def is_alive(self) -> bool:
        return bool(self._manager.is_running())

    async def generate(self, prompt: list[int], sampling: Sampling, stop_ids: tuple[int, ...]) -> Any:
        """Return transformers' ``GenerationOutput``; cancelling stops the generation."""
        room = self._room - len(prompt)
        if room < 1:  # in the manager it would end the thread, and every other request with it
            msg = f"a prompt of {len(prompt)} tokens leaves no room in a context of {self._room}"
            raise ModelError(msg)
        is_greedy = sampling.temperature == 0.0
        top_p = {"top_p": _GREEDY_TOP_P if is_greedy else sampling.top_p} if self.has_top_p else {}
        request_id = f"request-{next(self._ids)}"
        future = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        self._manager.register_result_handler(request_id, lambda output: _settle(future, output))
        try:
            accepted = self._manager.add_request(
                prompt,
                request_id=request_id,
                max_new_tokens=min(sampling.max_tokens, room),
                eos_token_id=list(stop_ids),
                temperature=1.0 if is_greedy else sampling.temperature,
                **top_p,
            )
            if accepted is None:
                msg = "the model's generating thread is stopping"
                raise EngineUnavailableError(msg)
            return await future
        finally:
            del self._waiting[request_id]
            if future.cancelled():
                self._manager.cancel_request(request_id)
                self._manager.output_router.result_handlers.pop(request_id, None)

    def watch(self) -> None:
        """Begin, once, to watch the manager's thread: should it die without a word, calls must not wait."""
        if self._watching is None:
            self._watching = outside(self._watch())

    async def _watch(self) -> None:
        while self.is_alive:  # noqa: ASYNC110 - a thread sets no asyncio event when it dies
            await asyncio.sleep(_WATCH_INTERVAL)
        self._fail_waiting("the model's generating thread died")

    def _fail_waiting(self, reason: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineUnavailableError(reason))

    async def close(self, *, hard: bool) -> None:
        """Stop the thread: at once and failing what waits (``hard``), or after what was begun is done."""
        if self._watching is not None:
            self._watching.cancel()
        timeout = _STOP_TIMEOUT if hard else None
        await asyncio.to_thread(self._manager.stop, block=True, timeout=timeout, hard_stop=hard)
        self._fail_waiting("the engine was closed")


def _settle(future: asyncio.Future[Any], output: Any) -> None:
    """Hand a finished request to its caller; runs on the event loop."""
    if future.done():
        return
    if output.error is not None:
        future.set_exception(EngineUnavailableError(f"the model failed to generate: {output.error}"))
    else:
        future.set_result(output)


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


def _begin(model: Model, *, has_top_p: bool) -> _Batcher:
    """Make a batcher and say what kind of failure it is where that does not work."""
    try:
        return _Batcher(model, has_top_p=has_top_p)
    except (ValueError, NotImplementedError, AttributeError) as error:
        msg = f"transformers cannot batch this model: {sentence(error)}"
        raise EngineSetupError(msg) from error
    except RuntimeError as error:  # out of memory, mostly
        msg = f"the model's cache cannot be made: {sentence(error)}"
        raise EngineUnavailableError(msg) from error


def _batching(network: Any) -> Any:
    """Size the cache: a GPU lends a share of what is free; the memory of a CPU is not ours alone."""
    from transformers import ContinuousBatchingConfig  # noqa: PLC0415 - heavy

    if network.device.type != "cpu":
        return ContinuousBatchingConfig(
            return_logprobs=True, per_request_processors=True, max_memory_percent=_GPU_MEMORY_SHARE
        )
    config = network.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    token_bytes = 2 * config.num_hidden_layers * kv_heads * head_size * network.dtype.itemsize
    tokens = min(LONGEST_CONTEXT, max(_CPU_CACHE_BYTES // token_bytes, _CPU_BATCH_TOKENS))
    return ContinuousBatchingConfig(
        return_logprobs=True,
        per_request_processors=True,
        page_size=_PAGE,
        num_blocks=tokens // _PAGE,
        max_batch_tokens=_CPU_BATCH_TOKENS,
        max_requests_per_batch=_CPU_BATCH_REQUESTS,
    )


def create(model: str, settings: Settings) -> TransformersEngine:
    """Make the engine for ``hf:PATH_OR_NAME``; nothing is loaded yet."""
    return TransformersEngine(_name(model), settings)


def check(model: str, settings: Settings) -> None:
    """Look at what shows without loading: the packages, and in a local folder config and chat template."""
    del settings
    name = _name(model)
    if not all(importlib.util.find_spec(package) for package in ("transformers", "torch")):
        raise EngineSetupError(NOT_INSTALLED)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if _HUB_NAME.fullmatch(name) and not folder.exists() and name[0] != ".":
            return  # a name on the Hub; only the load can tell
        msg = f"the model folder {name} does not exist"
        raise EngineSetupError(msg)
    if not (folder / "config.json").is_file():
        msg = f"the folder {name} holds no model: there is no config.json in it"
        raise EngineSetupError(msg)
    if not _has_template(folder):
        raise EngineSetupError(no_template(name))


def _name(model: str) -> str:
    name = model.removeprefix("hf:")
    if not name:
        msg = "the model `hf:` lacks a name; write hf:PATH_OR_NAME"
        raise EngineSetupError(msg)
    return name


def _has_template(folder: Path) -> bool:
    """Look where transformers looks for a chat template."""
    if any((folder / file).is_file() for file in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
