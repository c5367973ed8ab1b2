"""Keys that decide what a run reads: runs that have the same values share it."""

from __future__ import annotations

from rlhf_pipeline.config.lengths import LENGTHS

UNREAD = {"seed", "output_name", "learning_rate", "beta", "kl_coef"}
"""Keys by which the runs of one stage differ and on which no amount depends."""
TOKENS = {"chat_template", "chat_template_path", "chat_template_kwargs", "eos_token", "stop_token"}
"""Keys that change a tokenizer."""
ADAPTED = {
    *("gradient_checkpointing", "use_peft", "lora_r", "lora_target_modules", "lora_modules_to_save", "use_dora"),
    "freeze_layers",
}
"""Keys that change which weights a model has and trains."""
READ = {
    *TOKENS,
    *LENGTHS,
    *(f"dataset_{name}" for name in ("name", "config", "train_split", "test_split", "test_name")),
    *("datasets", "column_mapping", "split_fractions", "test_split_size", "skip_bad_rows", "allow_overlap"),
    *("instruction_style", "text_as_chat", "train_on"),
}
"""Keys that decide which examples a run reads; runs with the same values share them."""
