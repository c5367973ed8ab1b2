"""The common keys of `sft`, `train-rm`, `ppo` and `dpo`, and the checks between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf_pipeline.config.adapter import QuantType, check_adapter
from rlhf_pipeline.config.base import (
    ATTENTION,
    COLUMN_MAPPING,
    DTYPE,
    NUM_THREADS,
    REMOTE_CODE,
    SKIP_BAD_ROWS,
    SPLIT_FRACTIONS,
    STOP_TOKEN,
    USE_CPU,
    Count,
    DataInput,
    Dtype,
    Keys,
    ModelInput,
    Name,
    NonNegative,
    Positive,
    Seed,
    Steps,
    StopToken,
    Text,
    Texts,
    Warmup,
    check_fractions,
    check_world,
    option,
    part_of,
    renames,
)
from rlhf_pipeline.config.evaluation import Cadence, check_eval, check_evaluations, check_metric
from rlhf_pipeline.config.lengths import MAX_LENGTH, WithLengths, check_lengths
from rlhf_pipeline.config.optim import SCHEDULES, check_optim, check_schedule
from rlhf_pipeline.config.sharding import WithSharding, check_sharding
from rlhf_pipeline.config.template import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_KWARGS,
    CHAT_TEMPLATE_PATH,
    EOS_TOKEN,
    check_template,
)
from rlhf_pipeline.config.trackers import ReportTo, check_trackers
from rlhf_pipeline.errors import Fault


class DatasetEntry(Keys):
    """One source of a weighted mixture."""

    dataset_name: Text = option(
        ..., "data source: hub id, directory, file, world:verdicts or collected:NAME", names="data"
    )
    dataset_config: Text | None = option(None, "configuration of the source (default: its own)")
    split: Text | None = option(
        None, "train on this split of the source, whole, or on all its rows (all); default: dataset_train_split"
    )
    column_mapping: dict[Text, Text] | None = COLUMN_MAPPING
    weight: Positive = option(1.0, "weight in the mixture, relative to the other sources (ours: equal)")
    fraction: Annotated[float, Field(gt=0, le=1)] | None = option(
        None,
        "share of this source's training examples, in hash order; the mixture then joins all shares, without weights",
    )
    max_samples: Count | None = option(None, "maximum number of examples of this source, in hash order (default: all)")


NATIVE = "or engine: native"
"""The advice in every fault of `engine: trl`."""


def check_engine(config: TrainingConfig) -> Iterator[Fault]:
    """Yield the faults of keys that `engine: trl` supports in no stage."""
    if config.engine != "trl":
        return
    if config.stage == "ppo":
        found = "found 'trl', but TRL 1.16 has no PPO trainer"
        yield Fault("engine", found, "'native'", "engine: trl works for sft, train-rm and dpo")
        return
    if config.save_steps is not None or config.save_strategy in ("epoch", "best"):
        key = "save_steps" if config.save_steps is not None else "save_strategy"
        yield Fault(key, "engine trl writes no checkpoints and cannot resume", f"no {key}", NATIVE)
    if config.snapshot_steps is not None:
        yield Fault("snapshot_steps", "engine trl takes no snapshots", "no snapshot_steps", NATIVE)
    if getattr(config, "packing", False):
        yield Fault("packing", "engine trl trains on the examples one by one", "false", NATIVE)
    if SCHEDULES[config.lr_scheduler_type].measures:
        found = f"{config.lr_scheduler_type} does not work with engine trl"
        yield Fault("lr_scheduler_type", found, "another schedule", NATIVE)
    if config.follows_metric:
        key = config.following_key
        yield Fault(key, "engine trl keeps no weights of evaluations", f"no {key}", NATIVE)
    if config.micro_batch_tokens is not None:
        found = "engine trl limits micro-batches only by the number of examples"
        yield Fault("micro_batch_tokens", found, "no micro_batch_tokens", NATIVE)


class TrainingConfig(WithLengths, WithSharding):
    """Keys of every training stage, with the names of Hugging Face and TRL."""

    model_name_or_path: Text | None = option(
        None, "model to start from: registry name, directory or hub id", names="policy"
    )
    model_revision: Text | None = option(None, "hub revision of the model (default: the hub's main)")
    dtype: Dtype = DTYPE
    attn_implementation: Text | None = ATTENTION
    trust_remote_code: bool = REMOTE_CODE
    chat_template: Text | None = CHAT_TEMPLATE
    chat_template_path: Text | None = CHAT_TEMPLATE_PATH
    chat_template_kwargs: dict[str, Any] | None = CHAT_TEMPLATE_KWARGS
    eos_token: Text | None = EOS_TOKEN
    stop_token: StopToken = STOP_TOKEN

    dataset_name: Text | None = option(
        None,
        "data source: hub id, directory, .jsonl[.gz], .json, .csv, .parquet, world:verdicts, collected:NAME",
        names="data",
    )
    dataset_config: Text | None = option(None, "configuration of the source (default: its own)")
    dataset_train_split: Text = option("train", "split to train on, or 'all' (TRL)")
    dataset_test_split: Text = option("test", "split to evaluate on (TRL)")
    dataset_test_name: Text | None = option(
        None,
        "source of the test split, if it is not dataset_name; all rows of dataset_name are then train",
        names="data",
    )
    column_mapping: dict[Text, Text] | None = COLUMN_MAPPING
    datasets: tuple[DatasetEntry, ...] | None = option(
        None, "weighted mixture of sources, instead of dataset_name", names="data", min_length=1
    )
    test_split_size: Cadence = option(
        None,
        "examples to hold out of dataset_train_split for evaluation, whole prompts by hash, instead of "
        "dataset_test_split; below 1: a fraction (TRL)",
    )
    max_train_samples: Count | None = option(None, "maximum number of training examples, in hash order (default: all)")
    dataset_num_proc: Count | None = option(None, "processes that encode a large source's texts (TRL: one)")
    skip_bad_rows: bool = SKIP_BAD_ROWS
    allow_overlap: bool = option(
        False,
        "train even if evaluation rows of a source with its own splits share a prompt with the training split, "
        "ignoring case and punctuation (ours: stop; skip_bad_rows drops them from the evaluation)",
    )
    split_fractions: dict[str, float] = SPLIT_FRACTIONS
    instruction_style: Literal["sections", "alpaca", "plain"] = option(
        "sections",
        "prompt of Alpaca rows: sections such as ### Instruction (ours), the same after Alpaca's opening sentence, or "
        "plain: instruction and input",
    )
    text_as_chat: bool = option(
        False, "put prompts and completions that are text into the chat template, as turns of user and assistant"
    )
    max_prompt_length: Count | None = option(
        None, "maximum prompt length, in tokens; longer prompts are cut on the left, those of messages by whole turns"
    )
    response_length: Count | None = option(
        None, "maximum response length, in tokens, EOS included; longer responses are dropped"
    )
    max_length: Count | None = MAX_LENGTH

    learning_rate: Positive = option(..., "peak learning rate of AdamW", examples=[1e-5])
    warmup_steps: Warmup = option(
        0, "steps of linear warm-up, starting at rate 0; below 1: a fraction of all steps, rounded up (transformers)"
    )
    weight_decay: NonNegative = option(
        0.0, "AdamW's decoupled weight decay, per step and times the learning rate (TRL)", moves_optimum=True
    )
    max_grad_norm: NonNegative = option(1.0, "maximum L2 norm of the gradient; 0: no clipping (TRL)")
    adam_beta1: float = option(0.9, "decay rate of the gradient's running average (AdamW)", ge=0, lt=1)
    adam_beta2: float = option(0.999, "decay rate of the squared gradient's running average (AdamW)", ge=0, lt=1)
    adam_epsilon: Positive = option(1e-8, "constant added to AdamW's denominator (AdamW)")
    per_device_train_batch_size: Count = option(8, "examples per micro-batch on one device (TRL)")
    micro_batch_tokens: Count | None = option(
        None,
        "maximum tokens in a micro-batch of several examples, to save memory; a step keeps its examples (ours: none)",
    )
    per_device_eval_batch_size: Count = option(8, "examples per evaluation batch on one device (TRL)")
    gradient_accumulation_steps: Count | None = option(1, "micro-batches per optimizer step (TRL)")
    num_train_epochs: Positive = option(1.0, "passes over the training data (InstructGPT, DPO paper: 1)")
    max_steps: int = option(-1, "number of optimizer steps, overrides num_train_epochs; -1: count epochs (TRL)")
    bf16: bool | Literal["auto"] = option(
        False, "autocast to bfloat16, weights stay in dtype; auto: if that is faster on this machine (ours: off)"
    )
    gradient_checkpointing: bool = option(False, "recompute activations to save memory (ours: off)")

    use_peft: bool = option(False, "train a LoRA adapter (peft) on frozen weights instead of all weights (TRL: off)")
    lora_r: Count = option(16, "rank of the adapter's matrices (TRL)")
    lora_alpha: Count = option(32, "scale of the adapter: lora_alpha / lora_r times B A is added to a weight (TRL)")
    lora_dropout: NonNegative = option(
        0.0, "dropout of the adapter's inputs in training; ppo uses none (ours: off; TRL: .05)", lt=1
    )
    lora_target_modules: Texts | None = option(
        None, "names of the modules that get an adapter, or all-linear (default: peft's choice for the architecture)"
    )
    lora_modules_to_save: Texts | None = option(
        None, "names of modules that are trained and stored whole, beside the adapter (TRL: none)"
    )
    use_rslora: bool = option(False, "scale the adapter by lora_alpha / sqrt(lora_r) (Kalajdzievski 2023; TRL: off)")
    use_dora: bool = option(False, "train magnitude and direction of a weight apart (DoRA, Liu et al. 2024; TRL: off)")
    load_in_4bit: bool = option(
        False, "with use_peft: hold frozen linear layers, no heads, in 4 bits (QLoRA, Dettmers et al. 2023; TRL: off)"
    )
    bnb_4bit_quant_type: QuantType = option(
        "nf4", "the 16 values of a weight in 4 bits: quantiles of a normal distribution, or floating point (TRL)"
    )
    use_bnb_nested_quant: bool = option(
        False, "hold the scales of blocks of 64 weights in 8 bits too: .4 bits a weight less (TRL: off)"
    )

    seed: Seed = option(0, "random seed for initialisation, data order and sampling (ours)")
    use_cpu: bool = USE_CPU
    num_threads: Count | None = NUM_THREADS

    output_name: Name = option(
        ..., "name of the model in the registry (default: the last part of output_dir)", examples=["model"]
    )
    output_dir: Text | None = option(
        None, "folder for a copy of the model for plain transformers; it replaces an earlier copy of this name"
    )
    save_steps: Cadence = option(
        None, "steps between checkpoints; below 1: a fraction of all steps (ours: none before the end)"
    )
    save_total_limit: Count | None = option(2, "number of checkpoints to keep, newest first; null: all (ours)")
    snapshot_steps: Steps = option(
        None, "keep weights as name@vN#step, every n steps or at a list of steps (ours: none)"
    )
    report_to: ReportTo = option(
        (), "experiment trackers beside metrics.jsonl, by accelerate's names; none, all, or a list (ours: none)"
    )
    engine: Literal["native", "trl"] = option(
        "native", "training loop: native, or TRL's trainer on the same examples in the same order (not for ppo)"
    )

    @property
    def reads_prompts(self) -> bool:
        """Whether the stage reads only prompts from its data."""
        return False

    def parents(self) -> dict[str, ModelInput]:
        """Return the parents of the stage's model, by their role in its manifest; the start is first."""
        if self.model_name_or_path is None:
            return {}
        return {"base": ModelInput(self.model_name_or_path, revision=self.model_revision)}

    def sources(self) -> list[DataInput]:
        """Return the sources that the stage reads, in the order of its manifest's data."""
        if self.datasets is not None:
            return [
                DataInput(entry.dataset_name, entry.dataset_config, entry.split, renames(entry.column_mapping))
                for entry in self.datasets
            ]
        assert self.dataset_name is not None  # `check_data`
        kind = "prompt" if self.reads_prompts else "row"
        part = part_of(self.dataset_name, self.dataset_config, kind)
        return [DataInput(self.dataset_name, part, None, renames(self.column_mapping), self.dataset_test_name)]


