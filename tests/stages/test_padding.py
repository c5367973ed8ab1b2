"""Models as they are published: a tokenizer without PAD, or with PAD = EOS, and exactly one embedding row per token."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.data.tokenizers import load_tokenizer, train_byte_level_bpe
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.loading import adopt_tokenizer, load_causal_lm
from rlhf_pipeline.stages.common import load_policy, load_reward_model

NOUNS = ("river", "garden", "window", "letter", "engine")
WIDE = {
    "max_prompt_length": 24,
    "response_length": 12,
    "dataset_train_split": "all",
    "dataset_test_split": "all",
    "max_steps": 2,
}


def lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of one tiny Llama whose EOS is its last token, `none` without PAD and `eos` with PAD = EOS; pairs."""
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("published")
    texts = [f"Say of the {noun} : a kind {noun} ." for noun in NOUNS]
    backend = json.loads(train_byte_level_bpe(texts, 280).backend_tokenizer.to_str())
    backend["added_tokens"] = []
    backend["model"]["vocab"] = {token: place - 2 for token, place in backend["model"]["vocab"].items() if place >= 2}
    core = Tokenizer.from_str(json.dumps(backend))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    eos = tokenizer.eos_token_id
    assert eos == len(tokenizer) - 1
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3, **sizes)
    config.tie_word_embeddings = True
    config.bos_token_id, config.eos_token_id = None, eos
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = eos
    for name, pad in (("none", None), ("eos", "<|im_end|>")):
        tokenizer.pad_token = pad
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    pairs = [
        {"prompt": f"Say of the {noun} :", "chosen": f" a kind {noun} .", "rejected": f" no {noun} ."} for noun in NOUNS
    ]
    return folder, lines(folder / "pairs.jsonl", pairs * 2)


