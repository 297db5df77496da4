"""Train a tiny model with GRPO on rollouts that a head collects: two minutes on two CPU cores.

In the folder that holds `examples/`, with a Redis on this machine, each in a terminal of its own:

    export GYM_QUEUE_REDIS_URL=redis://127.0.0.1:6379/0 HEAD_SERVER_URL=http://127.0.0.1:11000
    gym-queue head
    celery -A workers.gpu worker
    python examples/grpo.py

It prints the mean reward before and after, and exits with 1 if that did not rise.

While the trainer computes a gradient, the workers sample the next batch with the weights that they have.
`freshness` keeps that within bounds: nothing that reaches the trainer is more than one version behind.

GRPO: Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300. Clipping: Schulman et al. 2017, arXiv:1707.06347.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from gym_queue import Client

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.client.deliveries import Group

FOLDER = Path(__file__).parent / "tiny-arithmetic" / "model"
MODEL = f"hf:{FOLDER}"
ENVIRONMENT = "python:examples.even_numbers:EvenNumbers"
SAMPLES = 8
"""Samples in a group: what they have in common is the prompt, what is learnt from is how they differ."""


def advantages_in(group: Group) -> torch.Tensor:
    """Return by how much each of a group's rollouts is better than their mean, in standard deviations."""
    rewards = torch.tensor(group.rewards)
    return (rewards - rewards.mean()) / rewards.std()


def train_step(network: Any, optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> None:
    """Make one gradient step.

    It works on what the engine recorded: token ids, which of them the model sampled (`loss_mask`), and their
    log-probabilities under the weights that sampled them, which may be older than those that are trained.
    """
    advantages = torch.cat([advantages_in(group) for group in groups])[:, None]
    tokens = [row["trajectory"] for group in groups for row in group.rollouts]
    ids, mask, sampled_logprobs = (
        pad_sequence([torch.tensor(some[name]) for some in tokens], batch_first=True)
        for name in ("token_ids", "loss_mask", "logprobs")
    )
    logits = network(input_ids=ids).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    ratio = (logprobs - sampled_logprobs[:, 1:]).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = -(gain * mask[:, 1:]).sum() / mask[:, 1:].sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


class Publisher:
    """Writes the weights to a folder, a new one each time, and announces them as the next version."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client, self.folder = client, folder
        self.version = int(
            time.time()
        )  # versions of a model only ever rise, also from one training to the next

    def publish(self, network: Any) -> None:
        """Announce what is there as a whole: a worker may read it at once. Old ones are not read any more."""
        self.version += 1
        network.save_pretrained(self.folder / str(self.version))
        self.client.announce(MODEL, self.version, str(self.folder / str(self.version)))
        shutil.rmtree(self.folder / str(self.version - 3), ignore_errors=True)


def mean_reward(client: Client, size: int) -> float:
    """Measure the newest weights on questions that are not trained on; ahead of whatever else is queued."""
    mix = [{"name": ENVIRONMENT, "size": size, "seed": 1}]
    run = client.submit(
        model=MODEL, samples=SAMPLES, sampling={"max_tokens": 8}, priority=1, environments=mix
    )
    rewards = torch.tensor([group.rewards for group in run.groups()])
    return float(rewards.mean())


def train(client: Client, publisher: Publisher, network: Any, steps: int, batch: int) -> None:
    """Make `steps` gradient steps, each from `batch` groups, as they are complete."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
    run = client.submit(
        model=MODEL,
        samples=SAMPLES,
        sampling={"max_tokens": 8},
        environments=[{"name": ENVIRONMENT, "size": 100 * steps * batch, "seed": 0}],
        groups={"wanted": steps * batch, "drop_uniform": True, "oversample": batch // 2},
        freshness={"max_staleness": 1, "groups_per_version": batch},
    )
    stream = run.groups()
    for step in range(steps):
        groups = list(islice(stream, batch))
        train_step(network, optimizer, groups)
        publisher.publish(network)
        behind = publisher.version - 1 - min(group.weight_version or 0 for group in groups)
        reward = torch.tensor([group.rewards for group in groups]).mean()
        print(f"step {step + 1}: {reward:.3f} in groups that differ, oldest {behind} behind", flush=True)


def main() -> int:
    """Measure, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16, help="gradient steps")
    parser.add_argument("--batch", type=int, default=32, help="groups for each of them")
    flags = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the other core is the worker's
    disable_progress_bar()
    network = AutoModelForCausalLM.from_pretrained(FOLDER)
    with Client() as client, tempfile.TemporaryDirectory() as folder:
        publisher = Publisher(client, Path(folder))
        publisher.publish(network)
        before = mean_reward(client, size=32)
        print(f"reward before: {before:.3f}", flush=True)
        train(client, publisher, network, flags.steps, flags.batch)
        after = mean_reward(client, size=32)
        print(f"reward after: {after:.3f}")
    return 0 if after > before else 1


if __name__ == "__main__":
    sys.exit(main())
