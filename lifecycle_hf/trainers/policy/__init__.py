"""Trainers that learn from the completions that they sample: PPO."""
