"""The modules for training and scoring: policy, reward model, actor-critic.

Every forward goes through `__call__`, so that a wrapped module (DDP, FSDP) sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from rlhf_pipeline.data.batch import PackedBatch, common_layout
from rlhf_pipeline.models.adapters import trunk_on_same_weights, whole_trunk
from rlhf_pipeline.models.forward import Reader, completion_logprobs, hidden_states, trunk_of
from rlhf_pipeline.models.last_layer import skip_unread, skipping_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ValueInit = Literal["reward_model", "sft", "shared"]


@dataclass(frozen=True)
class TokenScores:
    """logprobs: (N,) in nats; entropy: (N,) in nats, detached unless trained, or None; values: (N,) or None."""

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None = None


class Policy(nn.Module):
    """A causal language model that scores packed batches; logits are always divided by `temperature`.

    entropy: whether to compute the entropy of each distribution. Outputs that are no token of its tokenizer have no
    probability; `adopt_tokenizer` counts the tokens.
    """

    def __init__(self, model: PreTrainedModel, reader: Reader, temperature: float = 1.0, *, entropy: bool = True):
        super().__init__()
        self.model, self.temperature, self.entropy = model, temperature, entropy
        self.reader = replace(reader, tokens=getattr(model, "token_count", None))

    @property
    def language_model(self) -> PreTrainedModel:
        return self.model

    def forward(self, batch: PackedBatch | None = None, **decode) -> TokenScores:
        """Score a packed batch; without one, pass `decode` (ids, mask, cache) to the model for generation."""
        if batch is None:
            return self.model(**decode)
        logprobs, entropy, _ = completion_logprobs(
            self.model, self.reader, batch, self.temperature, entropy=self.entropy
        )
        return TokenScores(logprobs, entropy)


def sequence_head(model: PreTrainedModel) -> nn.Linear:
    """The scalar head of a sequence classifier."""
    return cast(nn.Linear, model.score if hasattr(model, "score") else model.classifier)


class RewardModel(nn.Module):
    """A sequence classifier with one label, read at each completion's last token.

    score = head(hidden at the last token) - reward_shift. With pooling "mean" the hidden states of all completion
    tokens are first averaged. `reward_shift` and `score_pooling` come from the config of the model. A model without
    them is not ours: it is read where transformers reads it, at the last token that is not its PAD.
    """

    def __init__(self, model: PreTrainedModel, reader: Reader):
        super().__init__()
        self.model, self.reader = model, reader

    @property
    def reward_shift(self) -> float:
        return float(getattr(self.model.config, "reward_shift", 0.0) or 0.0)

    @property
    def pooling(self) -> str:
        return getattr(self.model.config, "score_pooling", None) or "not_pad"

    def forward(self, batch: PackedBatch) -> Tensor:
        """Scores (C,) in at least fp32."""
        if self.pooling == "mean":
            tokens = hidden_states(trunk_of(self.model), batch, batch.token_index)
            total = tokens.new_zeros(batch.num_completions, tokens.shape[1])
            picked = total.index_add(0, batch.completion_index, tokens) / batch.lengths[:, None].to(tokens.dtype)
        else:
            picked = hidden_states(trunk_of(self.model), batch, self.last_index(batch))
        return self.read(picked)

    def last_index(self, batch: PackedBatch) -> Tensor:
        """Flat positions (C,) where the scores of completions are read, with a pooling other than "mean"."""
        if self.pooling == "last":
            return batch.last_index
        pad, index = self.model.config.get_text_config().pad_token_id, batch.last_index
        if pad is None:
            return index
        ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
        starts, before = (flat[batch.offset == 0] for flat in (batch.token_index, batch.predict_index))
        while bool((skipped := (ids[index] == pad) & (positions[index] > 0)).any()):
            index = torch.where(skipped, torch.where(index == starts, before, index - 1), index)
        return index

    def read(self, hidden: Tensor) -> Tensor:
        """Scores of (pooled) hidden states: head(hidden) - reward_shift, in at least fp32."""
        scores = sequence_head(self.model)(hidden).squeeze(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32)) - self.reward_shift


class ActorCritic(nn.Module):
    """Actor and critic in one module: FSDP and DeepSpeed accept one trainable module.

    The critic is a value head on its own trunk, or (`shared`) on the actor's. values[n] is read at the position that
    predicts token n, so it is V of the prefix before that token. Without a value head there is no critic and no value.
    """

    def __init__(
        self,
        actor: PreTrainedModel,
        reader: Reader,
        critic: PreTrainedModel | None,
        value_head: nn.Linear | None,
        temperature: float,
    ):
        super().__init__()
        self.actor, self.reader, self.critic, self.value_head = actor, reader, critic, value_head
        self.temperature = temperature
        self.actor_frozen, self.trains_entropy = False, False

    @property
    def language_model(self) -> PreTrainedModel:
        return self.actor

    def forward(self, batch: PackedBatch | None = None, *, pretraining: bool = False, **decode) -> TokenScores:
        """Score a packed batch; without one, pass `decode` to the actor for generation.

        With `pretraining` the actor alone reads the batch, at temperature 1, as SFT does.
        """
        if batch is None:
            return self.actor(**decode)
        if pretraining:
            return TokenScores(completion_logprobs(self.actor, self.reader, batch, entropy=False)[0], None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.actor_frozen):
            options = {"train_entropy": self.trains_entropy}
            logprobs, entropy, hidden = completion_logprobs(self.actor, self.reader, batch, self.temperature, **options)
            if self.value_head is None:
                return TokenScores(logprobs, entropy)
            if self.critic is None and hidden is None:
                hidden = hidden_states(trunk_of(self.actor), batch, batch.predict_index)
        if self.critic is not None:
            hidden = hidden_states(self.critic, batch, batch.predict_index)
        values = self.value_head(hidden).squeeze(-1)
        return TokenScores(logprobs, entropy, values.to(logprobs.dtype))


def make_actor_critic(
    actor: PreTrainedModel,
    reader: Reader,
    value_init: ValueInit | None,
    *,
    reward_model: RewardModel | None = None,
    start: PreTrainedModel | None = None,
    adapt: Callable[[PreTrainedModel], None] | None = None,
    temperature: float = 1.0,
) -> ActorCritic:
    """Combine the actor with a critic.

    * reward_model: a separate trunk, copied from the reward model; the value head is the reward head with bias
      -reward_shift, so at the last response token it gives the reward model's score.
    * sft: a separate trunk, copied from the actor before training; the head starts at 0.
    * shared: a head on the actor's trunk; it starts at 0, so all values are 0 at step 0.
    * None: no critic.

    Args:
        start: the actor without the adapter that is trained, if it has one.
        adapt: puts an adapter into the critic's trunk, which then shares its frozen weights instead of copying them.
    """

    def copied(source: PreTrainedModel) -> PreTrainedModel:
        trunk = trunk_of(source)
        if adapt is None:
            return whole_trunk(source)
        critic = trunk_on_same_weights(source)
        adapt(critic)
        if skipping_modules(trunk):
            skip_unread(critic)
        return critic

    if value_init is None:
        return ActorCritic(actor, reader, None, None, temperature)
    critic: PreTrainedModel | None
    if value_init == "reward_model":
        if reward_model is None:
            raise ValueError("value_init 'reward_model' needs a reward model")
        source = reward_model.model
        critic = copied(source)
        reader = replace(reader, layout=common_layout(reader.layout, reward_model.reader.layout))  # both read one batch
        weight, bias = sequence_head(source).weight.detach().clone(), -reward_model.reward_shift
    else:
        critic = copied(actor if start is None else start) if value_init == "sft" else None
        parameter = next(actor.parameters())
        width = actor.get_output_embeddings().weight.shape[1]
        weight, bias = torch.zeros(1, width, dtype=parameter.dtype, device=parameter.device), 0.0
    value_head = nn.Linear(weight.shape[1], 1).to(weight.device, weight.dtype)
    with torch.no_grad():
        value_head.weight.copy_(weight)
        value_head.bias.fill_(bias)
    return ActorCritic(actor, reader, critic, value_head, temperature)


def describe_critic(value_init: ValueInit | None, reward_model: str | None) -> str:
    """One line for the log: the kind of critic and its initialisation."""
    return {
        None: "no critic: the baseline of a response is the mean return of responses to its prompt",
        "reward_model": f"critic: a separate trunk, initialised from the reward model {reward_model}",
        "sft": "critic: a separate trunk, initialised from the SFT model; the value head starts at 0",
        "shared": "critic: a value head on the actor's trunk; it starts at 0",
    }[value_init]


def assert_independent(policy: nn.Module, frozen: nn.Module) -> None:
    """Check that a frozen model is independent of the model in training.

    Raises:
        RuntimeError: they share memory that is trained, or a module of `frozen` has a patched `forward` (some libraries
            replace `forward` in place; a deep copy of such a model computes with the original's weights, held in a
            closure). Frozen weights below adapters may be shared: no optimizer step changes them.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.numel() and parameter.requires_grad]
    mine = {parameter.untyped_storage().data_ptr() for parameter in trained}
    named = frozen.named_parameters()
    if shared := [name for name, parameter in named if parameter.untyped_storage().data_ptr() in mine]:
        raise RuntimeError(f"the frozen model shares memory with the policy: {', '.join(shared[:3])}")
    for name, module in frozen.named_modules():
        if "forward" in vars(module):
            raise RuntimeError(f"the frozen model's {name or 'top module'} has a patched forward")
