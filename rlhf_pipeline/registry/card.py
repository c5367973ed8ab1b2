"""The model card: README.md in a version's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.base import spelled
from rlhf_pipeline.config.names import DATA_SUFFIXES, HUB_ID
from rlhf_pipeline.registry.manifest import Manifest, plain

_WHAT = {
    "sft": "A language model after supervised fine-tuning.",
    "reward": "A reward model: one score per prompt and response, trained on preference pairs.",
    "ppo": "A policy trained by PPO against a reward.",
    "dpo": "A policy trained by direct preference optimisation on preference pairs.",
}
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([a-z0-9][a-z0-9.-]{0,39})[\"']?[ \t]*$", re.MULTILINE)
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


def _what(manifest: Manifest) -> str:
    """What the model is; a policy trained by a relative of PPO names it."""
    algorithm = str(manifest.config.get("algorithm") or "ppo").upper()
    return _WHAT.get(manifest.stage, "").replace("PPO", algorithm)


def model_card(manifest: Manifest) -> str:
    """Return the model card of a version as markdown."""
    title = f"# {escape(manifest.label)}"
    sections = [
        _front_matter(manifest),
        f"{title}\n\n{_what(manifest)}",
        _use(manifest),
        _table("Adapter", ("what", "value"), _flat(manifest.adapter)),
        _table("Parents", ("role", "model", "digest"), _parents(manifest)),
        _table("Data", ("source", "split", "rows", "dropped", "digest"), _data(manifest)),
        _table("Options that move the optimum", ("option", "value"), _moved(manifest)),
        _table("Metrics", ("metric", "value"), _flat({k: v for k, v in manifest.metrics.items() if k != "health"})),
        _table("Health", ("cause", "since step", "until step", "value", "meaning", "to try"), _health(manifest)),
        _table("Cost", ("item", "value"), _flat({k: v for k, v in manifest.cost.items() if k != "at_step"})),
        _table("Software", ("item", "version"), _flat({**manifest.code, **manifest.environment})),
        f"## Config\n\n{fence(json.dumps(plain(manifest.config), indent=2, ensure_ascii=False), 'json')}",
        "`manifest.json` has the full record, with the digest of every file.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def escape(text: Any) -> str:
    """Return a text that markdown shows literally, on one line and within a table cell."""
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def fence(text: str, language: str = "") -> str:
    """Return a code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def _front_matter(manifest: Manifest) -> str:
    """The metadata of the hub: licence, base models and data sets that are on the hub."""
    from huggingface_hub import ModelCardData

    task = "text-classification" if manifest.stage == "reward" else "text-generation"
    bases = {parent.ref.split("@")[0] for parent in manifest.parents.values()}
    sources = {entry.source for entry in manifest.data if not entry.source.endswith(DATA_SUFFIXES)}
    fields = ModelCardData(
        base_model=[base for base in sorted(bases) if re.fullmatch(HUB_ID, base)] or None,
        datasets=[source for source in sorted(sources) if re.fullmatch(HUB_ID, source)] or None,
        license=manifest.license,
        library_name="peft" if manifest.adapter else "transformers",
        pipeline_tag=task,
        tags=["rlhf", manifest.stage],
    )
    return f"---\n{fields.to_yaml(line_break=chr(10))}\n---"


def license_of(folder: Path) -> str | None:
    """Return the licence that the card of a model's folder names, or None."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")[:100_000]
    except (OSError, ValueError):
        return None
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    named = _LICENSE.search(head[1]) if head else None
    return named[1] if named else None


def _use(manifest: Manifest) -> str:
    if manifest.stage == "reward":
        auto = "AutoModelForSequenceClassification"
        note = (
            "\n\nThe score of a prompt and response is the single logit minus `reward_shift` of "
            "`config.json` (0 if it is absent). Plain transformers returns the logit."
        )
    else:
        auto, note = "AutoModelForCausalLM", ""
    load, name = f"model = {auto}.from_pretrained(folder)", auto
    if manifest.adapter:
        labels = ", num_labels=1" if manifest.stage == "reward" else ""
        if manifest.adapter.get("load_in_4bit"):
            auto += ", BitsAndBytesConfig"
            keys = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
            how = ", ".join(f"{key}={manifest.adapter[key]!r}" for key in keys)
            labels += f", quantization_config=BitsAndBytesConfig({how})"
        load = f"base = {name}.from_pretrained(base_folder{labels})\nmodel = PeftModel.from_pretrained(base, folder)"
        load = f"from peft import PeftModel\n{load}"
        base = escape(manifest.parents["base"].ref)
        note += (
            f"\n\nThis is an adapter: it holds only the difference to its base, {base}, whose folder is `base_folder`. "
            "If the base is an adapter itself, or for a tool without peft, `rlhf models export REF DIR --merge` writes "
            "whole weights."
        )
    code = (
        f"from transformers import AutoTokenizer, {auto}\n\n{load}\ntokenizer = AutoTokenizer.from_pretrained(folder)"
    )
    return f"## Use\n\n{fence(code, 'python')}{note}"


def _parents(manifest: Manifest) -> Iterable[tuple]:
    for role, parent in manifest.parents.items():
        yield role, parent.ref, (parent.digest or "")[:12]


def _data(manifest: Manifest) -> Iterable[tuple]:
    for entry in manifest.data:
        dropped = ", ".join(f"{reason}: {count}" for reason, count in entry.dropped.items())
        yield entry.source, entry.split or "", entry.rows, dropped or 0, entry.digest[:12]


def _health(manifest: Manifest) -> Iterable[tuple]:
    for found in manifest.metrics.get("health", ()):
        until = found["until_step"] or "the end"
        seen = f"{found['figure']} {found['value']:.4g}"
        yield found["cause"], found["since_step"], until, seen, found["message"], found["knob"]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", f"{value:.6g}" if isinstance(value, float) else value


def _moved(manifest: Manifest) -> Iterable[tuple[str, str]]:
    return ((name, spelled(value)) for name, value in (manifest.moves_optimum or {}).items())


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple]) -> str:
    lines = [f"| {' | '.join(escape(cell) for cell in row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"## {title}", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *lines])
