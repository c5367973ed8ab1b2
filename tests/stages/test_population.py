"""Fresh pairs of the built-in world: their law, their labels, and a run on them."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

from rlhf_pipeline.data import world
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import ConfigError, MismatchError
from rlhf_pipeline.evaluation.closed_forms import optimum
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.selfcheck import inspect_model
from rlhf_pipeline.stages.population import Population
from tests.models.conftest import build

PROMPTS = [("comedy", "plot"), ("horror", "music"), ("drama", "ending")]
BETA = 0.5


@pytest.fixture(scope="module")
def reference() -> Policy:
    torch.set_num_threads(1)
    model = build("llama")
    return Policy(model, inspect_model(model))


def make(reference: Policy, proposal: str = "mixture", response_length: int = 2) -> Population:
    prompts = [
        Example(world.encode(world.prompt_text(*pair)), [], [], f"p{number}", "x")
        for number, pair in enumerate(PROMPTS)
    ]
    return Population(reference, prompts, stop_id=1, response_length=response_length, beta=BETA, proposal=proposal)


@pytest.mark.check
@pytest.mark.parametrize("proposal", ["mixture", "reference"])
def test_both_responses_follow_the_declared_proposal(reference, proposal):
    population = make(reference, proposal)
    count = 30_000
    examples, _ = population.draw(count, torch.Generator().manual_seed(3))
    for table in population.tables:
        ref = table.ref_logprobs.exp()
        law = (ref + optimum(table.ref_logprobs, table.reward, BETA).exp()) / 2 if proposal == "mixture" else ref
        assert law.sum().item() == pytest.approx(1.0, abs=1e-6)
        index = {tuple(population.tree.completion(leaf)): leaf for leaf in range(population.tree.num_leaves)}
        drawn = [e for e in examples if e.prompt_key == table.prompt.prompt_key]
        assert len(drawn) == count // 3
        seen = torch.zeros(population.tree.num_leaves, dtype=torch.float64)
        for example in drawn:
            for ids, ended in zip(example.completions, example.ended, strict=True):
                assert ended == (ids[-1] == 1)
                seen[index[tuple(ids)]] += 1
        expected = 2 * len(drawn) * law  # counts are all but Poisson
        assert ((seen - expected).abs() <= 5 * expected.sqrt() + 6).all()


def test_labels_are_bradley_terry_at_unit_scale_and_drawn_by_their_law(reference):
    population = make(reference)
    examples, facts = population.draw(3000, torch.Generator().manual_seed(0))
    rewards = [world.verdicts([e.prompt_ids] * 2, e.completions, e.ended).reward.tolist() for e in examples]
    expected = [1 / (1 + math.exp(rejected - chosen)) for chosen, rejected in rewards]
    assert facts.target.tolist() == pytest.approx(expected, abs=1e-12)
    assert [e.label_probability for e in examples] == pytest.approx(expected, abs=1e-12)
    # The preferred response wins with probability max(p, 1 - p).
    wins = sum((p > 0.5) + 0.5 * (p == 0.5) for p in expected) / len(expected)
    ceiling = sum(max(p, 1 - p) for p in expected) / len(expected)
    assert wins == pytest.approx(ceiling, abs=4 * math.sqrt(0.25 / len(expected)))
    assert wins < 0.99


def test_reference_log_probabilities_are_the_references_own(reference):
    population = make(reference, response_length=3)
    window = next(iter(windows(population, size=24)))
    (micro_batch,) = window.micro_batches
    with torch.no_grad():
        expected = micro_batch.batch.per_completion(reference(micro_batch.batch).logprobs).view(-1, 2)
    torch.testing.assert_close(micro_batch.facts.ref_logprobs.float(), expected, rtol=0, atol=2e-5)


def windows(population: Population, *, size: int, accumulation: int = 1, start: int = 0, **options):
    return population.windows(
        steps=6,
        micro_batch_size=size,
        accumulation=accumulation,
        seed=1,
        layout="trees",
        start=start,
        **options,
    )


def content(window) -> set[tuple]:
    """The pairs of a window, whatever micro-batch they stand in."""
    found = set()
    for micro_batch in window.micro_batches:
        batch = micro_batch.batch
        ids = batch.padded(batch.target_ids, 4).view(-1, 8).tolist()
        facts = micro_batch.facts
        for number, row, ref, target in zip(
            micro_batch.indices, ids, facts.ref_logprobs.tolist(), facts.target.tolist(), strict=True
        ):
            found.add((number, tuple(row), tuple(ref), target))
    return found


def test_windows_are_a_function_of_seed_and_step(reference):
    population = make(reference)
    all_of_them = [content(window) for window in windows(population, size=8)]
    assert len(all_of_them) == 6 and len(set(map(frozenset, all_of_them))) == 6
    resumed = [content(window) for window in windows(population, size=8, start=4)]
    assert resumed == all_of_them[4:]
    split = [content(window) for window in windows(population, size=2, accumulation=4)]
    assert split == all_of_them
    ranks = [windows(population, size=4, rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(all_of_them, *ranks, strict=True):
        assert parts[0].counts["pairs"] == 8 and parts[0].counts == parts[1].counts
        assert content(parts[0]) | content(parts[1]) == whole
        assert not content(parts[0]) & content(parts[1])


def test_counts_are_those_of_the_whole_window(reference):
    window = next(islice(windows(make(reference), size=4, accumulation=2), 1))
    lengths = torch.cat([b.batch.lengths for b in window.micro_batches]).view(-1, 2)
    tokens = {"tokens": float(lengths.sum()), "chosen_tokens": float(lengths[:, 0].sum())}
    assert window.counts == {"prompts": 8.0, "pairs": 8.0, **tokens}


POPULATION = {"dataset_name": "world:verdicts", "dataset_config": "population", "per_device_train_batch_size": 16}


@pytest.mark.check
def test_dpo_trains_on_the_population(lab):
    result = lab.run("dpo", **POPULATION, max_steps=3)
    rows = [row for row in lab.rows(result.run) if "loss/dpo" in row]
    assert rows[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    entry = lab.registry.resolve(result.model).manifest.data[0]
    assert (entry.source, entry.split, entry.rows) == ("world:verdicts population (mixture)", "train", 48)


def test_the_world_means_the_population_to_dpo_and_only_to_it(lab):
    assert lab.config("dpo", dataset_name="world:verdicts").population
    with pytest.raises(ConfigError, match="population is a source for `rlhf dpo` only"):
        lab.config("train-rm", **POPULATION)
    with pytest.raises(ConfigError, match="expected 'population'"):
        lab.config("dpo", dataset_name="world:verdicts", dataset_config="demonstrations")
    with pytest.raises(ConfigError, match="max_steps"):
        lab.config("dpo", **POPULATION, max_steps=-1)


@pytest.mark.check
def test_a_policy_with_other_words_is_refused(lab):
    lab.run(
        "sft",
        output_name="text",
        model_name_or_path=None,
        model_init={
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
        tokenizer_init={"type": "byte_level_bpe", "vocab_size": 300},
        dataset_name="world:verdicts",
        max_prompt_length=40,
        response_length=20,
        max_steps=1,
    )
    with pytest.raises(MismatchError, match="expected that of world:verdicts"):
        lab.run("dpo", **POPULATION, model_name_or_path="text", max_steps=1)
