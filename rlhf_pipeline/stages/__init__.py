"""The stages: sft, reward, ppo, dpo, collect. Each module builds a model, trains it and registers it, in this order."""
