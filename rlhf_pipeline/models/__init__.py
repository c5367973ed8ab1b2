"""Loading and initialising models, the one forward pass over packed batches, and the models of each role."""
