"""Keys of `rlhf data collect`: sample responses, label them, publish the pairs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

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
    ModelInput,
    Name,
    Positive,
    Seed,
    StopToken,
    Text,
    Texts,
    check_fractions,
    check_prompts,
    option,
    part_of,
    renames,
)
from rlhf_pipeline.config.lengths import MAX_LENGTH, WithLengths, check_lengths, remark_on_halves
from rlhf_pipeline.config.names import NAME_RULE, is_name
from rlhf_pipeline.config.reward_names import PEOPLE_PREFIX, names_a_model
from rlhf_pipeline.config.rewards import (
    PAIR_PLACES,
    TOKENIZATION,
    LlmJudge,
    Tokenization,
    check_request,
    check_source,
    with_source,
)
from rlhf_pipeline.config.template import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_KWARGS,
    CHAT_TEMPLATE_PATH,
    EOS_TOKEN,
    check_template,
)
from rlhf_pipeline.errors import Fault

MOST_RESPONSES = 9
"""People rank at most so many responses at once."""


def check_labeller(config: CollectConfig) -> Iterator[Fault]:
    """Yield the faults of a language model as the labeller."""
    if config.project is not None and config.llm_judge is None:
        yield from check_people(config, config.project)
        return
    yield from check_source("judge", config.judge, config.llm_judge)
    yield from check_request("llm_judge", config.llm_judge, PAIR_PLACES)
    if config.llm_judge is not None and config.labels == "bradley-terry":
        found = f"found {config.labels!r}, but llm_judge decides each pair itself"
        yield Fault("labels", found, "rank", "remove labels")


def check_people(config: CollectConfig, project: str) -> Iterator[Fault]:
    """Yield the faults of people as the labellers: no name of a project, or labels that are not people's own."""
    if not is_name(project):
        yield Fault("judge", f"found {config.judge!r}", f"{PEOPLE_PREFIX}NAME, with a name of {NAME_RULE}")
    if config.k > MOST_RESPONSES:
        yield Fault("k", f"found {config.k} with judge {config.judge}", f"at most {MOST_RESPONSES}: people rank them")
    if config.labels != "bradley-terry":
        found = f"found {config.labels!r}, but people decide themselves"
        yield Fault("labels", found, "no labels", "remove labels")
    if config.flip_rate:
        yield Fault("flip_rate", f"found {config.flip_rate:g} with judge {config.judge}", "labels as people gave them")


def check_flips(config: CollectConfig) -> Iterator[Fault]:
    """Yield the fault of flipped labels of rankings or of single responses."""
    if config.flip_rate and config.labels == "best":
        found = f"found {config.flip_rate:g} with labels best: the best response alone has no label to flip"
        yield Fault("flip_rate", found, "flip_rate 0, or other labels")
    elif config.flip_rate and config.k > 2:
        found = f"found {config.flip_rate:g} with k {config.k}: a ranking has no label to flip"
        yield Fault("flip_rate", found, "k 2, or flip_rate 0")


