"""Reward models from elsewhere: the score of a response is plain transformers' score of the text."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.data.tokenizers import train_byte_level_bpe
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.rollout.text_reward import TextReward
from rlhf_pipeline.rollout.texts import answers

CHAT = (
    "{% if messages|length > 3 %}{{ raise_exception('too many turns') }}{% endif %}{{ bos_token }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
)
TEXTS = ["kind river, kind garden", "Say something of the window", "no letter and no engine"] * 4
PAIRS = [
    ("Say something of the river.", " kind river"),
    ("Garden?", " no"),
    ("A window and a letter, please: say it", " the kind window, a letter and the engine of the garden"),
    ("x", " y"),
]
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LONG = {"max_position_embeddings": 128}
CONFIGS = {
    "llama": {**SIZES, **LONG},
    "qwen2": {**SIZES, **LONG, "num_key_value_heads": 2},
    "mistral": {**SIZES, **LONG, "num_key_value_heads": 2, "sliding_window": 16},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_neox": {**SIZES, **LONG},
    "opt": {**LONG, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
    | {"word_embed_proj_dim": 24},
    "deberta-v2": {**SIZES, **LONG, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
    "bert": {**SIZES, **LONG},
    "roberta": {**SIZES, "max_position_embeddings": 130},
}


@pytest.fixture(scope="module")
def policys():
    return train_byte_level_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def theirs():
    """A decoder's tokenizer: it adds <s> before a text, and has no PAD."""
    made = train_byte_level_bpe([text[::-1] for text in TEXTS], 290)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    made.pad_token = None
    bos = made.bos_token_id
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return made


