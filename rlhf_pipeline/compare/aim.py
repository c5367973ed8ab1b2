"""What a model was trained towards: its optimum, the options that moved it, and its beta in units of labels' reward."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_pipeline.algorithms.preference import OBJECTIVES, Optimum, loss_optimum
from rlhf_pipeline.config.base import spelled
from rlhf_pipeline.config.kto import UNPAIRED
from rlhf_pipeline.registry.manifest import Manifest
from rlhf_pipeline.registry.optimum import REWARD_MODEL, carried_moves, own_moves
from rlhf_pipeline.registry.parents import beta_of, parent_of, rescaled_beta, reward_models_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.figures import EffectiveBeta, InContext, Row, Span

ADAPTIVE = "kl_target"
RESCALED = ("reward_scale", "normalize_rewards")
"""The options of PPO that only change the unit of its beta."""
OF_THE_LOSS = ("loss_type", "label_smoothing")
"""The options of DPO whose effect on the optimum is declared beside the losses (`algorithms.preference`)."""


@dataclass(frozen=True)
class Aim:
    """What a model was trained towards.

    Args:
        optimum: how it relates to pi_ref exp(r / beta).
        moved: the options that moved it: its own, and those of its reward models (`reward_model.option`); and the beta
            that a scale of the scores amounts to (`effective_kl_coef`).
        may_move: the options that moved it if the critic was wrong.
        effective_beta: see `effective_beta_of`.
    """

    optimum: Optimum = "same"
    moved: Mapping[str, object] = field(default_factory=dict)
    may_move: Mapping[str, object] = field(default_factory=dict)
    effective_beta: EffectiveBeta | None = None


def aim_of(registry: Registry, resolved: Resolved) -> Aim:
    """Read what a model was trained towards from its manifest and those of its reward models."""
    manifest = resolved.manifest
    if resolved.method is not None:
        return Aim("other", {"in_context": resolved.method})
    if manifest is None:
        return Aim()
    moved = moved_options(registry, resolved)
    # The optimum of an adaptive penalty is that of another beta than kl_coef: the one where it ended, `beta_of`.
    adapted = {ADAPTIVE} if beta_of(resolved) is not None else set()
    optimum = _optimum(manifest, moved.keys() - adapted)
    told = {} if (beta := rescaled_beta(resolved)) is None else {"effective_kl_coef": beta}
    return Aim(optimum, moved | told, manifest.may_move_optimum, effective_beta_of(registry, resolved))


def moved_options(registry: Registry, resolved: Resolved) -> dict[str, object]:
    """Return the options that moved a model's optimum; for an earlier release, its parents' configs are read too."""
    manifest = resolved.manifest
    if manifest is None:
        return {}
    if manifest.moves_optimum is not None:
        return manifest.moves_optimum
    roles = [role for role in manifest.parents if role.startswith(REWARD_MODEL)]
    found = {role: parent for role in roles if (parent := parent_of(registry, resolved, role)) is not None}
    return own_moves(manifest) | carried_moves(found)


def _optimum(manifest: Manifest, moved: Collection[str]) -> Optimum:
    if any(name not in (*OF_THE_LOSS, *RESCALED) for name in moved):
        return "other"
    if any(name in RESCALED for name in moved):
        return "scale"
    loss = manifest.config.get("loss_type")
    if manifest.stage == "dpo" and (isinstance(loss, list) or loss in UNPAIRED):
        return "other"
    if manifest.stage != "dpo" or loss not in OBJECTIVES:
        return "same"
    return loss_optimum(loss, manifest.config.get("label_smoothing") or 0.0)


def effective_beta_of(registry: Registry, resolved: Resolved) -> EffectiveBeta | None:
    """PPO's beta in units of the reward that the labels were drawn from: kl_coef x slope / weight.

    Where PPO scaled the scores, kl_coef is `rescaled_beta`.

    If the reward model gives r and its calibration slope on held-out pairs is s, the labels' reward is s r. The optimum
    of PPO on w r at kl_coef b is pi_ref exp(w r / b) = pi_ref exp(s r / (b s / w)): DPO's optimum at beta = b s / w.

    Returns:
        mean, low and high (those of the slope, times b / w), slope and reward_model. Without a finite slope, or with
        one that cannot be told from 0, mean is None and why_not gives the reason. None for a model that was not trained
        by PPO on one reward model of known slope.
    """
    manifest, beta = resolved.manifest, beta_of(resolved)
    if manifest is None or manifest.stage != "ppo" or beta is None:
        return None
    scaled_beta = rescaled_beta(resolved)
    if scaled_beta is None and manifest.config.get("normalize_rewards"):
        return None
    beta = scaled_beta or beta
    parts = manifest.config.get("reward_functions") or [{}]
    models = list(reward_models_of(registry, resolved))
    weight = float(parts[0].get("weight", 1.0))
    if len(parts) != 1 or len(models) != 1 or models[0].manifest is None or weight <= 0:
        return None
    slope = models[0].manifest.metrics.get("calibration_slope")
    if not slope:
        return None
    found = Span(**{key: slope.get(key) for key in ("mean", "low", "high")})
    scaled = {key: None if end is None else beta * end / weight for key, end in found}
    why_not = str(slope["why_not"]) if slope.get("why_not") else None
    if why_not is None and found.low is not None and found.low <= 0:  # a beta of 0 or below has no optimum
        scaled, why_not = dict.fromkeys(scaled), f"the calibration slope, {_ends(found)}, cannot be told from 0"
    return EffectiveBeta(**scaled, slope=found, reward_model=models[0].label, why_not=why_not)


def describe_aims(rows: Sequence[Row]) -> Iterator[str]:
    """Yield sentences on arms whose optimum or effective beta is not the one that beta names."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        if row.step is None and row.arm is not None:
            arms.setdefault(row.arm, []).append(row)
    for arm, finals in arms.items():
        kinds = {row.optimum for row in finals} - {"same"}
        if finals[0].in_context is not None:
            yield f"{arm} is not trained: {_told(finals[0].in_context)}; it has no beta"
        elif kinds:
            moved = {name: value for row in finals for name, value in row.moves_optimum.items()}
            listed = ", ".join(f"{name}={spelled(value)}" for name, value in moved.items())
            what = "beta on another scale" if kinds == {"scale"} else "another optimum"
            yield f"{arm} has {what} ({listed}): it is compared as trained and at matched KL only, not at one beta"
    for arm, finals in arms.items():
        ended = [row.beta for row in finals if ADAPTIVE in row.moves_optimum and row.beta is not None]
        if ended and {row.optimum for row in finals} == {"same"}:
            low, high = min(ended), max(ended)
            where = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            text = f"{arm} has an adaptive kl_coef: the beta is the one where that ended, {where}"
            yield f"{text}, and its optimum is that of this beta"
    for arm, finals in arms.items():
        clear = [row for row in finals if row.effective_beta is not None and _is_off_scale(row.effective_beta)]
        if clear:
            yield _off_scale(arm, clear, len(finals))


