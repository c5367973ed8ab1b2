from __future__ import annotations

import yaml

from rlhf_pipeline.registry.card import escape, fence, model_card
from rlhf_pipeline.registry.manifest import build_manifest


def card(**fields):
    files = {"model.safetensors": {"size": 3, "sha256": "a" * 64}}
    return model_card(build_manifest(**{"name": "demo", "version": 2, "stage": "sft", "files": files, **fields}))


def test_escaping_keeps_text_on_its_line_and_out_of_the_markup():
    assert escape("a|b\n# <script>*x*`") == "a\\|b \\# &lt;script&gt;\\*x\\*\\`"


def test_fence_is_longer_than_any_within():
    assert fence("a ```` b") == "`````\na ```` b\n`````"


def test_front_matter_is_yaml_with_hub_bases_alone():
    parents = {"init": {"ref": "org/name@main"}, "reference": {"ref": "sft@v1"}, "other": {"ref": "/a/b"}}
    sources = ("org/pairs", "org/rows.jsonl", "collected:pairs@v1", "world:verdicts", "./a/b")
    data = [{"source": source, "digest": "d" * 64, "rows": 1} for source in sources]
    head = card(parents=parents, data=data, license="mit").split("---\n")[1]
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "sft"],
        "base_model": ["org/name"],
        "datasets": ["org/pairs"],
        "license": "mit",
    }


def test_tables_hold_parents_data_and_metrics():
    text = card(
        parents={"policy": {"ref": "sft@v1", "digest": "0123456789abcdef"}},
        data=[{"source": "a|b.jsonl", "split": "train", "digest": "d" * 64, "rows": 5, "dropped": {"null": 2}}],
        metrics={"test": {"accuracy": 0.5}, "none": None},
        moves_optimum={"reward_model.center_rewards_coefficient": 0.1},
    )
    assert (
        "## Options that move the optimum" in text and "| reward\\_model.center\\_rewards\\_coefficient | 0.1 |" in text
    )
    assert "| policy | sft@v1 | 0123456789ab |" in text
    assert f"| a\\|b.jsonl | train | 5 | null: 2 | {'d' * 12} |" in text
    assert "| test.accuracy | 0.5 |" in text
    assert "none" not in text


def test_hostile_config_stays_in_its_block():
    text = card(config={"prompt": "```\n# Not a heading"})
    assert "\n# Not a heading" not in text
    assert '````json\n{\n  "prompt": "```\\n# Not a heading"\n}\n````' in text


def test_reward_model_says_how_to_get_its_score():
    text = card(stage="reward")
    assert "AutoModelForSequenceClassification" in text
    assert "`reward_shift`" in text
