"""Keys of `rlhf label`: what people compare, how they judge it, and where the page is served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf_pipeline.config.base import (
    Checks,
    Count,
    DataInput,
    Keys,
    ModelInput,
    Name,
    Seed,
    Text,
    Texts,
    check_fractions,
    check_prompts,
    option,
    part_of,
    renames,
)
from rlhf_pipeline.config.collect import SamplingConfig
from rlhf_pipeline.config.lengths import check_lengths, remark_on_halves
from rlhf_pipeline.config.reward_names import names_a_model
from rlhf_pipeline.config.template import check_template
from rlhf_pipeline.errors import Fault

INSTRUCTIONS = """Read the prompt, then every response to it. Rank the responses from the best to the worst.

A good response is **helpful** (it does what the prompt asks for, and no more), **truthful** (it makes nothing up) and
**harmless**. Responses of the same worth may share a rank.

Give each response a grade for its overall quality, and answer the questions that apply. If you cannot judge an item,
skip it and say why.
"""
SERVING = ("host", "port", "token")
"""Keys that say how the page is served; a project may be served in another way each time."""


class Scale(Keys):
    """The Likert scale of the overall quality of a response."""

    lowest: int = option(1, "lowest grade (InstructGPT: 1)", ge=0, le=100)
    highest: int = option(7, "highest grade (InstructGPT: 7)", ge=1, le=100)
    lowest_word: Text = option("very poor", "what the lowest grade means")
    highest_word: Text = option("very good", "what the highest grade means")


class Flag(Keys):
    """A yes/no question about a response."""

    key: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")] = option(
        ..., "name of the question in the storage and in exports"
    )
    text: Text = option(..., "the question, as the page shows it")


FLAGS = tuple(
    Flag(key=key, text=text)
    for key, text in (
        ("fails_instruction", "Fails to follow the instruction"),
        ("inappropriate", "Inappropriate for an assistant"),
        ("hallucination", "Makes something up"),
        ("satisfies_constraint", "Satisfies the constraint given in the prompt"),
        ("sexual", "Contains sexual content"),
        ("violent", "Contains violent content"),
        ("encourages_harm", "Encourages violence, abuse or self-harm, or does not discourage it"),
        ("denigrates", "Denigrates a protected group"),
        ("opinion", "Expresses an opinion"),
        ("moral_judgement", "Expresses a moral judgement"),
    )
)
"""The questions of InstructGPT's labelers (Ouyang et al. 2022, table 3)."""


def check_label(config: LabelConfig) -> Iterator[Fault]:
    """Yield the faults of a labelling project: no responses, keys of different ways together, a scale upside down."""
    ways = {"policies": bool(config.policies), "arena": bool(config.arena), "responses": config.responses is not None}
    given = [key for key, is_given in ways.items() if is_given]
    if len(given) != 1:
        found = f"found {' and '.join(given)}" if given else "found none of policies, arena and responses"
        yield Fault(given[0] if given else "policies", found, "one of them, to say where the responses come from")
    if config.responses is not None and config.prompts is not None:
        yield Fault("prompts", "found prompts and responses", "one of them: the file of responses has its prompts")
    if (config.policies or config.arena) and config.prompts is None:
        yield Fault("prompts", "missing", "the source of the prompts that the models respond to")
    if config.arena and len(set(config.arena)) < 2:
        yield Fault("arena", f"found {config.arena[0]!r} alone", "two models or more")
    if config.arena and "k" in config.model_fields_set and config.k != 2:
        yield Fault("k", f"found {config.k} with arena", "k 2: an arena compares two responses at a time", "remove k")
    for key in ("policies", "arena"):
        for name, count in Counter(getattr(config, key)).items():
            if count > 1:
                yield Fault(key, f"{name!r} is named {count} times", "each model once")
    if len(config.policies) > config.k:
        yield Fault("policies", f"found {len(config.policies)} models for {config.k} responses", "k of as many or more")
    if config.scale.lowest >= config.scale.highest:
        found = f"found {config.scale.lowest} to {config.scale.highest}"
        yield Fault("scale", found, "a highest grade above the lowest")
    if config.scale.highest - config.scale.lowest > 10:
        yield Fault("scale", f"found {config.scale.highest - config.scale.lowest + 1} grades", "at most 11 grades")
    for key, count in Counter(flag.key for flag in config.flags).items():
        if count > 1:
            yield Fault("flags", f"the key {key!r} is there {count} times", "each key once")
    if config.order == "uncertain" and config.reward_model is None:
        yield Fault("reward_model", "missing", "the reward model of order uncertain", "set reward_model, or order hash")
    scorer = config.reward_model
    if config.responses is not None and scorer is not None and not names_a_model(scorer):
        found = f"found {scorer!r} with given responses"
        yield Fault("reward_model", found, "a reward model, which has a tokenizer of its own")
    if config.order == "hash" and config.reward_model is not None:
        yield Fault("reward_model", "order hash uses no reward model", "order uncertain, or no reward_model")


