"""The training loop and its parts: windows, optimizer, checkpoints, tracking, cost."""
