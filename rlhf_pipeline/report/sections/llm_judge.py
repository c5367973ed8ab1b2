"""Win rates by a language model, and how far it agrees with people's labels."""

from __future__ import annotations

from rlhf_pipeline.report.charts import interval_bar, span
from rlhf_pipeline.report.markup import Group, Markup, Section, columns, estimate, h, section, table
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.results import LabelAgreement, LlmFigures, LlmJudged
from rlhf_pipeline.report.style import NEUTRAL
from rlhf_pipeline.report.text import clean, count, interval_text, percent, probability
from rlhf_pipeline.report.view import View

PAIRS = columns("lrlrrrr", "pair", "win rate", "from 0 to 1", "ties", "p", "first place wins", "readings disagree")


def llm_judge_section(view: View, points: Points) -> Section | None:
    """What a language model prefers, in both orders, and whether its verdicts are those of the labels."""
    judged = view.results.llm_judge
    if judged is None:
        return None
    return section("llm-judge", "Judged by a language model", _trust(judged), _pairs(judged))


def _trust(judged: LlmJudged) -> Markup:
    if judged.labels is None:
        text = f"Its agreement with labels is not known: {judged.why_no_labels}. Read its win rates with caution."
        return h("p", text)
    found = judged.labels
    basis = f"{count(found.pairs)} held-out pairs of {count(found.prompts)} prompts"
    text = f"{clean(judged.judge)} orders {interval_text(found.accuracy, 3)} of {basis} as labelled; {_habits(found)}."
    return h("p", f"{text} {_reading(found)}")


def _habits(found: LlmFigures) -> str:
    habits = [f"ties (one half each): {percent(found.ties, 0)}"]
    if found.first_place is not None:
        habits.append(
            f"the reply in the first place wins {percent(found.first_place, 0)} of the readings with a winner"
        )
    if found.unreadable:
        habits.append(f"{count(found.unreadable)} answers without a verdict")
    return "; ".join(habits)


def _reading(found: LabelAgreement) -> str:
    low = found.accuracy.low
    if low is not None and low > 0.5:
        return "It agrees with the labels more often than a coin does."
    return "It may agree no more often than a coin does: its win rates say nothing about what the labels prefer."


def _pairs(judged: LlmJudged) -> Markup:
    known = [pair for pair in judged.pairs if pair.estimate is not None]
    scale = span([pair.estimate for pair in known if pair.estimate is not None], 0.5)
    lines: list[list[object]] = []
    for pair in judged.pairs:
        name = f"{clean(pair.a)} against {clean(pair.b)}"
        if pair.estimate is None:
            lines.append([name, clean(pair.why_not or ""), "", "", "", "", ""])
            continue
        bar = interval_bar(pair.estimate, *scale, NEUTRAL, 0.5)
        shares = [percent(value, 0) for value in (pair.first_place, pair.disagreed)]
        lines.append([name, estimate(pair.estimate, 3), bar, percent(pair.ties, 0), probability(pair.p), *shares])
    each = judged.pairs_per_prompt
    caption = (
        f"{clean(judged.judge)} reads each pair of responses in both orders, {each} for each prompt; a response wins "
        "if it wins in both, else the pair is a tie, which counts one half; the interval is over prompts (and seeds)."
    )
    return table(PAIRS, [Group(lines)], label="Win rates by a language model", caption=caption)
