"""Keys of `rlhf evaluate`, `rlhf compare` and `rlhf exact`, which read the same prompts for every model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    Checks,
    CommandConfig,
    Count,
    Counts,
    Dtype,
    Name,
    Positive,
    Seed,
    StopToken,
    Text,
    Texts,
    check_fractions,
    check_prompts,
    option,
)
from rlhf_pipeline.config.decoding import TEMPERATURE, Decoding, changed
from rlhf_pipeline.config.in_context import InContext, split_arm
from rlhf_pipeline.config.rewards import PAIR_PLACES, TOKENIZATION, LlmJudge, Tokenization, check_request
from rlhf_pipeline.config.template import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_KWARGS,
    CHAT_TEMPLATE_PATH,
    EOS_TOKEN,
    check_template,
)
from rlhf_pipeline.errors import ConfigError, Fault

MOST_PROMPTS = "maximum number of prompts, in hash order"
SAMPLES = "responses sampled per prompt; 1 if do_sample is false"
REWARD_MODEL_PROMPTS = "maximum number of prompts for exact figures that need a reward model's score of every response"


def check_arms(config: CompareConfig) -> Iterator[Fault]:
    """Yield the faults of arms named twice, or of a single model without another one to compare it with."""
    seen: set[str] = set()
    for index, arm in enumerate(config.arms):
        if arm in seen:
            yield Fault(f"arms.{index}", f"{arm!r} is named twice", "each model once")
        seen.add(arm)
    if config.baseline in seen:
        yield Fault("baseline", f"{config.baseline!r} is also an arm", "another model, or no baseline")
    elif len(seen) + (config.baseline is not None) < 2:
        yield Fault("arms", f"{config.arms[0]!r} is the only model", "two models or a baseline")


def check_reference(config: PromptsConfig) -> Iterator[Fault]:
    """Yield the fault of a reference with demonstrations in its context."""
    if config.reference is not None and split_arm(config.reference)[0] is not None:
        expected = "a policy: KL is measured to the reference on the prompt alone"
        yield Fault("reference", f"found {config.reference!r}", expected, f"reference {split_arm(config.reference)[1]}")


def check_validation(config: CompareConfig) -> Iterator[Fault]:
    """Yield the fault of settings that are chosen on the same prompts as those of the results."""
    if config.validation_split is not None and config.split in (config.validation_split, "all"):
        found = f"split {config.split!r} has the prompts of validation_split {config.validation_split!r}"
        yield Fault("validation_split", f"{found}: settings would be chosen on the results", "another split, or null")


def check_llm_judge(config: CompareConfig) -> Iterator[Fault]:
    """Yield the faults of a template that has no places for two responses."""
    return check_request("llm_judge", config.llm_judge, PAIR_PLACES)


OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Keys of a decoder that do nothing if it does not sample."""


def check_decoding(config: EvaluateConfig) -> Iterator[Fault]:
    """Yield the faults of keys of the decoder that do nothing together."""
    given = changed(config)
    if config.do_sample and config.num_beams > 1:
        yield Fault(
            "num_beams", "do_sample is true, and beam search does not sample", "do_sample: false, or num_beams 1"
        )
    if config.num_beams == 1 and "length_penalty" in given:
        yield Fault("length_penalty", "num_beams is 1, so there is no beam search", "num_beams >= 2")
    if config.do_sample:
        return
    for key in OF_SAMPLING:
        if key in given:
            yield Fault(key, "do_sample is false, so nothing is sampled", f"do_sample: true, or no {key}")
    if config.samples > 1:
        yield Fault("samples", "do_sample is false, so all responses to a prompt are the same", "samples 1")
    if max(config.best_of, default=1) > 1:
        yield Fault("best_of", "do_sample is false, so all responses to a prompt are the same", "do_sample: true")


