"""An arena: which of several models people prefer, as win rates and standings.

A verdict is one labeler's comparison of two responses of different models to one prompt; an item of K responses holds
one for each pair of them. Intervals are clustered by prompt and by labeler (`evaluation/two_way.py`): two verdicts on
one prompt, or by one labeler, are alike. What labelers do not see cannot sway them: they judge blind.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from math import isfinite
from pathlib import Path

import numpy as np

from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.evaluation.elo import rank, reachable
from rlhf_pipeline.evaluation.statistics import cluster_mean
from rlhf_pipeline.evaluation.two_way import two_way_share
from rlhf_pipeline.labelling.kinds import Item, Judgement
from rlhf_pipeline.labelling.store import LabelStore, database
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.sides import HumanAgreement, HumanJudged, HumanPair, HumanStanding

NOT_COMPARED = "no labeler has compared these two"
NOT_JOINED = (
    "some models have never met the others, directly or through a third, or only as its winner or only as its loser"
)

Judge = Callable[["Verdict"], float]
"""What a scorer says of the two responses of a verdict: 1 where that of a is better, 0, or one half for a tie."""


@dataclass(frozen=True)
class Verdict:
    """One labeler's comparison of response `first` of an item with response `second`, of the models a and b.

    outcome: 1 if the labeler prefers a, 0 if b, one half for a tie.
    """

    item: int
    prompt: str
    labeler: int
    a: str
    b: str
    first: int
    second: int
    outcome: float


def verdicts(
    items: Iterable[Item], judgements: Iterable[Judgement], models: Sequence[str] | None = None
) -> list[Verdict]:
    """The verdicts of judgements on responses of different models, a before b in `models`; second sights are left out.

    A labeler's second sight of an item measures self-consistency; as a further verdict it would count the labeler's
    opinion of this item twice.

    Args:
        models: the models that count, by name; None: all, in the order of their names.
    """
    known = {item.number: item for item in items}
    if models is None:
        models = sorted({one.source for item in known.values() for one in item.responses if one.source is not None})
    place = {name: number for number, name in enumerate(models)}
    found = []
    for one in judgements:
        if one.skipped or one.repeat or one.item not in known:
            continue
        item = known[one.item]
        sources = [response.source for response in item.responses]
        for i, j in combinations(range(len(sources)), 2):
            a, b, first, second = sources[i], sources[j], i, j
            if a not in place or b not in place or a == b:
                continue
            assert a is not None and b is not None  # no model is called None
            if place[a] > place[b]:
                a, b, first, second = b, a, j, i
            gap = one.ranks[second] - one.ranks[first]
            outcome = 1.0 if gap > 0 else 0.0 if gap < 0 else 0.5
            found.append(Verdict(item.number, prompt_key(item), one.labeler, a, b, first, second, outcome))
    return found


def prompt_key(item: Item) -> str:
    """A prompt as a key: items of one prompt have the same."""
    return json.dumps(item.prompt, sort_keys=True, ensure_ascii=False)


def win_rates(
    found: Sequence[Verdict], models: Sequence[str], judges: Mapping[str, Judge] | None = None
) -> list[HumanPair]:
    """P(people prefer a to b) for every pair of models, each prompt with the same weight.

    Args:
        judges: the scorers, by figure, whose win rates of the same comparisons stand beside people's.
    """
    return [
        _pair(a, b, [one for one in found if (one.a, one.b) == (a, b)], judges or {})
        for a, b in combinations(models, 2)
    ]


def _pair(a: str, b: str, found: Sequence[Verdict], judges: Mapping[str, Judge]) -> HumanPair:
    prompts, labelers = [one.prompt for one in found], [one.labeler for one in found]
    outcomes = [one.outcome for one in found]
    estimate, p = two_way_share(outcomes, prompts, labelers) if found else (None, None)
    shares = {}
    for figure, judge in judges.items() if found else ():
        # One value for each response pair: no labeler has a part in it.
        scored = {(one.item, one.first, one.second): one for one in found}.values()
        judged = [judge(one) for one in scored]
        shares[figure] = Interval.of(cluster_mean(judged, [one.prompt for one in scored], share=True))
    return HumanPair(
        a=a,
        b=b,
        comparisons=len(found),
        prompts=len(set(prompts)),
        labelers=len(set(labelers)),
        estimate=None if estimate is None else Interval.of(estimate),
        among_these=Interval.of(cluster_mean(outcomes, prompts, share=True)) if found else None,
        why_not=None if found else NOT_COMPARED,
        p=p,
        ties=_tie_share(outcomes),
        judges=shares,
    )


def _tie_share(outcomes: Sequence[float]) -> float | None:
    return outcomes.count(0.5) / len(outcomes) if outcomes else None


def by_scores(scores: Mapping[int, Sequence[float]]) -> Judge:
    """The judge that prefers the response with the higher score.

    Args:
        scores: of every response of an item, by the item's number.
    """

    def judge(one: Verdict) -> float:
        first, second = scores[one.item][one.first], scores[one.item][one.second]
        return 1.0 if first > second else 0.0 if first < second else 0.5

    return judge


def standings(found: Sequence[Verdict], models: Sequence[str]) -> tuple[list[HumanStanding], str | None]:
    """Elo of the models that were compared, best first, the first of `models` at 1000; else why there is none.

    A verdict weighs 1 / (the verdicts on its prompt and its two models), so that a prompt has weight 1 for each pair of
    models, however many labelers have judged it. A model with a path of wins to another one, and none back, comes
    before it: with few prompts the end of its interval would say otherwise.
    """
    counts = Counter(name for one in found for name in (one.a, one.b))
    there = [name for name in models if counts[name]]
    if len(there) < 2:
        return [], NOT_COMPARED
    place = {name: number for number, name in enumerate(there)}
    shared = Counter((one.prompt, one.a, one.b) for one in found)
    wins = np.zeros((len(found), len(there), len(there)))
    for number, one in enumerate(found):
        i, j, weight = place[one.a], place[one.b], 1 / shared[one.prompt, one.a, one.b]
        wins[number, i, j], wins[number, j, i] = weight * one.outcome, weight * (1 - one.outcome)
    try:
        ranked = rank(wins, prompts=[one.prompt for one in found], labelers=[one.labeler for one in found])
    except ValueError:  # no path of wins joins them
        return [], NOT_JOINED
    rows = [
        HumanStanding(
            name=name,
            comparisons=counts[name],
            elo=Interval.of(one.elo) if isfinite(one.elo.mean) else None,
            bound=one.bound,
        )
        for name, one in zip(there, ranked, strict=True)
    ]
    beaten = reachable(wins.sum(0)).sum(1)  # a path to another model leads on to all that this one has beaten
    order = sorted(range(len(there)), key=lambda i: (-beaten[i], -ranked[i].elo.mean))
    return [rows[i] for i in order], None


def agreement(found: Sequence[Verdict], figure: str, name: str, judge: Judge) -> HumanAgreement | None:
    """The share of people's verdicts that a scorer shares; None if people named no winner. See `HumanAgreement`."""
    decided = [one for one in found if one.outcome != 0.5]
    if not decided:
        return None
    # |outcome - other| is 0 where both name the same winner, 1 where they name different ones, one half for its tie.
    shared = [1 - abs(one.outcome - judge(one)) for one in decided]
    share, p = two_way_share(shared, [one.prompt for one in decided], [one.labeler for one in decided])
    return HumanAgreement(figure=figure, judge=name, comparisons=len(decided), share=Interval.of(share), p=p)


