"""A language model that compares responses, labels them, and rates them, from the command to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.run import run_compare
from rlhf_pipeline.data import world
from rlhf_pipeline.errors import ConfigError, RunFailed
from rlhf_pipeline.measure.bench import find_policies, set_up
from rlhf_pipeline.measure.evaluate import measure
from rlhf_pipeline.report import load
from tests.rollout.llm_server import longer_wins, serving

KEY = "sk-a-secret-of-this-test"


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("KEY_OF_A_TEST", KEY)


def judge(server, **changes):
    settings = {"endpoint": server.endpoint, "model": "tiny", "api_key_env": "KEY_OF_A_TEST", "retry_seconds": 0.0}
    return settings | changes


def compared(lab, server, **changes):
    options = {"max_prompts": 6, "samples": 3, "arms": ["dpo"], "baseline": "sft", **changes}
    options.setdefault("judge", judge(server))  # `judge` with an endpoint is a language model
    return run_compare(lab.config("compare", **options), lab.home, quiet=True)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    lab = tiny.copy(tmp_path_factory.mktemp("judged") / "home")
    lab.run("dpo", max_steps=2)
    return lab


def words(example, k):
    """The words of a response, without the end token and without the world's control token."""
    return [token for token in example.completions[k] if token not in (world.EOS_ID, world.PAD_ID)]


@pytest.mark.check
def test_win_rate_and_agreement_are_those_of_the_rule(trained):
    """The judge prefers more words: both figures are counted here from the sampled tokens and from the pairs."""
    with serving(longer_wins) as server:
        found = compared(trained, server)
    ours = found.llm_judge
    (pair,) = ours.pairs
    assert (ours.judge, ours.endpoint, ours.pairs_per_prompt) == ("llm-judge:tiny", server.endpoint, 1)
    assert (pair.a, pair.b, pair.comparisons, pair.unreadable) == ("dpo@v1", "sft@v1", 6, 0)

    config = trained.config("compare", max_prompts=6, samples=3, arms=["dpo"], baseline="sft")
    models = find_policies(trained.registry, ["dpo", "sft"], lambda _: None)
    options = {"reference": None, "samples": 3, "seed": config.seed, "say": lambda _: None}
    bench = set_up(trained.registry, config, models[0], torch.device("cpu"), **options)
    mine, theirs = (measure(bench, bench.policy(model)).examples for model in models)
    gaps = [len(words(one, 0)) - len(words(other, 1)) for one, other in zip(mine, theirs, strict=True)]
    assert pair.estimate.mean == pytest.approx(sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / 6)
    assert pair.ties == pytest.approx(sum(gap == 0 for gap in gaps) / 6)

    labels = ours.labels
    rows = [row for row in rows_of(trained) if row["split"] == "test"]
    assert labels.pairs == labels.comparisons == len(rows) > 5
    assert labels.prompts == len({row["prompt"] for row in rows})
    assert 0 < labels.accuracy.mean < 1 and labels.accuracy.low < labels.accuracy.mean < labels.accuracy.high


def length(text):
    """The words of a response without the world's control token, which the judge does not see."""
    return sum(word != "<pad>" for word in text.split())


def rows_of(lab):
    path = lab.registry.resolve_data("pairs").path / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.check
def test_agreement_with_labels_counts_a_tie_one_half(trained):
    """A judge that reads "great" as good: of each held-out pair the side with more of it wins."""

    def prefers_great(text):
        if "[Reply A]" not in text:
            return "ready"
        first, second = (part.count("great") for part in text.split("[Reply A]")[1].split("[Reply B]"))
        return f"[[{'A' if first > second else 'B' if second > first else 'C'}]]"

    with serving(prefers_great) as server:
        labels = compared(trained, server).llm_judge.labels
    by_prompt = {}
    for row in rows_of(trained):
        if row["split"] == "test":
            gap = row["chosen"].count("great") - row["rejected"].count("great")
            by_prompt.setdefault(row["prompt"], []).append((gap > 0) + 0.5 * (gap == 0))
    expected = sum(sum(values) / len(values) for values in by_prompt.values()) / len(by_prompt)
    assert labels.accuracy.mean == pytest.approx(expected)


@pytest.mark.check
def test_results_report_and_cache_hold_no_key(trained):
    with serving(longer_wins) as server:
        results = compared(trained, server, name="kept")
        asked = len(server.requests)
        compared(trained, server, name="again")
        assert len(server.requests) == asked  # every answer is in the cache
    assert load(results.path).llm_judge == results.llm_judge
    page = Path(results.report).read_text()
    assert "Judged by a language model" in page and "as labelled" in page
    files = [path for path in trained.home.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)


