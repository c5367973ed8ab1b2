"""Keys of a decoder: what its defaults are, and which of them do nothing together."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.decoding import Decoding
from rlhf_pipeline.config.stages import SCHEMAS

MEASURING = ("evaluate", "generate", "compare")
GREEDY = {"do_sample": False}


@pytest.mark.parametrize("stage", MEASURING)
def test_without_a_key_the_policy_itself_is_sampled(load, stage):
    assert load(stage).decoding == Decoding() and load(stage).decoding.is_plain
    assert load(stage).samples == {"generate": 1}.get(stage, 4)
    warm = load(stage, temperature=0.7).decoding
    assert warm.is_plain and warm == Decoding(temperature=0.7)


def test_no_other_command_has_a_decoder():
    assert {stage for stage, schema in SCHEMAS.items() if "top_p" in schema.model_fields} == set(MEASURING)
    assert {stage for stage, schema in SCHEMAS.items() if issubclass(schema, Decoding)} == set(MEASURING)


@pytest.mark.parametrize("stage", MEASURING)
def test_a_decoder_without_chance_gives_one_response(load, stage):
    assert load(stage, **GREEDY).samples == 1
    assert load(stage, **GREEDY, samples=1).samples == 1
    assert load(stage, top_p=0.5).samples == load(stage).samples


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (GREEDY, "greedy"),
        ({"do_sample": False, "num_beams": 4, "length_penalty": 0.5}, "beam search, num_beams 4, length_penalty 0.5"),
        ({"temperature": 0.7, "top_p": 0.9}, "sampling, temperature 0.7, top_p 0.9"),
        ({"do_sample": False, "repetition_penalty": 1.2}, "greedy, repetition_penalty 1.2"),
    ],
)
def test_a_decoder_in_words(load, given, text):
    decoding = load("evaluate", **given).decoding
    assert decoding.text == text and not decoding.is_plain


@pytest.mark.parametrize("key", ["top_k", "top_p", "min_p", "typical_p", "repetition_penalty"])
def test_each_key_makes_another_policy(key):
    value = {"top_k": 3, "repetition_penalty": 1.1}.get(key, 0.5)
    assert not Decoding(**{key: value}).is_plain
    assert Decoding(**{key: value}, temperature=0.5).plain == Decoding(temperature=0.5)


REFUSED = {
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.9,
    "samples": 2,
    "best_of": [1, 4],
}


@pytest.mark.parametrize("stage", MEASURING)
@pytest.mark.parametrize("key", REFUSED)
def test_a_key_of_sampling_without_sampling_is_refused(faults, stage, key):
    found = faults(stage, do_sample=False, **{key: REFUSED[key]})
    assert list(found) == [key] and "do_sample is false" in found[key].found
    found = faults(stage, do_sample=False, num_beams=3, **{key: REFUSED[key]})
    assert list(found) == [key]


def test_keys_of_beam_search_without_beam_search_are_refused(faults):
    assert list(faults("evaluate", num_beams=4)) == ["num_beams"]
    assert list(faults("evaluate", length_penalty=2.0)) == ["length_penalty"]
    assert list(faults("evaluate", do_sample=False, length_penalty=2.0)) == ["length_penalty"]
    assert set(faults("evaluate", do_sample=False, top_k=5, length_penalty=0.0)) == {"top_k", "length_penalty"}


def test_values_that_change_nothing_are_taken(load):
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
    assert load("evaluate", **neutral, num_beams=1, length_penalty=1.0).decoding.is_plain
    assert load("evaluate", do_sample=False, **neutral, best_of=[1]).decoding.text == "greedy"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("top_k", -1),
        ("top_k", 0.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("typical_p", 0),
        ("typical_p", 2),
        ("repetition_penalty", 0),
        ("num_beams", 0),
        ("length_penalty", 11),
    ],
)
def test_values_out_of_range_are_refused(faults, key, value):
    assert key in faults("evaluate", **{key: value})


def test_temperature_0_is_refused_with_the_way_to_greedy_decoding(faults):
    fault = faults("generate", temperature=0)["temperature"]
    assert (fault.found, fault.expected) == ("found 0", "a number > 0")
    assert fault.fix == "for greedy decoding, set do_sample: false"