class SamplingConfig(WithLengths):
    """Keys of a command that samples responses of policies: how to read prompts, load models and sample."""

    samples: ClassVar[bool] = True

    temperature: Positive = option(1.0, "sampling temperature; 1: the policy itself")
    dataset_config: Text | None = option(None, "configuration of the prompts' source (default: its own)")
    column_mapping: dict[Text, Text] | None = COLUMN_MAPPING
    splits: Texts | None = option(None, "splits to take the prompts from (default: all)", min_length=1)
    split_fractions: dict[str, float] = SPLIT_FRACTIONS
    skip_bad_rows: bool = SKIP_BAD_ROWS
    reward_tokenization: Tokenization = TOKENIZATION
    max_prompt_length: Count | None = option(
        None, "maximum prompt length, in tokens; longer prompts are cut on the left, those of messages by whole turns"
    )
    response_length: Count | None = option(None, "maximum response length, in tokens, EOS included")
    max_length: Count | None = MAX_LENGTH
    per_device_eval_batch_size: Count = option(256, "responses per batch on one device; halved if memory runs out")
    dtype: Dtype = DTYPE
    attn_implementation: Text | None = ATTENTION
    trust_remote_code: bool = REMOTE_CODE
    chat_template: Text | None = CHAT_TEMPLATE
    chat_template_path: Text | None = CHAT_TEMPLATE_PATH
    chat_template_kwargs: dict[str, Any] | None = CHAT_TEMPLATE_KWARGS
    eos_token: Text | None = EOS_TOKEN
    stop_token: StopToken = STOP_TOKEN
    seed: Seed = option(0, "random seed for sampling and labels")
    use_cpu: bool = USE_CPU
    num_threads: Count | None = NUM_THREADS

    @abstractmethod
    def parents(self) -> dict[str, ModelInput]:
        """Return the models that the command reads, by their role; the first one's lengths are those of the command."""


class CollectConfig(SamplingConfig):
    """Config of `rlhf data collect` and of the `collect` stage of an experiment."""

    stage: ClassVar[str] = "collect"
    checks: ClassVar = (check_prompts, check_lengths, check_fractions, check_template, check_labeller, check_flips)
    remarks: ClassVar = (remark_on_halves,)

    policy: Text = option(
        ..., "model that samples the responses: registry name, directory or hub id", names="policy", examples=["model"]
    )
    prompts: Text = option(..., "source of the prompts, in any format with prompts", names="data", examples=["data"])
    judge: Text = option(
        ...,
        "what labels the responses: world, a reward model, module:function, or people:NAME, the labelers of the "
        "labelling project NAME, whose page rlhf label serve NAME opens",
        names="reward",
        examples=["world"],
    )
    llm_judge: LlmJudge | None = option(
        None, "language model that labels the responses, instead of judge: both orders of each pair, ties are left out"
    )
    num: Count = option(..., "number of records to collect", examples=[1])
    output_name: Name = option(..., "name of the data in the home directory", examples=["data"])
    first_record: int = option(
        0,
        "number of the first record: the prompts follow those of so many records before, and the draws are others; a "
        "later round of an experiment begins where the one before ended (ours: 0)",
        ge=0,
    )
    k: int = option(2, "responses per prompt; more than 2 give rankings (DPO paper: 2)", ge=2)
    labels: Literal["bradley-terry", "rank", "best"] = option(
        "bradley-terry",
        "how to label: draw the winner with odds exp(r_w - r_l), take the ranks of the scores, or (best) keep the best "
        "of the k responses alone, as a demonstration for rlhf sft (RAFT)",
        moves_optimum=True,
    )
    flip_rate: float = option(
        0.0,
        "share of the pairs whose label is flipped, at random, to study label noise; responses and all other labels "
        "stay as they are (ours: none)",
        moves_optimum=True,
        ge=0,
        lt=0.5,
    )

    @model_validator(mode="before")
    @classmethod
    def _labelled_by(cls, values: Any) -> Any:
        judged = isinstance(values, Mapping) and values.get("llm_judge") is not None
        return {"labels": "rank", **with_source(values, "judge")} if judged else values

    @property
    def project(self) -> str | None:
        """The labelling project whose labelers are the judge; None if people are not."""
        return self.judge.removeprefix(PEOPLE_PREFIX) if self.judge.startswith(PEOPLE_PREFIX) else None

    def parents(self) -> dict[str, ModelInput]:
        """Return the models that produce the data, by their role in the manifest."""
        found = {"policy": ModelInput(self.policy)}
        return found | ({"judge": ModelInput(self.judge, "reward_model")} if names_a_model(self.judge) else {})

    def sources(self) -> list[DataInput]:
        """Return the source of the prompts."""
        part = part_of(self.prompts, self.dataset_config, "prompt")
        return [DataInput(self.prompts, part, None, renames(self.column_mapping))]
