"""The engine behind ``hf:PATH_OR_NAME``: a model of transformers inside the worker, with continuous batching.

All calls of the event loop share the batches of one ``ContinuousBatchingManager``, which generates in one
thread. Token ids and logprobs come with every generation; logprobs are of the distribution that was sampled
from, so after temperature and top-p, and 0 where temperature 0 leaves no choice. There is one random stream
for a whole batch: the ``seed`` of a call cannot be kept, and is not used.

Measured with transformers 5.23: greedy tokens equal those of plain ``generate``, logprobs those of a separate
forward pass within 1e-5 (fp32, CPU).
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_queue.engines.base import Completion
from gym_queue.engines.chat_template import ChatTemplate
from gym_queue.errors import EngineSetupError, EngineUnavailableError, ModelError
from gym_queue.records import Usage
from gym_queue.telemetry.story import outside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Message, Sampling
    from gym_queue.settings import Settings


_PAGE = 16
"""Tokens in one block of the CPU's cache; prompts share whole blocks, and short ones should share too."""
_CPU_CACHE_TOKENS = 16_384
_CPU_CACHE_BYTES = 2**30
_CPU_BATCH_TOKENS = 512
_CPU_BATCH_REQUESTS = 256
_GPU_MEMORY_SHARE = 0.8
_WATCH_INTERVAL = 0.5
_STOP_TIMEOUT = 30.0
_LONGEST_ERROR = 300
_GREEDY_TOP_P = -1.0
"""Below every cumulative probability: only the likeliest token stays, whatever rounding does."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class TransformersEngine:
    """See the module's docstring. The first call loads the model, in a thread; later calls wait for it."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._name = name
        self._settings = settings
        self._loading: asyncio.Task[_Model] | None = None
        self._batcher: _Batcher | None = None
        self._starting = asyncio.Lock()

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
        )

    async def close(self) -> None:
        """Stop the generating thread and let go of the model."""
        if self._loading is not None:
            self._loading.cancel()
        if self._batcher is not None:
            await self._batcher.close(hard=True)
        self._loading = self._batcher = None

    async def _loaded(self) -> _Model:
        if self._loading is None or (self._loading.done() and _has_failed(self._loading)):
            load = asyncio.to_thread(_load, self._name, self._settings)
            self._loading = outside(load)
            self._loading.add_done_callback(_has_failed)  # looked at: asyncio need not report it
        return await asyncio.shield(self._loading)

    async def _running(self, model: _Model, *, needs_top_p: bool) -> _Batcher:
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


@dataclass(frozen=True)
class _Model:
    """A loaded model with what generation needs to know about it."""

    network: Any
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    context: int


class _Batcher:
    """One ``ContinuousBatchingManager`` and the calls that wait for it. Slow to make."""

    def __init__(self, model: _Model, *, has_top_p: bool) -> None:
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


def _has_failed(task: asyncio.Task[_Model]) -> bool:
    return task.cancelled() or task.exception() is not None


def _load(name: str, settings: Settings) -> _Model:
    """Load tokenizer and weights. Takes seconds to minutes."""
    try:
        import torch  # noqa: PLC0415 - heavy, and only where a model runs
        import transformers  # noqa: PLC0415
    except ImportError as error:
        raise EngineSetupError(_NOT_INSTALLED) from error

    transformers.utils.logging.disable_progress_bar()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # verifiers and Redis need cores too
    path, trust = str(Path(name).expanduser()), settings.tokenizer_trust_remote_code
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=trust, dtype="auto" if has_gpu else torch.float32
        )
        network = network.to("cuda" if has_gpu else "cpu").eval()
    except torch.OutOfMemoryError as error:
        msg = f"there is not enough GPU memory for hf:{name}"
        raise EngineUnavailableError(msg) from error
    except Exception as error:  # a folder of any origin may make the loaders raise anything
        msg = f"the model hf:{name} cannot be loaded: {_sentence(error)}"
        raise EngineSetupError(msg) from error
    if not tokenizer.chat_template:
        raise EngineSetupError(_no_template(name))
    stop_ids = _stop_ids(network.generation_config.eos_token_id, tokenizer.eos_token_id)
    text_config = network.config.get_text_config()
    return _Model(
        network=network,
        template=ChatTemplate(tokenizer, stop_ids),
        stop_ids=stop_ids,
        context=getattr(text_config, "max_position_embeddings", None) or _CPU_CACHE_TOKENS,
    )


def _begin(model: _Model, *, has_top_p: bool) -> _Batcher:
    """Make a batcher and say what kind of failure it is where that does not work."""
    try:
        return _Batcher(model, has_top_p=has_top_p)
    except (ValueError, NotImplementedError, AttributeError) as error:
        msg = f"transformers cannot batch this model: {_sentence(error)}"
        raise EngineSetupError(msg) from error
    except RuntimeError as error:  # out of memory, mostly
        msg = f"the model's cache cannot be made: {_sentence(error)}"
        raise EngineUnavailableError(msg) from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:_LONGEST_ERROR] or type(error).__name__


def _stop_ids(*sources: int | list[int] | None) -> tuple[int, ...]:
    """Merge the end-of-turn ids of the generation config (one or many) and of the tokenizer."""
    listed = [source if isinstance(source, list) else [source] for source in sources]
    return tuple(dict.fromkeys(stop for stops in listed for stop in stops if stop is not None))


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
    tokens = min(_CPU_CACHE_TOKENS, max(_CPU_CACHE_BYTES // token_bytes, _CPU_BATCH_TOKENS))
    return ContinuousBatchingConfig(
        return_logprobs=True,
        per_request_processors=True,
        page_size=_PAGE,
        num_blocks=tokens // _PAGE,
        max_batch_tokens=_CPU_BATCH_TOKENS,
        max_requests_per_batch=_CPU_BATCH_REQUESTS,
    )


_NOT_INSTALLED = "models of the kind hf: need transformers and torch; install gym_queue[hf]"


def _no_template(name: str) -> str:
    return f"the tokenizer of hf:{name} has no chat template, so it cannot be given messages"


def create(model: str, settings: Settings) -> TransformersEngine:
    """Make the engine for ``hf:PATH_OR_NAME``; nothing is loaded yet."""
    return TransformersEngine(_name(model), settings)


def check(model: str, settings: Settings) -> None:
    """Look at what shows without loading: the packages, and in a local folder config and chat template."""
    del settings
    name = _name(model)
    if not all(importlib.util.find_spec(package) for package in ("transformers", "torch")):
        raise EngineSetupError(_NOT_INSTALLED)
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
        raise EngineSetupError(_no_template(name))


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
