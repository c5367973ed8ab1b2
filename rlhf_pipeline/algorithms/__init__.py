"""Pure functions on tensors: losses, advantages, KL, masked statistics, token log-probabilities.

Legend of shapes: B rows, T positions of a row, C completions, R response tokens (padded), V vocabulary,
D hidden size, N active (completion) tokens of a batch. Losses return SUMS over active tokens, pairs or
sequences; the training loop divides each sum once, by its global count.
"""
