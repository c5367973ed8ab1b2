"""`engine: trl`: the same run with TRL's own trainer, as a check of the native loop."""
