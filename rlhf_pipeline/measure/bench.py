"""Set up an evaluation: its models, prompts, reference and reward sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict, TypeVar

import torch

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.config.base import part_of, renames
from rlhf_pipeline.config.compare import PromptsConfig
from rlhf_pipeline.config.in_context import split_arm
from rlhf_pipeline.config.lengths import DEFAULT_MAX_LENGTH, Lengths, resolve_lengths
from rlhf_pipeline.config.reward_names import WORLD_NAMES
from rlhf_pipeline.data import world
from rlhf_pipeline.data.load import RecordSet, examples_of, read_records
from rlhf_pipeline.data.samples import lowest_examples
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.data.tokenize import Example, prompts_of_texts
from rlhf_pipeline.data.tokenizers import same_but_for_pad, stop_ids
from rlhf_pipeline.errors import ConfigError, Fault, MismatchError
from rlhf_pipeline.evaluation.sampled import Samples, SamplingPlan, add_score, add_world_reward
from rlhf_pipeline.measure.trained_on import changes_of, note_changes, owned_by
from rlhf_pipeline.models.memory import MEASURING_ADVICE, Memory
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.registry.lengths import limit_of, positions_of
from rlhf_pipeline.registry.lineage import COLLECTED
from rlhf_pipeline.registry.parents import reward_model_keys
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.results import DataChange, DataReport
from rlhf_pipeline.rollout.rewards import RewardSource
from rlhf_pipeline.stages.common import find_model, load_policy, tokenizer_of
from rlhf_pipeline.stages.reward_sources import load_reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


C = TypeVar("C", bound=PromptsConfig)

REWARD_KEYS = ("true_reward", "reward_model", "judge", "reward")
"""Keys of evaluation configs that name a reward."""


class Reading(TypedDict):
    """How a model evaluates responses: the options of `completion_logprob_sums` and `score_examples`."""

    responses_at_once: int
    memory: Memory
    device: torch.device


@dataclass
class Bench:
    """What policies are evaluated with: prompts, reference, reward sources and settings."""

    registry: Registry
    config: PromptsConfig
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    plan: SamplingPlan
    knows_truth: bool  # the world's reward, which can be computed for every response
    reference: Resolved | None
    scorer: RewardSource | None  # the training reward model, or the one in the config
    judge: RewardSource | None  # a reward model trained on pairs that none of the compared models were trained on
    truth: RewardSource | None  # the reward source that labelled the data, outside the built-in world
    say: Callable[[str], None]
    _reference: Policy | None = None
    data: list[DataReport] = field(default_factory=list)
    data_changed: list[DataChange] = field(default_factory=list)  # since models were trained on them

    def compare_data(self, resolved: Resolved, sources: Sequence[RecordSet]) -> None:
        """Report once what has changed in a model's data since it was trained, and keep it for the results."""
        for change in note_changes(self.data_changed, changes_of(resolved, sources)):
            self.say(f"note: {change.text}")

    @property
    def reading(self) -> Reading:
        """The `Reading` of this bench."""
        at_once, memory = self.plan.responses_at_once, self.plan.memory
        return Reading(responses_at_once=at_once, memory=memory, device=self.device)

    def policy(
        self, resolved: Resolved, temperature: float | None = None, *, four_bits: FourBits | None = None
    ) -> Policy:
        """Load a policy, after checking that it has the same tokenizer as the others, except for PAD.

        Args:
            temperature: divides its logits; None uses the sampling temperature.
            four_bits: how its weights are held, if it has none of its own; see `load_adapted`.

        Raises:
            MismatchError: its tokenizer is different.
            ConfigError: it has too few positions.
        """
        theirs = tokenizer_of(resolved, self.config.trust_remote_code, self.config)
        if not same_but_for_pad(theirs, self.tokenizer):
            raise MismatchError(
                f"{resolved.label}: found another tokenizer than that of the first model; expected models that read "
                "the same token ids; compare only models of one family"
            )
        longest = max((len(prompt.prompt_ids) for prompt in self.plan.prompts), default=0)
        response = self.plan.response_length
        require_room(self.config, resolved, Lengths(longest, response, longest + response))
        return load_policy(
            resolved,
            self.config,
            self.tokenizer,
            self.device,
            frozen=True,
            temperature=self.config.temperature if temperature is None else temperature,
            **({} if four_bits is None else {"four_bits": four_bits}),
        )

    @property
    def truth_label(self) -> str | None:
        """The source of `true_reward`; None if the true reward is not known."""
        return self.truth.label if self.truth is not None else "world" if self.knows_truth else None

    def reference_policy(self) -> Policy | None:
        """The reference, loaded once."""
        if self._reference is None and self.reference is not None:
            self._reference = self.policy(self.reference)
        return self._reference


