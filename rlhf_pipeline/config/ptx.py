"""Keys of the pretraining stream of `rlhf ppo` (PPO-ptx), and the config by which the stream is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator

from rlhf_pipeline.config.base import Count, DataInput, NonNegative, check_world, option
from rlhf_pipeline.config.sft import SftConfig
from rlhf_pipeline.config.training import DatasetEntry, TrainingConfig
from rlhf_pipeline.errors import Fault

_OWN: dict[str, Any] = {
    **dict.fromkeys(("dataset_name", "dataset_config", "dataset_test_name", "column_mapping", "test_split_size")),
    **dict.fromkeys(("max_prompt_length", "response_length", "max_train_samples")),
}
"""Keys of the prompts that the stream does not share, with the values that the stream has instead."""


def _entries(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return [{"dataset_name": entry} if isinstance(entry, str) else entry for entry in value]


class WithStream(TrainingConfig):
    """A config whose optimizer steps also read a batch of a pretraining stream."""

    ptx_coef: NonNegative = option(
        0.0,
        "gamma of PPO-ptx: each optimizer step adds ptx_coef x the mean negative log-likelihood per token of a batch "
        "of ptx_dataset (InstructGPT: 27.8; ours: 0)",
        moves_optimum=True,
    )
    ptx_dataset: Annotated[tuple[DatasetEntry, ...] | None, BeforeValidator(_entries)] = option(
        None,
        "with ptx_coef: text or demonstrations to pretrain on beside the rollouts, a source as in dataset_name or a "
        "mixture as in datasets; read as rlhf sft reads it",
        names="data",
        min_length=1,
    )
    ptx_batch_size: Count | None = option(
        None, "with ptx_coef: examples of the stream per optimizer step, on all devices together (default: a minibatch)"
    )
    ptx_max_length: Count | None = option(
        None,
        "with ptx_coef: maximum length of an example of the stream, in tokens; longer ones are dropped (default: "
        "max_length)",
    )

    def stream(self) -> SftConfig | None:
        """Return the config by which `rlhf sft` would read the stream; None without one."""
        if not self.ptx_coef or self.ptx_dataset is None:
            return None
        shared = {key: getattr(self, key) for key in TrainingConfig.model_fields if key not in _OWN}
        total = self.ptx_max_length or self.lengths().total
        return SftConfig.model_construct(**{**shared, **_OWN, "datasets": self.ptx_dataset, "max_length": total})

    def streams(self) -> list[DataInput]:
        """Return the sources of the stream, which follow those of `sources` in the manifest's data."""
        found = self.stream()
        return [] if found is None else found.sources()


def check_stream(config: WithStream) -> Iterator[Fault]:
    """Yield the faults of a stream without weight or without data, and of sources that do not exist."""
    if config.ptx_coef and config.ptx_dataset is None:
        expected = "a source of text or demonstrations"
        yield Fault("ptx_dataset", f"missing, but ptx_coef is {config.ptx_coef:g}", expected, "or ptx_coef: 0")
    for key in ("ptx_dataset", "ptx_batch_size", "ptx_max_length"):
        if getattr(config, key) is not None and "ptx_coef" not in config.model_fields_set:
            yield Fault(key, "found without ptx_coef", "ptx_coef: the weight of its loss", f"or no {key}")
    for index, entry in enumerate(config.ptx_dataset or ()):
        for fault in check_world(entry):
            yield Fault(f"ptx_dataset.{index}.{fault.where}", fault.found, fault.expected, fault.fix)
        if entry.weight != 1 and any(other.fraction is not None for other in config.ptx_dataset or ()):
            fix = "remove the weights, or the fractions"
            yield Fault(f"ptx_dataset.{index}.weight", "other sources have a fraction", "fractions or weights", fix)
