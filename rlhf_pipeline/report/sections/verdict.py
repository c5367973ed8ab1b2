"""Who won, what was compared, and whether the comparison is fair."""

from __future__ import annotations

from rlhf_pipeline.report.charts import arm_name
from rlhf_pipeline.report.markup import Column, Group, Markup, Section, h, join, section, table
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.text import NOTHING, clean, count, plain, plural, words
from rlhf_pipeline.report.view import View, setting_text

TOPICS = {
    "primary": "primary contrast",
    "matched KL": "at matched KL",
    "cost": "at equal cost",
    "judge": "by the judge",
    "human": "by people",
    "selected": "at the chosen settings",
    "exact": "without sampling error",
    "decoding": "how responses are made",
    "data": "data that changed",
    "limits": "what limits it",
    "next": "what to try next",
}
UNCERTAIN = h("span", "not certain", class_="chip")


def headline(view: View) -> Markup:
    """The verdict in words; uncertain lines are marked."""
    verdict = view.results.verdict
    topics: dict[str, list[Markup]] = {}
    for line in verdict.lines:
        chip = None if line.certain else UNCERTAIN
        topics.setdefault(clean(line.topic), []).append(h("li", line.text, " ", chip))
    made = [h("div", h("dt", TOPICS.get(topic, topic)), h("dd", h("ul", *lines))) for topic, lines in topics.items()]
    return h(
        "section",
        h("h2", "Verdict", class_="eyebrow", id="verdict-h"),
        h("p", verdict.headline, " ", None if verdict.certain else UNCERTAIN, class_="headline"),
        h("dl", *made) if made else None,
        id="verdict",
        class_="verdict",
        aria_labelledby="verdict-h",
    )


def overview(view: View) -> Markup:
    """The facts of the comparison: prompts, samples, seeds, reference, judge."""
    results, seeds = view.results, [str(seed) for seed in view.seeds()]
    known = [
        ("prompts", f"{count(results.prompts)} (split: {results.split})"),
        ("samples per prompt", count(results.samples)),
        ("seeds", words(seeds) if seeds else None),
        ("temperature", plain(results.temperature)),
        ("decoder", results.decoder),
        ("longest response", plural(results.response_length, "token")),
        ("primary figure", view.name_of(results.primary) if results.primary else None),
        ("KL measured to", results.reference),
        ("baseline", results.baseline),
        ("reward model", results.reward_model),
        ("judge", results.judge),
    ]
    return h("dl", *(h("div", h("dt", what), h("dd", value)) for what, value in known if value is not None))


def fairness(view: View, points: Points) -> Section | None:
    """What differs between the arms other than the algorithm, and how much each arm was tuned."""
    comparable = view.results.comparable
    answer = h("b", "Yes. ", class_="good")
    said = "The arms share the SFT parent, preference data, prompts, tokenizer, length limits and sampling."
    if comparable.ok and comparable.differences:
        apart = ", ".join(difference.what for difference in comparable.differences)
        said = f"The arms share all but what is compared on purpose: {apart}."
    if not comparable.ok:
        answer = h("b", "No. ", class_="bad")
        allowed = " --allow-mismatch was set." if comparable.allowed else ""
        said = f"The arms differ in more than the algorithm.{allowed} This may affect every figure."
    parts = [h("p", answer, said), _differences(view), _conditions(view), _tuning(view), _resampled(view)]
    return section("fair", "Is it a fair comparison?", *parts)


def _differences(view: View) -> Markup | None:
    differences = view.results.comparable.differences
    if not differences:
        return None
    arms = list(dict.fromkeys(arm for entry in differences for arm in entry.values))
    columns = [Column("what differs", False), *(Column(arm_name(view, arm), False) for arm in arms)]
    rows = [[entry.what, *(entry.values.get(arm, NOTHING) for arm in arms)] for entry in differences]
    return table(columns, [Group(rows)], label="Differences between the arms")


def _by_arm(view: View, said: dict[str, str]) -> Markup:
    return join([join([arm_name(view, arm), f": {text}"]) for arm, text in said.items()], ", ")


def _conditions(view: View) -> Markup | None:
    """The options that move an arm's optimum only if its critic is wrong; they are reported, not refused."""
    found = {view.arm(row): setting_text(row.may_move_optimum) for row in view.trained if row.may_move_optimum}
    return (
        h("p", "Options that move the optimum if the critic is wrong: ", _by_arm(view, found), ".") if found else None
    )


def _tuning(view: View) -> Markup | None:
    trials = {arm: entry.trials for arm, entry in view.results.arms.items()}
    if not trials:
        return None
    said = _by_arm(view, {arm: plural(number_of, "trial") for arm, number_of in trials.items()})
    uneven = " The arm with more trials was tuned more: a lead of that arm may partly come from tuning."
    return h("p", "Tuning: ", said, ".", uneven if len(set(trials.values())) > 1 else "")


def _resampled(view: View) -> Markup | None:
    stages = [clean(stage) for stage in view.results.resampled]
    if len(view.seeds()) < 2 or not stages:
        return None
    return h("p", f"Each seed runs these stages again: {words(stages)}. The seeds share everything else.")