@pytest.fixture(scope="module")
def encoders():
    """An encoder's tokenizer: [CLS] prompt [SEP] response [SEP] with segments 0 and 1."""
    words = sorted({word for text in TEXTS + [part for pair in PAIRS for part in pair] for word in text.split()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def classifier(kind, tokenizer, pad=None):
    """A classifier with random weights, larger than at initialisation, so that scores are far apart."""
    torch.manual_seed(0)
    sizes = {**CONFIGS[kind], "vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": pad}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def examples(policys, pairs=PAIRS, ended=True, **changes):
    made = []
    for prompt, response in pairs:
        ids, completion = (policys(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
        completion = completion + [policys.eos_token_id] * ended
        made.append(Example(ids, [completion], [ended], prompt, "w", prompt_text=prompt, **changes))
    return made


def plain(model, inputs):
    """transformers' own score of one unpadded input."""
    with torch.no_grad():
        return model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits.item()


DECODERS = ["llama", "qwen2", "mistral", "gpt2", "gpt_neox", "opt"]


# OPT has PAD 1 unless told otherwise.
@pytest.mark.parametrize(
    ("kind", "with_pad"), [(kind, pad) for pad in (False, True) for kind in DECODERS if pad or kind != "opt"]
)
def test_a_decoders_score_is_that_of_prompt_and_response_as_one_text(kind, with_pad, policys, theirs):
    """Also where its config has EOS as PAD: transformers then reads the token before it, alone or in a batch."""
    model = classifier(kind, theirs, theirs.eos_token_id if with_pad else None)
    reward = TextReward("rm", model, theirs, policys, "plain", longest=128)
    expected = [plain(model, {"input_ids": theirs(p + r + "</s>")["input_ids"]}) for p, r in PAIRS]
    assert len(set(expected)) == len(expected)
    assert reward.score(examples(policys)).tolist() == pytest.approx(expected, abs=1e-5)
    cut = [plain(model, {"input_ids": theirs(p + r)["input_ids"]}) for p, r in PAIRS]
    assert reward.score(examples(policys, ended=False)).tolist() == pytest.approx(cut, abs=1e-5)
    assert model.config.pad_token_id == (theirs.eos_token_id if with_pad else None)


def test_a_pad_of_minus_1_is_none(policys, theirs):
    model, scores = classifier("llama", theirs), []
    for pad in (None, -1):
        model.config.pad_token_id = pad
        scores.append(TextReward("rm", model, theirs, policys, "plain").score(examples(policys)).tolist())
    assert scores[0] == scores[1] and model.config.pad_token_id == -1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_chat_models_score_is_that_of_its_own_template(kind, policys, theirs):
    theirs.chat_template = CHAT
    model = classifier(kind, theirs)
    reward = TextReward("rm", model, theirs, policys, "chat", longest=128)

    def expected(turns, response):
        text = theirs.apply_chat_template([*turns, {"role": "assistant", "content": response}], tokenize=False)
        assert text.count("<s>") == 1
        return plain(model, {"input_ids": theirs(text, add_special_tokens=False)["input_ids"]})

    as_user = [expected([{"role": "user", "content": p}], r.strip()) for p, r in PAIRS]
    assert reward.score(examples(policys)).tolist() == pytest.approx(as_user, abs=1e-5)
    turns = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Garden?"})
    chat = examples(policys, [("unseen", " no")], messages=turns)
    assert reward.score(chat).item() == pytest.approx(expected(turns, "no"), abs=1e-5)
    with pytest.raises(RunFailed, match=r"rm: its chat template refuses .*too many turns"):
        reward.score(examples(policys, [("unseen", " no")], messages=turns * 2))


@pytest.mark.parametrize("kind", ["deberta-v2", "bert", "roberta"])
def test_an_encoder_reads_two_segments_and_keeps_the_bias_of_its_head(kind, policys, encoders):
    model = classifier(kind, encoders, 0)
    names = ["input_ids", "token_type_ids"] if kind == "bert" else ["input_ids"]
    encoders.model_input_names = [*names, "attention_mask"]
    reward = TextReward("rm", model, encoders, policys, "pair", longest=128)
    head = model.classifier.out_proj if kind == "roberta" else model.classifier
    head.bias.data.fill_(3.0)
    found = [encoders(p, r.strip()) for p, r in PAIRS]
    expected = [plain(model, {name: one[name] for name in names}) for one in found]
    assert len(set(expected)) == len(expected)
    assert reward.score(examples(policys)).tolist() == pytest.approx(expected, abs=1e-5)


def test_long_inputs_are_cut_at_their_beginning_and_said_once(policys, theirs):
    model, said = classifier("llama", theirs), []
    reward = TextReward("rm", model, theirs, policys, "plain", longest=8, say=said.append)
    ids = [theirs(p + r + "</s>")["input_ids"][-8:] for p, r in PAIRS]
    expected = [plain(model, {"input_ids": one}) for one in ids]
    assert reward.score(examples(policys)).tolist() == pytest.approx(expected, abs=1e-5)
    reward.score(examples(policys))
    first = len(theirs("".join(PAIRS[0]) + "</s>")["input_ids"])
    assert said == [f"note: rm reads at most 8 tokens; longer inputs ({first}) are cut"]


def test_control_tokens_of_the_policy_are_no_text(policys, theirs):
    """A policy that writes the reward model's end mark as one of its own control tokens cannot open a turn."""
    own = train_byte_level_bpe(TEXTS, 300)
    own.add_special_tokens({"additional_special_tokens": ["</s>"]})
    model = classifier("llama", theirs)
    reward = TextReward("rm", model, theirs, own, "plain", longest=128)
    ids = own("kind", add_special_tokens=False)["input_ids"]
    mark = own.convert_tokens_to_ids("</s>")
    given = [Example(own("x")["input_ids"], [[*ids, mark, *ids]], [False], "k", "w", prompt_text="x")]
    text = theirs("xkindkind")["input_ids"]
    assert reward.score(given).item() == pytest.approx(plain(model, {"input_ids": text}), abs=1e-5)


def test_a_round_trip_through_text_gives_the_policys_own_ids(policys):
    """With the policy's tokenizer as the reward model's, text and ids are the same input for canonical responses."""
    reward = TextReward("rm", classifier("llama", policys), policys, policys, "plain", longest=128)
    seen = [reward.encode(answer)["input_ids"] for answer in answers(examples(policys), policys, rereading=True)]
    together = [policys(p + r)["input_ids"] + [policys.eos_token_id] for p, r in PAIRS]
    assert seen == together == [one.prompt_ids + one.completions[0] for one in examples(policys)]


def test_the_space_that_a_response_begins_with_is_kept_by_tokenizers_that_drop_it():
    """SentencePiece-like: decoded alone, the response of "Say" + " it" is "it"; its text continues as "Say it"."""
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁Say", -1.0), ("▁it", -1.0), ("▁", -2.0)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    ids = tokenizer("Say it")["input_ids"]
    example = Example(ids[:1], [ids[1:]], [False], "k", "w", prompt_text="Say")
    assert tokenizer.decode(ids[1:]) == "it"
    assert [answer.response for answer in answers([example], tokenizer, rereading=True)] == [" it"]


def test_batches_are_of_similar_length(policys, theirs):
    model, passes = classifier("llama", theirs), []
    reward = TextReward("rm", model, theirs, policys, "plain", longest=128, count=passes.append)
    reward.score(examples(policys))
    lengths = sorted((len(theirs(p + r + "</s>")["input_ids"]) for p, r in PAIRS), reverse=True)
    assert [n for rows in passes for n in rows] == lengths
    assert all(4 * rows[-1] >= 3 * rows[0] for rows in passes) and len(passes) > 1
