"""What a run will compute: steps, tokens, and FLOPs by the formula of the cost bill (`ModelShape`).

Counted for one process and for packed trees, the layout in which most architectures are read. The adapters of earlier
stages are not counted; they have about a hundredth of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.config.collect import CollectConfig
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.kto import KTO
from rlhf_pipeline.config.ppo import PpoConfig
from rlhf_pipeline.config.reward import RewardConfig
from rlhf_pipeline.config.sft import SftConfig
from rlhf_pipeline.config.stages import ModelConfig, StageConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.data.batch import Counted, counted
from rlhf_pipeline.data.examples import Example, all_whole
from rlhf_pipeline.registry.adapters import chain_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.rollout.responses import distinct_prompts
from rlhf_pipeline.stages.common import packed_rows
from rlhf_pipeline.stages.ppo_models import check_processes
from rlhf_pipeline.training.cost import ModelShape
from rlhf_pipeline.training.ptx import SEED
from rlhf_pipeline.training.session import is_due
from rlhf_pipeline.training.windows import epoch_order, steps_per_epoch, total_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Work:
    """Amounts of work; the sum of two is the work of both.

    tokens_trained: tokens that pass forward and backward. tokens_sampled: tokens of the responses. decoding_steps: each
    reads all weights once and adds a token to every response of its batch. weight_updates: optimizer steps x trained
    weights. training, scoring, sampling: FLOPs, as the bill counts them. prefill: the part of `sampling` that reads
    prompts. evaluation: FLOPs that the bill leaves out: held-out rows, and the judge.
    """

    optimizer_steps: int = 0
    tokens_trained: int = 0
    tokens_sampled: int = 0
    decoding_steps: int = 0
    weight_updates: int = 0
    training: float = 0.0
    scoring: float = 0.0
    sampling: float = 0.0
    prefill: float = 0.0
    evaluation: float = 0.0

    @property
    def flops(self) -> float:
        """The `flops` of the bill."""
        return self.training + self.scoring + self.sampling

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Work:
        return Work(*(mine * times for mine in astuple(self)))


@dataclass(frozen=True)
class Amounts:
    """What is known of one run before it.

    rows: examples to train on, prompts to sample from, or records to collect. rows, work: None if they are not known.
    response: the assumed tokens of a sampled response; 0 if none is sampled. notes: what was assumed or is not known.
    """

    rows: int | None
    work: Work | None
    response: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Models:
    """The shapes of a run's models.

    policy: the language model that is trained or samples, with its new adapter. reference: the same model without it.
    critic: None if the critic is a head on the actor, or if there is none. rewards, judge: the models that score.
    trained: number of weights that an optimizer step changes.
    """

    policy: ModelShape
    reference: ModelShape
    critic: ModelShape | None = None
    rewards: tuple[ModelShape, ...] = ()
    judge: ModelShape | None = None
    trained: int = 0


def transformers_config(resolved: Resolved, config: ModelConfig, tokens: int = 0) -> Any:
    """The transformers config of a model, or of the model below an adapter, with at least `tokens` outputs."""
    from transformers import AutoConfig

    whole, _ = chain_of(resolved)
    options = {"revision": whole.revision, "trust_remote_code": config.trust_remote_code}
    described: Any = AutoConfig.from_pretrained(whole.location, **options)
    text = described.get_text_config()
    text.vocab_size = max(text.vocab_size, tokens)
    return described


def shapes_of(described: Any, config: TrainingConfig | None) -> tuple[ModelShape, ModelShape, int]:
    """The shapes of a language model with and without the adapter of a config, and the number of its trained weights.

    The model has no memory. A model is counted with the shortened last layer (models/last_layer.py).

    Args:
        described: the transformers config of the model.

    Raises:
        ConfigError: the architecture has no causal language model, or no modules for the adapter.
    """
    import torch

    from rlhf_pipeline.models.adapters import add_adapter
    from rlhf_pipeline.models.forward import trunk_of
    from rlhf_pipeline.models.freezing import freeze_layers
    from rlhf_pipeline.models.last_layer import compute_all, skip_unread
    from rlhf_pipeline.models.loading import model_of_config

    with torch.device("meta"):
        model: PreTrainedModel = model_of_config(described)
        skip_unread(trunk_of(model))
        bare = ModelShape.of(model)
        compute_all(trunk_of(model))
        if config is not None and config.use_peft:
            add_adapter(model, config, "")
        if isinstance(config, PpoConfig) and config.freeze_layers:
            freeze_layers(model, config.freeze_layers)
        skip_unread(trunk_of(model))
        checkpointed = config is not None and config.gradient_checkpointing
        shape = ModelShape.of(model, checkpointed=checkpointed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if isinstance(config, RewardConfig) and config.use_peft:
        trained += described.get_text_config().hidden_size  # the score head
    return shape, bare, trained


def as_critic(shape: ModelShape) -> ModelShape:
    """A language model's shape without its output head: read at every position that predicts a token."""
    return replace(shape, head=0, frozen_head=0)


