"""Sampling and scoring of responses: prompts -> Rollout."""
