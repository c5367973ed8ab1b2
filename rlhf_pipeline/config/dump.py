"""A config as YAML text, and its digest."""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel

from rlhf_pipeline.config import yaml

# Keys that change how a run is logged, stored or paced, but not its result.
RUN_ONLY = frozenset(
    {
        *("logging_steps", "save_strategy", "save_steps", "save_total_limit", "num_threads", "report_to", "output_dir"),
        "dataset_num_proc",
        *("fsdp", "fsdp_reshard_after_forward"),
    }
)


def dump_yaml(config: BaseModel) -> str:
    """Return the config as YAML text that `load_config` reads back as an equal config."""
    return yaml.dump(config.model_dump(mode="json"))


def config_digest(config: BaseModel) -> str:
    """Return the SHA-256 of the config, without the keys that do not change the result of a run."""
    values = {key: value for key, value in config.model_dump(mode="json").items() if key not in RUN_ONLY}
    stage = getattr(type(config), "stage", type(config).__name__)
    text = json.dumps({"stage": stage, "config": values}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
