"""Pure functions on tensors: losses, advantages, KL, masked statistics, token log-probabilities.

Shapes: B rows, T positions of a row, C completions, R response tokens (padded), P pairs, V vocabulary, D hidden size,
N active (completion) tokens of a batch. Log-probabilities, entropies and KL are in nats. Losses return SUMS over active
tokens, pairs or sequences; the training loop divides each sum once, by its global count.
"""
