"""Experiments: run stages in order, evaluate models, compare them."""