def faults_in_context(config: EvaluateConfig, arms: Sequence[str]) -> Iterator[Fault]:
    """Yield the faults of these arms, as far as they depend on demonstrations in the context.

    They are `in_context` without an arm that reads it, a decoder beside such an arm, a retrieval without an arm that
    retrieves, and results on the prompts on which an arm chooses its demonstrations.
    """
    named = {arm: method for arm in arms if (method := split_arm(arm)[0]) is not None}
    if not named:
        if config.in_context is not None:
            found = f"no arm has demonstrations in its context: found {' and '.join(arms)}"
            yield Fault("in_context", found, "few_shot:REF or icdpo:REF", "remove in_context, or name such an arm")
        return
    for key in sorted(changed(config) - {"temperature"}):
        found = f"found {str(getattr(config, key)).lower()} with the arm {next(iter(named))}, whose policy is sampled"
        yield Fault(key, found, f"no {key}, or arms without demonstrations in the context")
    settings = config.in_context or InContext()
    if settings.retrieval != "bm25" and "icdpo" not in named.values():
        found = f"found {settings.retrieval!r} without an arm icdpo:REF, which alone retrieves"
        yield Fault("in_context.retrieval", found, "no retrieval", "remove it, or name such an arm")
    chosen = settings.validation_split
    chooses = next((arm for arm, method in named.items() if method == "few_shot"), None)
    if chooses is not None and config.prompts is None and config.split in (chosen, "all"):
        found = f"split {config.split!r} has the prompts on which {chooses} chooses its demonstrations"
        fix = "set split or in_context.validation_split"
        yield Fault("in_context.validation_split", found, "another split than that of the results", fix)


def check_in_context(config: CompareConfig) -> Iterator[Fault]:
    """Yield the faults of arms and a baseline with demonstrations in the context."""
    yield from faults_in_context(config, [*([] if config.baseline is None else [config.baseline]), *config.arms])


def require_in_context(config: EvaluateConfig, model: str) -> None:
    """Check the model that is measured with this config, which the config does not name.

    Raises:
        ConfigError: the faults of `faults_in_context`.
    """
    if faults := list(faults_in_context(config, [model])):
        raise ConfigError(faults)


class PromptsConfig(CommandConfig):
    """Keys of every evaluation: prompts, a reference, and how to load models."""

    checks: ClassVar[Checks] = (check_prompts, check_fractions, check_template, check_reference)

    split: Text = option("test", "split to take the prompts from, or 'all'")
    prompts: Text | None = option(None, "source of the prompts (default: the model's own training data)", names="data")
    dataset_config: Text | None = option(None, "configuration of the prompts' source (default: its own)")
    column_mapping: dict[Text, Text] | None = COLUMN_MAPPING
    max_prompts: Count = option(256, MOST_PROMPTS)
    temperature: Positive = TEMPERATURE
    max_new_tokens: Count | None = option(
        None, "maximum response length, in tokens, EOS included (default: as trained)"
    )
    max_prompt_length: Count | None = option(None, "maximum prompt length, in tokens (default: as trained)")
    reward_model: Text | None = option(
        None, "scorer of the responses: a reward model, world or module:function (default: as trained)", names="reward"
    )
    reward_tokenization: Tokenization = TOKENIZATION
    reference: Text | None = option(
        None, "reference model of the KL (default: the training's reference, else the SFT model)", names="policy"
    )
    split_fractions: dict[str, float] = SPLIT_FRACTIONS
    skip_bad_rows: bool = SKIP_BAD_ROWS
    per_device_eval_batch_size: Count = option(256, "responses per batch on one device; halved if memory runs out")
    dtype: Dtype = DTYPE
    attn_implementation: Text | None = ATTENTION
    trust_remote_code: bool = REMOTE_CODE
    chat_template: Text | None = CHAT_TEMPLATE
    chat_template_path: Text | None = CHAT_TEMPLATE_PATH
    chat_template_kwargs: dict[str, Any] | None = CHAT_TEMPLATE_KWARGS
    eos_token: Text | None = EOS_TOKEN
    stop_token: StopToken = STOP_TOKEN
    use_cpu: bool = USE_CPU
    num_threads: Count | None = NUM_THREADS

    @property
    def decoding(self) -> Decoding:
        """How responses are made from a policy."""
        keys = Decoding.model_fields.keys() & type(self).model_fields.keys()
        return Decoding(**{key: getattr(self, key) for key in Decoding.model_fields if key in keys})