def check_model(config: TrainingConfig) -> Iterator[Fault]:
    """Yield the fault of a stage without a model to start from."""
    if config.model_name_or_path is None:
        yield Fault("model_name_or_path", "missing", "the model to start from: name, directory or hub id")


def check_data(config: TrainingConfig) -> Iterator[Fault]:
    """Yield the fault of a missing source, or of two sources."""
    if config.datasets is None and config.dataset_name is None:
        yield Fault("dataset_name", "missing", "dataset_name: SOURCE, or datasets: for a mixture")
    if config.datasets is not None and config.dataset_name is not None:
        yield Fault("datasets", "dataset_name is also given", "one of the two", "remove one")
    for key in ("dataset_config", "column_mapping", "dataset_test_name"):
        if config.datasets is not None and getattr(config, key) is not None:
            fix = f"write {key} into the entries of datasets" if key in DatasetEntry.model_fields else "remove it"
            yield Fault(key, "it belongs to dataset_name, but datasets is given", fix=fix)
    if config.dataset_test_name is not None and config.test_split_size is not None:
        yield Fault("test_split_size", "dataset_test_name is also given", "one of the two", "remove one")
    if config.dataset_test_name is not None and config.dataset_train_split == "all":
        found = "found 'all', which also has the rows of dataset_test_name"
        yield Fault("dataset_train_split", found, "train: all rows of dataset_name")


