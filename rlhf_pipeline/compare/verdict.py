"""The verdict in words: fixed rules applied to the figures of results.json.

A contrast whose 95 % interval excludes 0 is a difference. If the interval contains 0, the verdict is "cannot tell",
with the number of seeds or prompts that would settle it if the difference stayed the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite

from rlhf_pipeline.compare.aim import describe_aims
from rlhf_pipeline.compare.apart import apart_in_kl, apart_in_length, say_interval, unmoved
from rlhf_pipeline.compare.by_people import by_people
from rlhf_pipeline.compare.preference_quality import LONGER
from rlhf_pipeline.config.decoding import KL_OF
from rlhf_pipeline.evaluation.seeds import needed
from rlhf_pipeline.evaluation.statistics import Estimate
from rlhf_pipeline.measure.icdpo import LOG_P
from rlhf_pipeline.report.figures import Gate
from rlhf_pipeline.report.results import Findings, Line, Verdict
from rlhf_pipeline.report.sides import Contrast, Overoptimised

FIGURES = {
    "objective": "the exact objective, reward - beta KL,",
    "true_reward": "true reward",
    "judge": "the judge's score",
    "score": "the reward model's score",
}


def line(topic: str, text: str, certain: bool = True) -> Line:
    """One line of the verdict."""
    return Line(topic=topic, text=text, certain=certain)


def say_contrast(contrast: Contrast, topic: str, caveat: str = "") -> Line:
    """Return the verdict line of one contrast.

    Args:
        topic: the heading of the line.
        caveat: a known weakness of the model that gives the figure, appended to the place of the contrast.
    """
    a, b, estimate = contrast.a, contrast.b, contrast.estimate
    figure, at = FIGURES.get(contrast.figure, contrast.figure), contrast.at + caveat
    if estimate is None:
        return line(topic, f"cannot tell {a} from {b} in {figure} {at}: {contrast.why_not or 'not measured'}", False)
    if estimate.excludes():
        ahead, behind = (a, b) if estimate.mean > 0 else (b, a)
        text = f"{ahead} is ahead of {behind} in {figure} {at}: {a} - {b} = {say_interval(estimate)}"
        if not estimate.method.startswith("t over seeds"):
            text += " (one seed: this holds for these runs and says nothing about other seeds)"
        return line(topic, text)
    text = f"cannot tell {a} from {b} in {figure} {at}: {a} - {b} = {say_interval(estimate)}"
    more = None
    if estimate.ends is not None:
        more = needed(Estimate(estimate.mean, *estimate.ends, estimate.n, estimate.clusters, estimate.method))
    if more is not None and not caveat:  # more prompts from a judge that knows nothing settle nothing
        text += f"; about {more['count']:,} {more['unit']} would settle it if the difference stayed the same"
    return line(topic, text, False)


NO_FIGURE = (
    "cannot tell: nothing measures how good a response is; name a reward model, a judge or a true reward "
    "(--reward-model REF, --judge REF, --true-reward REF)"
)

RIVALS = {"coin": "a coin", "longer_wins": "'the longer response wins'", "tfidf": "a TF-IDF model of the words"}
"""The baselines of a reward model's gate, in words."""


def _failed_gate(results: Findings, figure: str) -> Gate | None:
    """The gate that the model of a figure has failed."""
    who = {"judge": results.judge, "score": results.reward_model}.get(figure)
    gate = None if who is None else results.gates.get(who)
    return None if gate is None or gate.passed else gate


def _caveat(results: Findings, figure: str) -> str:
    """Return the caveat of a figure whose model has failed its gate, else an empty string."""
    gate = _failed_gate(results, figure)
    if gate is None:
        return ""
    unbeaten = [text for rival, text in RIVALS.items() if not gate.beats.get(rival, True)]
    why = f"is no better than {' and '.join(unbeaten)}" if unbeaten else "has not passed its gate"
    return f", measured by a {'judge' if figure == 'judge' else 'reward model'} that {why}"


