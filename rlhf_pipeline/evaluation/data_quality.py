"""Findings on a source in words, and how well simple rules predict its labels, which bounds the label noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from rlhf_pipeline.data.encode import ADVICE
from rlhf_pipeline.data.kinds import as_kind
from rlhf_pipeline.data.overlap import EVALUATED, loose_key
from rlhf_pipeline.data.records import Record, plain
from rlhf_pipeline.data.samples import lowest_hashes
from rlhf_pipeline.data.splits import SPLITS
from rlhf_pipeline.evaluation.preference_metrics import accuracy, longer_wins, tfidf_bradley_terry

FOLDS = 5
PAIRS = 5000
"""The most pairs that are used, in hash order: five fits of TF-IDF then take seconds."""

SHORTCUT = 0.65
"""A rule that ignores quality is reported if it predicts at least this share of the labels."""
FEW_PAIRS = 20
"""With fewer pairs, the interval of a rule is too wide to be useful."""
FEW_JUDGE_PAIRS = 200
"""Rule of thumb: a reward model trained on fewer pairs seldom beats length and TF-IDF."""
FEW_TEST_PROMPTS = 100
"""With fewer prompts, the 95 % interval of a win rate is wider than ±.1."""
NAMED = 3
CONTROL = "their text has control tokens or marks of a chat template, encoded as such: was it rendered before?"


def findings(found: Mapping[str, Any]) -> list[str]:
    """Return sentences on what the figures of a source mean for training on it, the most serious first.

    The standard error of a win rate over n prompts is about .5 / sqrt(n): sqrt(p (1 - p) / n) at p = 1/2.

    Args:
        found: what `data.check.describe` returns, with `label_noise`.
    """
    return [
        *_stops(found),
        *_rules(found.get("label_noise")),
        *_minimum(found.get("win_graphs")),
        *_repeated(found),
        *_tokens(found.get("tokens", {})),
        *_sizes(found),
    ]


def _stops(found: Mapping[str, Any]) -> Iterator[str]:
    if found["faulty_rows"]:
        yield (
            f"{found['faulty_rows']} of {found['rows']} rows stop a stage ({_counts(found['faults'])}): correct them "
            "or leave them out with `skip_bad_rows: true`"
        )
    if found["unread_column"] is not None:
        yield (
            f"the column {found['unread_column']!r} is not read; did you mean prompt? Without it, the prompt is the "
            "common beginning of 'chosen' and 'rejected'"
        )
    if found["labels"]:
        yield (
            f"each row has a label ({_counts(found['labels'])}): `rlhf dpo` with loss_type kto trains on such rows and "
            "needs both labels; other stages refuse them, because they would also learn what is labelled false"
        )
    yield from found["notes"]
    if (margins := found["margins"]) is not None:
        yield (
            f"{margins['pairs']} of {found['kinds'].get('pair', 0)} pairs have a margin, from {margins['min']:g} to "
            f"{margins['max']:g}, mean {margins['mean']:.3g}: `rlhf train-rm` and `rlhf dpo` subtract it from the "
            "difference of the two rewards if `use_margin: true`, which moves the optimum"
        )
    if found["leaked_rows"]:
        yield (
            f"leakage: {found['leaked_rows']} rows of evaluation splits are also in their training split "
            f"({_counts(found['leaks'])}): a stage that trains on it refuses them"
        )
    similar = found["similar_prompt_overlap"]
    shared = {name: similar.get("/".join(sorted((name, "train"))), 0) for name in EVALUATED}
    if any(shared.values()) and not found["leaked_rows"]:
        yield f"leakage: 'train' has prompts of evaluation splits, apart from case and punctuation ({_counts(shared)})"


def _rules(noise: Mapping[str, Any] | None) -> Iterator[str]:
    if noise is None:
        return
    if noise["contradicted"]:
        yield f"{noise['contradicted']} pairs also occur with the opposite label"
    if noise["pairs"] < FEW_PAIRS:
        return
    longer, words = noise["longer_wins"], noise["tfidf"]
    share = max(longer["accuracy"], 1 - longer["accuracy"])
    if share >= SHORTCUT and not longer["accuracy_low"] <= 0.5 <= longer["accuracy_high"]:
        side = "longer" if longer["accuracy"] > 0.5 else "shorter"
        yield (
            f"length alone predicts {share:.0%} of the labels (the {side} response is preferred): a model can learn "
            "length instead of quality; read the length-controlled win rates of `rlhf compare`"
        )
    if words["accuracy"] >= SHORTCUT and words["accuracy_low"] > 0.5:
        yield (
            f"words alone (TF-IDF, on held-out prompts) predict {words['accuracy']:.0%} of the labels: a "
            "reward model has to beat that to pass its gate"
        )


def _minimum(graphs: Mapping[str, int] | None) -> Iterator[str]:
    if graphs is None or graphs["connected"] == graphs["prompts"]:
        return
    yield (
        f"{graphs['connected']} of {graphs['prompts']} prompts have labels with a finite best reward for each response "
        "(a chain of wins leads from each response to each other; one label per pair gives none). On the "
        "other prompts the loss of a reward model or of DPO keeps falling as reward differences grow, at any beta: the "
        "result depends on when training stops. Choose the step by held-out pairs, or label each pair more than once"
    )


def _repeated(found: Mapping[str, Any]) -> Iterator[str]:
    if count := found["duplicate_rows"]:
        first = found["duplicate_list"][:NAMED]
        more = ", ..." if count > len(first) else ""
        yield f"{count} of {found['usable']} rows repeat an earlier one exactly: {', '.join(first)}{more}"


def _tokens(found: Mapping[str, Any]) -> Iterator[str]:
    for reason, rows in found.items():
        first = rows["first"][:NAMED]
        more = ", ..." if rows["rows"] > len(first) else ""
        yield f"{rows['rows']} rows ({', '.join(first)}{more}): {ADVICE.get(reason, CONTROL)}"


def _sizes(found: Mapping[str, Any]) -> Iterator[str]:
    splits, hashed = found["splits"], found["splits_from"] != "source"
    if not splits:
        return
    names = [*(name for name in SPLITS if hashed or name in splits), *sorted(set(splits) - set(SPLITS))]
    origin = "by the hash of the prompt, default `split_fractions`" if hashed else "as in the source"
    yield f"rows of the splits: {', '.join(f'{name} {splits.get(name, 0)}' for name in names)} ({origin})"
    judged = splits.get("judge", 0)
    if set(found["kinds"]) <= {"pair", "ranking"} and judged < FEW_JUDGE_PAIRS and (hashed or judged):
        what = "pairs" if "pair" in found["kinds"] else "rankings"
        fix = "raise split_fractions.judge" if hashed else "add rows to it"
        yield (
            f"judge split: {judged} {what}; a judge trained on so few is unlikely to pass its gate: {fix}"
            if judged
            else f"judge split: no {what}; no judge can be trained on it: {fix}"
        )
    prompts = found["split_prompts"].get("test", 0)
    if "text" in found["kinds"] or prompts >= FEW_TEST_PROMPTS or not (hashed or prompts):
        return
    fix = "raise split_fractions.test" if hashed else "add prompts to it"
    if not prompts:
        yield f"test split: no prompts; nothing can be compared on it: {fix}"
        return
    error = 0.5 / prompts**0.5
    yield (
        f"test split: {prompts} prompts; a win rate on so few has a standard error of about .5/sqrt({prompts}) = "
        f"{error:.2f} and a 95 % interval of ±{1.96 * error:.2f}: {fix}"
    )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def label_noise(records: Sequence[Record]) -> dict[str, Any] | None:
    """Held-out accuracy of "longer wins" and of TF-IDF with Bradley-Terry on all pairs; None without pairs.

    Every pair is held out once: FOLDS folds by prompt, with the model fitted on the other folds. If a rule agrees with
    a share a (or 1 - a) of the labels, at most 1 - a are flipped at random (`noise_at_most`, from the ends of the 95 %
    intervals); if that rule is length, the labels have a shortcut. Rankings count as their untied pairs.

    Returns:
        pairs, prompts, longer_wins and tfidf (accuracy, accuracy_low, accuracy_high), noise_at_most, contradicted:
        pairs whose opposite is labelled too; expected_noise: mean of min(p, 1 - p) where label probabilities are known.
    """
    preferences = [record for record in records if record.kind in ("pair", "ranking")]
    if not preferences:
        return None
    known = [record.extra.get("label_probability") for record in preferences]
    pairs = as_kind(preferences, "pair")[0]
    if not pairs:
        return None
    contradicted = _contradicted(pairs)
    pairs = lowest_hashes(pairs, PAIRS)
    texts = [(plain(pair.completions[0]), plain(pair.completions[1])) for pair in pairs]
    prompts = [pair.prompt_key for pair in pairs]
    folds = [_fold(pair) for pair in pairs]
    tfidf = [0.0] * len(pairs)
    for fold in range(FOLDS):
        held_out = [i for i, own in enumerate(folds) if own == fold]
        train = [pair for pair, own in zip(texts, folds, strict=True) if own != fold]
        for i, value in zip(held_out, tfidf_bradley_terry(train, [texts[i] for i in held_out]), strict=True):
            tfidf[i] = value
    found: dict[str, Any] = {"pairs": len(pairs), "prompts": len(set(prompts))}
    longer = longer_wins([chosen for chosen, _ in texts], [rejected for _, rejected in texts])
    for name, differences in (("longer_wins", longer), ("tfidf", tfidf)):
        estimate = accuracy(differences, prompts)
        found[name] = {"accuracy": estimate.mean, "accuracy_low": estimate.low, "accuracy_high": estimate.high}
    rules = [found["longer_wins"], found["tfidf"]]
    sure = [share for rule in rules for share in (rule["accuracy_low"], 1 - rule["accuracy_high"])]
    found["noise_at_most"] = 1 - max(0.5, *(share for share in sure if share == share))
    found["contradicted"] = contradicted
    if None not in known:
        found["expected_noise"] = sum(min(p, 1 - p) for p in known if p is not None) / len(known)
    return found


def _fold(pair: Record) -> int:
    """The fold of a pair; prompts that differ only in case or punctuation are in the same fold."""
    return int.from_bytes(sha256(f"fold {loose_key(pair)}".encode()).digest()[:8], "big") % FOLDS


def _contradicted(pairs: Sequence[Record]) -> int:
    """Count the pairs that also occur with the opposite label."""
    said = [(pair.prompt_key, *zip(map(plain, pair.completions), pair.ended, strict=True)) for pair in pairs]
    all_said = set(said)
    return sum((prompt, worse, better) in all_said for prompt, better, worse in said)
