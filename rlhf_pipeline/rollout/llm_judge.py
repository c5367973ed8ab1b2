"""A language model as a judge of pairs, and as a reward that rates one response."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from rlhf_pipeline.config.rewards import PLACES
from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.data.records import Text
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.rollout.llm import ChatModel
from rlhf_pipeline.rollout.texts import answers, as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_TEMPLATE = """\
Compare two replies to the same prompt. Decide which reply helps the writer of the prompt more: it is correct, answers \
what was asked, is clear, and does no harm. Do not prefer a reply for its length or for its place.

[Prompt]
{prompt}

[Reply A]
{first}

[Reply B]
{second}

Give your verdict on the last line: [[A]] if reply A is better, [[B]] if reply B is better, [[C]] if they are equally good.
"""  # noqa: E501
RATING_TEMPLATE = """\
Rate a reply to a prompt from 1 (useless or harmful) to 10 (correct, complete, clear and harmless). Do not prefer a \
reply for its length.

[Prompt]
{prompt}

[Reply]
{response}

Give your rating on the last line as [[number]], for example [[5]].
"""
VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
RATING = re.compile(r"\[\[\s*([+-]?\d+(?:\.\d+)?)\s*\]\]")


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt."""

    prompt: Text
    one: str
    other: str


@dataclass(frozen=True)
class PairVerdicts:
    """The judge's verdicts on some comparisons.

    outcomes: 1 where `one` is better, 0 where `other` is, one half for a tie. first_place: share of the single readings
    with a winner that the reply in the first place won; one half without a preference for a place. disagreed: share of
    comparisons whose two readings named different winners (ties by rule). unreadable: answers without a verdict.
    """

    outcomes: list[float]
    first_place: float | None
    disagreed: float
    unreadable: int

    @property
    def ties(self) -> float:
        return sum(outcome == 0.5 for outcome in self.outcomes) / max(1, len(self.outcomes))


def filled(template: str, texts: Mapping[str, str]) -> str:
    """A template with texts in its places; places within the texts stay as they are."""
    return PLACES.sub(lambda match: texts.get(match[1], match[0]), template)


def compare_pairs(chat: ChatModel, comparisons: Sequence[Comparison]) -> PairVerdicts:
    """Compare each pair twice, with the replies in both orders. A reply wins if it wins in both, else it is a tie.

    Source of the rule: Zheng et al. 2023 (MT-bench), section 3.4.

    Raises:
        RunFailed: the endpoint does not answer.
    """
    template = chat.config.template or PAIR_TEMPLATE
    requests = []
    for pair in comparisons:
        for first, second in ((pair.one, pair.other), (pair.other, pair.one)):
            requests.append(filled(template, {"prompt": as_text(pair.prompt), "first": first, "second": second}))
    found = [_last(VERDICT, answer) for answer in chat.ask(requests)]
    outcomes, disagreed = [], 0
    for forward, backward in zip(found[::2], found[1::2], strict=True):
        wins, losses = (forward, backward) == ("A", "B"), (forward, backward) == ("B", "A")
        disagreed += forward == backward and forward in ("A", "B")
        outcomes.append(1.0 if wins else 0.0 if losses else 0.5)
    decided = [verdict for verdict in found if verdict in ("A", "B")]
    first_place = decided.count("A") / len(decided) if decided else None
    return PairVerdicts(outcomes, first_place, disagreed / max(1, len(comparisons)), found.count(None))


def copeland(chat: ChatModel, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[float]]:
    """For each response the mean outcome against the other responses to its prompt: 1 if it beats all, in [0, 1]."""
    answered, comparisons, scores = answers(examples, tokenizer, rereading=True), [], []
    for example in examples:
        mine = [next(answered) for _ in example.completions]
        for one, other in combinations(mine, 2):
            comparisons.append(Comparison(one.prompt, one.response, other.response))
    outcomes = iter(compare_pairs(chat, comparisons).outcomes)
    for example in examples:
        count = len(example.completions)
        total = [0.0] * count
        for i, j in combinations(range(count), 2):
            won = next(outcomes)
            total[i], total[j] = total[i] + won, total[j] + 1 - won
        scores.append([points / (count - 1) for points in total])
    return scores


def _last(pattern: re.Pattern[str], answer: str) -> str | None:
    """What the last match of a pattern holds; reasoning before it may quote other verdicts."""
    return next((match[1] for match in reversed(list(pattern.finditer(answer)))), None)


@dataclass
class RatingReward:
    """The rating of each response by a language model; nan if its answer holds none."""

    label: str
    chat: ChatModel
    tokenizer: PreTrainedTokenizerBase
    skips: ClassVar[bool] = True

    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        template = self.chat.config.template or RATING_TEMPLATE
        texts = [
            filled(template, {"prompt": as_text(one.prompt), "response": one.response.strip()})
            for one in answers(examples, self.tokenizer, rereading=True)
        ]
        ratings = [_last(RATING, answer) for answer in self.chat.ask(texts)]
        return torch.tensor([math.nan if rating is None else float(rating) for rating in ratings])