def _is_a_coin(results: Findings, figure: str) -> bool:
    """Whether the model of a figure may be no better than a coin on held-out pairs: nothing is certain by it."""
    gate = _failed_gate(results, figure)
    return gate is not None and not gate.beats.get("coin", True)


def _doubted(said: Line) -> Line:
    """A line of a figure that tells nothing for certain."""
    return line(said.topic, f"cannot tell: {said.text}", False) if said.certain else said


def _primary(results: Findings) -> Line:
    for contrast in results.find(primary=True):
        said = say_contrast(contrast, "primary", _caveat(results, contrast.figure))
        return _doubted(said) if _is_a_coin(results, contrast.figure) else said
    if results.contrasts:
        return line("primary", "cannot tell: none of the contrasts that can be primary could be computed", False)
    if results.primary is None:
        return line("primary", NO_FIGURE, False)
    return line("primary", "only one arm: it can be compared with the baseline only", False)


MOST_CONTRASTS = 6
"""The most contrasts of one kind that have a line each: those of four arms."""
TOPICS = ("as trained", "matched KL", "selected", "cost")
"""The kinds of contrast in the primary figure that the verdict lists, each under its own name."""


def _topic(contrast: Contrast, primary: str | None) -> str | None:
    """Return the topic of a contrast; None if the contrast is only in the table."""
    if contrast.figure == "judge" and contrast.figure != primary:
        return "judge" if contrast.kind in ("as trained", "matched KL") else None
    if contrast.kind == "exact":
        return "exact"
    return contrast.kind if contrast.kind in TOPICS and contrast.figure == primary else None


def _said_as_trained(results: Findings, contrast: Contrast) -> bool:
    """Whether a contrast at matched KL would repeat a contrast of the final models."""
    said = results.find(kind="as trained", a=contrast.a, b=contrast.b, figure=contrast.figure)
    return contrast.kind == "matched KL" and any(True for _ in said)


def _others(results: Findings) -> Iterator[Line]:
    """Yield the other contrasts, those of one kind together: a line for each, or for each arm if they are many."""
    groups: dict[tuple[str, str, str, str], list[Contrast]] = {}
    for contrast in results.find(primary=False):
        topic = _topic(contrast, results.primary)
        if topic is not None and not (topic == "judge" and _said_as_trained(results, contrast)):
            at = contrast.at if contrast.kind == "exact" else ""  # arms are ahead of others at one beta
            groups.setdefault((topic, contrast.kind, contrast.figure, at), []).append(contrast)
    for (topic, kind, figure, at), group in groups.items():
        coin = _is_a_coin(results, figure)
        if coin and len(group) > MOST_CONTRASTS:
            text = f"cannot tell by {len(group)} contrasts of {FIGURES.get(figure, figure)}{_caveat(results, figure)}"
            yield line(topic, f"{text}; the table of contrasts has every interval", False)
        elif coin:
            yield from (_doubted(say_contrast(one, topic, _caveat(results, figure))) for one in group)
        elif len(group) > MOST_CONTRASTS:
            first = [one for one in results.find(kind=kind, figure=figure, primary=True) if at in ("", one.at)]
            yield from _standings(topic, f"{FIGURES.get(figure, figure)} {at}".rstrip(" ,"), [*first, *group])
        else:
            yield from (_corrected(contrast, topic) for contrast in group)


def _corrected(contrast: Contrast, topic: str) -> Line:
    """The line of a contrast; it says so if Holm's correction removes its significance."""
    said, holm = say_contrast(contrast, topic), contrast.p_holm
    if said.certain and not _significant(contrast):
        text = f"{said.text}; not significant after the correction for several contrasts (Holm p = {holm:.2f})"
        return line(topic, text, False)
    return said


def _significant(contrast: Contrast) -> bool:
    """Whether an interval excludes 0 and Holm's correction, if there is one, leaves it so."""
    found, holm = contrast.estimate, contrast.p_holm
    return found is not None and found.excludes() and (holm is None or holm <= 0.05)