@pytest.mark.check
def test_a_response_is_not_compared_with_the_one_of_its_own_random_numbers(trained, undrawn):
    with serving(longer_wins) as server:
        (pair,) = compared(trained, server, samples=1).llm_judge.pairs
        assert pair.estimate is None and "sample at least 2" in pair.why_not
        several = compared(trained, server, judge=judge(server, pairs_per_prompt=9, label_pairs=0)).llm_judge
    assert several.pairs_per_prompt == 3 and several.pairs[0].comparisons == 18
    assert several.labels is None and several.why_no_labels == "label_pairs is 0"


def test_what_is_wrong_is_found_before_anything_is_sampled(trained, monkeypatch):
    def never(*_, **__):
        raise AssertionError("sampled")

    monkeypatch.setattr("rlhf_pipeline.evaluation.sampled.sample_for_prompts", never)
    with serving(lambda _: (401, "no")) as server:
        with pytest.raises(RunFailed, match="status 401"):
            compared(trained, server)
        monkeypatch.delenv("KEY_OF_A_TEST")
        with pytest.raises(ConfigError, match="KEY_OF_A_TEST"):
            compared(trained, server)


@pytest.mark.check
def test_collect_takes_its_verdicts_and_leaves_out_ties(lab):
    with serving(longer_wins) as server:
        result = lab.run("collect", judge=judge(server), num=30, output_name="judged")
        assert result.metrics["judge"] == "llm-judge:tiny" and result.metrics["dropped"]["tie"] > 0
        path = lab.registry.resolve_data("judged").path / "records.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) + sum(result.metrics["dropped"].values()) == 30
        assert rows and all(length(row["chosen"]) > length(row["rejected"]) for row in rows)
        assert not any("label_probability" in row for row in rows)
        assert {(row["chosen_score"], row["rejected_score"]) for row in rows} == {(1.0, 0.0)}
        several = lab.run("collect", judge=judge(server), num=6, k=3, output_name="several")
        path = lab.registry.resolve_data("several").path / "records.jsonl"
        for row in [json.loads(line) for line in path.read_text().splitlines()]:
            lengths = [length(text) for text in row["completions"]]
            assert row["ranks"] == [1 + sum(other > mine for other in lengths) for mine in lengths]
    assert several.metrics["records"] > 0
    assert lab.registry.resolve_data("judged").manifest.config["llm_judge"]["api_key_env"] == "KEY_OF_A_TEST"


def test_ppo_is_trained_on_its_ratings(lab):
    def rate(text):
        reply = text.split("[Reply]\n")[1].split("\n\n")[0]
        return f"[[{len(reply.split())}]]"

    with serving(rate) as server:
        reward = [{"llm_judge": judge(server), "weight": 1.0}]
        result = lab.run("ppo", reward_model_path=None, reward_functions=reward, max_steps=2)
        texts = [text for text in server.texts if "[Reply]" in text]
    row = lab.rows(result.run)[0]
    assert texts and 0 < row["objective/scores"] <= 4
    config = lab.registry.resolve(result.model).manifest.config
    assert config["reward_functions"][0]["source"] == "llm-judge:tiny" and config["value_init"] == "sft"


def test_what_a_config_must_not_say(lab):
    def refused(stage, **changes):
        with pytest.raises(ConfigError) as error:
            lab.config(stage, **changes)
        return str(error.value)

    at = {"endpoint": "http://127.0.0.1:1/v1", "model": "m"}
    arms = {"arms": ["a", "b"]}
    assert "without a key or password" in refused("compare", **arms, judge={**at, "endpoint": "http://me:pw@host/v1"})
    assert "http or https" in refused("compare", **arms, judge={**at, "endpoint": "localhost:8000"})
    assert "has no {second}" in refused("compare", **arms, judge={**at, "template": "{prompt} {first}"})
    assert "has no {response}" in refused(
        "ppo", reward_model_path=None, reward_functions=[{"llm_judge": {**at, "template": "{prompt}"}}]
    )
    assert "without llm_judge" in refused("collect", judge="llm-judge:m")
    assert "without llm_judge" in refused("ppo", reward_model_path=None, reward_functions="llm-judge:m")
    assert "beside llm_judge" in refused("collect", judge="world", llm_judge=at)
    assert "decides each pair itself" in refused("collect", judge=at, labels="bradley-terry")
    again = lab.config("collect", judge=at)
    assert (again.judge, again.labels) == ("llm-judge:m", "rank")
    assert type(again).model_validate(again.model_dump()) == again


def test_a_command_finds_a_missing_key_in_its_dry_run(lab, monkeypatch, capsys):
    monkeypatch.delenv("KEY_OF_A_TEST")
    values = "{endpoint: http://127.0.0.1:1/v1, model: m, api_key_env: KEY_OF_A_TEST}"
    command = ["data", "collect", "sft", "--prompts", "world:verdicts", "--num", "8", "--name", "x", "--dry-run"]
    assert main([*command, "--json", "--home", str(lab.home), f"llm_judge={values}"]) == 2
    assert "KEY_OF_A_TEST" in capsys.readouterr().out
