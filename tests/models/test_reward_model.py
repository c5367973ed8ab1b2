"""The reward model: where it is read, what it is saved as."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import LAYOUTS, pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.models.forward import Reader, trunk_of
from rlhf_pipeline.models.loading import init_reward_model, load_sequence_classifier, save_model, store_reward_shift
from rlhf_pipeline.models.modules import RewardModel, sequence_head
from rlhf_pipeline.models.selfcheck import read_reward_model

NAMES = ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "gemma3_text", "gpt2", "gpt_neox", "bloom"]
CLOSE = {"rtol": 0, "atol": 1e-5}


@torch.no_grad()
def score(scorer: RewardModel, examples, **options) -> torch.Tensor:
    return scorer(pack(examples, layout=scorer.reader.layout, **options))


@torch.no_grad()
def plain(model, examples) -> torch.Tensor:
    """Scores of plain transformers, one sequence at a time."""
    sequences = [e.prompt_ids + c for e in examples for c in e.completions]
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])


@torch.no_grad()
def padded(model, examples, side: str) -> torch.Tensor:
    """Scores of plain transformers in one padded batch."""
    sequences = [e.prompt_ids + c for e in examples for c in e.completions]
    width = max(map(len, sequences)) + 2
    input_ids, mask = torch.zeros(2, len(sequences), width, dtype=torch.long)
    for row, ids in enumerate(sequences):
        place = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        input_ids[row, place], mask[row, place] = torch.tensor(ids), 1
    return model(input_ids=input_ids, attention_mask=mask).logits[:, 0]


def altered(examples, change) -> list[Example]:
    return [replace(e, completions=[change(c) for c in e.completions]) for e in examples]


@pytest.mark.parametrize("name", NAMES)
def test_packed_plain_left_and_right_padded_scores_agree(make_model, examples, name):
    model = make_model(name, scorer=True)
    scorer = read_reward_model(model)
    assert scorer.reader.layout == ("rows" if name == "bloom" else "flat")
    expected = plain(model, examples)
    assert expected.std() > 0.1
    for layout in LAYOUTS[: LAYOUTS.index(scorer.reader.layout) + 1]:
        reading = RewardModel(model, Reader(layout))
        for row_length in (None, 30, 100):
            found = score(reading, examples, row_length=row_length, flat_from=0)
            torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(padded(model, examples, "right"), expected, **CLOSE)
    if name != "gpt2":  # transformers counts a left-padded GPT-2's absolute positions from the padding
        torch.testing.assert_close(padded(model, examples, "left"), expected, **CLOSE)


@pytest.mark.parametrize("flat_from", [0, 1000])
def test_the_order_of_examples_permutes_the_scores(make_model, examples, flat_from):
    scorer = read_reward_model(make_model("llama", scorer=True))
    found = score(scorer, examples[::-1], row_length=64, flat_from=flat_from)
    torch.testing.assert_close(found, plain(scorer.model, examples[::-1]), **CLOSE)


def test_deleting_eos_changes_the_score_and_appended_pads_do_not(make_model, examples):
    scorer = read_reward_model(make_model("llama", scorer=True))
    longer = [e for e in examples if min(map(len, e.completions)) > 1]
    full = score(scorer, longer)
    cut = score(scorer, altered(longer, lambda ids: ids[:-1]))
    assert (full - cut).abs().min() > 1e-3
    # Pads behind the completions, as row padding: the scores stay.
    torch.testing.assert_close(score(scorer, longer, row_length=200), full, **CLOSE)


def test_a_sampled_pad_is_a_token_and_lengths_say_where_to_read(make_model, examples):
    model = make_model("llama", scorer=True)
    model.config.score_pooling = "last"  # as in every reward model of ours
    scorer = read_reward_model(model)
    ending = altered(examples, lambda ids: [*ids, 0])
    sequences = [e.prompt_ids + c for e in ending for c in e.completions]
    with torch.no_grad():
        hidden = [trunk_of(model)(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences]
        expected = torch.stack([model.score(state)[0] for state in hidden])
    torch.testing.assert_close(score(scorer, ending), expected, **CLOSE)
    assert (score(scorer, ending) - score(scorer, examples)).abs().min() > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pad", [None, 0, 1, 5])
def test_a_model_that_is_not_ours_is_read_where_transformers_reads_it(make_model, examples, layout, pad):
    """Its last token that is not PAD: with PAD = EOS (1) the one before EOS, in the prompt if the response is EOS."""
    model = make_model("llama", scorer=True)
    model.config.pad_token_id = pad
    scorer = RewardModel(model, Reader(layout))
    read_reward_model(model)
    bare = Example([7, 5, 5], [[1], [5, 5, 1], [5]], [True] * 3, prompt_key="", where="")
    only = Example([1, 1], [[1, 1]], [True], prompt_key="", where="")
    every = [*examples, bare, only]
    torch.testing.assert_close(score(scorer, every, flat_from=0), plain(model, every), **CLOSE)


@pytest.mark.parametrize("flat_from", [0, 1000])
def test_pooling_mean_averages_the_response_tokens(make_model, examples, flat_from):
    model = make_model("llama", scorer=True)
    model.config.score_pooling = "mean"
    scorer = read_reward_model(model)
    expected = []
    with torch.no_grad():
        for example in examples:
            for completion in example.completions:
                ids = torch.tensor([example.prompt_ids + completion])
                states = trunk_of(model)(input_ids=ids).last_hidden_state[0, len(example.prompt_ids) :]
                expected.append(model.score(states).mean())
    assert scorer.pooling == "mean"
    found = score(scorer, examples, row_length=64, flat_from=flat_from)
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)
    assert (score(scorer, examples) - plain(model, examples)).abs().max() > 1e-2


@pytest.fixture
def language_model(make_model, tmp_path):
    """A saved tiny Llama with the words of the built-in world."""
    path = tmp_path / "lm"
    save_model(make_model("llama"), world.tokenizer(), path)
    return path


def test_a_new_head_has_no_bias_and_the_std_of_its_width(language_model):
    model = init_reward_model(language_model, world.tokenizer(), seed=1)
    assert RewardModel(model, Reader()).pooling == "last"
    head = sequence_head(model)
    assert head.bias is None and head.weight.shape == (1, 16)
    same, other = (init_reward_model(language_model, world.tokenizer(), seed=seed) for seed in (1, 2))
    assert torch.equal(sequence_head(same).weight, head.weight)
    assert not torch.equal(sequence_head(other).weight, head.weight)
    weights = torch.cat([init_reward_model(language_model, world.tokenizer(), seed=s).score.weight for s in range(40)])
    # 640 numbers of standard deviation 1 / sqrt(17): 4 standard errors are 4 sigma / sqrt(2 x 640).
    sigma = 1 / math.sqrt(17)
    assert abs(weights.std().item() - sigma) < 4 * sigma / math.sqrt(1280)
    assert abs(weights.mean().item()) < 4 * sigma / math.sqrt(640)


def test_the_trunk_is_that_of_the_language_model(language_model, make_model):
    model = init_reward_model(language_model, world.tokenizer(), seed=1)
    trunk, source = trunk_of(model).state_dict(), trunk_of(make_model("llama")).state_dict()
    assert trunk.keys() == source.keys()
    assert all(torch.equal(trunk[key], source[key]) for key in trunk)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_shift_and_pooling_survive_a_save_and_plain_transformers_lacks_the_shift(
    language_model, examples, tmp_path, pooling
):
    from transformers import AutoModelForSequenceClassification

    scorer = read_reward_model(init_reward_model(language_model, world.tokenizer(), seed=1, score_pooling=pooling))
    before = score(scorer, examples)
    store_reward_shift(scorer.model, 0.75)
    torch.testing.assert_close(score(scorer, examples), before - 0.75, **CLOSE)
    path = tmp_path / "rm"
    save_model(scorer.model, world.tokenizer(), path)
    again = read_reward_model(load_sequence_classifier(path))
    assert (again.reward_shift, again.pooling) == (0.75, pooling)
    assert torch.equal(score(again, examples), score(scorer, examples))
    elsewhere = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert elsewhere.config.num_labels == 1
    if pooling == "last":
        torch.testing.assert_close(plain(elsewhere, examples), score(again, examples) + 0.75, **CLOSE)


def test_a_second_normalisation_is_refused(make_model):
    model = make_model("llama", scorer=True)
    store_reward_shift(model, 0.5)
    with pytest.raises(ValueError, match=r"already normalised \(reward_shift 0.5\)"):
        store_reward_shift(model, 0.1)
    assert model.config.reward_shift == 0.5


def test_subtracting_the_mean_score_makes_it_0(make_model, examples):
    scorer = read_reward_model(make_model("llama", scorer=True))
    store_reward_shift(scorer.model, score(scorer, examples).mean().item())
    assert score(scorer, examples).mean().item() == pytest.approx(0.0, abs=1e-5)


def test_a_classifier_with_two_labels_is_refused(make_model, tmp_path):
    model = make_model("llama", scorer=True, num_labels=2)
    model.config.num_labels = 2
    save_model(model, world.tokenizer(), tmp_path / "two")
    with pytest.raises(MismatchError, match="2 labels"):
        load_sequence_classifier(tmp_path / "two")


def test_a_saved_head_bias_is_refused_instead_of_dropped(make_model, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "rm"
    save_model(make_model("llama", scorer=True), world.tokenizer(), path)
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "score.bias": torch.ones(1)}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"score\.bias"):
        load_sequence_classifier(path)


def test_a_language_model_is_no_reward_model_even_with_one_label(make_model, tmp_path):
    model = make_model("llama")
    model.config.num_labels = 1
    save_model(model, world.tokenizer(), tmp_path / "lm")
    with pytest.raises(MismatchError, match=r"no score\.weight"):
        load_sequence_classifier(tmp_path / "lm")


def test_scores_of_a_half_precision_model_are_fp32(make_model, examples):
    scorer = RewardModel(make_model("llama", scorer=True, dtype=torch.bfloat16), Reader())
    assert score(scorer, examples).dtype == torch.float32


def test_a_pointer_to_code_is_not_handed_on(make_model, tmp_path):
    model = make_model("llama")
    model.config.auto_map = {"AutoConfig": "somewhere--code.Config"}
    save_model(model, world.tokenizer(), tmp_path / "lm")
    assert "auto_map" not in json.loads((tmp_path / "lm" / "config.json").read_text())
