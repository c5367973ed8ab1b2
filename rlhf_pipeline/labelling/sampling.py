"""Sample the responses of a labelling project from one or several models."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.config.mentions import functions
from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.records import Text as RecordText
from rlhf_pipeline.data.samples import lowest_of
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.data.tokenize import tokenize
from rlhf_pipeline.data.tokenizers import chat_template_digest, stop_ids, text_of, tokenizer_digest
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.kinds import Item, Response, Text
from rlhf_pipeline.labelling.origins import REDRAWS, Draw, Made, Origin, give, turns, winner_entropy
from rlhf_pipeline.models.memory import MEASURING_ADVICE, Memory
from rlhf_pipeline.models.needs import require_needs
from rlhf_pipeline.registry.lengths import with_lengths
from rlhf_pipeline.registry.parents import parents_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.rollout.responses import sample_for_prompts
from rlhf_pipeline.rollout.scoring import by_example, score
from rlhf_pipeline.stages.common import find_model, load_policy, tokenizer_of
from rlhf_pipeline.stages.data import prompts_by_split
from rlhf_pipeline.stages.reward_sources import load_reward
from rlhf_pipeline.training.accelerator import make_accelerator, seed_everything
from rlhf_pipeline.training.tracking import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DRAWS_AT_ONCE = 512
Say = Callable[[str], None]


class _AtOnce(TypedDict):
    responses_at_once: int
    memory: Memory


def _at_once(config: LabelConfig, say: Say) -> _AtOnce:
    return _AtOnce(responses_at_once=config.per_device_eval_batch_size, memory=Memory(say, advice=MEASURING_ADVICE))


@dataclass(frozen=True)
class _Model:
    """A model that responds. prompts: as it reads them, by their place in the source."""

    resolved: Resolved
    tokenizer: PreTrainedTokenizerBase
    prompts: dict[str, Example]


def sample(config: LabelConfig, home: Path, say: Say) -> Made:
    """Sample K responses to each prompt, from the models in turn.

    A response that is like another one of its item is drawn again, up to REDRAWS times, and then left out; in an arena
    all responses stay as they are, since models that say the same are a tie. A prompt is used again only where there
    are fewer prompts than items.

    Raises:
        BadInput: a model or a source cannot be used. RunFailed: memory ran out.
    """
    registry = Registry(home)
    config, told = with_lengths(config, registry)
    resolved = [find_model(registry, name, "policy", say=say) for name in config.models]
    if told:
        say(told)
    require_needs(config, parents_of(registry, config))
    device = make_accelerator(config).device
    seed_everything(config.seed)
    models, splits = _with_prompts(config, home, resolved, say)
    # The prompts that every model can read, those with the lowest hashes, in the order of the source.
    first = models[0].prompts
    places = [place for place in first if all(place in model.prompts for model in models)]
    places = [places[number] for number in lowest_of([first[place].prompt_key for place in places], config.num)]
    if not places:
        raise BadInput(f"{config.prompts}: found no prompt that every model can read; expected at least one")
    amount = f"{config.num} x {2 if config.arena else config.k} responses"
    say(f"sampling {amount} of {', '.join(model.resolved.label for model in models)} to {len(places)} prompts")
    prompt_of = [places[number % len(places)] for number in range(config.num)]
    planned = [turns(config, number) for number in range(config.num)]
    drawn: list[dict[int, Response]] = [{} for _ in planned]  # by item, then by k
    scores: list[list[float]] = [[] for _ in planned]
    counts = Counter[str]()
    for turn, model in enumerate(models):
        todo = {n: [k for k, who in enumerate(plan) if who == turn] for n, plan in enumerate(planned) if turn in plan}
        draw = _drawing(config, model, turn, prompt_of, device, say)
        counts += give(draw, todo, drawn, 0 if config.arena else REDRAWS)
        if config.reward_model is not None:
            _add_scores(config, registry, model, turn, planned, prompt_of, drawn, scores, device, say)
    same = {(tokenizer_digest(model.tokenizer), chat_template_digest(model.tokenizer)) for model in models}
    made: list[Item] = []
    entropies: list[float] = []
    for number, responses in enumerate(drawn):
        if len(responses) < 2:
            counts["items"] += 1
            continue
        place = prompt_of[number]
        kept = [responses[k] for k in sorted(responses)]
        made.append(_item(len(made), config, first[place], splits[place], kept, with_ids=len(same) == 1))
        entropies.append(winner_entropy(scores[number]) if scores[number] else 0.0)
    for reason, what in (
        ("again", "responses were like another one of their item, and were drawn again"),
        ("merged", "responses were still like another one, and are left out"),
        ("items", "items are left out, because all of their responses are alike"),
    ):
        if counts[reason]:
            say(f"{counts[reason]} {what}")
    shared = next(iter(same)) if len(same) == 1 else (None, None)
    parents = {model.resolved.label: model.resolved.digest for model in models}
    origin = Origin(parents=parents, tokenizer_digest=shared[0], chat_template_digest=shared[1])
    return Made(made, origin, entropies if config.reward_model is not None else None)


def _drawing(
    config: LabelConfig, model: _Model, turn: int, prompt_of: Sequence[str], device: torch.device, say: Say
) -> Draw:
    """How a model draws responses; its draws follow from the seed and its place among the models."""
    policy = load_policy(model.resolved, config, model.tokenizer, device, frozen=True)
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + turn) % 2**63)
    at_once = _at_once(config, say)

    def draw(todo: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, int, Response]]:
        for block in progress(_blocks(todo), f"sampling {model.resolved.label}"):
            sampled, _ = sample_for_prompts(
                policy,
                [model.prompts[prompt_of[number]] for number in block],
                samples=len(todo[block[0]]),
                response_length=config.lengths().response,
                stop_ids=stop_ids(model.tokenizer),
                generator=generator,
                temperature=config.temperature,
                **at_once,
                device=device,
            )
            for number, example in zip(block, sampled, strict=True):
                for k, ids, ended in zip(todo[number], example.completions, example.ended, strict=True):
                    text = text_of(model.tokenizer, ids[: len(ids) - int(ended)])
                    yield number, k, Response(text=text, source=model.resolved.label, ids=list(ids), ended=ended)

    return draw


def _with_prompts(
    config: LabelConfig, home: Path, resolved: Sequence[Resolved], say: Say
) -> tuple[list[_Model], dict[str, str]]:
    """Each model with the prompts as it reads them; and the split of each prompt, by its place in the source."""
    (data,) = config.sources()
    found = read_records(*data, home=home, skip_bad_rows=config.skip_bad_rows, splits=config.splits)
    for note in found.notes(functions=any(functions(config))):
        say(f"{found.source}: {note}")
    models: list[_Model] = []
    splits: dict[str, str] = {}
    read: dict[tuple[str | None, str | None, Style], dict[str, Example]] = {}
    for one in resolved:
        tokenizer, style = tokenizer_of(one, config.trust_remote_code, config), Style.of(one.config)
        kind = (tokenizer_digest(tokenizer), chat_template_digest(tokenizer), style)
        if kind not in read:
            prompts, _ = prompts_by_split(found, config, tokenizer, style)
            read[kind] = {example.where: example for example, _ in prompts}
            splits |= {example.where: split for example, split in prompts}
        models.append(_Model(one, tokenizer, read[kind]))
    return models, splits


def _blocks(todo: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Items in blocks, all of a block with the same number of responses to draw."""
    by_count: defaultdict[int, list[int]] = defaultdict(list)
    for number, wanted in todo.items():
        by_count[len(wanted)].append(number)
    return [
        numbers[start : start + DRAWS_AT_ONCE]
        for _, numbers in sorted(by_count.items())
        for start in range(0, len(numbers), DRAWS_AT_ONCE)
    ]