@dataclass(frozen=True)
class Arena:
    """The items of a labelling project that compare the models of interest, and what labelers said of them."""

    project: str
    models: list[str]
    missing: list[str]
    items: list[Item]
    judgements: list[Judgement]

    @property
    def verdicts(self) -> list[Verdict]:
        return verdicts(self.items, self.judgements, self.models)

    def judged(self, judges: Mapping[str, tuple[str, Judge]] | None = None, why_not: str | None = None) -> HumanJudged:
        """Every figure of the arena.

        Args:
            judges: by figure, the name of a scorer and its verdicts. why_not: why there are none.
        """
        found, named = self.verdicts, judges or {}
        places, why_no_standings = standings(found, self.models)
        shares = [agreement(found, figure, *judge) for figure, judge in named.items()]
        known = [share for share in shares if share is not None]
        if named and not known:
            why_not = "people have named no winner"
        return HumanJudged(
            project=self.project,
            prompts=len({one.prompt for one in found}),
            labelers=len({one.labeler for one in found}),
            comparisons=len(found),
            ties=_tie_share([one.outcome for one in found]),
            skipped=sum(one.skipped for one in self.judgements),
            missing=self.missing,
            pairs=win_rates(found, self.models, {figure: judge for figure, (_, judge) in named.items()}),
            standings=places,
            why_no_standings=why_no_standings,
            agreement=known,
            why_no_agreement=None if known else why_not,
        )


