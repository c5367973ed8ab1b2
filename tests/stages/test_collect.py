"""Collected preference data: labels, what is left out, and what is read back."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.splits import assign_splits
from rlhf_pipeline.data.world import SPLITS, encode, parse_prompt, verdicts
from rlhf_pipeline.data.world.vocabulary import ASPECTS, GENRES
from rlhf_pipeline.errors import ConfigError
from rlhf_pipeline.stages.collect import preference_order

DRAWS = 20_000


def rows_of(lab, name="collected"):
    path = lab.registry.resolve_data(name).path / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("difference", [0.0, 1.0, -2.0, 40.0])
def test_pairs_are_labelled_by_bradley_terry(difference):
    scores = torch.tensor([[difference, 0.0]]).expand(DRAWS, 2)
    order = preference_order(scores, "bradley-terry", torch.Generator().manual_seed(0))
    p = 1 / (1 + math.exp(-difference))
    found = float((order[:, 0] == 0).double().mean())
    assert abs(found - p) <= 4 * math.sqrt(p * (1 - p) / DRAWS) + 1e-9


def test_rankings_are_draws_of_plackett_luce():
    scores = torch.tensor([1.0, 0.0, -0.5])
    drawn = preference_order(scores.expand(DRAWS, 3), "bradley-terry", torch.Generator().manual_seed(1)).tolist()
    weights = scores.exp().tolist()
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            third = 3 - first - second
            p = weights[first] / sum(weights) * weights[second] / (weights[second] + weights[third])
            found = sum(order == [first, second, third] for order in drawn) / DRAWS
            assert abs(found - p) <= 4 * math.sqrt(p * (1 - p) / DRAWS)


def test_labels_by_rank_are_the_order_of_the_scores():
    scores = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 3.0]])
    order = preference_order(scores, "rank", torch.Generator())
    assert order.tolist() == [[1, 2, 0], [2, 0, 1]]  # ties in the order of sampling


def test_every_row_says_what_the_judge_and_the_draw_were(lab):
    result = lab.run("collect", num=120)
    rows = rows_of(lab)
    assert len(rows) == result.metrics["records"]
    for row in rows:
        ids = [row["chosen_ids"], row["rejected_ids"]]
        ended = [row["chosen_ended"], row["rejected_ended"]]
        scores = [row["chosen_score"], row["rejected_score"]]
        expected = verdicts([row["prompt_ids"]] * 2, ids, ended).reward.tolist()
        assert scores == pytest.approx(expected, abs=1e-6)
        odds = 1 / (1 + math.exp(scores[1] - scores[0]))
        assert row["label_probability"] == pytest.approx(odds, abs=1e-9)
        assert encode(row["prompt"]) == row["prompt_ids"]
        assert ids[0] != ids[1]
    flipped = sum(row["label_probability"] < 0.5 for row in rows)
    assert 0 < flipped < len(rows) / 2


def test_the_share_of_surprising_labels_is_what_the_probabilities_say(tiny):
    rows = rows_of(tiny, "pairs")
    favourites = [max(row["label_probability"], 1 - row["label_probability"]) for row in rows]
    found = sum(row["label_probability"] > 0.5 for row in rows if row["label_probability"] != 0.5)
    free = [p for p, row in zip(favourites, rows, strict=True) if row["label_probability"] != 0.5]
    sigma = math.sqrt(sum(p * (1 - p) for p in free))
    assert abs(found - sum(free)) <= 4 * sigma


def test_identical_pairs_are_left_out_and_counted(lab):
    result = lab.run("collect", num=150, temperature=0.05)  # nearly greedy: most pairs are identical
    rows = rows_of(lab)
    dropped = result.metrics["dropped"]["identical_pair"]
    assert dropped > 30
    assert len(rows) + dropped == 150
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in rows)


def test_prompts_take_turns_and_keep_their_split(lab):
    result = lab.run("collect", num=72)
    rows = rows_of(lab)
    for row in rows:
        genre, aspect = parse_prompt(row["prompt_ids"])
        assert row["split"] == SPLITS[GENRES[genre], ASPECTS[aspect]]
    counts = [[row["prompt"] for row in rows].count(prompt) for prompt in {row["prompt"] for row in rows}]
    assert len(counts) == 36 and max(counts) == 2
    assert sum(result.metrics["by_split"].values()) == len(rows)


def test_a_later_first_record_goes_on_with_the_prompts_and_draws_anew(lab):
    lab.run("collect", num=36)  # once for each prompt of the world
    lab.run("collect", num=18, first_record=18, output_name="rest")
    lab.run("collect", num=18, output_name="again")
    whole, rest, again = rows_of(lab), rows_of(lab, "rest"), rows_of(lab, "again")
    place = {row["prompt"]: number for number, row in enumerate(whole)}  # identical pairs are left out of each
    before, after = ([place[row["prompt"]] for row in rows if row["prompt"] in place] for rows in (again, rest))
    assert len(before) > 10 and len(after) > 10
    assert before == sorted(before) and after == sorted(after) and max(before) < min(after)
    same = [row == whole[place[row["prompt"]]] for row in rest if row["prompt"] in place]
    assert not all(same)


@pytest.mark.check
def test_flips_change_labels_only(lab):
    lab.run("collect", num=400)
    lab.run("collect", num=400, flip_rate=0.3, output_name="flipped")
    clean, noisy = rows_of(lab), rows_of(lab, "flipped")
    flips = 0
    for one, other in zip(clean, noisy, strict=True):
        same = one["chosen_ids"] == other["chosen_ids"]
        flips += not same
        ours, theirs = (one, other) if same else ({**one, "chosen_ids": one["rejected_ids"]}, other)
        assert ours["chosen_ids"] == theirs["chosen_ids"] and one["prompt_ids"] == other["prompt_ids"]
        right = 1 / (1 + math.exp(-(other["chosen_score"] - other["rejected_score"])))
        assert other["label_probability"] == pytest.approx(0.7 * right + 0.3 * (1 - right), abs=1e-12)
    assert abs(flips / len(clean) - 0.3) <= 4 * math.sqrt(0.3 * 0.7 / len(clean))
    flipped = []
    for seed in (1, 2, 3):  # each seed flips other pairs
        for rate in (0.0, 0.3):
            lab.run("collect", num=36, flip_rate=rate, seed=seed, output_name=f"pairs{seed}-{rate:g}")
        both = zip(rows_of(lab, f"pairs{seed}-0"), rows_of(lab, f"pairs{seed}-0.3"), strict=True)
        flipped.append([row["prompt"] for row, other in both if row["chosen_ids"] != other["chosen_ids"]])
    assert flipped[0] != flipped[1] != flipped[2] != flipped[0]
    with pytest.raises(ConfigError, match="a ranking has no label to flip"):
        lab.config("collect", k=4, flip_rate=0.1)


def test_rows_are_read_back_as_pairs_with_their_ids_and_splits(lab):
    lab.run("collect", num=80)
    found = read_records("collected:collected", home=lab.home)
    rows = rows_of(lab)
    assert found.tokenizer_digest == lab.registry.resolve("sft").manifest.tokenizer_digest
    assert len(found.records) == len(rows)
    assert assign_splits(found.records, source=found.source) == [row["split"] for row in rows]
    for record, row in zip(found.records, rows, strict=True):
        assert record.kind == "pair"
        assert list(record.prompt_ids) == row["prompt_ids"]
        assert [list(ids) for ids in record.completion_ids] == [row["chosen_ids"], row["rejected_ids"]]
        assert list(record.ended) == [row["chosen_ended"], row["rejected_ended"]]
        assert record.extra["label_probability"] == row["label_probability"]


def test_a_single_split_stays_that_split(lab):
    """Only the judge's prompts: all rows are of that split, whatever the hash of their prompts says."""
    result = lab.run("collect", splits=["judge"], num=40)
    assert set(result.metrics["by_split"]) == {"judge"}
    found = read_records("collected:collected", home=lab.home)
    assert set(assign_splits(found.records, source=found.source)) == {"judge"}
    trained = lab.run("train-rm", dataset_name="collected:collected", dataset_train_split="judge", max_steps=1)
    assert trained.metrics["train_pairs"] == len(found.records)


