"""Models with several tokens that end a response, in the styles of Gemma, Phi-3.5 and Llama 3."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_pipeline.data.tokenizers import load_tokenizer, stop_ids, with_padding
from rlhf_pipeline.stages.common import tokenizer_of
from rlhf_pipeline.stages.data import StageData

LENGTHS = {"max_prompt_length": 12, "response_length": 8}
STYLES = {
    # eos, the ids in generation_config.json by name, what opens and closes a turn, what the template writes at the end
    "gemma": ("<eos>", ["<eos>", "<end_of_turn>"], "<start_of_turn>", "<end_of_turn>", "\n", ""),
    "phi": ("<|endoftext|>", ["<|end|>", "<|endoftext|>", "<|other|>"], "<|user|>", "<|end|>", "\n", "<|endoftext|>"),
    "llama": ("<|eot_id|>", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "<|header|>", "<|eot_id|>", "", ""),
}
WORDS = ["say", "a", "kind", "word", "no", "bad", "good", "of", "it"]


def template(opening: str, closing: str, between: str, last: str) -> str:
    turn = f"{opening}{{{{ m.role }}}}\n{{{{ m.content }}}}{closing}{between}"
    end = f"{{% if add_generation_prompt %}}{opening}assistant\n{{% else %}}{last}{{% endif %}}"
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{end}"


@pytest.fixture(scope="module", params=STYLES)
def model(request, tmp_path_factory):
    """(folder, names of its stop tokens, its end of turn, pairs): a tiny Llama of one word per token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    eos, stops, opening, closing, between, last = STYLES[request.param]
    special = list(dict.fromkeys(["<pad>", *stops, opening, closing]))
    names = [*special, "user", "assistant", "\n", " ", *WORDS]
    core = Tokenizer(models.WordLevel(vocab={name: place for place, name in enumerate(names)}))
    split = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")
    core.pre_tokenizer = pre_tokenizers.Sequence(list(split))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template(opening, closing, between, last)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = tokenizer.convert_tokens_to_ids(stops)
    config = LlamaConfig(vocab_size=len(names), max_position_embeddings=32, initializer_range=0.1, **sizes)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, None, ids[0]
    made = LlamaForCausalLM(config)
    made.generation_config.eos_token_id = ids
    folder = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def turn(role, content):
        return [{"role": role, "content": content}]

    rows = [
        {
            "prompt": turn("user", f"say a {word}"),
            "chosen": turn("assistant", f"a kind {word}"),
            "rejected": turn("assistant", f"no {word}"),
        }
        for word in WORDS
    ]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", set(ids), tokenizer.convert_tokens_to_ids(closing), str(pairs)


def settings(model, **changes):
    folder, _, _, pairs = model
    splits = {"dataset_train_split": "all", "dataset_test_split": "all"}
    return {"model_name_or_path": str(folder), "dataset_name": pairs, **LENGTHS, **splits, "max_steps": 1, **changes}


def test_stop_ids_are_those_of_generation_config_and_eos(model):
    folder, stops, _, _ = model
    tokenizer = load_tokenizer(str(folder))
    assert (set(stop_ids(tokenizer)), stop_ids(tokenizer)[0]) == (stops, tokenizer.eos_token_id)
    tokenizer.pad_token = None
    assert stop_ids(with_padding(tokenizer)) == stop_ids(tokenizer)


def test_a_training_target_ends_at_the_template_s_end_of_turn(lab, model):
    _, stops, closing, _ = model
    config = lab.config("dpo", **settings(model))
    tokenizer = tokenizer_of(lab.registry.resolve(config.model_name_or_path))
    examples, _ = StageData(config, lab.home, lambda _: None).split("pair", "all", tokenizer)
    words = [tokenizer.convert_tokens_to_ids([*text.split()]) for text in ("a kind say", "no say")]
    assert examples[0].completions == [[*ids, closing] for ids in words]
    for example in examples:
        assert all(stops.isdisjoint(ids[:-1]) for ids in example.completions)


@pytest.mark.parametrize("stage", ["dpo", "ppo", "train-rm"])
def test_all_stop_ids_are_published(lab, model, stage, function):
    _, stops, _, _ = model
    changes = settings(model, reward_centering_samples=None if stage != "train-rm" else 4)
    if stage == "ppo":
        changes |= {"reward_model_path": None, "reward_functions": [function(ones)]}
    path = lab.registry.resolve(lab.run(stage, **changes).model).path
    file = path / ("config.json" if stage == "train-rm" else "generation_config.json")
    assert set(json.loads(file.read_text())["eos_token_id"]) == stops
    assert set(stop_ids(load_tokenizer(str(path)))) == stops


