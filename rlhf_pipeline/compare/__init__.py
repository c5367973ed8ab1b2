"""Comparisons of arms: fairness, rows, contrasts, frontiers, rankings, the verdict."""