class EvaluateConfig(Decoding, PromptsConfig):
    """Config of `rlhf evaluate`."""

    stage: ClassVar[str] = "evaluate"
    checks: ClassVar[Checks] = (*PromptsConfig.checks, check_decoding)

    samples: Count = option(4, SAMPLES)
    seed: Seed = option(0, "random seed for sampling")
    best_of: Counts = option((), "report best of n for these n, for example 1,4,16 (default: none)")
    in_context: InContext | None = option(
        None,
        "demonstrations in the context of arms few_shot:REF and icdpo:REF (default: the defaults of its keys)",
        names="data",
    )
    judge: Text | None = option(
        None, "held-out reward model, trained on pairs that none of the compared models were trained on", names="reward"
    )
    true_reward: Text | None = option(
        None,
        "source of the labels, if known: module:function or a model (default: world for its own data)",
        names="reward",
    )

    @model_validator(mode="after")
    def _one_response_without_chance(self) -> EvaluateConfig:
        if not self.do_sample and "samples" not in self.model_fields_set:
            object.__setattr__(self, "samples", 1)
        return self


class GenerateConfig(EvaluateConfig):
    """Config of `rlhf generate`: a few responses for reading, not for measuring."""

    stage: ClassVar[str] = "generate"

    max_prompts: Count = option(8, MOST_PROMPTS)
    samples: Count = option(1, SAMPLES)


class CompareConfig(EvaluateConfig):
    """Config of `rlhf compare`."""

    stage: ClassVar[str] = "compare"
    checks: ClassVar = (*EvaluateConfig.checks, check_arms, check_in_context, check_validation, check_llm_judge)

    name: Name = option("compare", "name of the report")
    arms: Texts = option(
        ...,
        "models to compare: registry names, directories or hub ids; few_shot:REF and icdpo:REF answer with "
        "demonstrations in the context",
        names="arm",
        min_length=1,
        examples=[["a", "b"]],
    )
    baseline: Text | None = option(None, "model that the arms are compared with (default: the first arm)", names="arm")
    llm_judge: LlmJudge | None = option(
        None, "language model that compares the responses; its agreement with held-out labels is measured too"
    )
    human: Name | None = option(
        None,
        "labelling project of the home whose labelers compared responses of these models: their verdicts stand beside "
        "the judge's, with their agreement",
    )
    validation_split: Text | None = option("validation", "split whose prompts select settings and snapshots")
    allow_mismatch: bool = option(
        False, "compare arms that differ in more than their training; the report lists the differences"
    )
    allow_other_data: bool = option(
        False,
        "compare arms on different preference data and prompts if all else is equal (rounds of an experiment: on)",
    )
    allow_other_optimum: bool = option(
        False,
        "compare arms that aim at different optima (loss_type, ...) if all else is equal: as trained and at matched KL",
    )
    primary_contrast: Literal["auto", "as_trained", "matched_kl", "selected"] = option(
        "auto", "contrast declared in advance; auto: matched_kl in a sweep, else as_trained"
    )
    snapshots: bool = option(
        False, "add the snapshots of every arm's runs (snapshot_steps) to its curve; each snapshot is sampled as well"
    )
    shown_prompts: Count = option(4, "number of prompts whose responses the report shows side by side")
    exact: bool = option(True, "add exact figures if all responses can be listed, as in the built-in world")
    reward_model_prompts: Count = option(4, REWARD_MODEL_PROMPTS)


class ExactConfig(PromptsConfig):
    """Config of `rlhf exact`."""

    stage: ClassVar[str] = "exact"

    beta: Positive | None = option(None, "penalty per nat of KL in the objective (default: each model's own)")
    reward: Text = option("world", "reward of the objective: world, the true reward, or a reward model", names="reward")
    reward_model_prompts: Count = option(4, REWARD_MODEL_PROMPTS)
    reward_model: Text | None = option(
        None, "reward model whose optimum DPO is compared with (default: PPO's reward model)", names="reward"
    )
    training_loss: bool = option(True, "add the excess training loss of DPO models")
    long_run: Text | None = option(
        None,
        "DPO model whose training loss counts as the minimum (default: the lowest of the given models)",
        names="policy",
    )