def ones(prompts, completions, **_):
    return [1.0] * len(prompts)


def test_every_command_that_samples_ends_a_response_at_any_of_them(lab, model, function):
    """In a model with almost equal logits each of 8 tokens is a stop token in 2 or 3 of 17 cases."""
    folder, stops, _, pairs = model
    seen = {}

    def judge(prompts, completions, completion_ids, ended, **_):
        seen.update({tuple(ids): end for ids, end in zip(completion_ids, ended, strict=True)})
        return [float(len(ids)) for ids in completion_ids]

    def check(found):
        assert {ids[-1] for ids, ended in found.items() if ended} == stops
        for ids, ended in found.items():
            assert [place for place, token in enumerate(ids) if token in stops] == [len(ids) - 1] * ended

    name = function(judge)
    lab.run("ppo", **settings(model, rollout_batch_size=64, reward_model_path=None, reward_functions=[name]))
    check(seen)
    seen.clear()
    lab.run("collect", policy=str(folder), prompts=pairs, judge=name, num=32, **LENGTHS)
    check(seen)
    seen.clear()
    from rlhf_pipeline.measure.evaluate import run_evaluate

    changes = {"prompts": pairs, "split": "all", "max_prompt_length": 12, "max_new_tokens": 8, "samples": 8}
    run_evaluate(str(folder), lab.config("evaluate", reward_model=name, **changes), lab.home)
    check(seen)


@pytest.mark.check
def test_arms_of_ppo_and_dpo_are_compared_also_where_one_names_a_stop_token(lab, model, function):
    from rlhf_pipeline.compare.run import run_compare

    folder, _, closing, _ = model
    stop = load_tokenizer(str(folder)).convert_ids_to_tokens(closing)
    reward = {"reward_model_path": None, "reward_functions": [function(ones)], "stop_token": stop}
    lab.run("ppo", **settings(model, output_name="arm-ppo", **reward))
    lab.run("dpo", **settings(model, output_name="arm-dpo", beta=0.5))
    config = lab.config("compare", arms=["arm-ppo", "arm-dpo"], split="train", samples=2, allow_mismatch=True)
    result = run_compare(config, lab.home, quiet=True)
    assert "stop token" not in {difference.what for difference in result.comparable.differences}


def test_a_stop_token_of_the_config_closes_plain_text_and_is_published(lab, tmp_path):
    """The built-in world's words: EOS alone ends a response, unless a stop token is named."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "this was", "completion": " great"}) + "\n" for _ in range(4)))
    changes = {"dataset_name": str(path), "dataset_train_split": "all", "dataset_test_split": "all", "max_steps": 1}
    result = lab.run("sft", stop_token="and", **changes)
    tokenizer = tokenizer_of(lab.registry.resolve(result.model))
    stop, great = tokenizer.convert_tokens_to_ids(["and", "great"])
    assert stop_ids(tokenizer) == (stop, tokenizer.eos_token_id)
    examples, _ = StageData(lab.config("sft", **changes), lab.home, print).split("demonstration", "all", tokenizer)
    assert examples[0].completions == [[great, stop]]


def test_a_typed_prompt_is_a_user_s_turn_of_a_chat_model(lab, model, capsys):
    from rlhf_pipeline.evaluation import sampled
    from rlhf_pipeline.measure.generate import run_generate

    folder, _, _, _ = model
    tokenizer = load_tokenizer(str(folder))
    turn = [{"role": "user", "content": "say a word"}]
    templated = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    read = []
    draw = sampled.sample_for_prompts

    def watched(policy, prompts, **options):
        read.extend(prompt.prompt_ids for prompt in prompts)
        return draw(policy, prompts, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled, "sample_for_prompts", watched)
        config = lab.config("generate", max_prompt_length=16, max_new_tokens=8)
        for raw in (False, True):
            found = run_generate(str(folder), config, lab.home, texts=["say a word"], raw=raw)
            assert [row["prompt"] for row in found["responses"]] == ["say a word"]
            assert ("--raw" in capsys.readouterr().err) is not raw
    assert read == [templated, tokenizer.convert_tokens_to_ids(["say", "a", "word"])]