def plain_scores(folder, tokenizer, texts):
    """Scores of plain transformers: one batch padded on each side, and one text at a time."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for side in ("left", "right"):
            batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
            found.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0])
        alone = [model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, 0] for text in texts]
    return *found, torch.stack(alone)


@pytest.mark.parametrize("pad", ["none", "eos"])
def test_a_reward_model_trains_and_plain_transformers_gives_its_scores(lab, published, pad):
    folder, pairs = published
    result = lab.run("train-rm", model_name_or_path=str(folder / pad), dataset_name=pairs, **WIDE)
    tokenizer = load_tokenizer(result.path)
    assert tokenizer.pad_token_id == len(tokenizer) - 1  # a new row
    texts = ["Say of the river : a kind river .<|im_end|>", "Say of the river : no .", "Say<|im_end|>"]
    left, right, alone = plain_scores(result.path, tokenizer, texts)
    model = load_reward_model(lab.registry.resolve(result.model), lab.config("train-rm"), torch.device("cpu"))
    ids = tokenizer(texts)["input_ids"]
    rows = [Example(row[:1], [row[1:]], [True], prompt_key="", where="") for row in ids]
    with torch.no_grad():
        ours = model(pack(rows, layout=model.reader.layout)) + model.reward_shift
    for scores in (left, right, alone):
        torch.testing.assert_close(scores, ours, rtol=0, atol=1e-5)
    # PPO takes it for the policy without that PAD.
    trained = {"model_name_or_path": str(folder / pad), "reward_model_path": result.model, "dataset_name": pairs}
    done = lab.run("ppo", **trained, **WIDE)
    assert lab.weights(done.model)["model.embed_tokens.weight"].shape[0] == len(tokenizer) - 1
    assert load_tokenizer(done.path).pad_token == (None if pad == "none" else "<|im_end|>")


@pytest.mark.parametrize("pad", ["none", "eos"])
def test_ppo_gives_the_scores_of_an_external_reward_model(lab, published, tmp_path, pad, monkeypatch):
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    from rlhf_pipeline.rollout.rewards import ModelReward

    folder, pairs = published
    torch.manual_seed(1)
    config = LlamaForSequenceClassification.config_class.from_pretrained(folder / pad)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "scorer")
    load_tokenizer(str(folder / pad)).save_pretrained(tmp_path / "scorer")
    seen = []
    score = ModelReward.score

    def watched(self, examples, packed=None):
        found = score(self, examples, packed)
        seen.extend(zip([e.prompt_ids + ids for e in examples for ids in e.completions], found.tolist(), strict=True))
        return found

    monkeypatch.setattr(ModelReward, "score", watched)
    scorer = str(tmp_path / "scorer")
    trained = {"model_name_or_path": str(folder / pad), "reward_model_path": scorer, "dataset_name": pairs}
    lab.run("ppo", **trained, **{**WIDE, "max_steps": 1})
    plain = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    eos = load_tokenizer(scorer).eos_token_id
    assert len(seen) == 16 and any(ids[-1] == eos for ids, _ in seen)
    with torch.no_grad():
        for ids, found in seen:
            assert found == pytest.approx(plain(input_ids=torch.tensor([ids])).logits.item(), abs=1e-5)


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
@pytest.mark.parametrize("start", ["none", "eos", "own-head"])
def test_almost_without_learning_the_model_that_is_registered_is_the_one_that_it_started_from(
    lab, published, tmp_path, stage, start, function
):
    """A tied config whose file has an `lm_head.weight` of its own keeps it."""
    folder, pairs = published
    source = folder / start.replace("own-head", "eos")
    if start == "own-head":
        load_causal_lm(source).save_pretrained(tmp_path / "own")
        load_tokenizer(str(source)).save_pretrained(tmp_path / "own")
        source = tmp_path / "own"
        weights = load_file(source / "model.safetensors")
        weights["lm_head.weight"] = torch.randn(weights["model.embed_tokens.weight"].shape)
        save_file(weights, source / "model.safetensors", {"format": "pt"})
    changes = {"model_name_or_path": str(source), "dataset_name": pairs, "learning_rate": 1e-9, "max_steps": 1}
    if stage == "ppo":
        changes |= {"reward_model_path": None, "reward_functions": [function(one)]}
    if stage == "sft":
        rows = [{"prompt": f"Say of the {noun} :", "completion": f" a kind {noun} ."} for noun in NOUNS]
        changes["dataset_name"] = lines(tmp_path / "shown.jsonl", rows)
    result = lab.run(stage, **{**WIDE, **changes})
    before, after = load_file(source / "model.safetensors"), lab.weights(result.model)
    assert before.keys() == after.keys()
    for name, weight in before.items():  # AdamW moves a weight by at most its learning rate
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-7)


def one(prompts, completions, **_):
    return [1.0] * len(prompts)


def test_tokens_without_a_row_get_equal_ones_in_policy_and_reference(lab, published, tmp_path):
    """Every new row is the mean of the old ones, so DPO starts at log 2."""
    folder, pairs = published
    source = tmp_path / "more"
    load_causal_lm(folder / "eos").save_pretrained(source)
    tokenizer = load_tokenizer(str(folder / "eos"))
    tokenizer.add_tokens([f"<new{number}>" for number in range(40)])
    tokenizer.save_pretrained(source)
    result = lab.run("dpo", model_name_or_path=str(source), dataset_name=pairs, **{**WIDE, "learning_rate": 1e-9})
    assert lab.rows(result.run)[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-7)
    old = load_file(folder / "eos" / "model.safetensors")["model.embed_tokens.weight"]
    new = lab.weights(result.model)["model.embed_tokens.weight"]
    assert new.shape[0] == old.shape[0] + 40
    torch.testing.assert_close(new[-40:], old.mean(0).expand(40, -1), rtol=0, atol=1e-6)


def test_a_head_of_its_own_stays_one_when_rows_are_added(published):
    folder, _ = published
    tokenizer = copy.deepcopy(load_tokenizer(str(folder / "eos")))
    tokenizer.add_tokens(["<new>"])
    model = load_causal_lm(folder / "eos")
    own = torch.randn_like(model.lm_head.weight)
    model.lm_head.weight = torch.nn.Parameter(own.clone())
    adopt_tokenizer(model, tokenizer)
    assert torch.equal(model.lm_head.weight[:-1], own)
    torch.testing.assert_close(model.lm_head.weight[-1], own.mean(0))
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_an_end_of_turn_that_is_the_pad_too_is_trained(published):
    """torch.nn.Embedding gives the row of its `padding_idx` no gradient."""
    folder, _ = published
    tokenizer = load_tokenizer(str(folder / "eos"))
    model = load_causal_lm(folder / "eos", tokenizer=tokenizer)
    row = tokenizer.eos_token_id
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model(input_ids=torch.tensor([[1, row, 2]])).logits[0, -1, 0].backward()
    assert model.model.embed_tokens.weight.grad[row].abs().max() > 0


@pytest.fixture
def stranger(published, tmp_path):
    """Make a folder of the tiny Llama with another generation_config.json."""

    def make(**generation):
        folder = tmp_path / "stranger"
        shutil.copytree(published[0] / "eos", folder)
        file = folder / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **generation}))
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("generation", "kept"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"do_sample": False, "length_penalty": 0.5}, {}),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_generation_config_that_cannot_be_saved_is_mended_before_training(
    lab, published, stranger, stage, generation, kept, tmp_path
):
    from transformers import AutoModelForCausalLM, GenerationConfig

    source, pairs = stranger(**generation), published[1]
    if stage == "sft":
        pairs = lines(tmp_path / "shown.jsonl", [{"prompt": "Say :", "completion": " a kind river ."}] * 9)
    result = lab.run(stage, model_name_or_path=source, dataset_name=pairs, **WIDE)
    log = (lab.home / "runs" / Path(result.run).name / "log.txt").read_text()
    assert log.index("generation_config.json: transformers cannot save it") < log.index("registered")
    file = json.loads((Path(result.path) / "generation_config.json").read_text())
    assert {name: file.get(name) for name in generation} == {name: kept.get(name) for name in generation}
    GenerationConfig.from_pretrained(result.path).validate(strict=True)
    AutoModelForCausalLM.from_pretrained(result.path).save_pretrained(tmp_path / "again")


def test_a_config_that_cannot_be_saved_is_refused_before_training(lab, published, monkeypatch):
    from transformers import LlamaConfig

    def refuse(self, *args, **options):
        raise ValueError("no")

    monkeypatch.setattr(LlamaConfig, "save_pretrained", refuse)
    with pytest.raises(BadInput, match="the config of the model cannot be saved"):
        lab.run("dpo", model_name_or_path=str(published[0] / "eos"), dataset_name=published[1], **WIDE)


def test_ids_that_no_token_has_are_never_sampled_nor_given_probability(lab, published, tmp_path, function):
    """60 rows more than tokens in the policy, none in the reward model: with equal logits a fifth of the mass."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    folder, pairs = published
    tokenizer = load_tokenizer(str(folder / "eos"))
    tokens = len(tokenizer)
    config = LlamaForCausalLM.config_class.from_pretrained(folder / "eos")
    config.vocab_size, config.tie_word_embeddings = tokens + 60, False
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    config.vocab_size, config.num_labels = tokens, 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "scorer")
    for name in ("wide", "scorer"):
        tokenizer.save_pretrained(tmp_path / name)
    wide = str(tmp_path / "wide")
    seen = []

    def judge(prompts, completions, completion_ids, **_):
        seen.extend(token for ids in completion_ids for token in ids)
        return [1.0] * len(prompts)

    parts = [{"source": function(judge)}, {"source": str(tmp_path / "scorer")}]
    trained = {"model_name_or_path": wide, "reward_model_path": None, "reward_functions": parts}
    result = lab.run("ppo", **trained, dataset_name=pairs, **{**WIDE, "rollout_batch_size": 64})
    assert len(seen) > 500 and max(seen) < tokens
    rows = lab.rows(result.run)  # the scored distribution is the sampled one
    assert rows[0]["first_minibatch/ratio_error"] < 1e-5 and abs(rows[0]["objective/kl"]) < 1e-5
    assert lab.weights(result.model)["lm_head.weight"].shape[0] == tokens + 60
    policy = load_policy(lab.registry.resolve(wide), lab.config("ppo"), tokenizer, torch.device("cpu"))
    example = Example([1], [[token] for token in range(tokens)], [True] * tokens, prompt_key="", where="")
    with torch.no_grad():
        total = policy(pack([example], layout=policy.reader.layout)).logprobs.double().exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("pad", ["none", "eos"])
@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo"])
def test_both_engines_train_alike_without_a_pad_of_its_own(lab, published, tmp_path, stage, pad):
    folder, pairs = published
    if stage == "sft":
        rows = [{"prompt": f"Say of the {noun} :", "completion": f" a kind {noun} ."} for noun in NOUNS]
        pairs = lines(tmp_path / "shown.jsonl", rows * 2)
    changes = {"model_name_or_path": str(folder / pad), "dataset_name": pairs, "learning_rate": 1e-3, **WIDE}
    ours, theirs = (lab.run(stage, **changes, engine=engine, output_name=engine) for engine in ("native", "trl"))
    mine, other = lab.weights(ours.model), lab.weights(theirs.model)
    assert mine.keys() == other.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-5)
    assert load_tokenizer(ours.path).pad_token == load_tokenizer(theirs.path).pad_token
