"""Measure the tiny model: mean reward on held-out questions, and how often samples of one question disagree.

python evaluate.py --model model
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from questions import held_out_entries, make_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


def parse_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--seed", type=int, default=12345, help="seed of the questions and of the sampling")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=4, help="answers sampled for each question")
    parser.add_argument("--all-questions", action="store_true", help="also use questions seen in training")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Sample answers at temperature 1 and print three numbers."""
    flags = parse_flags()
    torch.manual_seed(flags.seed)
    tokenizer = AutoTokenizer.from_pretrained(flags.model, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(flags.model)
    dataset = make_dataset(flags.seed, size=20 * flags.questions)
    entries = [dataset[index] for index in range(flags.questions)]
    if not flags.all_questions:
        entries = held_out_entries(dataset, flags.questions)
    chats = [[{"role": "user", "content": entry["question"]}] for entry in entries]
    options: dict[str, Any] = {
        "add_generation_prompt": True,
        "padding": True,
        "return_tensors": "pt",
        "return_dict": True,
    }
    prompts: Any = tokenizer.apply_chat_template(chats, **options)
    sampling: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 16,
    }
    output = model.generate(**prompts, num_return_sequences=flags.samples, **sampling)
    answers = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [dataset.score_answer(text, entries[i // flags.samples]) for i, text in enumerate(answers)]

    rewards = torch.tensor(scores).view(-1, flags.samples)  # (questions, samples)
    best, worst = rewards.max(dim=1).values, rewards.min(dim=1).values
    error = rewards.mean(dim=1).std() / len(entries) ** 0.5  # samples of one question are not independent
    print(f"mean reward {rewards.mean():.3f} +- {error:.3f} (standard error), {len(entries)} questions")
    mixed = ((worst == 0) & (best == 1)).float().mean()
    print(f"groups of {flags.samples} with both a 0 and a 1: {mixed:.3f}")
    print(f"groups of {flags.samples} whose rewards differ: {(worst != best).float().mean():.3f}")


if __name__ == "__main__":
    main()
