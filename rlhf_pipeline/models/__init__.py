"""Loading and initialising models, the forward pass over packed batches, and the modules of each role."""
