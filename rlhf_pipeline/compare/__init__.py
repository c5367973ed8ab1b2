"""Arms against each other: fairness, rows, contrasts, frontiers, rankings, the verdict."""