def _told(found: InContext) -> str:
    """How an arm answers with demonstrations in its context, in words."""
    several = "" if found.demonstrations == 1 else "s"
    text = f"it answers with {found.demonstrations} demonstration{several} of {found.source} in its context"
    if found.candidates is not None:
        text += (
            f", as the best of {found.candidates} candidates by the {found.score} contrast; its KL is an upper bound"
        )
    if found.retrieval == "embeddings":
        text += "; they are found by the policy's own embeddings"
    if found.chosen is not None:
        by = (
            "the likelihood of demonstrations" if found.chosen_by == "likelihood" else f"the score of {found.chosen_by}"
        )
        text += f" (set {found.chosen + 1} of {len(found.prefixes)}, chosen on validation prompts by {by})"
    return text


def _is_off_scale(found: EffectiveBeta) -> bool:
    low, high = found.slope.low, found.slope.high
    return found.mean is not None and low is not None and high is not None and (low > 1 or high < 1)


def _off_scale(arm: str, clear: Sequence[Row], models: int) -> str:
    known = [row.effective_beta for row in clear if row.effective_beta is not None]
    first, slopes = known[0], [found.slope.mean for found in known if found.slope.mean is not None]
    text = f"{arm}: the rewards of {first.reward_model} are not on the scale of the labels: calibration slope "
    text += f"{_ends(first.slope)} on held-out pairs, so kl_coef {clear[0].beta:g} is a beta of {_ends(first)} in "
    text += "units of the labels' reward"
    if len(slopes) > 1:
        text += f"; this applies to {len(slopes)} of its {models} models, slopes {min(slopes):.2f} to {max(slopes):.2f}"
    return text


def _ends(span: Span) -> str:
    return f"{span.mean:.2f} [{span.low:.2f}, {span.high:.2f}]"