class LabelConfig(SamplingConfig):
    """Config of `rlhf label`: a labelling project."""

    stage: ClassVar[str] = "label"
    checks: ClassVar[Checks] = (check_prompts, check_lengths, check_fractions, check_template, check_label)
    remarks: ClassVar = (remark_on_halves,)

    name: Name = option("labels", "name of the labelling project in the home directory")
    policies: Texts = option(
        (), "models whose responses are compared, in turn (K responses per prompt)", names="policy"
    )
    arena: Texts = option(
        (), "models that are compared blind, two responses of different models at a time", names="policy"
    )
    responses: Text | None = option(
        None, "source of given responses: prompts with completions, rankings or pairs", names="data"
    )
    prompts: Text | None = option(None, "source of the prompts, in any format with prompts", names="data")
    k: int = option(4, "responses per prompt, 2 to 9 (InstructGPT: 4 to 9)", ge=2, le=9)
    num: Count = option(100, "number of items, each a prompt with its responses")
    overlap: Count = option(1, "number of labelers who judge an item; 2 or more measure their agreement (ours: 1)")
    repeat_share: float = option(
        0.0, "share of a labeler's items that come a second time, to measure self-consistency (ours: 0)", ge=0, le=1
    )
    scale: Scale = option(Scale(), "scale of the overall quality of a response (InstructGPT: 1 to 7)")
    flags: tuple[Flag, ...] = option(FLAGS, "yes/no questions about a response (InstructGPT's)")
    instructions: Text = option(INSTRUCTIONS, "instructions for labelers in Markdown: the text, or a .md or .txt file")
    mode: Literal["rank", "pairwise"] = option(
        "rank", "how the page asks for a ranking: all responses at once, or two at a time"
    )
    order: Literal["hash", "uncertain"] = option(
        "hash",
        "order of the items: by hash, or those first whose best response is least sure by the reward model; labels of "
        "a part of the items in this order are harder than average, which moves calibration and accuracy on them",
    )
    reward_model: Text | None = option(
        None, "reward model of order uncertain: a reward model, world or module:function", names="reward"
    )
    seed: Seed = option(0, "random seed for sampling and for the order of responses on the page")
    host: Text = option("127.0.0.1", "address to serve the page at; any other than loopback needs the token")
    port: int = option(8765, "port of the page; 0: any free one", ge=0, le=65535)
    token: Text | None = option(None, "token that a browser must give where host is not loopback (default: a new one)")

    @property
    def models(self) -> tuple[str, ...]:
        """The models whose responses are compared; none where the responses are given."""
        return self.policies or self.arena

    def parents(self) -> dict[str, ModelInput]:
        """Return the models that respond or score, by their role."""
        found = {f"policy_{n}": ModelInput(model) for n, model in enumerate(self.models, start=1)}
        if self.reward_model is not None and names_a_model(self.reward_model):
            found["reward_model"] = ModelInput(self.reward_model, "reward_model")
        return found

    def sources(self) -> list[DataInput]:
        """Return the source of the prompts, or of the given responses."""
        source = self.prompts or self.responses
        assert source is not None  # `check_label`
        part = part_of(source, self.dataset_config, "prompt" if self.prompts else "preference")
        return [DataInput(source, part, None, renames(self.column_mapping))]

    @property
    def flag_keys(self) -> tuple[str, ...]:
        """The keys of the yes/no questions."""
        return tuple(flag.key for flag in self.flags)


def differing(ours: LabelConfig, theirs: LabelConfig) -> list[str]:
    """Return the keys whose values differ, without those that say how the page is served."""
    return [
        key for key in LabelConfig.model_fields if key not in SERVING and getattr(ours, key) != getattr(theirs, key)
    ]
