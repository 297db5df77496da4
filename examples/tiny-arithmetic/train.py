"""Train a tiny decoder on reasoning_gym's `chain_sum`, on two CPU cores, in ten to fifteen minutes.

The result is a folder that `AutoTokenizer.from_pretrained` and `AutoModelForCausalLM.from_pretrained` load
offline. The same flags on the same machine and library versions give the same weights.

    python train.py --output model
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from questions import training_entries
from tiny_tokenizer import build_tokenizer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_LENGTH = 512
IGNORE = -100  # the label value that transformers leaves out of the loss


def parse_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--seed", type=int, default=0, help="start weights and training examples")
    parser.add_argument("--steps", type=int, default=9000, help="number of weight updates")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per weight update")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the highest one, after warm-up")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained decoder: an ordinary small Llama."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Plain attention is the fastest on sequences this short; the choice is not stored with the model.
    config._attn_implementation = "eager"  # noqa: SLF001 - transformers offers no other way
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,  # 0 means "all tokens"; left out, transformers would keep only the 50 likeliest
        max_new_tokens=16,
    )
    return model


def encode(
    tokenizer: PreTrainedTokenizerFast, entries: list[dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn question-answer pairs into `(input_ids, labels)`, both of shape (examples, longest example).

    Only the answer and its end-of-turn token are labelled: the question is random and cannot be predicted.
    Padding is on the right, where causal attention never lets a real token see it, so no mask is needed.
    """
    conversations = [
        [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": entry["answer"]}]
        for entry in entries
    ]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    role_id: Any = tokenizer.convert_tokens_to_ids("<|assistant|>")
    is_role = torch.eq(input_ids, role_id)
    is_answer = (is_role.cumsum(dim=1) > 0) & ~is_role
    is_answer &= input_ids != tokenizer.pad_token_id
    return input_ids, input_ids.masked_fill(~is_answer, IGNORE)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield encoded batches without end.

    Examples are taken sixteen batches at a time and sorted by length, which keeps padding (and so time) low.
    """
    entries = training_entries(seed, easy_count=steps * batch_size // 3)
    order = torch.Generator().manual_seed(seed)
    while True:
        pool = sorted(itertools.islice(entries, 16 * batch_size), key=lambda entry: len(entry["question"]))
        for index in torch.randperm(16, generator=order).tolist():
            yield encode(tokenizer, pool[index * batch_size : (index + 1) * batch_size])


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, flags: argparse.Namespace) -> None:
    """Run `flags.steps` weight updates on the model, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    # The learning rate rises for a twentieth of the steps (at least two, or the schedule cannot be computed),
    # then follows a cosine down to almost nothing.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=flags.learning_rate,
        total_steps=flags.steps,
        pct_start=max(0.05, 2 / flags.steps),
        cycle_momentum=False,
        final_div_factor=1e3,
    )
    stream = batches(tokenizer, flags.seed, flags.steps, flags.batch_size)
    model.train()
    started = time.monotonic()
    for step in range(1, flags.steps + 1):
        input_ids, labels = next(stream)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == flags.steps:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step}/{flags.steps}  loss {loss.item():.3f}  {minutes:.1f} min", flush=True)


def main() -> None:
    """Build, train and save."""
    flags = parse_flags()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(flags.seed)
    tokenizer = build_tokenizer(MAX_LENGTH)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    train(model, tokenizer, flags)
    model.eval()
    model.save_pretrained(flags.output)
    tokenizer.save_pretrained(flags.output)
    print(f"saved to {flags.output}")


if __name__ == "__main__":
    main()