def knows_data(resolved: Resolved) -> bool:
    """Whether a model's config says what it was trained on."""
    return resolved.config.get("dataset_name") is not None


def _lengths(config: PromptsConfig, resolved: Resolved) -> Lengths:
    """Prompt and response lengths: those of the config, else of training, else what the model's positions allow.

    Raises:
        ConfigError: the lengths need more positions than the model has.
    """
    positions = positions_of(resolved)
    named = [resolved.config.get(key) for key in ("max_prompt_length", "response_length", "max_length")]
    if positions is not None and not any(named):
        named[2] = min(positions, DEFAULT_MAX_LENGTH)
    trained = resolve_lengths(*named, samples=True)
    response = config.max_new_tokens or trained.response
    prompt = config.max_prompt_length or trained.prompt
    lengths = Lengths(prompt, response, prompt + response)
    require_room(config, resolved, lengths)
    return lengths


def require_room(config: PromptsConfig, resolved: Resolved, lengths: Lengths) -> None:
    """Check that a model has enough positions for a prompt and a response.

    Raises:
        ConfigError: it has too few.
    """
    positions, limit = limit_of(resolved)
    if positions is not None and lengths.total > positions:
        raise ConfigError(
            Fault(
                "--max-new-tokens" if config.max_new_tokens else "max_prompt_length",
                f"a prompt of up to {lengths.prompt} and a response of up to {lengths.response} tokens",
                f"together at most {positions}, {limit} {resolved.label}",
            )
        )


def load_prompts(
    registry: Registry, config: PromptsConfig, resolved: Resolved, tokenizer: PreTrainedTokenizerBase, lengths: Lengths
) -> tuple[list[Example], list[DataReport], RecordSet | None]:
    """The prompts of an evaluation: those of the config, else the chosen split of the model's own data.

    Returns:
        The prompts, a report for each source, and the records that they come from if they are the model's own.

    Raises:
        ConfigError: no prompts are named and the data of the model are not known.
        UnknownReference, DataError: the source is missing or cannot be used.
    """
    source = config.prompts or resolved.config.get("dataset_name")
    if source is None:
        where = f"prompts of {resolved.label}"
        raise ConfigError(Fault(where, "not known", "a source of prompts", "give --prompts SOURCE"))
    part = part_of(source, config.dataset_config, "prompt")
    if part is None and config.prompts is None:
        part = resolved.config.get("dataset_config")
    columns, test = renames(config.column_mapping), None
    if config.prompts is None:
        columns = columns or renames(resolved.config.get("column_mapping"))
        test = resolved.config.get("dataset_test_name")
    fractions = config.split_fractions if config.prompts else resolved.config.get("split_fractions")
    skip = config.skip_bad_rows or bool(not config.prompts and resolved.config.get("skip_bad_rows"))
    own = config.prompts is None and part == part_of(source, resolved.config.get("dataset_config"), "prompt")
    with owned_by(resolved, {"dataset_name": source}) if config.prompts is None else nullcontext():
        found = read_records(
            source, part, None, columns, test, home=registry.home, skip_bad_rows=skip, splits={config.split}
        )
    examples, report = examples_of(
        found,
        kind="prompt",
        split=config.split,
        tokenizer=tokenizer,
        lengths=lengths,
        skip_bad_rows=skip,
        fractions=fractions or config.split_fractions,
        style=Style.of(resolved.config),
    )
    chosen = list(lowest_examples(examples, config.max_prompts))
    return chosen, [DataReport(**report.to_dict())], found if own else None


def labelled_by_world(
    registry: Registry, config: PromptsConfig, resolved: Resolved, say: Callable[[str], None]
) -> bool:
    """Whether the world's reward is the true reward of a model with the world's tokenizer; logs the reason.

    It is if a key of the config names the world, if the prompts are the world's, or if the world labelled the collected
    data. The tokenizer alone decides nothing: the model may have been trained on other data.

    Raises:
        UnknownReference, DamagedFile: collected data are missing or damaged.
    """
    source = config.prompts or resolved.config.get("dataset_name")
    asked = [key for key in REWARD_KEYS if key in config.model_fields_set and getattr(config, key) in WORLD_NAMES]
    if asked:
        say(f"true reward: the built-in world's, since {asked[0]} names it")
    elif source == world.NAME:
        say(f"true reward: the built-in world's, since the prompts are those of {source}")
    elif source is not None and _judged_by_world(registry, source):
        say(f"true reward: the built-in world's, since it labelled {source}")
    else:
        say(
            f"note: {resolved.label} has the tokenizer of {world.NAME}, but nothing shows that the world labelled "
            f"{source or 'its data'}: the world's reward is not used; to use it, set true_reward: world "
            "(--true-reward world; rlhf exact: --reward world)"
        )
        return False
    return True


