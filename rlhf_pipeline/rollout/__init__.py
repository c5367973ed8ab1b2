"""Sampling responses and scoring them: prompts -> Rollout."""
