"""What the runs of an experiment will read before their inputs exist: models, rows, prompts, and the work on them.

Architecture and tokenizer of a stage's model are those of the model at the root of its chain; the rows of a `collect`
stage are its prompts, with responses of the assumed length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_pipeline.config.grid import Node
from rlhf_pipeline.config.lengths import LENGTHS
from rlhf_pipeline.config.mentions import set_value
from rlhf_pipeline.config.reward import RewardConfig
from rlhf_pipeline.config.reward_names import names_a_model
from rlhf_pipeline.config.stages import CollectConfig, DpoConfig, ModelConfig, PpoConfig, SftConfig, StageConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.config.yaml import KeyPath
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.data.tokenizers import token_count
from rlhf_pipeline.errors import DataError
from rlhf_pipeline.experiment.done import output_of
from rlhf_pipeline.experiment.mixtures import as_rows, prompts_to_sample, rows_that_exist, rows_to_come
from rlhf_pipeline.experiment.read_keys import ADAPTED, READ, TOKENS, UNREAD
from rlhf_pipeline.experiment.work import (
    Amounts,
    Models,
    as_critic,
    as_scorer,
    collect_work,
    example_work,
    ppo_work,
    shapes_of,
    stream_work,
    transformers_config,
    with_responses,
)
from rlhf_pipeline.registry.lengths import with_lengths
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.stages.common import tokenizer_of
from rlhf_pipeline.stages.data import StageData, preference_kind, stream_data, training_kind, trains_all_replies
from rlhf_pipeline.training.cost import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

MODEL_KEYS: tuple[KeyPath, ...] = (("model_name_or_path",), ("policy",))
DATA_KEYS: tuple[KeyPath, ...] = (("dataset_name",), ("prompts",))


class Outlook:
    """The inputs of the runs of an experiment, as far as they can be known before it.

    Args:
        nodes: its runs. done: the version that each has already made; None if there is none yet.
        say: writes a line about the rows of a training split.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        done: Sequence[Resolved | None],
        registry: Registry,
        say: Callable[[str], None] = lambda _: None,
    ):
        self.nodes, self.registry, self.say = nodes, registry, say
        self._made = {n: output_of(nodes[n], found.label) for n, found in enumerate(done) if found is not None}
        self._known: dict[Any, Any] = {}

    def _once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` returns; it is called once for each key."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def place(self, node: Node, keys: Sequence[KeyPath]) -> int | None:
        """The number of the unfinished run that one of these keys names; None if what it names exists."""
        place = self._linked(node, keys)
        return None if place in self._made else place

    def _linked(self, node: Node, keys: Sequence[KeyPath]) -> int | None:
        """The number of the run that one of these keys names."""
        return next((node.inputs[node.spec.links[key]] for key in keys if key in node.spec.links), None)

    def unmade(self, node: Node, key: str = "datasets") -> dict[int, int]:
        """The numbers of the unfinished runs whose data a run reads, by the number of the source; most have one.

        key: ptx_dataset for the sources of its pretraining stream.
        """
        found = {
            path[1] if path[0] == key else 0: node.inputs[name]
            for path, name in node.spec.links.items()
            if path[0] == key or (key == "datasets" and path in DATA_KEYS)
        }
        return {int(number): place for number, place in found.items() if place not in self._made}

    def config(self, node: Node) -> StageConfig:
        """The config with the outputs of finished runs, and lengths that it inherits; names of unfinished ones stay."""
        return self._once(("config", node.label), lambda: self._config(node))

    def _config(self, node: Node) -> StageConfig:
        spec = node.spec
        values = spec.config.model_dump()
        for path, name in spec.links.items():
            if (output := self._made.get(node.inputs[name])) is not None:
                set_value(values, path, output)
        config = type(spec.config).model_validate(values)
        above = self.place(node, MODEL_KEYS)
        if above is None:
            return with_lengths(config, self.registry)[0]
        if any(getattr(config, key) is not None for key in LENGTHS):
            return config
        theirs = self.config(self.nodes[above])
        return config.model_copy(update={key: getattr(theirs, key) for key in LENGTHS})

    def root(self, node: Node) -> tuple[Node, Resolved | None]:
        """The first run of a chain of models that has not finished, and the model that it starts from, if any."""
        above = self.place(node, MODEL_KEYS)
        if above is not None:
            return self.root(self.nodes[above])
        start = next(iter(self.config(node).parents().values()), None)
        return node, None if start is None else self.registry.resolve(start.reference, revision=start.revision)

    def tokenizer(self, node: Node) -> PreTrainedTokenizerBase:
        """The tokenizer of a run."""
        (first, start), config = self.root(node), self.config(node)
        if start is None:
            described = self.config(first)
            assert isinstance(described, SftConfig) and described.tokenizer_init is not None  # `check_start`
            made = self._data(first, described)
            return self._once(("tokenizer", first.label), partial(made.new_tokenizer, described.tokenizer_init))
        key = ("tokenizer", start.label, json.dumps(config.model_dump(mode="json", include=TOKENS), sort_keys=True))
        return self._once(key, lambda: tokenizer_of(start, config.trust_remote_code, config))

    def _data(self, node: Node, config: TrainingConfig) -> StageData:
        """The sources of a run that exist."""
        return self._once(("data", node.label), lambda: StageData(config, self.registry.home, self.say))

    def described(self, node: Node) -> Any:
        """The transformers config of a run's model."""
        tokenizer = self.tokenizer(node)
        return self._once(("described", id(tokenizer), node.name), lambda: self._described(node, tokenizer))

    def _described(self, node: Node, tokenizer: PreTrainedTokenizerBase) -> Any:
        (first, start), tokens = self.root(node), token_count(tokenizer)
        if start is not None:
            return transformers_config(start, self.config(node), tokens)
        from rlhf_pipeline.models.loading import new_config

        config = self.config(first)
        assert isinstance(config, SftConfig) and config.model_init is not None
        return new_config(config.model_init, dropout=config.dropout, vocab_size=tokens)

    def training(self, node: Node) -> Sequence[Example]:
        """The examples of the training split; prompts alone if the stage samples the rest."""
        config = self.config(node)
        assert isinstance(config, TrainingConfig)
        kind, split = training_kind(config), config.dataset_train_split
        return self._split(node, config, kind, split, config.max_train_samples, say=self.say)

    def stream(self, node: Node) -> Sequence[Example]:
        """The examples of a run's pretraining stream, also of sources to come; none without one."""
        config = self.config(node)
        found = config.stream() if isinstance(config, PpoConfig) else None
        if found is None or not isinstance(config, PpoConfig):
            return []
        key, kind, split = "ptx_dataset", "demonstration", found.dataset_train_split
        unmade, tokenizer = self.unmade(node, key), self.tokenizer(node)

        def rows() -> Sequence[Example]:
            if unmade:
                return rows_to_come(found, split, kind, None, partial(self._source, node, found, kind, key=key))
            return stream_data(config, self.registry.home, self.say, tokenizer)[0]

        read = json.dumps(found.model_dump(mode="json", include=READ), sort_keys=True)
        return self._once((key, read, *unmade.items(), id(tokenizer)), rows)

    def held_out(self, node: Node) -> Sequence[Example]:
        """The examples that the run is evaluated on; none for a stage that evaluates on none."""
        config = self.config(node)
        assert isinstance(config, TrainingConfig)
        if isinstance(config, PpoConfig):
            return []
        kind = "demonstration" if isinstance(config, SftConfig) else preference_kind(config)
        return self._split(node, config, kind, config.dataset_test_split, config.max_eval_samples, required=False)

    def _split(
        self,
        node: Node,
        config: TrainingConfig,
        kind: str,
        split: str,
        limit: int | None,
        *,
        required: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> Sequence[Example]:
        """Some rows of a split, read as the run reads them, or those that an unfinished `collect` run will make."""
        unmade = self.unmade(node)
        root, start = self.root(node)
        read = json.dumps(config.model_dump(mode="json", include=READ), sort_keys=True)
        key = ("rows", *unmade.items(), kind, split, limit, read, root.label if start is None else start.label)

        def rows() -> Sequence[Example]:
            if unmade:
                return rows_to_come(config, split, kind, limit, partial(self._source, node, config, kind))
            data, tokenizer = self._data(node, config), self.tokenizer(node)
            data.say = say
            every = trains_all_replies(config)
            return data.split(kind, split, tokenizer, limit=limit, required=required, all_replies=every)[0]

        return self._once(key, rows)

    def _source(
        self, node: Node, config: TrainingConfig, kind: str, number: int, split: str, key: str = "datasets"
    ) -> Sequence[Example]:
        """The rows of one source of a run, those of an unfinished `collect` run as it will make them."""
        place = self.unmade(node, key).get(number)
        if place is not None:
            return self.collected(place, kind, split)
        return rows_that_exist(config, kind, number, split, self.tokenizer(node), self.registry.home)

    def collected(self, place: int, kind: str, split: str) -> list[Example]:
        """The rows of a `collect` run, one for each record; identical pairs, which it leaves out, are not known."""
        return as_rows([one for one, its in self.draws(self.nodes[place]) if split in (its, "all")], kind)

    def draws(self, node: Node) -> list[tuple[Example, str]]:
        """The prompts of a `collect` run with their splits, in its order, each with the responses of a record."""
        return self._once(("draws", node.label), lambda: self._draws(node))

    def _draws(self, node: Node) -> list[tuple[Example, str]]:
        config = self.config(node)
        assert isinstance(config, CollectConfig)
        above, (_, start) = self.place(node, MODEL_KEYS), self.root(node)
        trained = {} if start is None else start.config
        style = Style.of(trained if above is None else self.config(self.nodes[above]).model_dump())
        chosen = prompts_to_sample(config, self.tokenizer(node), style, self.registry.home)
        rows = with_responses([example for example, _ in chosen], self.response(node)[0], config.k)
        return list(zip(rows, (split for _, split in chosen), strict=True))

    def response(self, node: Node) -> tuple[int, str]:
        """The assumed number of tokens of a response that a run samples, and where it comes from.

        It is the mean of the completions that the policy, or the model that it starts from, is trained on; without
        these, of the run's own rows; without these too, the longest that the config allows.
        """
        config = self.config(node)
        limit = config.sampled_lengths().response
        mean, chain = self._typical(node), node
        while mean is None and (above := self._linked(chain, MODEL_KEYS)) is not None:
            chain = self.nodes[above]
            mean = self._typical(chain)
        if mean is None:
            return limit, f"responses are counted with their longest length, {limit} tokens: fewer if they end before"
        tokens = min(limit, max(1, round(mean)))
        return tokens, f"responses are counted with {tokens} tokens, the mean of the data; {limit} at most"

    def _typical(self, node: Node) -> float | None:
        """The mean length of the completions that a run's rows have; None if they have none."""
        config = self.config(node)
        if not isinstance(config, TrainingConfig) or self.unmade(node) or getattr(config, "population", False):
            return None
        kind = "demonstration" if config.reads_prompts else training_kind(config)
        try:
            rows = self._split(node, config, kind, config.dataset_train_split, config.max_train_samples)
        except DataError:  # prompts alone
            return None
        return sum(len(one.completions[0]) for one in rows) / len(rows)

    def models(self, node: Node) -> Models:
        """The shapes of the models of a run."""
        config = self.config(node)
        training = config if isinstance(config, TrainingConfig) else None
        policy, bare, trained = self.shapes(self.described(node), training)
        rewards, judge = self.scorers(node.spec.links, node.inputs, config)
        critic = None
        if isinstance(config, PpoConfig) and config.separate_critic:
            critic = as_critic(replace(policy, frozen=0, frozen_skipped=0) if config.freeze_layers else policy)
        return Models(policy, bare, critic, rewards, judge, trained)

    def shapes(self, described: Any, config: TrainingConfig | None = None) -> tuple[ModelShape, ModelShape, int]:
        """`shapes_of`, once for models of the same sizes."""
        head = isinstance(config, RewardConfig)
        changes = {} if config is None else config.model_dump(mode="json", include=ADAPTED)
        key = ("shapes", described.to_json_string(), json.dumps(changes, sort_keys=True), head)
        return self._once(key, lambda: shapes_of(described, config))

    def scorers(
        self, links: Mapping[KeyPath, str], inputs: Mapping[str, int], config: ModelConfig
    ) -> tuple[tuple[ModelShape, ...], ModelShape | None]:
        """The shapes of the reward models and of the judge that a config names."""
        named: dict[KeyPath, str | None] = {("judge",): getattr(config, "judge", None)}
        named |= {(key,): getattr(config, key, None) for key in ("reward_model_path", "reward_model", "true_reward")}
        for number, part in enumerate(getattr(config, "reward_functions", None) or ()):
            named["reward_functions", number, "source"] = part.source
        found: dict[KeyPath, ModelShape] = {}
        for path, text in named.items():
            if text is None or not (path in links or names_a_model(text)):
                continue
            place = inputs.get(links[path]) if path in links else None
            if place is not None and place not in self._made:
                theirs = self.nodes[place]
                shape, *_ = self.shapes(self.described(theirs))
                found[path] = as_scorer(shape, getattr(theirs.spec.config, "score_pooling", "last"))
            else:
                resolved = self.registry.resolve(text if place is None else self._made[place])
                pooling = resolved.config.get("score_pooling", "last")
                shape, *_ = self.shapes(transformers_config(resolved, config))
                found[path] = as_scorer(shape, pooling)
        judge = found.pop(("judge",), None)
        labels = (judge,) if isinstance(config, CollectConfig) and judge is not None else ()
        return (*found.values(), *labels), None if labels else judge

    def amounts(self, node: Node) -> Amounts:
        """The rows and the work of a run."""
        return self._once(("amounts", self._alike(node)), lambda: self._amounts(node))

    def _alike(self, node: Node) -> str:
        """A text that is equal for runs with the same amounts: those of several seeds, say."""
        config = self.config(node).model_dump(mode="json", exclude=UNREAD)
        above = {name: self._alike(self.nodes[place]) for name, place in node.inputs.items()}
        return json.dumps([node.name, config, above], sort_keys=True)

    def _amounts(self, node: Node) -> Amounts:
        config, models = self.config(node), self.models(node)
        if isinstance(config, CollectConfig):
            (tokens, note), drawn = self.response(node), [example for example, _ in self.draws(node)]
            return Amounts(config.num, collect_work(config, models, drawn), tokens, (note,))
        rows = self.training(node)
        if isinstance(config, DpoConfig) and config.population:
            return Amounts(len(rows), None, notes=("pairs are drawn at every step: their tokens are not known",))
        if isinstance(config, PpoConfig):
            tokens, note = self.response(node)
            work = ppo_work(config, models, rows, tokens) + stream_work(config, models, self.stream(node))
            return Amounts(len(rows), work, tokens, (note,))
        centred = getattr(config, "reward_centering", None) == "reference_samples"
        tokens, note = self.response(node) if centred else (0, "")
        work = example_work(config, models, rows, self.held_out(node), tokens)
        return Amounts(len(rows), work, tokens, (note,) if note else ())
