"""The loop and what it needs: windows, optimizer, checkpoints, tracking, cost."""
