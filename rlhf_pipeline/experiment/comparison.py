"""What the comparison of an experiment will compute: its prompts, samples, scores and KL."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.grid import Node, StageSpec
from rlhf_pipeline.config.stages import PpoConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.data.load import examples_of, read_records
from rlhf_pipeline.data.samples import lowest_examples, lowest_hashes
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.experiment.outlook import DATA_KEYS, Outlook
from rlhf_pipeline.experiment.work import Amounts, Models, Work, compare_work


def runs_of_arms(outlook: Outlook, spec: StageSpec[CompareConfig]) -> list[Node]:
    """The runs whose models are compared."""
    arms = {name for path, name in spec.links.items() if path[0] == "arms"}
    return [node for node in outlook.nodes if node.name in arms]


def run_of_prompts(outlook: Outlook, spec: StageSpec[CompareConfig]) -> Node | None:
    """The run whose prompts, lengths and shapes the comparison has; None if it has prompts of no run.

    It is the first arm that is trained on one source, else the baseline; with prompts of its own, the first arm.
    """
    made, baseline = runs_of_arms(outlook, spec), spec.links.get(("baseline",))
    if spec.config.prompts is not None:
        return made[0]
    known = [*made, *(node for node in outlook.nodes if node.name == baseline)]
    return next((node for node in known if getattr(node.spec.config, "dataset_name", None) is not None), None)


def comparison(outlook: Outlook, spec: StageSpec[CompareConfig]) -> Amounts:
    """The prompts and the work of a comparison with at least one arm of the experiment."""
    config, made, example = spec.config, runs_of_arms(outlook, spec), run_of_prompts(outlook, spec)
    assert example is not None  # the caller has looked
    inputs = {node.name: place for place, node in reversed(list(enumerate(outlook.nodes)))}
    rewards, judge = outlook.scorers(spec.links, inputs, config)
    if not rewards:  # each arm is scored by the reward model of PPO
        used = next((node for node in made if isinstance(node.spec.config, PpoConfig)), None)
        rewards = () if used is None else outlook.models(used).rewards
    lengths = cast(TrainingConfig, outlook.config(example)).sampled_lengths()
    limit = config.max_new_tokens or lengths.response
    tokens, note = outlook.response(example)
    tokens = min(tokens, limit)
    arms = [spec.links.get(("arms", n)) for n in range(len(config.arms))]
    count = sum(1 if arm is None else sum(node.name == arm for node in made) for arm in arms)
    count += config.baseline is not None
    splits = [config.split]
    swept = any(node.setting for node in made)
    if swept and config.validation_split and config.prompts is None:
        splits.append(config.validation_split)
    shape, *_ = outlook.shapes(outlook.described(example))
    models = Models(shape, shape, rewards=rewards, judge=judge)
    work, prompts = Work(), 0
    for split in splits:
        chosen = _prompts(outlook, example, config, split)
        prompts = prompts or len(chosen)
        work += compare_work(config, models, chosen, count=count, response=tokens, longest=limit)
    return Amounts(prompts, work, tokens, (note,))


def _prompts(outlook: Outlook, node: Node, config: CompareConfig, split: str) -> list[Example]:
    """The prompts of a comparison."""
    trained = cast(TrainingConfig, outlook.config(node))
    source = outlook.place(node, DATA_KEYS) if config.prompts is None else None
    if source is not None:
        return lowest_hashes(outlook.collected(source, "prompt", split), config.max_prompts)
    if config.prompts is None:
        (data, *_), fractions = trained.sources(), trained.split_fractions
    else:
        values = {"dataset_name": config.prompts, "dataset_config": config.dataset_config, "datasets": None}
        (data,) = trained.model_copy(update={**values, "column_mapping": config.column_mapping}).sources()
        fractions = config.split_fractions
    skip = config.skip_bad_rows or trained.skip_bad_rows
    lengths = trained.sampled_lengths()
    found = read_records(*data, home=outlook.registry.home, skip_bad_rows=skip, splits={split})
    examples, _ = examples_of(
        found,
        kind="prompt",
        split=split,
        tokenizer=outlook.tokenizer(node),
        lengths=replace(lengths, prompt=config.max_prompt_length or lengths.prompt),
        skip_bad_rows=skip,
        fractions=fractions,
        style=Style.of(trained.model_dump(include={"instruction_style", "text_as_chat"})),
    )
    return list(lowest_examples(examples, config.max_prompts))
