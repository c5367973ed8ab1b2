"""Sampled metrics, reward-model quality, baselines and statistics."""
