"""Trainers that learn from text or labels: pretraining, supervised fine-tuning, reward models."""