def _judged_by_world(registry: Registry, source: str) -> bool:
    """Whether a source is collected data that the world labelled."""
    if not source.startswith(COLLECTED):
        return False
    manifest = registry.resolve_data(source.removeprefix(COLLECTED)).manifest
    return manifest is not None and manifest.config.get("judge") in WORLD_NAMES


def set_up(
    registry: Registry,
    config: PromptsConfig,
    first: Resolved,
    device: torch.device,
    *,
    reference: Resolved | None,
    samples: int,
    seed: int,
    say: Callable[[str], None],
    memory: Memory | None = None,
    texts: Sequence[str] = (),
    raw: bool = True,
    models: Sequence[Resolved] = (),
) -> Bench:
    """Prepare the evaluation of `first` and of models like it, on typed `texts` or on a split's prompts.

    raw: see `prompts_of_texts`.
    models: those that are compared. A response of any of them ends at the stop ids of any of them.
    """
    tokenizer, *others = (
        tokenizer_of(model, config.trust_remote_code, config)
        for model in (first, *(model for model in models if model.label != first.label))
    )
    stops = [stop_ids(one) for one in (tokenizer, *others)]
    lengths = _lengths(config, first)
    data: list[DataReport] = []
    own: RecordSet | None = None
    if texts:
        prompts = prompts_of_texts(texts, tokenizer, lengths, raw=raw)
    else:
        prompts, data, own = load_prompts(registry, config, first, tokenizer, lengths)
    plan = SamplingPlan(
        prompts=prompts,
        samples=samples,
        response_length=lengths.response,
        decoding=config.decoding,
        seed=seed,
        stop_ids=tuple(dict.fromkeys(stop for own in stops for stop in own)),
        responses_at_once=config.per_device_eval_batch_size,
        memory=memory or Memory(say, advice=MEASURING_ADVICE),
        device=device,
    )
    drawn = f", {samples} samples each, seed {seed}" if samples else ""
    say(f"{len(prompts)} prompts of the split {config.split!r}{drawn}")
    if models and len({frozenset(own) for own in stops}) > 1:
        named = " or ".join(map(str, tokenizer.convert_ids_to_tokens(list(plan.stop_ids))))
        say(f"note: the models end their responses with different tokens; here a response of any model ends at {named}")
    in_world = world.is_world_tokenizer(tokenizer)

    def source(text: str | None) -> RewardSource | None:
        if text is None or (in_world and text in WORLD_NAMES):
            return None  # the world's reward has its own figure
        loaded = load_reward(registry, text, config, first, tokenizer, device, say=say)
        if loaded.model is not None and loaded.resolved is not None:  # one that reads text has its own limit
            require_room(config, loaded.resolved, lengths)
        return loaded.scorer

    scorer, judge, truth = (source(getattr(config, key, None)) for key in ("reward_model", "judge", "true_reward"))
    known = truth is None and in_world and labelled_by_world(registry, config, first, say)
    bench = Bench(registry, config, device, tokenizer, plan, known, reference, scorer, judge, truth, say, data=data)
    if own is not None:
        bench.compare_data(first, [own])
    return bench


def scored_as_trained(config: C, registry: Registry, models: Sequence[Resolved]) -> C:
    """The config with the reward model that one of these policies was trained on, read as in its training.

    A `reward_model` or `reward_tokenization` of the config stays.

    Raises:
        MismatchError, UnknownReference: as for `parent_of`.
    """
    if config.reward_model is not None:
        return config
    found = reward_model_keys(registry, models)
    if "reward_tokenization" in config.model_fields_set:
        found.pop("reward_tokenization", None)
    return config.model_copy(update=found)


def add_rewards(bench: Bench, samples: Samples, scorer: RewardSource | None = None) -> None:
    """Add the scores of responses by the true reward, the reward model (`scorer` replaces the bench's) and the
    judge, as far as these are known."""
    if bench.knows_truth:
        add_world_reward(samples)
    sources = {"true_reward": bench.truth, "score": scorer or bench.scorer, "judge": bench.judge}
    for name, source in sources.items():
        if source is not None:
            add_score(samples, source, name, bench.plan)


def find_policies(registry: Registry, references: list[str], say: Callable[[str], None]) -> list[Resolved]:
    """Resolve policies and arms, checking role and files."""
    arms = map(split_arm, references)
    return [replace(find_model(registry, model, "policy", say=say), method=method) for method, model in arms]
