"""The verdict says what the figures carry and no more: A/A runs, a planted effect, and each rule by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.compare.verdict import say_contrast, verdict
from rlhf_pipeline.evaluation.seeds import contrast
from rlhf_pipeline.report.figures import (
    EffectiveBeta,
    Exact,
    ExactPerPrompt,
    ExactRow,
    Gap,
    Gate,
    Gibbs,
    Interval,
    Row,
    Span,
)
from rlhf_pipeline.report.results import (
    Comparable,
    DataChange,
    Difference,
    Findings,
    Preferences,
    Scorer,
    Verdict,
)
from rlhf_pipeline.report.sides import ArmEntry, Contrast, GaoFit, Overoptimised, Summary

SEEDS, PROMPTS = 5, 24

NOTHING: dict[str, Any] = {
    "name": "duel",
    "command": None,
    "primary": None,
    "baseline": "sft@v1",
    "reference": None,
    "reward_model": None,
    "judge": None,
    "true_reward": None,
    "gates": {},
    "prompts": 0,
    "prompt_texts": [],
    "samples": 1,
    "split": "test",
    "validation_split": None,
    "temperature": 1.0,
    "response_length": 4,
    "seed": 0,
    "seeds": [],
    "resampled": [],
    "data": [],
    "comparable": Comparable(ok=True, differences=[], allowed=False),
    "rows": [],
    "exact": None,
    "preferences": None,
    "data_changed": [],
    "demonstrations": None,
    "summary": [],
    "arms": {},
    "contrasts": [],
}


def said(**parts: Any) -> Verdict:
    """The verdict on results that have these parts alone."""
    return verdict(Findings(**{**NOTHING, **parts}))


def entry(estimate: Interval | None, **changes: Any) -> Contrast:
    given = {"kind": "as trained", "a": "ppo", "b": "dpo", "figure": "true_reward", "at": "at beta 0.5"}
    rest = {"name": "ppo - dpo", "why_not": None, "p": 0.5, "p_holm": None, "primary": True}
    return Contrast(**{**given, **rest, "estimate": estimate, **changes})


def estimate(mean: float, half: float, method: str = "t over seeds") -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half, n=40, clusters=5, method=method)


def simulated(effect: float, rng: np.random.Generator) -> Verdict:
    """A verdict on two arms whose seeds and prompts vary and whose true difference is `effect`."""
    prompts = rng.normal(size=PROMPTS)  # a prompt is as hard for the one as for the other

    def arm(shift: float) -> np.ndarray:
        seeds = rng.normal(scale=0.2, size=(SEEDS, 1))
        return shift + prompts + seeds + rng.normal(scale=0.4, size=(SEEDS, PROMPTS))

    found = contrast(arm(effect), arm(0.0))
    return said(contrasts=[entry(Interval.of(found.estimate), p=found.p)], seeds=list(range(SEEDS)))


def test_two_sets_of_seeds_of_one_arm_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    made = [simulated(0.0, rng) for _ in range(2000)]
    wrong = sum(one.certain for one in made) / len(made)
    assert wrong <= 0.06  # nominal 5 %, and the interval is conservative
    assert all(one.headline.startswith("cannot tell ppo from dpo") for one in made if not one.certain)


def test_a_planted_effect_is_found():
    rng = np.random.default_rng(1)
    made = [simulated(0.8, rng) for _ in range(500)]  # about 5 standard errors of the difference
    found = [one for one in made if one.certain]
    assert len(found) / len(made) >= 0.9
    assert all("ppo is ahead of dpo" in one.headline for one in found)
    assert all("dpo is ahead of ppo" in simulated(-2.0, rng).headline for _ in range(20))


def test_a_difference_is_one_when_its_interval_excludes_zero():
    def certain(found: Interval | None) -> bool:
        return say_contrast(entry(found), "primary").certain

    assert certain(estimate(0.3, 0.2)) and certain(estimate(-0.3, 0.2))
    assert not certain(estimate(0.1, 0.2)) and not certain(None)
    assert not certain(Interval(mean=1.0, low=None, high=None, n=1, clusters=1, method="t"))


def test_an_interval_that_is_not_known_is_infinite_in_words():
    unknown = Interval(mean=1.0, low=None, high=None, n=1, clusters=1, method="t")
    assert say_contrast(entry(unknown), "primary").text.endswith("ppo - dpo = +1.000 [-inf, +inf]")


def test_an_end_that_is_not_zero_is_not_printed_as_zero():
    found = Interval(mean=-0.018, low=-0.036, high=-0.0003, n=64, clusters=8, method="t")
    assert "= -0.0180 [-0.0360, -0.0003]" in say_contrast(entry(found), "primary").text
    assert "= -0.018 [-0.036, +0.000]" in say_contrast(entry(found.model_copy(update={"high": 0.0})), "primary").text


def test_what_would_settle_it_is_said():
    text = say_contrast(entry(estimate(0.2, 0.3)), "primary").text
    assert "ppo - dpo = +0.200 [-0.100, +0.500]" in text
    # t over 5 seeds: s = .3 / 2.776 x sqrt 5; the smallest S with t(S - 1) s / sqrt S < .2 is 9.
    assert "about 9 seeds would settle it" in text
    assert "would settle" not in say_contrast(entry(estimate(0.0, 0.3)), "primary").text
    # More prompts from a judge that knows nothing settle nothing.
    doubt = ", measured by a judge that is no better than a coin"
    assert say_contrast(entry(estimate(0.2, 0.3)), "primary", doubt).text == text.split("; about")[0].replace(
        ": ppo - dpo", f"{doubt}: ppo - dpo"
    )


def test_one_seed_speaks_of_its_runs_only():
    assert "says nothing about other seeds" in said(contrasts=[entry(estimate(0.3, 0.2, "t"))]).headline
    assert "says nothing about other seeds" not in said(contrasts=[entry(estimate(0.3, 0.2))]).headline


def test_what_was_not_reached_is_said():
    found = said(contrasts=[entry(None, why_not="the arms' ranges of KL do not meet")])
    assert found.headline.endswith("the arms' ranges of KL do not meet") and not found.certain


def topics(**parts: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in said(**parts).lines:
        found.setdefault(one.topic, []).append(one.text)
    return found


def test_several_contrasts_are_corrected_for_their_number():
    def judged(p_holm: float):
        other = entry(estimate(0.3, 0.2), primary=False, figure="judge", p=0.02, p_holm=p_holm)
        (found,) = [one for one in said(contrasts=[entry(estimate(0.1, 0.5)), other]).lines if one.topic == "judge"]
        return found

    assert not judged(0.08).certain and "Holm p = 0.08" in judged(0.08).text
    assert judged(0.04).certain


def gap(value: float) -> Gap:
    return Gap(value=value, prompts=1, reward=[(1.0, "world")])


def exact(*rows: ExactRow) -> Exact:
    frontier = Gibbs(beta=[], reward=[], kl=[])
    given = {"reward": "world", "reference": "sft@v1", "reward_model": None, "prompts": 1, "reward_model_prompts": 1}
    return Exact(**given, responses=1, temperature=1.0, rows=list(rows), best_of_n=[], frontier=frontier)


def exact_row(stage: str, total: float, **parts: float) -> ExactRow:
    figures = dict.fromkeys(("reward", "kl", "objective", "gap", "attainable"), 0.0)
    return ExactRow(
        name=stage,
        model=stage,
        stage=stage,
        digest=None,
        beta=0.5,
        share=None,
        prompts=1,
        **figures,
        per_prompt=ExactPerPrompt(**{name: [] for name in figures}),
        below_frontier=0.0,
        gap_true=gap(total),
        gap_true_there=gap(total),
        **{name: gap(value) for name, value in parts.items()},
    )


@pytest.mark.parametrize(("own", "words"), [(0.05, "the reward model's error limits PPO"), (0.4, "at least half")])
def test_what_limits_ppo(own, words):
    rows = [exact_row("ppo", 0.5, optimisation_gap=own), exact_row("dpo", 0.7, disagreement=0.6)]
    found = topics(exact=exact(*rows))
    assert words in found["limits"][0] and "PPO at beta 0.5 is 0.500 short" in found["limits"][0]
    assert "DPO at beta 0.5 is 0.700 short" in found["limits"][1] and "0.600" in found["limits"][1]
    assert any("for PPO" in text for text in found["next"])


def test_advice_comes_from_figures_and_not_from_sentences():
    """A stage whose name holds a sentence of the verdict changes no advice."""
    name = "the reward model's error limits PPO: optimisation error is at least half, over-optimised, as trained ("
    contrasts = [entry(estimate(0.3, 0.2), a=name, name=f"{name} - dpo", primary=False, kind="as trained", p_holm=0.01)]
    gates = {name: Gate(passed=False, reason=name)}
    found = topics(contrasts=contrasts, gates=gates, seeds=[0, 1, 2])
    assert any(name in text for text in found["limits"])
    assert "next" not in found


def test_arms_at_two_betas_are_told_so():
    def summary(beta: float) -> list[Summary]:
        return [kl_of("ppo", 1.0, 0.5, 0.5), kl_of("dpo", 1.0, 0.5, beta)]

    contrasts = [entry(estimate(0.3, 0.2))]
    advice = topics(contrasts=contrasts, summary=summary(0.1))["next"]
    assert any("trained at different betas" in text for text in advice)
    assert "next" not in topics(contrasts=contrasts, summary=summary(0.5))


def scorers(**accuracies: float) -> Preferences:
    rest = {"ece": None, "nll": None, "brier": None, "bins": []}
    found = {name: Scorer(accuracy=estimate(value, 0.1), **rest) for name, value in accuracies.items()}
    return Preferences(pairs=1, prompts=1, scorers=found, test=None)


def over(found: bool, peak: float | None) -> Overoptimised:
    fit = GaoFit(form="rl", alpha=1.0, beta=1.0, peak=peak, least=0.0, largest=1.0, points=3, residual=0.0)
    return Overoptimised(gold="judge", reference="sft@v1", points=[], fit=fit, found=found, why="", p=None)


def tuned(trials: int) -> ArmEntry:
    return ArmEntry(trials=trials, snapshots=0, settings=[], selected=None, cost=None)


def row(arm: str, **changes: Any) -> Row:
    return Row(**{"name": arm, "model": arm, "stage": arm, "arm": arm, "metrics": {}, **changes})


def test_over_optimisation_length_and_a_useless_reward_model():
    found = topics(
        contrasts=[entry(estimate(2.0, 0.5), primary=False, figure="length")],
        rows=[row("sft", metrics={"length": estimate(10.0, 1.0)})],
        overoptimisation={"ppo": over(True, 2.5), "dpo": over(False, None)},
        preferences=scorers(**{"longer wins": 0.55, "reward@v1": 0.54, "dpo@v1": 0.7}),
        arms={"ppo": tuned(4), "dpo": tuned(1)},
        seeds=[0],
    )
    assert any("ppo is over-optimised beyond sqrt(KL) = 2.50" in text for text in found["limits"])
    assert any("ppo writes longer responses" in text for text in found["limits"])
    assert any("reward@v1 orders held-out pairs no better" in text for text in found["limits"])
    assert not any("dpo@v1 orders" in text for text in found["limits"])
    assert any("ppo was tuned more (ppo: 4 settings, dpo: 1 settings)" in text for text in found["next"])
    assert any("at least 3 seeds" in text for text in found["next"])


def gate(*unbeaten: str, passed: bool = False) -> Gate:
    beats = {rival: rival not in unbeaten for rival in ("coin", "longer_wins", "tfidf")}
    return Gate(passed=passed, beats=beats, differences={}, reason="held-out accuracy 0.550 [0.500, 0.600]")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            gate("longer_wins"),
            "at beta 0.5, measured by a judge that is no better than 'the longer response wins': ppo - dpo =",
        ),
        (
            gate("coin", "tfidf"),
            ", measured by a judge that is no better than a coin and a TF-IDF model of the words: ppo - dpo",
        ),
        (Gate(passed=False, reason="few"), ", measured by a judge that has not passed its gate: ppo - dpo ="),
        (gate(passed=True), "at beta 0.5: ppo - dpo ="),
    ],
)
def test_a_judge_that_failed_its_gate_stands_in_the_headline(found, words):
    results = {"judge": "judge@v1", "gates": {"judge@v1": found}, "primary": "judge"}
    assert words in said(**results, contrasts=[entry(estimate(0.3, 0.2), figure="judge")]).headline
    assert words in said(**results, contrasts=[entry(estimate(0.1, 0.2), figure="judge")]).headline
    truth = said(**results, contrasts=[entry(estimate(0.3, 0.2))]).headline
    assert "by a judge" not in truth  # the truth has judged, not that model


@pytest.mark.parametrize(("figure", "role"), [("judge", "judge"), ("score", "reward_model")])
def test_nothing_is_certain_by_a_model_that_may_be_a_coin(figure, role):
    results = {role: "m@v1", "gates": {"m@v1": gate("coin")}, "primary": figure}
    first, other = entry(estimate(0.3, 0.2), figure=figure), entry(estimate(0.3, 0.2), figure=figure, primary=False)
    found = said(**results, contrasts=[first, other])
    assert not found.certain and found.headline.startswith("cannot tell: ppo is ahead of dpo in the ")
    (second,) = [one for one in found.lines if one.topic == "as trained"]
    assert not second.certain and second.text.startswith("cannot tell: ppo is ahead of dpo in the ")
    many = [one for one in said(**results, contrasts=[first, *[other] * 7]).lines if one.topic == "as trained"]
    assert [(one.certain, one.text.split(",")[0][:29]) for one in many] == [(False, "cannot tell by 7 contrasts of")]
    # It loses to length alone: a caveat, and a difference in its score all the same.
    assert said(**results | {"gates": {"m@v1": gate("longer_wins")}}, contrasts=[first]).certain


def test_a_reward_model_that_failed_its_gate_stands_in_a_headline_by_its_score():
    results = {"reward_model": "reward@v1", "gates": {"reward@v1": gate("longer_wins")}, "primary": "score"}
    found = said(**results, contrasts=[entry(estimate(0.3, 0.2), figure="score")])
    assert "measured by a reward model that is no better than 'the longer response wins'" in found.headline


def test_one_limit_of_a_model_is_said_once():
    accuracies = {"longer wins": 0.55, "reward@v1": 0.54, "reward@v2": 0.53, "dpo@v1": 0.5}
    gates = {"reward@v1": gate("longer_wins"), "reward@v2": gate(passed=True)}
    found = topics(gates=gates, preferences=scorers(**accuracies))["limits"]
    assert [text.split()[0] for text in found] == ["reward@v1", "reward@v2", "dpo@v1"]
    assert "failed its gate" in found[0] and "orders held-out pairs no better" in found[1]


def kl_of(arm: str, mean: float, half: float, beta: float | None = 0.5) -> Summary:
    given = {"arm": arm, "setting": {}, "beta": beta, "optimum": "same", "effective_beta": None, "seeds": 3}
    return Summary(**given, metrics={"kl": estimate(mean, half)}, method="t over seeds")


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (kl_of("ppo", 3.0, 0.5), kl_of("dpo", 1.0, 0.5), True),
        (kl_of("ppo", 1.9, 0.1), kl_of("dpo", 1.0, 0.1), False),  # less than twice
        (kl_of("ppo", 3.0, 1.5), kl_of("dpo", 1.0, 0.6), False),  # [1.5, 4.5] and [0.4, 1.6] meet
        (kl_of("ppo", 3.0, 0.5, 0.1), kl_of("dpo", 1.0, 0.5, 0.5), False),  # two prices
        (kl_of("ppo", 3.0, 0.5, None), kl_of("dpo", 1.0, 0.5, None), False),
        (kl_of("ppo", 0.1, 0.05), kl_of("dpo", -0.01, 0.02), True),  # an estimate below 0 has no factor
        (kl_of("ppo", 0.04, 0.001), kl_of("dpo", 0.001, 0.0005), True),
        (kl_of("ppo", 0.004, 0.001), kl_of("dpo", 0.001, 0.0005), False),  # neither has moved
    ],
)
def test_arms_that_one_beta_has_taken_far_apart(one, other, apart):
    for summary in ([one, other], [other, one]):
        trained = entry(estimate(0.3, 0.2))
        found = topics(contrasts=[trained], summary=summary)
        words = [text for text in found.get("limits", []) if "at the same beta, " in text]
        answers = [text for text in found.get("next", []) if "compare them at matched KL" in text]
        assert (len(words), len(answers)) == (apart, apart)
        if apart:
            assert "ppo is much farther from the reference than dpo" in words[0]
            assert "KL 0.00 " not in words[0]
        reached = entry(estimate(0.2, 0.1), kind="matched KL", primary=False)
        found = topics(contrasts=[trained, reached], summary=summary)
        assert not any("compare them at matched KL" in text for text in found.get("next", []))  # it is answered


def test_far_apart_says_both_kls():
    found = topics(summary=[kl_of("ppo", 3.0, 0.5), kl_of("dpo", 1.0, 0.5)])
    assert "at the same beta, 0.5" in found["limits"][0]
    assert "KL 3 [2.5, 3.5] against 1 [0.5, 1.5] nats" in found["limits"][0]


def test_arms_that_have_hardly_moved_are_named():
    found = topics(summary=[kl_of("ppo", 0.003, 0.001), kl_of("dpo", 0.0001, 0.0002), kl_of("ppo", 0.002, 0.001, 1.0)])
    assert [text.split(" [")[0] for text in found["limits"]] == [
        f"{arm} has hardly moved from the reference: its KL is below {kl} nats a response; its figures are those of "
        "the model that it started from"
        for arm, kl in (("ppo", "0.004"), ("dpo", "0.0003"))
    ]
    assert "train ppo and dpo for more steps, or at a larger learning rate" in found["next"]
    moved = topics(summary=[kl_of("ppo", 0.003, 0.001), kl_of("ppo", 0.02, 0.001, 1.0)])  # at one setting it has
    assert not any("hardly moved" in text for text in moved.get("limits", []))


def test_data_that_have_changed_come_first():
    text = "the data of dpo@v1 have changed since it was trained"
    where = {"model": "dpo@v1", "source": "own.jsonl", "split": "train", "found": None, "expected": "0"}
    change = DataChange(**where, rows=0, expected_rows=1, text=text)
    lines = said(data_changed=[change], gates={"reward@v1": gate("coin")}).lines
    assert (lines[0].topic, lines[0].text) == ("data", text)


def test_arms_that_are_not_alike_come_first():
    unlike = Comparable(ok=False, differences=[Difference(what="lengths", values={})], allowed=True)
    found = topics(comparable=unlike, seeds=[0, 1, 2])
    assert found["next"] == ["first train the arms under the same conditions: they differ in lengths"]


def test_results_with_nothing_in_them_have_a_verdict():
    assert not said().certain


def effective_row(arm: str, low: float, high: float) -> Row:
    slope = Span(mean=(low + high) / 2, low=low, high=high)
    ends = {key: 0.5 * value for key, value in slope}
    beta = EffectiveBeta(**ends, slope=slope, reward_model="reward@v1", why_not=None)
    return row(arm, step=None, beta=0.5, effective_beta=beta)


@pytest.mark.parametrize(("low", "high", "count"), [(2.0, 2.4, 1), (0.5, 0.9, 1), (0.9, 1.3, 0)])
def test_a_reward_model_off_the_scale_of_its_labels_is_said_where_the_interval_excludes_1(low, high, count):
    lines = topics(rows=[effective_row("ppo", low, high), row("dpo", beta=0.5)]).get("limits", [])
    assert len(lines) == count
    if low == 2.0:
        assert "calibration slope 2.20 [2.00, 2.40] on held-out pairs" in lines[0]
        assert "kl_coef 0.5 is a beta of 1.10 [1.00, 1.20] in units of the labels' reward" in lines[0]


def test_an_unknown_slope_is_passed_over():
    nothing = {"mean": None, "low": None, "high": None}
    unknown = EffectiveBeta(**nothing, slope=Span(**nothing), reward_model="reward@v1", why_not="no pair is wrong")
    assert "limits" not in topics(rows=[row("ppo", beta=0.5, effective_beta=unknown)])


def test_an_arm_with_another_optimum_is_named_with_what_moved_it():
    (words,) = topics(rows=[row("dpo", optimum="scale", moves_optimum={"loss_type": "ipo"})])["limits"]
    assert words.startswith(
        "dpo has beta on another scale (loss_type=ipo): it is compared as trained and at matched KL only"
    )


def summary_of(*arms: str, **metrics: float) -> list[Summary]:
    found = {name: estimate(value, 0.1) for name, value in metrics.items()}
    return [kl_of(arm, 1.0, 0.5).model_copy(update={"metrics": found}) for arm in arms]


def test_two_arms_without_a_figure_are_told_what_is_missing():
    found = said(summary=summary_of("ppo", "dpo", length=4.0))
    assert "only one arm" not in found.headline and not found.certain
    assert found.headline.startswith("cannot tell: nothing measures how good a response is; name a reward model")
    assert "only one arm" in said(summary=summary_of("ppo", score=1.0), primary="score").headline


MANY = [f"arm{n}" for n in range(8)]


def of_pairs(figure: str, **changes: Any) -> list[Contrast]:
    """Contrasts of all pairs of eight arms: arm n is n units below arm 0, and 1.5 units are certain."""
    return [
        entry(
            estimate(float(j - i), 1.5),
            a=MANY[i],
            b=MANY[j],
            figure=figure,
            primary=False,
            **{"p_holm": 0.01, **changes},
        )
        for i in range(8)
        for j in range(i + 1, 8)
    ]


def test_many_contrasts_have_a_line_for_each_arm_that_is_ahead():
    found = topics(primary="true_reward", contrasts=of_pairs("true_reward"), seeds=[0, 1, 2])["as trained"]
    # 28 pairs, of which the 7 of neighbours (a difference of 1) are not certain.
    assert found[0].startswith("21 of 28 contrasts of true reward are certain; the table")
    assert found[1] == "arm0 is ahead of arm2, arm3, arm4, arm5, arm6 and arm7"
    assert found[-1] == "arm5 is ahead of arm7" and len(found) == 7
    # Holm's correction takes all of them away.
    (none,) = topics(primary="true_reward", contrasts=of_pairs("true_reward", p_holm=0.06))["as trained"]
    assert none.startswith("0 of 28 contrasts")
    few = topics(primary="true_reward", contrasts=of_pairs("true_reward")[:6])["as trained"]
    assert len(few) == 6 and few[1].startswith("arm0 is ahead of arm2 in true reward at beta 0.5")


def test_many_contrasts_at_two_betas_are_told_apart():
    given = {"kind": "exact"}
    contrasts = [*of_pairs("objective", **given, at="at beta 0.1"), *of_pairs("objective", **given, at="at beta 1")]
    found = topics(primary="true_reward", contrasts=contrasts)["exact"]
    assert [text for text in found if "21 of 28" in text and "reward - beta KL, at beta 1 are certain" in text]
    assert found.count("arm5 is ahead of arm7") == 2


def test_lengths_of_many_arms_are_one_line():
    lengths = [one for n, arm in enumerate(MANY) for one in summary_of(arm, length=20.0 - n)]
    found = topics(
        contrasts=[entry(estimate(0.1, 0.5)), *of_pairs("length")],
        rows=[row("sft", metrics={"length": estimate(10.0, 1.0)})],
        summary=lengths,
    )["limits"]
    (words,) = [text for text in found if "length" in text]
    assert "arm0 20, arm1 19, arm2 18, arm3 17, arm4 16, arm5 15, arm6 14, arm7 13; 21 contrasts" in words


def test_kls_of_many_arms_are_one_line():
    kls = [kl_of(arm, 0.1 * 3.0**n, 0.01) for n, arm in enumerate(MANY)]
    (words,) = [text for text in topics(summary=kls)["limits"] if "at the same beta" in text]
    assert "at the same beta, 0.5, the KLs of 28 pairs of arms differ by more than a factor of 2: arm7 219, " in words
    assert words.count("arm0") == 1


def test_where_an_adaptive_penalty_ended_is_said():
    moved = {"moves_optimum": {"kl_target": 6.0}}
    found = topics(rows=[row("ppo", name=f"ppo-{beta}", beta=beta, **moved) for beta in (0.2, 0.4)])["limits"]
    (words,) = [text for text in found if "adaptive kl_coef" in text]
    assert "the one where that ended, 0.2 to 0.4, and its optimum is that of this beta" in words