def arena_of(project: str, items: Sequence[Item], judgements: Sequence[Judgement]) -> Arena | None:
    """The arena of all models of a project, in the order in which its items name them; None without any verdict."""
    models = list(dict.fromkeys(one.source for item in items for one in item.responses if one.source is not None))
    found = Arena(project, models, [], list(items), list(judgements))
    return found if found.verdicts else None


def find_project(home: Path, project: str, models: Sequence[str] = ("REF", "REF")) -> Path:
    """The file of the labelling project of `human`.

    Raises:
        ConfigError: there is none; the message says how to make an arena of these models.
    """
    path = database(home, project)
    if not path.is_file():
        others = sorted(one.parent.name for one in path.parent.parent.glob("*/labels.sqlite"))
        there = f"one of {', '.join(others)}" if others else "a labelling project; there is none yet"
        fix = f"rlhf label --arena {' '.join(models)} --name {project} --prompts SOURCE"
        raise ConfigError(Fault("human", f"found {project!r}, and no such project in {path.parent.parent}", there, fix))
    return path


def read_arena(home: Path, project: str, models: Sequence[str]) -> Arena:
    """The part of a labelling project that compares some of these models.

    Raises:
        ConfigError: there is no such project, it compares no two of these models, or none of its items is labelled.
    """
    with LabelStore.open(find_project(home, project, models)) as store:
        items, judgements = store.items(), store.judgements()
    theirs = {one.source for item in items for one in item.responses if one.source is not None}
    known = [name for name in models if name in theirs]
    sources = {item.number: {one.source for one in item.responses} & set(known) for item in items}
    kept = [item for item in items if len(sources[item.number]) > 1]
    if not kept:
        found = f"{project} compares {', '.join(sorted(theirs)) or 'responses of no known model'}"
        raise ConfigError(Fault("human", found, f"two of the compared models: {', '.join(models)}"))
    numbers = {item.number for item in kept}
    judged = [one for one in judgements if one.item in numbers]
    if not any(not one.skipped and not one.repeat for one in judged):
        found = f"none of the {len(kept)} items of {project} that compare these models is labelled"
        raise ConfigError(Fault("human", found, "labels", f"rlhf label serve {project}, or remove human"))
    return Arena(project, known, [name for name in models if name not in theirs], kept, judged)


def arena_digest(home: Path, project: str) -> str:
    """The digest of all items and judgements of a project; empty if there is none. Notes and times do not count."""
    path = database(home, project)
    if not path.is_file():
        return ""
    with LabelStore.open(path) as store:
        content = [item.model_dump_json() for item in store.items()]
        content += [
            one.model_dump_json(include={"labeler", "item", "repeat", "ranks", "skipped"}) for one in store.judgements()
        ]
    return sha256("\n".join(content).encode()).hexdigest()
