"""`world:verdicts`: reward by hand and over all responses, splits, tokenizer, demonstrations."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from rlhf_pipeline.data import world
from rlhf_pipeline.errors import ConfigError, DataError, MismatchError

LEAVES = 954_305  # 1 + 31 + 31^2 + 31^3 that ended and 31^4 that were cut

# v(adjective) for two prompts, added up by hand: base + genre + aspect.
HORROR_PACING = {
    "great": 1.5,
    "fine": 0.5,
    "dull": -1.5,
    "awful": -1.5,
    "funny": -2.0,
    "scary": 2.0,
    "tender": -1.5,
    "slow": -0.5,
    "tense": 1.0,
    "loud": 0.5,
}


def reward(genre: str, aspect: str, text: str, ended: bool = True) -> float:
    ids = world.encode(text) + [world.EOS_ID] * ended
    return world.verdicts([world.encode(world.prompt_text(genre, aspect))], [ids], [ended]).reward.item()


@pytest.mark.parametrize(
    "genre, aspect, text, ended, expected",
    [
        ("drama", "plot", "great", True, 1.5),
        ("drama", "plot", "very great", True, 3.0),
        ("drama", "plot", "quite great", True, 0.9),
        ("drama", "plot", "not great", True, -1.125),
        ("drama", "plot", "not awful", True, 1.5),
        ("comedy", "dialogue", "funny", True, 2.5),  # .5 + 1.5 + .5
        ("comedy", "plot", "very scary", True, -4.0),
        ("horror", "pacing", "slow", True, -0.5),  # -.5 + .5 - .5
        ("horror", "plot", "slow", True, 0.0),
        ("western", "music", "loud", True, 1.5),  # 0 + 1 + .5
        ("thriller", "ending", "very tense", True, 5.0),  # 2 (0 + 2 + .5)
        ("drama", "plot", "great and fine", True, 1.8),  # 1.5 + .6 x .5
        ("drama", "plot", "fine and great", True, 1.4),
        ("drama", "plot", "great and great", True, 0.9),  # 1.5 + .9 - 1.5
        ("drama", "plot", "very great and fine", False, 2.8),  # 3 + .3 - .5
        ("drama", "plot", "great and very fine", False, 1.6),  # 1.5 + .6 - .5
        ("drama", "plot", "great and not great", False, -1.175),  # 1.5 - .675 - 1.5 - .5
        ("drama", "plot", "", True, -2.5),
        ("drama", "plot", "very", True, -2.5),
        ("drama", "plot", "and great", True, -2.5),
        ("drama", "plot", "great and", True, -2.5),
        ("drama", "plot", "great great", True, -2.5),
        ("drama", "plot", "very very great", True, -2.5),
        ("drama", "plot", "great drama", True, -2.5),
        ("drama", "plot", "<pad>", True, -2.5),
        ("drama", "plot", "great <pad>", True, -2.5),
        ("drama", "plot", "very great and very", False, -2.5),
    ],
)
def test_reward_by_hand(genre, aspect, text, ended, expected):
    assert reward(genre, aspect, text, ended) == pytest.approx(expected, abs=1e-12)


def well_formed_rewards(value: dict[str, float]) -> dict[tuple[str, ...], float]:
    """All well-formed responses of at most four words with their reward, made by writing them down."""
    phrases = {(adjective,): (v, adjective) for adjective, v in value.items()}
    for modifier, factor in {"very": 2.0, "quite": 0.6, "not": -0.75}.items():
        phrases |= {(modifier, adjective): (factor * v, adjective) for adjective, v in value.items()}
    found = {phrase: worth for phrase, (worth, _) in phrases.items()}
    for (one, (first, a)), (two, (second, b)) in product(phrases.items(), phrases.items()):
        words = (*one, "and", *two)
        if len(words) <= 4:
            found[words] = first + 0.6 * second - 1.5 * (a == b) - 0.5 * (len(words) == 4)
    return found


def test_the_vectorised_reward_equals_a_slow_one_over_all_responses_of_a_prompt():
    words = [i for i in range(len(world.VOCABULARY)) if i != world.EOS_ID]
    known = {
        tuple(world.VOCABULARY.index(word) for word in text): value
        for text, value in well_formed_rewards(HORROR_PACING).items()
    }
    total = well_formed = 0
    for length in range(5):
        strings = list(product(words, repeat=length))
        expected = np.array([known.get(string, -2.5) for string in strings])
        tokens = np.full((len(strings), 4), world.EOS_ID)
        tokens[:, :length] = np.array(strings).reshape(len(strings), length)
        prompt = world.GENRES.index("horror"), world.ASPECTS.index("pacing")
        columns = [np.full(len(strings), value) for value in (*prompt, length, length < 4)]
        found = world.true_reward(columns[0], columns[1], tokens, columns[2], columns[3])
        np.testing.assert_allclose(found.reward, expected, rtol=0, atol=1e-12)
        total += len(strings)
        well_formed += int(found.well_formed.sum())
    assert total == LEAVES
    # 10 A, 30 MA, 100 A&A, 300 MA&A and 300 A&MA
    assert well_formed == len(known) == 740


def test_what_stands_behind_the_words_does_not_matter():
    tokens = np.array([[world.VOCABULARY.index("great")] * 4] * 2)
    tokens[1, 1:] = world.PAD_ID
    index = np.zeros(2, dtype=int)
    found = world.true_reward(index, index, tokens, np.ones(2, dtype=int), np.ones(2, dtype=bool))
    assert found.reward.tolist() == [1.5, 1.5]


def test_every_prompt_has_its_own_values_and_batches_equal_single_calls():
    prompts, completions, ended, expected = [], [], [], []
    for genre, aspect in world.SPLITS:
        for text in ("slow", "very loud and tense", "awful plot"):
            cut = text.count(" ") == 3
            prompts.append(world.encode(world.prompt_text(genre, aspect)))
            completions.append(world.encode(text) + [world.EOS_ID] * (not cut))
            ended.append(not cut)
            expected.append(reward(genre, aspect, text, not cut))
    assert world.verdicts(prompts, completions, ended).reward.tolist() == expected
    slow = {genre: reward(genre, "plot", "slow") for genre in world.GENRES}
    expected_slow = {"comedy": -1.5, "horror": 0.0, "thriller": -2.0, "romance": 0.0, "drama": 1.0, "western": 0.5}
    assert slow == pytest.approx(expected_slow)


def test_responses_that_are_too_long_are_refused():
    prompt = world.encode(world.prompt_text("drama", "plot"))
    with pytest.raises(MismatchError, match=r"5 tokens.*at most 4"):
        world.verdicts([prompt], [world.encode("very great and very great")], [False])
    with pytest.raises(ValueError, match="5 tokens"):
        zero = np.zeros(1, dtype=int)
        world.true_reward(zero, zero, np.zeros((1, 5), dtype=int), zero, zero == 0)


def test_splits_hold_20_8_4_4_prompts_and_training_sees_everything_three_times():
    assert Counter(world.SPLITS.values()) == {"train": 20, "test": 8, "validation": 4, "judge": 4}
    assert set(world.SPLITS) == set(product(world.GENRES, world.ASPECTS))
    train = [prompt for prompt, split in world.SPLITS.items() if split == "train"]
    assert min(Counter(genre for genre, _ in train)[genre] for genre in world.GENRES) >= 3
    assert min(Counter(aspect for _, aspect in train)[aspect] for aspect in world.ASPECTS) >= 3


def test_tokenizer_round_trip():
    tokenizer = world.tokenizer()
    assert len(tokenizer) == len(world.VOCABULARY) == 32
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (world.PAD_ID, world.EOS_ID)
    assert world.PAD_ID != world.EOS_ID and tokenizer.bos_token_id is None
    text = " ".join(world.VOCABULARY[2:])
    assert tokenizer(text)["input_ids"] == world.encode(text) == list(range(2, 32))
    assert tokenizer.decode(world.encode(text)) == world.decode(world.encode(text)) == text
    for index in range(32):
        assert tokenizer.decode([index]) == world.VOCABULARY[index]
    assert world.is_world_tokenizer(tokenizer)
    tokenizer.add_tokens(["splendid"])
    assert not world.is_world_tokenizer(tokenizer)


def test_tokenizer_survives_a_save(tmp_path):
    from transformers import AutoTokenizer

    world.tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert world.is_world_tokenizer(loaded)
    assert loaded("very great")["input_ids"] == world.encode("very great")
    assert (loaded.pad_token_id, loaded.eos_token_id) == (world.PAD_ID, world.EOS_ID)


@pytest.mark.parametrize("genre, aspect", world.SPLITS)
def test_prompts_parse_back(genre, aspect):
    ids = world.encode(world.prompt_text(genre, aspect))
    g, a = world.parse_prompt(ids)
    assert (world.GENRES[g], world.ASPECTS[a]) == (genre, aspect)


@pytest.mark.parametrize("text", ["the plot of this was", "the drama of this plot was", "great", "a"])
def test_other_texts_are_no_prompts(text):
    with pytest.raises(DataError):
        world.parse_prompt(world.encode(text))


def test_an_unknown_id_is_no_prompt():
    with pytest.raises(DataError, match="not a prompt"):
        world.parse_prompt([2, 99, 3, 4, 6, 5])


def test_an_unknown_word_is_named_with_a_suggestion():
    with pytest.raises(DataError, match=r"unknown word 'grate'.*did you mean 'great'"):
        world.encode("very grate")


def test_demonstrations_are_deterministic_and_follow_the_seed():
    one = world.demonstrations("drama", "plot")
    np.random.seed(7)
    assert one == world.demonstrations("drama", "plot")
    assert len(one) == 1000
    assert one != world.demonstrations("drama", "plot", seed=1)
    assert one != world.demonstrations("drama", "music")


def test_demonstrations_end_unless_four_words_fill_the_limit():
    for completion, ended in world.demonstrations("western", "ending"):
        assert 1 <= len(completion) <= 4
        assert ended == (completion[-1] == world.EOS_ID)
        assert world.EOS_ID not in completion[:-1] and world.PAD_ID not in completion
        assert ended or len(completion) == 4


def test_demonstrations_have_the_shapes_of_the_grammar():
    # A .32, MA .32, A&A .16, MA&A + A&MA .14, noise .06 (hardly ever well-formed): 4 standard errors of 4,000.
    shapes: Counter[str] = Counter()
    for completion, ended in world.demonstrations("comedy", "acting", count=4000):
        words = world.decode(completion[: len(completion) - ended]).split()
        letter = {**dict.fromkeys(("very", "quite", "not"), "M"), "and": "&"}
        shapes["".join(letter.get(word, "A") for word in words)] += 1
    for shape, share in {"A": 0.32, "MA": 0.32, "A&A": 0.16, "MA&A": 0.07, "A&MA": 0.07}.items():
        noise = 0.06 * 0.2  # at most: one of five lengths
        slack = 4 * (share * (1 - share) / 4000) ** 0.5
        assert share - slack <= shapes[shape] / 4000 <= share + noise + slack


def test_records_of_both_parts():
    prompts = world.records("prompts")
    assert len(prompts) == 36 and {r.kind for r in prompts} == {"prompt"}
    rows = world.records()
    assert len(rows) == 36_000 and {r.kind for r in rows} == {"demonstration"}
    assert Counter(r.split for r in rows)["judge"] == 4000
    for row in rows[::997]:
        assert list(row.prompt_ids) == world.encode(row.prompt)
        ended, ids = row.ended[0], list(row.completion_ids[0])
        assert ids == world.encode(row.completions[0]) + [world.EOS_ID] * ended
    with pytest.raises(ConfigError, match="rankings"):
        world.records("rankings")
