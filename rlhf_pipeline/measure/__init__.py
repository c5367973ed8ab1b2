"""Measurement of one model: prompts, samples, scores, exact figures."""
