"""Evaluate a model through a head: mean reward and pass@k of a run (the head is HEAD_SERVER_URL).

python examples/evaluate.py QUESTIONS.jsonl MODEL
"""

import sys

from gym_queue import Client

questions, model = sys.argv[1:]
with Client() as client:
    run = client.submit(model=model, examples=questions, samples=4)
    for rollout in run.rollouts():
        print(rollout.rollout_id, getattr(rollout, "reward", rollout.state))
    metrics = run.metrics()
print(f"mean reward {metrics['reward']['mean']:.3f}")
print(", ".join(f"pass@{k} {chance:.3f}" for k, chance in metrics["pass_at_k"].items()))
