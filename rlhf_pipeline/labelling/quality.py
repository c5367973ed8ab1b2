"""The quality of labels as one typed result: agreement, consistency, reliability, biases, times, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from rlhf_pipeline.evaluation.statistics import Estimate
from rlhf_pipeline.labelling.advice import findings
from rlhf_pipeline.labelling.agreement import (
    Level,
    Value,
    Verdicts,
    alpha,
    between,
    flags_said,
    ranks_said,
    ratings_against_ranks,
    ratings_said,
    same_answers,
    tied_share,
    within,
)
from rlhf_pipeline.labelling.biases import (
    FASTEST,
    characters,
    earlier_wins,
    length_bias,
    place_shares,
    speed,
    time_outliers,
)
from rlhf_pipeline.labelling.figures import Alpha, ItemStrengths, LabelerQuality, Quality, TimeOutlier, Twosome
from rlhf_pipeline.labelling.kinds import Item, Judgement
from rlhf_pipeline.labelling.pairs import Pair, lengths_of, pairs_of, share
from rlhf_pipeline.labelling.reliability import Fit, fit, strengths
from rlhf_pipeline.report.figures import Interval


def measure_quality(items: Sequence[Item], judgements: Sequence[Judgement]) -> Quality:
    """All figures of the labels of a project. docs/labelling-quality.md has the formula and the use of each.

    Raises:
        BadInput: the package krippendorff is missing.
        ValueError: judgements that do not belong to the items.
    """
    everything = pairs_of(items, judgements, ties=True)
    untied = [pair for pair in everything if not pair.tied]
    met, again, rated = between(untied), within(untied), ratings_against_ranks(untied)
    length = length_bias(untied, lengths_of(items))
    fitted = fit(everything)
    sizes = {item.number: len(item.responses) for item in items}
    raw = {} if fitted is None else dict(zip(fitted.labelers, fitted.raw.tolist(), strict=True))
    adjusted = strengths(everything, sizes, raw) if raw else {}
    done = [one for one in judgements if not one.skipped]
    found = Quality(
        items=len(items),
        labelled=len({one.item for one in done}),
        judgements=len(done),
        skipped=len(judgements) - len(done),
        repeats=sum(one.repeat > 0 for one in done),
        pairs=len(untied),
        ties=_interval(tied_share(everything)),
        agreement=_interval(met.of()),
        twosomes=_twosomes(met),
        alphas=_alphas(done),
        consistency=_interval(again.of()),
        ratings=_interval(rated.order.of()),
        rated_alike=_interval(rated.alike),
        places=[Interval.of(one) for one in place_shares(everything)],
        earlier_wins=_interval(earlier_wins(everything)),
        longer_wins=_interval(length.longer_wins),
        length_slope=_interval(length.slope),
        outliers=[
            TimeOutlier(
                labeler=one.judgement.labeler,
                item=one.judgement.item,
                repeat=one.judgement.repeat,
                seconds=one.judgement.seconds,
                z=one.z,
            )
            for one in time_outliers(done)
        ],
        reasons=dict(Counter(one.reason.strip() for one in judgements if one.skipped).most_common()),
        labelers=_labelers(items, judgements, everything, (met, again, rated.order), fitted),
        strengths=[ItemStrengths(item=item, strengths=own) for item, own in sorted(adjusted.items())],
        findings=[],
    )
    return found.model_copy(update={"findings": findings(found)})


def _interval(found: Estimate | None) -> Interval | None:
    return None if found is None else Interval.of(found)


def _twosomes(met: Verdicts) -> list[Twosome]:
    by_two: dict[tuple[int, int], Verdicts] = {}
    for same, item, two in zip(*met, strict=True):
        own = by_two.setdefault(two, Verdicts([], [], []))
        own.same.append(same)
        own.items.append(item)
        own.labelers.append(two)
    found = [(two, own.of()) for two, own in sorted(by_two.items())]
    return [Twosome(labelers=two, agreement=Interval.of(one)) for two, one in found if one is not None]


def _alphas(judgements: Sequence[Judgement]) -> list[Alpha]:
    """Alpha of ranks and ratings (ordinal) and of each flag (nominal), of what was said at all."""
    said: list[tuple[str, Level, list[Value]]] = [
        ("ranks", "ordinal", ranks_said(judgements)),
        ("ratings", "ordinal", ratings_said(judgements)),
    ]
    found = [
        Alpha(what=what, level=level, values=len(values), alpha=_interval(alpha(values, level)))
        for what, level, values in said
        if values
    ]
    for flag, values in flags_said(judgements).items():
        found.append(
            Alpha(
                what=flag,
                level="nominal",
                values=len(values),
                alpha=_interval(alpha(values, "nominal")),
                same=_interval(same_answers(values)),
                yes=_interval(share([one.value for one in values], [one.item for one in values])),
            )
        )
    return found


def _labelers(
    items: Sequence[Item],
    judgements: Iterable[Judgement],
    pairs: Sequence[Pair],
    verdicts: tuple[Verdicts, Verdicts, Verdicts],
    fitted: Fit | None,
) -> list[LabelerQuality]:
    """Each labeler's figures; verdicts: between labelers, within each, of ratings with ranks."""
    read = characters(items)
    by_labeler: dict[int, list[Judgement]] = {}
    for one in judgements:
        by_labeler.setdefault(one.labeler, []).append(one)
    compared: dict[int, list[Pair]] = {labeler: [] for labeler in by_labeler}
    for pair in pairs:
        compared[pair.judgement.labeler].append(pair)
    found = []
    for labeler, said in sorted(by_labeler.items()):
        done = [one for one in said if not one.skipped]
        timed = [one for one in done if one.seconds > 0]  # other tools' projects may say no time
        speeds = [speed(one, read) for one in timed]
        known = fitted is not None and labeler in fitted.labelers
        agreement, consistency, ratings = (_interval(one.of(labeler)) for one in verdicts)
        found.append(
            LabelerQuality(
                labeler=labeler,
                judgements=len(done),
                skipped=len(said) - len(done),
                seconds=median(one.seconds for one in timed) if timed else None,
                speed=median(speeds) if timed else None,
                hurried=sum(one > FASTEST for one in speeds) / len(timed) if timed else 0.0,
                ties=_interval(tied_share(compared[labeler])),
                agreement=agreement,
                consistency=consistency,
                ratings=ratings,
                right=_interval(fitted.right(labeler)) if fitted is not None and known else None,
                reliability=_interval(fitted.reliability(labeler)) if fitted is not None and known else None,
            )
        )
    return found
