"""Human judgement beside that of the scorers, on the same responses of a labelling project."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_pipeline.config.reward_names import names_a_model
from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.data.records import plain
from rlhf_pipeline.labelling.arena import Arena, Judge, Verdict, by_scores, prompt_key
from rlhf_pipeline.labelling.kinds import Item, Text
from rlhf_pipeline.measure.bench import Bench
from rlhf_pipeline.registry.lengths import positions_of
from rlhf_pipeline.report.sides import HumanJudged
from rlhf_pipeline.rollout.llm import ChatModel
from rlhf_pipeline.rollout.llm_judge import Comparison, compare_pairs
from rlhf_pipeline.rollout.rewards import RewardSource, WorldReward
from rlhf_pipeline.rollout.scoring import by_example, score

NO_IDS = "the responses of {} have no token ids, which scorers read; rlhf label --arena samples them with their ids"
NO_SCORER = "this comparison has no scorer: give --judge REF"


def human_judged(bench: Bench, arena: Arena, chat: ChatModel | None) -> HumanJudged:
    """What people preferred, and how far each scorer of the comparison agrees with them.

    Args:
        chat: the language model that compares responses, if there is one.

    Raises:
        RunFailed: the language model's endpoint does not answer.
    """
    bench.say(f"people have judged {len(arena.verdicts)} pairs of responses in {arena.project}")
    if arena.missing:
        bench.say(f"note: {arena.project} has no responses of {', '.join(arena.missing)}")
    found: dict[str, tuple[str, Judge]] = {}
    plan = bench.plan
    examples, why_not = examples_of(arena)
    for figure, source in _scorers(bench).items() if examples is not None else ():
        assert examples is not None
        if (longest := _too_long(bench, source, examples)) is not None:
            why_not = longest
            continue
        scores = by_example(
            score(source.score, examples, responses_at_once=plan.responses_at_once, memory=plan.memory), examples
        )
        numbered = dict(zip((item.number for item in arena.items), scores, strict=True))
        found[figure] = (source.label, by_scores(numbered))
    if chat is not None:
        found["llm_judge"] = (chat.config.label, _by_language_model(chat, arena))
    return arena.judged(found, why_not or NO_SCORER)


def examples_of(arena: Arena) -> tuple[list[Example] | None, str | None]:
    """The items as examples, with the ids of prompts and responses as they were sampled; else why there are none."""
    made = []
    for item in arena.items:
        ids, prompt = [response.ids for response in item.responses], item.columns.get("prompt_ids")
        if prompt is None or None in ids:
            return None, NO_IDS.format(arena.project)
        completions = [list(one) for one in ids if one is not None]
        ended = [response.ended for response in item.responses]
        messages = None if isinstance(item.prompt, str) else tuple(item.prompt)
        made.append(
            Example(
                list(prompt),
                completions,
                ended,
                prompt_key(item),
                f"{arena.project}, item {item.number}",
                prompt_text=_text(item.prompt),
                messages=messages,
                columns=item.columns,
            )
        )
    return made, None


def _scorers(bench: Bench) -> dict[str, RewardSource]:
    """The scorers of the comparison, by figure."""
    truth = WorldReward() if bench.knows_truth else bench.truth
    named = {"judge": bench.judge, "score": bench.scorer, "true_reward": truth}
    return {figure: source for figure, source in named.items() if source is not None}


def _too_long(bench: Bench, source: RewardSource, examples: Sequence[Example]) -> str | None:
    """Why a reward model cannot read these responses; None if it can."""
    if not names_a_model(source.label):
        return None
    positions = positions_of(bench.registry.resolve(source.label))
    longest = max(len(one.prompt_ids) + len(ids) for one in examples for ids in one.completions)
    if positions is None or longest <= positions:
        return None
    return f"a prompt and its response have {longest} tokens, more than the {positions} positions of {source.label}"


def _by_language_model(chat: ChatModel, arena: Arena) -> Judge:
    """The verdicts of a language model that reads each pair in both orders."""
    items = {item.number: item for item in arena.items}
    asked = list({_key(one): one for one in arena.verdicts}.values())
    outcomes = compare_pairs(chat, [_comparison(items[one.item], one) for one in asked]).outcomes
    known = {_key(one): outcome for one, outcome in zip(asked, outcomes, strict=True)}
    return lambda one: known[_key(one)]


def _key(one: Verdict) -> tuple[int, int, int]:
    return one.item, one.first, one.second


def _comparison(item: Item, one: Verdict) -> Comparison:
    prompt = item.prompt if isinstance(item.prompt, str) else tuple(item.prompt)
    return Comparison(prompt, *(_text(item.responses[k].text) for k in (one.first, one.second)))


def _text(text: Text) -> str:
    return text if isinstance(text, str) else plain(tuple(text))
