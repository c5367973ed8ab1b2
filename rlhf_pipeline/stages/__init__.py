"""The stages: sft, reward, ppo, dpo, collect. Each page reads build -> fit -> register."""