def check_mixture(config: TrainingConfig) -> Iterator[Fault]:
    """Yield the faults of the built-in world in a mixture."""
    for index, entry in enumerate(config.datasets or ()):
        for fault in check_world(entry):
            yield Fault(f"datasets.{index}.{fault.where}", fault.found, fault.expected, fault.fix)


def check_fractions_of_sources(config: TrainingConfig) -> Iterator[Fault]:
    """Yield the faults of a mixture with fractions and weights, and of an evaluation that has no examples."""
    entries = config.datasets or ()
    for index, entry in enumerate(entries):
        if entry.weight != 1 and any(other.fraction is not None for other in entries):
            fix = "remove the weights, or the fractions"
            yield Fault(f"datasets.{index}.weight", "other sources have a fraction", "fractions or weights", fix)
    if config.eval_strategy != "no" and any(entry.split for entry in entries) and config.test_split_size is None:
        found = "the sources of datasets name the split to train on, so there is none to evaluate on"
        yield Fault("eval_strategy", found, "test_split_size, or eval_strategy 'no'")


def check_precision(config: TrainingConfig) -> Iterator[Fault]:
    """Yield the fault of weights in float16, in which AdamW's epsilon of 1e-8 is 0: steps would have no bound."""
    if config.dtype == "float16":
        found = "float16 cannot be trained: in it AdamW's epsilon rounds to 0"
        yield Fault("dtype", found, "float32 (with bf16: true for speed), or bfloat16")


