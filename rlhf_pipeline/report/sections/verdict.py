"""Who won, whether the comparison is fair, and what was compared."""

from __future__ import annotations

from typing import Any, TypeGuard

from rlhf_pipeline.report.markup import Column, Group, Markup, facts, h, join, table
from rlhf_pipeline.report.parts import Section, arm_name, section
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.text import NOTHING, clean, count, plain, plural, words
from rlhf_pipeline.report.view import View, items, listed, records

TOPICS = {
    "primary": "primary contrast",
    "matched KL": "at matched KL",
    "cost": "at equal cost",
    "judge": "by the judge",
    "selected": "at the chosen settings",
    "exact": "without sampling error",
    "data": "data that changed",
    "limits": "what limits it",
    "next": "what to try next",
}
UNCERTAIN = h("span", "not certain", class_="chip")


def headline(view: View) -> Markup | None:
    """The verdict in words; what is not certain says so."""
    text = view.get("verdict", "headline")
    topics: dict[str, list[Markup]] = {}
    for line in records(view.get("verdict", "lines")):
        chip = UNCERTAIN if line.get("certain") is False else None
        topics.setdefault(clean(line.get("topic") or ""), []).append(h("li", line.get("text"), " ", chip))
    if not text and not topics:
        return None
    chip = UNCERTAIN if view.get("verdict", "certain") is False else None
    made = [h("div", h("dt", TOPICS.get(topic, topic)), h("dd", h("ul", *lines))) for topic, lines in topics.items()]
    return h(
        "section",
        h("h2", "Verdict", class_="eyebrow", id="verdict-h"),
        h("p", text, " ", chip, class_="headline") if text else None,
        h("dl", *made) if made else None,
        id="verdict",
        class_="verdict",
        aria_labelledby="verdict-h",
    )


def overview(view: View) -> Markup | None:
    """The numbers that say what kind of comparison this is."""
    get = view.results.get
    seeds, longest = view.seeds(), get("response_length")
    pairs: list[tuple[str, Any]] = [
        ("prompts", f"{count(get('prompts'))} of {get('split') or 'the data'}" if get("prompts") else None),
        ("samples a prompt", count(get("samples")) if _whole(get("samples")) else None),
        ("seeds", words([str(seed) for seed in seeds]) if seeds else None),
        ("temperature", plain(get("temperature")) if get("temperature") is not None else None),
        ("longest response", plural(longest, "token") if _whole(longest) else None),
        ("primary figure", view.name_of() if view.rows else None),
        ("KL measured to", get("reference")),
        ("baseline", get("baseline")),
        ("reward model", get("reward_model")),
        ("judge", get("judge")),
    ]
    known = [(what, value) for what, value in pairs if value is not None]
    return facts(known) if known else None


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def fairness(view: View, points: Points) -> Section | None:
    """Is it a fair comparison: what differs between the arms other than the algorithm, and how much each was tuned."""
    ok, differences = view.get("comparable", "ok"), records(view.get("comparable", "differences"))
    body: list[Any] = []
    if ok is True:
        body.append(
            h(
                "p",
                h("b", "Yes. ", class_="good"),
                "The arms share SFT parent, preference data, prompts, tokens, lengths and sampling.",
            )
        )
    elif ok is False:
        allowed = " It was asked for with --allow-mismatch." if view.get("comparable", "allowed") else ""
        body.append(
            h(
                "p",
                h("b", "No. ", class_="bad"),
                f"The arms differ in more than the algorithm.{allowed} Read every figure with this in mind.",
            )
        )
    if differences:
        arms = list(dict.fromkeys(arm for entry in differences for arm, _ in items(entry.get("values"))))
        columns = [Column("what differs", False), *(Column(arm_name(view, arm), False) for arm in arms)]
        rows = [
            [entry.get("what"), *(dict(items(entry.get("values"))).get(arm, NOTHING) for arm in arms)]
            for entry in differences
        ]
        body.append(table(columns, [Group(rows)], label="Differences between the arms"))
    body += [_conditions(view), _tuning(view), _resampled(view)]
    return section("fair", "Is it a fair comparison?", *body)


def _conditions(view: View) -> Markup | None:
    """The options that move an arm's optimum only where its critic is wrong: said, and no reason to refuse."""
    found = {
        view.arm(row): ", ".join(f"{name} {plain(value)}" for name, value in items(row.get("may_move_optimum")))
        for row in view.trained()
        if items(row.get("may_move_optimum"))
    }
    if not found:
        return None
    said = [join([arm_name(view, arm), f": {options}"]) for arm, options in found.items()]
    return h("p", "Moves the optimum only with a wrong critic: ", join(said, ", "), ".")


def _tuning(view: View) -> Markup | None:
    given = {arm: entry.get("trials") for arm, entry in items(view.get("arms")) if isinstance(entry, dict)}
    trials = {arm: number_of for arm, number_of in given.items() if _whole(number_of)}
    if not trials:
        return None
    said = [join([arm_name(view, arm), f": {plural(number_of, 'trial')}"]) for arm, number_of in trials.items()]
    note = ""
    if len(set(trials.values())) > 1:
        note = " The arm with more trials was tuned more: part of its lead may be that."
    return h("p", "Tuning: ", join(said, ", "), ".", note)


def _resampled(view: View) -> Markup | None:
    seeds, stages = view.seeds(), listed(view.get("resampled"))
    if len(seeds) < 2 or not stages:
        return None
    return h("p", f"A seed draws anew: {words([clean(stage) for stage in stages])}. All else is shared by the seeds.")