@pytest.mark.parametrize("labels", ["rank", "bradley-terry"])
def test_more_than_two_responses_make_rankings(lab, labels):
    lab.run("collect", k=3, num=36, labels=labels)
    rows = rows_of(lab)
    assert len(rows) == 36
    for row in rows:
        assert sorted(row["ranks"]) == [1, 2, 3]
        assert len(row["completions"]) == len(row["completion_ids"]) == len(row["ended"]) == len(row["scores"]) == 3
        if labels == "rank":
            by_rank = [score for _, score in sorted(zip(row["ranks"], row["scores"], strict=True))]
            assert by_rank == sorted(by_rank, reverse=True)
    found = read_records("collected:collected", home=lab.home)
    assert {record.kind for record in found.records} == {"ranking"}
    assert [list(map(list, record.completion_ids)) for record in found.records] == [
        row["completion_ids"] for row in rows
    ]


def test_pairs_of_a_ranking_follow_its_ranks(lab):
    """The ranks are the labels that were drawn; the scores beside them only say what the judge thought."""
    lab.run("collect", k=3, num=36, labels="bradley-terry")
    result = lab.run("dpo", dataset_name="collected:collected", dataset_train_split="all", max_steps=1)
    distinct = 0
    for row in rows_of(lab):
        ids = [tuple(value) for value in row["completion_ids"]]
        distinct += sum(ids[i] != ids[j] for i in range(3) for j in range(i))
    assert result.metrics["train_pairs"] == distinct
    from rlhf_pipeline.data.kinds import as_kind

    found = read_records("collected:collected", home=lab.home)
    for record, row in zip(found.records, rows_of(lab), strict=True):
        place = {tuple(ids): rank for ids, rank in zip(row["completion_ids"], row["ranks"], strict=True)}
        if len(place) < 3:
            continue
        for pair in as_kind([record], "pair")[0]:
            better, worse = (place[tuple(ids)] for ids in pair.completion_ids)
            assert better < worse