def check_max_steps(config: TrainingConfig) -> Iterator[Fault]:
    """Yield the fault of a number of steps that is neither positive nor -1."""
    if config.max_steps < 1 and config.max_steps != -1:
        yield Fault("max_steps", f"found {config.max_steps}", "a number >= 1, or -1 to count epochs")


def check_warmup(config: TrainingConfig) -> Iterator[Fault]:
    """Yield the faults of a warm-up that the schedule does not have, or that is longer than the run."""
    if config.warmup_steps and not SCHEDULES[config.lr_scheduler_type].warms:
        expected = "warmup_steps 0, or lr_scheduler_type constant_with_warmup"
        yield Fault("warmup_steps", f"lr_scheduler_type {config.lr_scheduler_type} has no warm-up", expected)
    if 1 <= config.max_steps < config.warmup_steps:
        found = f"warm-up of {config.warmup_steps} steps in a run of {config.max_steps}"
        yield Fault("warmup_steps", found, "at most max_steps")


COMMON_CHECKS = (
    check_template,
    check_data,
    check_world,
    check_mixture,
    check_fractions_of_sources,
    check_lengths,
    check_fractions,
    check_precision,
    check_max_steps,
    check_warmup,
    check_eval,
    check_engine,
    check_adapter,
    check_optim,
    check_schedule,
    check_metric,
    check_evaluations,
    check_trackers,
    check_sharding,
)
