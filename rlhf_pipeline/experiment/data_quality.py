"""How far simple rules predict the labels of preference pairs, and what that says about their noise."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from rlhf_pipeline.data.kinds import as_kind
from rlhf_pipeline.data.load import lowest_hashes
from rlhf_pipeline.data.overlap import loose_key
from rlhf_pipeline.data.records import Record, plain
from rlhf_pipeline.evaluation.preferences import accuracy, longer_wins, tfidf_bradley_terry

FOLDS = 5
PAIRS = 5000
"""Most pairs that are looked at, by hash order: five fits of TF-IDF take seconds then."""


def label_noise(records: Sequence[Record]) -> dict[str, Any] | None:
    """Held-out accuracy of "longer wins" and of TF-IDF with Bradley-Terry on all pairs; None without pairs.

    Every pair is held out once: FOLDS folds by prompt, the model fitted on the others. A rule that agrees with a share
    a of the labels, or with 1 - a of them, shows that at most 1 - a are flipped at random (`noise_at_most`, from the
    ends of the 95 % intervals); a rule of length that does so shows a shortcut. Rankings count as their untied pairs.

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
    """The fold of a pair: prompts that differ in case or punctuation alone fall into one."""
    return int.from_bytes(sha256(f"fold {loose_key(pair)}".encode()).digest()[:8], "big") % FOLDS


def _contradicted(pairs: Sequence[Record]) -> int:
    """Count the pairs of which the opposite is labelled somewhere else."""
    said = [(pair.prompt_key, *zip(map(plain, pair.completions), pair.ended, strict=True)) for pair in pairs]
    all_said = set(said)
    return sum((prompt, worse, better) in all_said for prompt, better, worse in said)
