"""The tokenizer of the tiny model: one token per byte, plus a few whole phrases.

Every text can be encoded (each byte has a token, so nothing becomes "unknown"), every digit is its own token
(which makes arithmetic learnable), and the words that occur in every question are one token, so that a prompt
is about 15 tokens long instead of 90.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD = "<|pad|>"
END_OF_TURN = "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
PHRASES = ("State the final answer to the following arithmetic problem: ", " + ", " - ", " =")

# Each message is "<|role|>content<|end|>" with nothing in between, so a prompt followed by the tokens the
# model sampled is exactly what the template renders for the longer conversation.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('unknown role: ' ~ message['role']) -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ (message['content'] or '') ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer; it is fixed, nothing about it is learnt from data."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, END_OF_TURN, *(f"<|{role}|>" for role in ROLES)]
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END_OF_TURN,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
