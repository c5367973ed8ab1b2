"""Lineage of the models, how to reproduce the report, and the glossary."""

from __future__ import annotations

from rlhf_pipeline.report.glossary import ENTRIES
from rlhf_pipeline.report.markup import Group, Markup, Section, columns, details, folded, h, join, section, table
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.text import NOTHING, clean, plain, plural
from rlhf_pipeline.report.view import View

DIGITS = 12


def lineage_section(view: View, points: Points) -> Section | None:
    """Every model behind the comparison, with its digest and its parents."""
    lines = []
    for entry in view.results.lineage:
        digest = clean(entry.digest or "")
        parents = [
            h("span", h("span", role.replace("_", " "), class_="note"), " ", h("code", parent))
            for role, parent in entry.parents.items()
        ]
        lines.append(
            [
                h("code", entry.model),
                clean(entry.stage or NOTHING),
                h("code", digest[:DIGITS], title=digest) if digest else NOTHING,
                join(parents, ", ") if parents else NOTHING,
            ]
        )
    if not lines:
        return None
    caption = (
        f"First {DIGITS} digits of the SHA-256 over a version's files; results.json has all digits. A version never "
        "changes."
    )
    made = table(
        columns("llll", "model", "stage", "digest", "made from"), [Group(lines)], label="Lineage", caption=caption
    )
    return section("lineage", "Lineage", folded(f"All models and data ({len(lines)})", len(lines), made))


def reproduce_section(view: View, points: Points) -> Section | None:
    """The command, its seed and temperature, and the config of each model."""
    results, configs = view.results, view.results.configs
    body: list[Markup] = []
    if results.command:
        body.append(h("pre", h("code", results.command), class_="command", tabindex="0"))
        said = f"With evaluation seed {results.seed} and temperature {plain(results.temperature)} every model answers"
        if results.decoder:
            said = f"With evaluation seed {results.seed} and the decoder {results.decoder} every model answers"
        body.append(h("p", f"{said} the same prompts with the same random numbers."))
    if configs:
        made = [details(h("code", label), h("pre", h("code", text), tabindex="0")) for label, text in configs.items()]
        body.append(h("h3", f"Exact configs ({plural(len(configs), 'model')})", class_="screen"))
        body.append(h("div", *made, class_="configs screen"))
    return section("reproduce", "How to reproduce", *body)


def glossary_section(view: View, points: Points) -> Section | None:
    """The figures that occur in this report."""
    present = _present(view)
    made = [
        h("div", h("dt", name), h("dd", text, " ", h("span", formula, class_="formula")))
        for key, (name, text, formula) in ENTRIES.items()
        if key in present
    ]
    return section("glossary", "Glossary", h("dl", *made, class_="glossary"))


def _present(view: View) -> set[str]:
    results, rows = view.results, view.rows
    asked = {
        "win_rate": bool(results.win_rates) or any(row.win_rate for row in rows),
        "length_controlled": any(one.length_controlled.estimate for one in results.win_rates),
        "elo": results.ranking is not None,
        "matched_kl": results.frontier is not None and results.frontier.matched_kl is not None,
        "gibbs": results.frontier is not None and results.frontier.gibbs is not None,
        "kl_bound": bool(view.best_of_n),
        "effective_beta": any(row.effective_beta and row.effective_beta.mean is not None for row in rows),
        **dict.fromkeys(("share", "gap"), results.exact is not None),
        "gao": bool(results.overoptimisation),
        **dict.fromkeys(("ece", "nll", "brier"), results.preferences is not None),
        **dict.fromkeys(("distinct", "self_bleu"), any(row.diversity for row in rows)),
        "flops": any(row.cost for row in rows),
        "interval": True,
        "p_holm": any(one.p_holm is not None for one in results.contrasts),
    }
    return {key for key, there in asked.items() if there} | view.figures()


def footer() -> Markup:
    """The source of the figures."""
    return h(
        "footer",
        h(
            "p",
            "Made by rlhf from ",
            h("code", "results.json"),
            " beside this page. That file has every figure in full precision. The page loads nothing from outside.",
        ),
    )
