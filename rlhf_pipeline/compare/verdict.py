"""The verdict in words: rules that read the figures of results.json and say no more than these do.

A contrast whose 95 % interval excludes 0 is a difference; one whose interval holds 0 is "cannot tell", with the number
of seeds or prompts that would settle it if the difference stayed what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from math import isfinite
from typing import Any

from rlhf_pipeline.compare.aim import describe_aims
from rlhf_pipeline.evaluation.needed import needed

FIGURES = {
    "objective": "the exact objective, reward - beta KL,",
    "true_reward": "true reward",
    "judge": "the judge's score",
    "score": "the reward model's score",
}
APART = 2.0
"""Arms at one beta whose KLs differ by more than this factor, with intervals that do not meet, are far apart."""
NOTABLE_LENGTH = 0.1
"""A difference in mean length beyond this share of the baseline's is worth a word."""

Line = dict[str, Any]


def line(topic: str, text: str, certain: bool = True) -> Line:
    """One line of the verdict."""
    return {"topic": topic, "text": text, "certain": certain}


def _interval(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['mean']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def excludes_zero(estimate: Mapping[str, Any] | None) -> bool:
    """Whether a 95 % interval says that there is a difference."""
    if not estimate or estimate.get("low") is None or estimate.get("high") is None:
        return False
    return estimate["low"] > 0 or estimate["high"] < 0


def say_contrast(contrast: Mapping[str, Any], topic: str, caveat: str = "") -> Line:
    """One contrast in words.

    caveat: what is to be known of who judged it.
    """
    a, b, estimate = contrast["a"], contrast["b"], contrast.get("estimate")
    figure, at = FIGURES.get(contrast["figure"], contrast["figure"]), contrast["at"] + caveat
    if not estimate or estimate.get("mean") is None:
        return line(
            topic, f"cannot tell {a} from {b} in {figure} {at}: {contrast.get('why_not') or 'not measured'}", False
        )
    if excludes_zero(estimate):
        ahead, behind = (a, b) if estimate["mean"] > 0 else (b, a)
        text = f"{ahead} is ahead of {behind} in {figure} {at}: {a} - {b} = {_interval(estimate)}"
        if not str(estimate.get("method", "")).startswith("t over seeds"):
            text += " (one seed: this is about these runs, not about their kind)"
        return line(topic, text)
    text = f"cannot tell {a} from {b} in {figure} {at}: {a} - {b} = {_interval(estimate)}"
    more = needed(estimate)
    if more is not None:
        text += f"; it would take about {more['count']:,} {more['unit']} to tell, if the difference stayed what it is"
    return line(topic, text, False)


def _find(results: Mapping[str, Any], **wanted: Any) -> Iterator[Mapping[str, Any]]:
    for contrast in results.get("contrasts") or ():
        if all(contrast.get(key) == value for key, value in wanted.items()):
            yield contrast


RIVALS = {"coin": "a coin", "longer_wins": "'the longer wins'", "tfidf": "a TF-IDF model of the words"}
"""What a reward model's gate sets it against, in words."""


def _caveat(results: Mapping[str, Any], figure: str) -> str:
    """`, by a judge that is no better than 'the longer wins'`, where who gives a figure has failed its gate."""
    role = {"judge": "judge", "score": "reward model"}.get(figure, "")
    gate = (results.get("gates") or {}).get(results.get(role.replace(" ", "_")))
    if not gate or gate.get("passed"):
        return ""
    unbeaten = [text for rival, text in RIVALS.items() if not (gate.get("beats") or {}).get(rival, True)]
    why = f"is no better than {' and '.join(unbeaten)}" if unbeaten else "has not passed its gate"
    return f", by a {role} that {why}"


def _primary(results: Mapping[str, Any]) -> Line:
    for contrast in _find(results, primary=True):
        return say_contrast(contrast, "primary", _caveat(results, contrast["figure"]))
    if results.get("contrasts"):
        return line(
            "primary", "cannot tell: none of the contrasts that could be declared beforehand can be formed", False
        )
    return line("primary", "one arm alone: there is nothing to compare it with but the baseline", False)


TOPICS = {kind: kind for kind in ("as trained", "matched KL", "selected", "cost", "exact")}


def _topic(contrast: Mapping[str, Any], primary: str | None) -> str | None:
    """What a contrast is said under; None for those that stay in the table: one topic is one answer."""
    kind, figure = contrast.get("kind"), contrast["figure"]
    if figure == "judge" and figure != primary:
        return "judge" if kind in ("as trained", "matched KL") else None
    if kind == "exact":
        return "exact"
    return TOPICS.get(str(kind)) if figure == primary else None


def _said_as_trained(results: Mapping[str, Any], contrast: Mapping[str, Any]) -> bool:
    """Whether the final models answer already what a contrast at matched KL would say again."""
    same = {key: contrast[key] for key in ("a", "b", "figure")}
    return contrast["kind"] == "matched KL" and any(True for _ in _find(results, kind="as trained", **same))


def _others(results: Mapping[str, Any]) -> Iterator[Line]:
    """The contrasts beside the primary one; those that the correction for their number takes away say so."""
    for contrast in _find(results, primary=False):
        topic = _topic(contrast, results.get("primary"))
        if topic is None or (topic == "judge" and _said_as_trained(results, contrast)):
            continue
        said = say_contrast(contrast, topic)
        holm = contrast.get("p_holm")
        if said["certain"] and holm is not None and holm > 0.05:
            said["text"] += f"; not after the correction for several contrasts (Holm p = {holm:.2f})"
            said["certain"] = False
        yield said


Shortfall = tuple[float, float, float]  # beta; what is missing to the optimum of the true reward; to the model's own
PARTS = {"ppo": "optimisation_gap", "dpo": "disagreement"}  # what an exact row says of a model's own optimum


def _shortfalls(results: Mapping[str, Any], stage: str) -> list[Shortfall]:
    """What keeps a stage's models from the optimum, beta by beta, where that is known exactly."""
    part = PARTS[stage]
    by_beta: dict[float, list[Mapping[str, Any]]] = {}
    for row in (results.get("exact") or {}).get("rows", ()):
        if row["stage"] == stage and row.get(part):
            by_beta.setdefault(row["beta"], []).append(row)
    found = []
    for beta, rows in by_beta.items():
        # Both over the prompts of the part, which a reward model's score of every response makes few.
        total = sum(row["gap_true_there"]["value"] for row in rows) / len(rows)
        own = sum(row[part]["value"] for row in rows) / len(rows)
        if isfinite(total) and isfinite(own):
            found.append((beta, total, own))
    return found


def _reward_model_limits(shortfall: Shortfall) -> bool:
    """Whether the reward model's own error keeps PPO from the optimum more than its optimisation does."""
    _, total, own = shortfall
    return own < total / 2


def _limits(results: Mapping[str, Any]) -> Iterator[Line]:
    """What keeps each arm from the optimum, where that is known exactly, beta by beta; and what else stands out."""
    for shortfall in _shortfalls(results, "ppo"):
        cause = (
            "the reward model's own error limits it more than optimisation does"
            if _reward_model_limits(shortfall)
            else "its optimisation is at least half of what is missing"
        )
        yield line("limits", f"{_short_of('PPO', shortfall)} (its own optimisation); {cause}")
    for shortfall in _shortfalls(results, "dpo"):
        yield line("limits", f"{_short_of('DPO', shortfall)} (its disagreement with the reward model)")
    for model, gate in (results.get("gates") or {}).items():
        if not gate.get("passed"):
            yield line("limits", f"{model} failed its gate: {gate.get('reason')}; what it says of the arms says little")
    yield from (line("limits", text) for text in describe_aims(results.get("rows") or ()))
    yield from _apart_in_kl(results)
    yield from _reward_model(results)
    yield from _over_optimisation(results)
    yield from _length(results)


def _short_of(name: str, shortfall: Shortfall) -> str:
    beta, total, own = shortfall
    away = f"{name} at beta {beta:g} is {total:.3f} short of the optimum of the true reward"
    return f"{away}; to that of the reward model it is {own:.3f}"


def _apart_in_kl(results: Mapping[str, Any]) -> Iterator[Line]:
    """Arms that one beta has taken to very different KLs: what is different there is not the algorithm alone."""
    said: set[tuple[str, str]] = set()
    entries = [e for e in results.get("summary") or () if e.get("beta") is not None and "kl" in e["metrics"]]
    for one, other in combinations(entries, 2):
        near, far = sorted((one, other), key=lambda entry: entry["metrics"]["kl"]["mean"])
        low, high, arms = near["metrics"]["kl"], far["metrics"]["kl"], (one["arm"], other["arm"])
        if arms[0] == arms[1] or one["beta"] != other["beta"] or arms in said or None in (low["high"], high["low"]):
            continue
        if high["mean"] > APART * max(low["mean"], 0.0) and high["low"] > low["high"]:
            said.add(arms)
            figures = " against ".join(f"{kl['mean']:.2f} [{kl['low']:.2f}, {kl['high']:.2f}]" for kl in (high, low))
            text = f"at one beta, {one['beta']:g}, {far['arm']} is much farther from the reference than {near['arm']}"
            text += f": a KL of {figures} nats; a difference between them is one of that distance too"
            yield line("limits", text)


def _reward_model(results: Mapping[str, Any]) -> Iterator[Line]:
    scorers = (results.get("preferences") or {}).get("scorers") or {}
    baseline = scorers.get("longer wins")
    for name, scorer in scorers.items():
        estimate = scorer.get("accuracy") or {}
        if (results.get("gates") or {}).get(name, {}).get("passed") is False:
            continue  # its gate has said so
        if name != "longer wins" and baseline and estimate.get("mean", 1.0) <= baseline["accuracy"]["mean"]:
            yield line("limits", f"{name} orders held-out pairs no better than 'the longer response wins'")
    test = (results.get("preferences") or {}).get("test")
    if test and test.get("difference") and excludes_zero(test["difference"]):
        yield line("limits", f"accuracy on held-out pairs, {test['name']}: {_interval(test['difference'])}")


def _over_optimisation(results: Mapping[str, Any]) -> Iterator[Line]:
    for arm, entry in _over_optimised(results).items():
        peak = (entry.get("fit") or {}).get("peak")
        where = f" beyond sqrt(KL) = {peak:.2f}" if peak is not None else ""
        yield line("limits", f"{arm} is over-optimised{where}: the proxy still rises while the judged reward falls")


def _over_optimised(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The arms whose judged reward falls while the optimised one still rises."""
    return {arm: entry for arm, entry in (results.get("overoptimisation") or {}).items() if entry.get("found")}


def _length(results: Mapping[str, Any]) -> Iterator[Line]:
    for contrast in _find(results, figure="length"):
        estimate = contrast.get("estimate")
        base = next(
            (row["metrics"]["length"]["mean"] for row in results.get("rows") or () if "length" in row["metrics"]), None
        )
        if estimate and base and excludes_zero(estimate) and abs(estimate["mean"]) > NOTABLE_LENGTH * base:
            longer = contrast["a"] if estimate["mean"] > 0 else contrast["b"]
            text = f"{longer} writes longer responses {contrast['at']} ({_interval(estimate)} tokens)"
            yield line("limits", f"{text}: see the length-controlled win rate")


def _two_prices(results: Mapping[str, Any]) -> bool:
    """Whether arms with one setting each, contrasted as trained, were trained at different betas."""
    betas: dict[str, set[float | None]] = {}
    for entry in results.get("summary") or ():
        betas.setdefault(entry["arm"], set()).add(entry.get("beta"))
    for contrast in _find(results, kind="as trained"):
        mine, theirs = (betas.get(contrast[side], {None}) for side in ("a", "b"))
        if None not in mine | theirs and not mine & theirs:
            return True
    return False


def _next(results: Mapping[str, Any]) -> Iterator[Line]:
    """What to try, from what limits the arms."""
    comparable = results.get("comparable") or {}
    if not comparable.get("ok", True):
        listed = ", ".join(difference["what"] for difference in comparable["differences"])
        yield line("next", f"train the arms alike first: they differ in {listed}")
    if _two_prices(results):
        yield line(
            "next", "the arms pay different prices of KL: train them at one beta, or sweep it to compare at matched KL"
        )
    matched = any(contrast.get("estimate") for contrast in _find(results, kind="matched KL"))
    if not matched and any(True for _ in _apart_in_kl(results)):
        text = "sweep beta for every arm, or keep snapshots of the runs, to compare them at matched KL"
        yield line("next", f"{text}: one beta has taken them to different distances from the reference")
    trials = {arm: entry.get("trials", 1) for arm, entry in (results.get("arms") or {}).items()}
    if len(set(trials.values())) > 1:
        most = max(trials, key=lambda arm: trials[arm])
        counts = ", ".join(f"{arm}: {number} settings" for arm, number in trials.items())
        yield line("next", f"{most} was tuned more ({counts}): tune all arms alike")
    limited_by_reward_model = [_reward_model_limits(shortfall) for shortfall in _shortfalls(results, "ppo")]
    if any(limited_by_reward_model):
        yield line(
            "next",
            "for PPO: more or fresher preference pairs, a larger reward model, or a smaller step from the reference",
        )
    if not all(limited_by_reward_model):
        yield line("next", "for PPO: more updates, a smaller learning rate at the end, larger rollouts")
    if _over_optimised(results):
        yield line("next", "raise beta (kl_coef), or stop at the KL where the judge peaks")
    seeds = min((entry["seeds"] for entry in results.get("summary") or ()), default=len(results.get("seeds") or ()))
    if seeds < 3:
        yield line("next", "run at least 3 seeds: with fewer nothing is known about the spread between runs")


def verdict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Headline and lines; every line says whether the figures carry it."""
    head = _primary(results)
    said = [line("data", change["text"]) for change in results.get("data_changed") or ()]
    said += [*_others(results), *_limits(results)]
    said += list(_next(results))
    if results.get("primary") == "score" and results.get("contrasts"):
        head["text"] += " (PPO was trained to raise this very number: it is no judge of it)"
        said.append(line("next", "judge by what no arm was trained on: a reward model on held-out pairs, --judge REF"))
    return {"headline": head["text"], "certain": head["certain"], "lines": said}