def _standings(topic: str, figure: str, group: Sequence[Contrast]) -> Iterator[Line]:
    """Say of many contrasts of one kind how many are certain, and for each arm which arms it is ahead of."""
    ahead: dict[str, dict[str, None]] = {}
    for one in group:
        if _significant(one) and one.estimate is not None:
            first, second = (one.a, one.b) if one.estimate.mean > 0 else (one.b, one.a)
            ahead.setdefault(first, {})[second] = None
    certain, unknown = sum(map(_significant, group)), sum(one.estimate is None for one in group)
    text = f"{certain} of {len(group)} contrasts of {figure} are certain"
    text += f", {unknown} could not be computed" if unknown else ""
    seeds = all(one.estimate is None or one.estimate.method.startswith("t over seeds") for one in group)
    text += "" if seeds else " (one seed: this holds for these runs and says nothing about other seeds)"
    yield line(topic, f"{text}; the table of contrasts has every interval", certain > 0)
    for arm in sorted(ahead, key=lambda name: -len(ahead[name])):
        yield line(topic, f"{arm} is ahead of {_and([*ahead[arm]])}")


def _and(names: Sequence[str]) -> str:
    """Names in words: `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _shortfalls(results: Findings, stage: str) -> list[tuple[float, float, float]]:
    """Return the exact gaps of a stage's models: for each beta, (beta, total, own).

    Both are means over the models: the gap to the optimum of the true reward, and to that of the learned one.
    """
    by_beta: dict[float, list[tuple[float, float]]] = {}
    for row in results.exact.rows if results.exact is not None else ():
        part = row.optimisation_gap if stage == "ppo" else row.disagreement
        if row.stage == stage and part is not None and row.gap_true_there is not None:
            # Both are means over the prompts of the learned gap, which needs a score of every response: these are few.
            by_beta.setdefault(row.beta, []).append((row.gap_true_there.value, part.value))
    means = [(beta, *(sum(values) / len(gaps) for values in zip(*gaps))) for beta, gaps in by_beta.items()]
    return [(beta, total, own) for beta, total, own in means if isfinite(total) and isfinite(own)]


def _limits(results: Findings) -> Iterator[Line]:
    """Yield what limits each arm: exact gaps to the optimum at each beta, failed gates, and other notable figures."""
    for beta, total, own in _shortfalls(results, "ppo"):
        cause = "the optimisation error is at least half of the total"
        if own < total / 2:
            cause = "the reward model's error limits PPO more than optimisation does"
        yield line("limits", f"{_short_of('PPO', beta, total, own)} (optimisation error); {cause}")
    for gaps in _shortfalls(results, "dpo"):
        yield line("limits", f"{_short_of('DPO', *gaps)} (disagreement with the reward model)")
    for model, gate in results.gates.items():
        if not gate.passed:
            yield line("limits", f"{model} failed its gate: {gate.reason}; its scores say little about the arms")
    for arm, kl in unmoved(results).items():
        text = f"{arm} has hardly moved from the reference: its KL is below {kl:.2g} nats a response"
        yield line("limits", f"{text}; its figures are those of the model that it started from")
    yield from (line("limits", text) for text in describe_aims(results.rows))
    yield from (line("limits", text) for text in apart_in_kl(results))
    yield from _reward_model(results)
    yield from _over_optimisation(results)
    yield from (line("limits", text) for text in apart_in_length(results))


def _short_of(name: str, beta: float, total: float, own: float) -> str:
    away = f"{name} at beta {beta:g} is {total:.3f} short of the optimum of the true reward"
    return f"{away}; its distance from the optimum of the reward model is {own:.3f}"


def _reward_model(results: Findings) -> Iterator[Line]:
    if results.preferences is None:
        return
    scorers, test = results.preferences.scorers, results.preferences.test
    for name, scorer in scorers.items():
        gate = results.gates.get(name)
        if name == LONGER or name.startswith(LOG_P) or (gate is not None and not gate.passed):
            continue  # reported with its gate
        if LONGER in scorers and scorer.accuracy.mean <= scorers[LONGER].accuracy.mean:
            yield line("limits", f"{name} orders held-out pairs no better than 'the longer response wins'")
    if test is not None and test.difference.excludes():
        yield line("limits", f"accuracy on held-out pairs, {test.name}: {say_interval(test.difference)}")


def _over_optimisation(results: Findings) -> Iterator[Line]:
    for arm, entry in _over_optimised(results).items():
        peak = None if entry.fit is None else entry.fit.peak
        where = f" beyond sqrt(KL) = {peak:.2f}" if peak is not None else ""
        yield line("limits", f"{arm} is over-optimised{where}: the proxy reward rises while the gold reward falls")


def _over_optimised(results: Findings) -> dict[str, Overoptimised]:
    """The arms whose gold reward falls while the optimised one still rises."""
    return {arm: entry for arm, entry in (results.overoptimisation or {}).items() if entry.found}


def _two_prices(results: Findings) -> bool:
    """Whether two arms that are compared as trained have no beta in common."""
    betas: dict[str, set[float | None]] = {}
    for entry in results.summary:
        betas.setdefault(entry.arm, set()).add(entry.beta)
    sides = ((betas.get(one.a, {None}), betas.get(one.b, {None})) for one in results.find(kind="as trained"))
    return any(None not in mine | theirs and not mine & theirs for mine, theirs in sides)


def _next(results: Findings) -> Iterator[Line]:
    """Yield what to try next, derived from what limits the arms."""
    if not results.comparable.ok:
        listed = ", ".join(difference.what for difference in results.comparable.differences)
        yield line("next", f"first train the arms under the same conditions: they differ in {listed}")
    if _two_prices(results):
        yield line(
            "next", "the arms were trained at different betas: use one beta, or sweep beta to compare at matched KL"
        )
    matched = any(contrast.estimate is not None for contrast in results.find(kind="matched KL"))
    if not matched and any(True for _ in apart_in_kl(results)):
        text = "sweep beta for every arm, or keep snapshots of the runs, to compare them at matched KL"
        yield line("next", f"{text}: at the same beta their distances from the reference differ")
    if still := unmoved(results):
        yield line("next", f"train {' and '.join(still)} for more steps, or at a larger learning rate")
    trials = {arm: entry.trials for arm, entry in results.arms.items()}
    if len(set(trials.values())) > 1:
        most = max(trials, key=lambda arm: trials[arm])
        counts = ", ".join(f"{arm}: {number} settings" for arm, number in trials.items())
        yield line("next", f"{most} was tuned more ({counts}): tune all arms equally")
    limited_by_reward_model = [own < total / 2 for _, total, own in _shortfalls(results, "ppo")]
    if any(limited_by_reward_model):
        yield line(
            "next",
            "for PPO: use more or newer preference pairs, a larger reward model, or a smaller KL to the reference",
        )
    if not all(limited_by_reward_model):
        yield line("next", "for PPO: use more updates, a smaller learning rate at the end, or larger rollouts")
    if _over_optimised(results):
        yield line("next", "raise beta (kl_coef), or stop at the KL where the gold reward peaks")
    seeds = min((entry.seeds for entry in results.summary), default=len(results.seeds))
    if seeds < 3:
        yield line("next", "run at least 3 seeds: fewer seeds do not show the variation between runs")


def verdict(results: Findings) -> Verdict:
    """Return the headline and the lines; every line says whether the figures support it."""
    head, text = _primary(results), ""
    said = [line("decoding", f"responses are made by {results.decoder}; {KL_OF}")] if results.decoder else []
    said += [line("data", change.text) for change in results.data_changed]
    people = [] if results.human is None else by_people(results.human)
    said += [*_others(results), *people, *_limits(results), *_next(results)]
    if results.primary == "score" and results.contrasts:
        text = " (PPO was trained to maximise this score, so it is not an independent measure)"
        said.append(line("next", "use a judge that no compared model was trained on (a reward model): --judge REF"))
    return Verdict(headline=head.text + text, certain=head.certain, lines=said)
