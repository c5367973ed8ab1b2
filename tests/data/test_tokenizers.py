from __future__ import annotations

import copy
import json

import pytest

from rlhf_pipeline.data import world
from rlhf_pipeline.data.tokenizers import (
    chat_template_digest,
    load_tokenizer,
    same_but_for_pad,
    token_count,
    tokenizer_digest,
    train_byte_level_bpe,
    with_padding,
)
from rlhf_pipeline.errors import BadInput, ConfigError

TEXTS = ["the cat sat on the mat", "the dog sat on the log"] * 5


def test_a_trained_tokenizer_round_trips_and_is_reproducible():
    first, second = train_byte_level_bpe(TEXTS, 270), train_byte_level_bpe(TEXTS, 270)
    assert len(first) == 270
    assert (first.eos_token, first.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert first.pad_token_id != first.eos_token_id
    text = "the cat  saw\n\n\u00e9\U0001f600 !"
    assert first.decode(first(text)["input_ids"]) == text
    assert tokenizer_digest(first) == tokenizer_digest(second)
    assert tokenizer_digest(first) != tokenizer_digest(train_byte_level_bpe(TEXTS, 260))


def test_a_vocabulary_too_small_for_all_bytes_is_refused():
    with pytest.raises(ConfigError, match="at least 258"):
        train_byte_level_bpe(TEXTS, 257)


def test_digests_survive_saving_and_use(tmp_path, chat):
    digest, template = tokenizer_digest(chat), chat_template_digest(chat)
    chat(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(chat) == digest
    chat.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (tokenizer_digest(loaded), chat_template_digest(loaded)) == (digest, template)
    loaded.chat_template = None
    assert (tokenizer_digest(loaded), chat_template_digest(loaded)) == (digest, None)


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_pad_is_left_alone_and_added_for_scores_alone(tmp_path, letters, pad):
    letters.pad_token = pad
    letters.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    padded = with_padding(loaded)
    assert (loaded.pad_token, padded.pad_token, padded.pad_token_id, padded.eos_token_id) == (pad, "<|pad|>", 8, 0)
    assert (token_count(loaded), token_count(padded)) == (8, 9)
    assert with_padding(padded) is padded
    assert with_padding(loaded, new=False) is loaded  # for adapters, which cannot add a row
    assert tokenizer_digest(loaded) == tokenizer_digest(padded)  # the digest before PAD was left alone
    loaded.unk_token = "c"
    assert (with_padding(loaded).pad_token, token_count(with_padding(loaded))) == ("c", 8)


def test_tokenizers_that_differ_in_pad_alone_read_alike(letters):
    none, own, of_eos, new, other = (copy.deepcopy(letters) for _ in range(5))
    none.pad_token, own.pad_token, of_eos.pad_token = None, "a", "<eos>"
    new.add_special_tokens({"pad_token": "[PAD]"})
    other.add_tokens(["xy"])
    like = [none, own, of_eos, new]
    assert all(same_but_for_pad(one, two) for one in like for two in like)
    assert not any(same_but_for_pad(one, other) for one in like)


def test_a_tokenizer_that_cannot_end_or_is_not_there_is_refused(tmp_path, letters):
    with pytest.raises(BadInput, match="the tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))
    letters.eos_token = None
    letters.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="has no EOS token"):
        load_tokenizer(str(tmp_path))


def test_a_saved_tokenizer_keeps_its_ids_beside_a_model_of_any_type(tmp_path):
    """transformers would read it beside qwen2 as another tokenizer, which gives no ids at all."""
    tokenizer, text = world.tokenizer(), "the plot of this drama"
    tokenizer.save_pretrained(tmp_path)
    for model_type in ("llama", "qwen2", "phi3"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert load_tokenizer(str(tmp_path))(text)["input_ids"] == tokenizer(text)["input_ids"], model_type