def test_a_function_or_a_reward_model_may_judge(lab, function):
    name = function(lambda prompts, completions, **_: [float(len(text.split())) for text in completions])
    lab.run("collect", judge=name, labels="rank")
    for row in rows_of(lab):
        assert len(row["chosen"].split()) >= len(row["rejected"].split())
        assert "label_probability" not in row
    result = lab.run("collect", output_name="by-model", judge="reward")
    assert set(lab.registry.resolve_data("by-model").manifest.parents) == {"policy", "judge"}
    assert result.metrics["judge"] == "reward"


def test_one_seed_gives_one_data_set(lab):
    lab.run("collect", output_name="a")
    lab.run("collect", output_name="b")
    lab.run("collect", output_name="c", seed=1)
    assert rows_of(lab, "a") == rows_of(lab, "b") != rows_of(lab, "c")


def test_the_law_of_the_best_response_is_that_of_best_of_k():
    """All 4^3 draws of 3 out of 4 responses: P(best = y) = p(y) / P(r) (F(r)^3 - F(r-)^3), ties by the order."""
    p, reward = [0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 1.0, 2.0]  # P(0) = .3, P(1) = .6, P(2) = .1
    law = [0.0] * 4
    for draw in itertools.product(range(4), repeat=3):
        scores = torch.tensor([[reward[y] for y in draw]], dtype=torch.float64)
        (order,) = preference_order(scores, "best", torch.Generator()).tolist()
        law[draw[order[0]]] += math.prod(p[y] for y in draw)
    middle = 0.9**3 - 0.3**3
    assert law == pytest.approx([middle * 0.4 / 0.6, 0.3**3, middle * 0.2 / 0.6, 1 - 0.9**3], abs=1e-12)


def test_the_best_of_k_responses_is_a_demonstration(lab):
    """RAFT: what `rlhf sft` reads of the best alone is what it reads of a ranking by the same scores."""
    lab.run("collect", k=4, num=36, labels="best", output_name="best")
    lab.run("collect", k=4, num=36, labels="rank", output_name="ranked")
    best, ranked = rows_of(lab, "best"), rows_of(lab, "ranked")
    assert len(best) == len(ranked) == 36
    for one, every in zip(best, ranked, strict=True):
        place = every["ranks"].index(1)
        assert one["score"] == max(every["scores"]) and one["prompt_ids"] == every["prompt_ids"]
        assert one["completion_ids"] == every["completion_ids"][place]
        assert (one["completion"], one["ended"]) == (every["completions"][place], every["ended"][place])
        assert set(one) == {"prompt", "prompt_ids", "split", "completion", "completion_ids", "ended", "score"}
    found = read_records("collected:best", home=lab.home)
    assert {record.kind for record in found.records} == {"demonstration"}
    result = [lab.run("sft", dataset_name=f"collected:{name}", output_name=name) for name in ("best", "ranked")]
    one, other = (lab.weights(made.model) for made in result)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert lab.registry.resolve("best").manifest.data[0].source.startswith("collected:best")


def test_two_equal_responses_have_a_best_one(lab):
    lab.run("collect", k=2, num=200, labels="best", output_name="best")
    assert len(rows_of(lab, "best")) == 200
    lab.run("collect", k=2, num=200, labels="rank", output_name="pairs-by-rank")
    assert len(rows_of(lab, "pairs-by-rank")) < 200


def test_sft_on_the_preferred_responses_reads_no_rejected_one(lab):
    from rlhf_pipeline.stages.common import tokenizer_of
    from rlhf_pipeline.stages.data import StageData

    config = lab.config("sft")
    examples, _ = StageData(config, lab.home, lambda _: None).training(tokenizer_of(lab.registry.resolve("sft")))
    chosen = [row["chosen_ids"] for row in rows_of(lab, "pairs") if row["split"] == "train"]
    assert [example.completions for example in examples] == [[ids] for ids in chosen]


def test_the_best_response_has_no_label_to_flip(lab):
    with pytest.raises(ConfigError, match=r"flip_rate: found 0\.1 with labels best"):
        lab.config("collect", labels="best", flip_rate=0.1)