def _add_scores(
    config: LabelConfig,
    registry: Registry,
    model: _Model,
    turn: int,
    planned: Sequence[Sequence[int]],
    prompt_of: Sequence[str],
    drawn: Sequence[dict[int, Response]],
    scores: list[list[float]],
    device: torch.device,
    say: Say,
) -> None:
    """Add the reward model's scores of the responses of one model."""
    assert config.reward_model is not None
    numbers, examples = [], []
    for number, plan in enumerate(planned):
        own = [one for k, one in sorted(drawn[number].items()) if plan[k] == turn]
        if own:
            numbers.append(number)
            completions, ended = [one.ids or [] for one in own], [one.ended for one in own]
            examples.append(replace(model.prompts[prompt_of[number]], completions=completions, ended=ended))
    if not examples:
        return
    loaded = load_reward(registry, config.reward_model, config, model.resolved, model.tokenizer, device, say=say)
    values = by_example(score(loaded.scorer.score, examples, **_at_once(config, say)), examples)
    for number, found in zip(numbers, values, strict=True):
        scores[number] += found


def _item(
    number: int, config: LabelConfig, prompt: Example, split: str, responses: list[Response], *, with_ids: bool
) -> Item:
    text: Text = prompt.prompt_text if prompt.messages is None else [dict(turn) for turn in prompt.messages]
    return Item(
        number=number,
        kind="arena" if config.arena else "rank",
        prompt=text,
        responses=responses if with_ids else [one.model_copy(update={"ids": None}) for one in responses],
        split=split,
        columns={"prompt_ids": prompt.prompt_ids} if with_ids else {},
    )


def _frozen(text: Text) -> RecordText:
    return text if isinstance(text, str) else tuple(text)


def uncertainty_of(items: Sequence[Item], config: LabelConfig, home: Path, say: Say) -> list[float]:
    """How unsure the reward model is of the best of given responses; it reads them with its own tokenizer.

    Returns:
        one entropy per item (`winner_entropy`); -1 for an item that is too long for the model.
    """
    scorer = config.reward_model
    assert scorer is not None
    registry = Registry(home)
    config, _ = with_lengths(config, registry)
    device = make_accelerator(config).device
    model = find_model(registry, scorer, "reward_model", say=say)
    tokenizer = tokenizer_of(model, config.trust_remote_code, config)
    records = [
        Record(
            "ranking",
            _frozen(item.prompt),
            tuple(_frozen(response.text) for response in item.responses),
            tuple(response.ended for response in item.responses),
            where=str(item.number),
            extra={"ranks": list(range(1, len(item.responses) + 1))},
        )
        for item in items
    ]
    examples, counts = tokenize(records, tokenizer, config.lengths())
    reward = load_reward(registry, scorer, config, model, tokenizer, device, say=say).scorer
    scores = by_example(score(reward.score, examples, **_at_once(config, say)), examples)
    entropy = {example.where: winner_entropy(values) for example, values in zip(examples, scores, strict=True)}
    if missing := len(items) - len(entropy):
        say(f"{missing} items are too long for {model.label} ({dict(counts.dropped)}); they come last")
    return [entropy.get(str(item.number), -1.0) for item in items]
