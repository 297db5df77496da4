"""A tiny random model, in a folder as ``save_pretrained`` writes it: no test needs a download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from gym_queue.engines.openai import OpenAIEngine
from tests.unit.engines.endpoint import SETTINGS, Endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

ROLES = ("<|im_start|>", "<|im_end|>")

CHATML = """\
{%- if tools %}{{- '<|im_start|>system\\n' ~ (tools | tojson) ~ '<|im_end|>\\n' }}{% endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>\\n' ~ ({'name': call.function.name, 'arguments': call.function.arguments} | tojson)
    ~ '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

QWEN3_LIKE = """\
{%- set empty = '<think>\\n\\n</think>\\n\\n' -%}
{%- set ns = namespace(last_query=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last_query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message.content or '' -%}
{%- if message.role == 'assistant' and loop.index0 > ns.last_query and '</think>' in content -%}
{{- '<|im_start|>assistant\\n' ~ content.strip() ~ '<|im_end|>\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' ~ (empty if loop.last and loop.index0 > ns.last_query else '')
    ~ content.split('</think>')[-1].strip() -}}
{%- for call in message.tool_calls or [] -%}
{{- '\\n<tool_call>\\n' ~ ({'name': call.function.name, 'arguments': call.function.arguments} | tojson)
    ~ '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' ~ content ~ '\\n</tool_response><|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

BARE = """\
{%- for message in messages -%}
{%- if message.role == 'tool' and not messages[loop.index0 - 1].tool_calls -%}
{{- raise_exception('a tool answers, but nobody called it') -}}
{%- endif -%}
{{- '[' ~ message.role ~ ']' ~ (message.content or '') | trim -}}
{%- for call in message.tool_calls or [] -%}
{{- '(' ~ call.function.name ~ (call.function.arguments | tojson) ~ ')' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[assistant]' -}}{%- endif -%}
"""


TEMPLATES = {"chatml": CHATML, "qwen3": QWEN3_LIKE, "bare": BARE}


def build_tokenizer(chat_template: str) -> Any:
    """Return a tokenizer with one token a byte and ChatML's two special tokens.

    ``chat_template`` is one of ``TEMPLATES``, or a template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - heavy
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - heavy

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*ROLES, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",  # noqa: S106 - a token of a language model
        pad_token="<|im_end|>",  # noqa: S106
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATES.get(chat_template, chat_template),
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(folder: Path, *, context: int = 256, stop_ids: int | list[int] = 1) -> str:
    """Write a random Llama with its tokenizer; return its model string."""
    import torch  # noqa: PLC0415 - heavy
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - heavy

    tokenizer = build_tokenizer("chatml")
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=context,
            initializer_range=0.3,  # large: the likeliest token should be clearly so
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    _forbid(network, token=1)
    network.generation_config.eos_token_id = stop_ids
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"hf:{folder}"


def _forbid(network: Any, token: int) -> None:
    """Make a token impossible, so that no test ends early by chance: channel 0 becomes a bias."""
    import torch  # noqa: PLC0415 - heavy

    with torch.no_grad():
        network.model.embed_tokens.weight[:, 0] = 1.0
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        network.lm_head.weight[:, 0] = 0.0
        network.lm_head.weight[token] = 0.0
        network.lm_head.weight[token, 0] = -1e4


@pytest.fixture(scope="session")
def tokenizer_for() -> Callable[[str], Any]:
    """Build a tokenizer for a template, by name or as it is."""
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that only its limits stop."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def stopping_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model for which every other token ends the turn."""
    return save_tiny_model(tmp_path_factory.mktemp("stopping"), stop_ids=list(range(3, 258, 2)))


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    scripted = Endpoint()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", scripted.chat)
    app.router.add_get("/v1/models", scripted.list_models)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    scripted.base = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield scripted
    await runner.cleanup()


@pytest.fixture
async def slept() -> list[float]:
    """What the engine waited between tries; it does not really wait."""
    return []


@pytest.fixture
async def engine(endpoint: Endpoint, slept: list[float]) -> AsyncIterator[OpenAIEngine]:
    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    made = OpenAIEngine(f"{endpoint.base}?model=m", SETTINGS, sleep=sleep)
    yield made
    await made.close()