def as_scorer(shape: ModelShape, pooling: str = "last") -> ModelShape:
    """A language model's shape as that of a reward model."""
    return replace(as_critic(shape), reads="tokens" if pooling == "mean" else "last")


def with_responses(prompts: Sequence[Example], tokens: int, samples: int = 1) -> list[Example]:
    """The prompts with `samples` responses of `tokens` tokens each."""
    responses, ended = [[0] * tokens] * samples, [True] * samples
    return [replace(one, completions=responses, ended=ended, trained=None, ranks=None) for one in prompts]


def sampled_work(shape: ModelShape, examples: Sequence[Example], *, at_once: int, longest: int) -> Work:
    """The work of sampling the completions of some examples, in batches that last until the longest response.

    Args:
        at_once: responses of a batch. longest: the limit of a response; a batch is taken to reach it.
    """
    prompts = [example.prompt_ids for example in examples for _ in example.completions]
    lengths = [len(ids) for example in examples for ids in example.completions]
    run = distinct_prompts(prompts, at_once)
    return Work(
        tokens_sampled=sum(lengths),
        decoding_steps=-(-len(prompts) // at_once) * longest if prompts else 0,
        sampling=shape.decode_flops([len(prompt) for prompt in prompts], lengths, run),
        prefill=shape.decode_flops([], [], run),
    )


def of_processes(config: StageConfig, processes: int) -> StageConfig:
    """The config whose windows in one process are those of `config` in several; the estimated work is that of all.

    Raises:
        ConfigError: PPO cannot divide its minibatches between them.
    """
    if isinstance(config, PpoConfig):
        check_processes(config, processes)
    if isinstance(config, PpoConfig | CollectConfig) or processes == 1:
        return config
    steps = (config.gradient_accumulation_steps or 1) * processes
    return config.model_copy(update={"gradient_accumulation_steps": steps})


def example_work(
    config: TrainingConfig, models: Models, examples: Sequence[Example], held_out: Sequence[Example], response: int
) -> Work:
    """The work of SFT, a reward model or DPO on these examples.

    Args:
        response: tokens of a response that is sampled to centre the scores of a reward model.
    """
    if isinstance(config, SftConfig) and config.trains_all:
        examples, held_out = all_whole(examples), all_whole(held_out)
    bins = packed_rows(config, examples) or [[index] for index in range(len(examples))]
    size = config.per_device_train_batch_size * (config.gradient_accumulation_steps or 1)
    steps = total_steps(len(bins), size, config.num_train_epochs, config.max_steps)
    per_epoch = steps_per_epoch(len(bins), size)
    everything, seen = counted(examples), seen_in(steps, size, examples, bins, config.seed)
    shape = as_scorer(models.policy, config.score_pooling) if isinstance(config, RewardConfig) else models.policy
    work = Work(
        optimizer_steps=steps,
        tokens_trained=seen.active_tokens,
        weight_updates=steps * models.trained,
        training=shape.training_flops(*shape.batch_counts(seen)),
    )
    due = (is_due(config.eval_strategy, config.eval_steps, n, steps, n / per_epoch) for n in range(1, steps + 1))
    work += Work(evaluation=(1 + sum(due)) * shape.batch_flops(counted(held_out)))
    if isinstance(config, DpoConfig) and config.needs_reference:
        once = config.caches_reference and config.engine == "native"
        scored = models.reference.batch_flops(everything if once else seen)
        work += Work(scoring=scored, evaluation=models.reference.batch_flops(counted(held_out)))
        if config.loss_type == KTO:  # z0 of each step; the prompts with other responses have about the same size
            work += Work(scoring=2 * models.reference.batch_flops(seen))
    if isinstance(config, RewardConfig) and config.reward_centering == "chosen":
        work += Work(evaluation=shape.batch_flops(everything))
    if isinstance(config, RewardConfig) and config.reward_centering == "reference_samples":
        distinct = list({example.prompt_key: example for example in examples}.values())
        chosen = [distinct[n % len(distinct)] for n in range(config.reward_centering_samples)]
        drawn, most = with_responses(chosen, response), max(64, config.per_device_eval_batch_size)
        limit = config.sampled_lengths().response
        work += sampled_work(models.reference, drawn, at_once=most, longest=limit)
        work += Work(evaluation=shape.batch_flops(counted(drawn)))
    return work


def seen_in(steps: int, size: int, examples: Sequence[Example], bins: Sequence[Sequence[int]], seed: int) -> Counted:
    """The counts of `steps` windows of `size` bins; see `example_windows`."""
    whole, rest = divmod(steps, steps_per_epoch(len(bins), size))
    last = epoch_order(len(bins), seed, whole)[: rest * size] if rest else []
    return counted(examples) * whole + counted(examples[index] for unit in last for index in bins[unit])


def stream_work(config: PpoConfig, models: Models, examples: Sequence[Example]) -> Work:
    """The work of training the actor on a pretraining stream; none without examples."""
    if not examples:
        return Work()
    steps, bins = config.stream_steps(config.updates), [[index] for index in range(len(examples))]
    seen = seen_in(steps, config.stream_batch_size, examples, bins, config.seed + SEED)
    training = models.policy.training_flops(*models.policy.batch_counts(seen))
    return Work(tokens_trained=seen.active_tokens, training=training)


def ppo_work(config: PpoConfig, models: Models, prompts: Sequence[Example], response: int) -> Work:
    """The work of PPO whose responses have `response` tokens each.

    In training the responses to different prompts share nothing, those to one prompt share it as far as all of them
    are certain to be in one micro-batch.
    """
    whole, rest = divmod(config.updates * config.prompts_per_rollout, len(prompts))
    order = epoch_order(len(prompts), config.seed, whole)[:rest] if rest else []
    group, tree = config.num_generations, config.responses_per_tree()
    parts = (prompts, [prompts[index] for index in order])
    everything, last = (with_responses(part, response, group) for part in parts)
    seen, rest_seen = (counted(with_responses(part, response, tree)) * (group // tree) for part in parts)
    seen = seen * whole + rest_seen
    shapes = [models.policy, models.reference, *models.rewards, *filter(None, [models.critic])]
    warm = min(config.critic_warmup_steps or 0, config.updates) / config.updates  # the actor only runs forward
    actor = (1 - warm) * models.policy.training_flops(*models.policy.batch_counts(seen))
    actor += warm * models.policy.batch_flops(seen)
    critic = 0.0 if models.critic is None else models.critic.training_flops(*models.critic.batch_counts(seen))
    steps = config.updates * config.num_ppo_epochs * config.num_mini_batches
    one = {"at_once": config.rollout_batch_size, "longest": config.lengths().response}
    drawn = sampled_work(models.policy, everything, **one) * whole + sampled_work(models.policy, last, **one)
    judged = 0.0 if models.judge is None else models.judge.batch_flops(seen) / config.logging_steps
    return replace(drawn, decoding_steps=config.updates * config.lengths().response) + Work(
        optimizer_steps=steps,
        tokens_trained=seen.active_tokens * config.num_ppo_epochs,
        weight_updates=steps * models.trained * (1 if models.critic is None else 2),
        training=(actor + critic) * config.num_ppo_epochs,
        scoring=sum(shape.batch_flops(seen) for shape in shapes),
        evaluation=judged,
    )


def collect_work(config: CollectConfig, models: Models, examples: Sequence[Example]) -> Work:
    """The work of sampling and labelling the responses of these examples."""
    drawn = sampled_work(
        models.reference, examples, at_once=config.per_device_eval_batch_size, longest=config.lengths().response
    )
    return drawn + Work(evaluation=sum(shape.batch_flops(counted(examples)) for shape in models.rewards))


def compare_work(
    config: CompareConfig, models: Models, prompts: Sequence[Example], *, count: int, response: int, longest: int
) -> Work:
    """The work of a comparison of `count` models: samples, their scores, and their KL to the reference."""
    drawn = with_responses(prompts, response, config.samples)
    one = sampled_work(models.reference, drawn, at_once=config.per_device_eval_batch_size, longest=longest)
    scored = 2 * models.reference.batch_flops(counted(drawn))
    scored += sum(shape.batch_flops(counted(drawn)) for shape in (*models.rewards, *filter(None, [models.judge])))
    work = (one + Work(evaluation=scored)) * count
    if not config.decoding.is_plain:  # the decoder's responses are made and scored beside samples of the policy
        judged = scored - 2 * models.reference.batch_flops(counted(drawn))
        work += (one * config.decoding.num_beams + Work(evaluation=judged)) * count
    further = max(0, max(config.best_of, default=0) - config.samples)  # the baseline alone
    if further:
        more = with_responses(prompts, response, further)
        work += sampled_work(models.reference, more, at_once=config.per_device_eval_batch_size, longest=longest)
    return work
