"""gym_queue: collect rollouts for RL post-training on many machines, each ending exactly once."""
