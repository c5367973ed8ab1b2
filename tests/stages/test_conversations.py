"""SFT on conversations: which tokens are trained, in the loss, in the first lines of a run, and with TRL's trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.data.tokenizers import load_tokenizer, train_byte_level_bpe
from rlhf_pipeline.errors import ConfigError
from rlhf_pipeline.models.loading import init_causal_lm, load_causal_lm, save_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SUMS = ("2+2?", "4", "3+3?", "6", "4+4?", "8")
OPTIONS = {"dataset_train_split": "all", "dataset_test_split": "all", "max_steps": 1, "max_prompt_length": 60}
OPTIONS |= {"response_length": 8, "per_device_train_batch_size": 4}


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> str:
    """A directory with a tiny random model whose tokenizer has ChatML."""
    tokenizer = train_byte_level_bpe(["user assistant 2 + 2 ? 4"] * 4, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"model_type": "llama", **sizes, "max_position_embeddings": 128}
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_model(init_causal_lm(settings, tokenizer, seed=1), tokenizer, folder)
    return str(folder)


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = [talk(*SUMS), talk(*SUMS[:2]), talk(*SUMS[2:]), talk("1+1?", "2", "5?", "5")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return str(path)


def expected_nll(folder: str, source: str, train_on: str) -> float:
    """The mean over trained tokens of -log p by plain transformers, with the trained tokens found by their marks."""
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder)
    start, end, new_line = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "Ċ"))
    total, count = 0.0, 0
    for line in Path(source).read_text().splitlines():
        ids = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True, return_dict=False)
        ids = ids[: len(ids) - ids[::-1].index(end)]  # without the newline behind the last turn
        turns, inside, header = [], False, False
        for place, token in enumerate(ids):
            if token == start:
                header, inside = True, False
                turns.append([])
            elif header and token == new_line:
                header, inside = False, tokenizer.decode(ids[place - 9 : place]).endswith("assistant")
            elif inside:
                turns[-1].append(place)
                inside = token != end
        replies = [places for places in turns if places]
        trained = {
            "all_assistant": [place for places in replies for place in places],
            "last": replies[-1],
            "all": range(1, len(ids)),
        }[train_on]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(float(logprobs[place - 1, ids[place]]) for place in trained)
        count += len(trained)
    return total / count


@pytest.mark.parametrize("train_on", ["all_assistant", "last", "all"])
def test_the_loss_is_the_mean_over_the_trained_tokens(lab, chat, source, train_on) -> None:
    result = lab.run("sft", output_name="x", model_name_or_path=chat, dataset_name=source, train_on=train_on, **OPTIONS)
    expected = expected_nll(chat, source, train_on)
    assert lab.rows(result.run)[0]["loss/nll"] == pytest.approx(expected, abs=1e-5)
    (said,) = [line for line in (Path(result.run) / "log.txt").read_text().splitlines() if "first example" in line]
    trained = {"all_assistant": ": 6 of ", "last": ": 2 of ", "all": "tokens trained: "}[train_on]
    assert trained in said and said.endswith('8<|im_end|>"')


def test_every_turn_of_the_assistant_is_the_default(lab, chat, source) -> None:
    config = lab.config("sft", output_name="x", model_name_or_path=chat, dataset_name=source)
    assert config.train_on == "all_assistant" and not config.trains_all


@pytest.mark.check
def test_trl_trains_the_same_tokens(lab, chat, source) -> None:
    options = {**OPTIONS, "model_name_or_path": chat, "dataset_name": source, "max_steps": 3}
    runs = [lab.run("sft", output_name=engine, engine=engine, **options).run for engine in ("native", "trl")]
    for ours, theirs in zip(*map(lab.rows, runs), strict=True):
        assert ours["loss/nll"] == pytest.approx(theirs["loss/nll"], abs=1e-5)


def test_the_preview_shows_ids_borders_and_trained_tokens(capsys, lab, chat, source) -> None:
    words = ["--home", str(lab.home), "data", "preview", source, "--tokenizer", chat]
    assert main([*words, "--json", "-n", "1"]) == 0
    tokens = json.loads(capsys.readouterr().out)["rows"][0]["tokens"]
    tokenizer = load_tokenizer(chat)
    ids = tokens["prompt_ids"] + tokens["completion_ids"][0]
    whole = tokenizer.apply_chat_template(talk(*SUMS), tokenize=True, return_dict=False)
    assert ids == whole[: len(ids)] and tokenizer.decode(whole[len(ids) :]) == "\n"
    assert tokenizer.decode(tokens["prompt_ids"]).endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert tokens["trained_text"] == [["4<|im_end|>", "6<|im_end|>", "8<|im_end|>"]]
    assert main([*words, "--train-on", "last"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "trained" in line) == "  trained     2 tokens '8<|im_end|>'"


def test_a_dry_run_finds_what_is_wrong_with_the_template(capsys, lab, chat, source) -> None:
    words = ["--home", str(lab.home), "sft", "--dry-run", f"model_name_or_path={chat}", f"dataset_name={source}"]
    words += ["output_name=x", "use_cpu=true", "max_prompt_length=60", "response_length=8", "dataset_train_split=all"]
    for override, error in (
        ("chat_template_path=nowhere.jinja", "chat_template_path: 'nowhere.jinja' cannot be read"),
        (
            "chat_template=chatlm",
            "chat_template=chatlm: found 'chatlm'; expected alpaca, chatml, zephyr, or Jinja text; did",
        ),
        ("chat_template='{{ raise_exception(\"no\") }}'", "4 of 4 rows cannot be used (refused_by_template 4)"),
        ("eos_token=<none>", "eos_token: '<none>' is not a token"),
    ):
        assert main([*words, override]) == 2, override
        assert error in capsys.readouterr().err, override
    assert main(words) == 0


def test_a_model_from_scratch_has_the_template_of_its_config(lab, source) -> None:
    from rlhf_pipeline.stages.common import tokenizer_of

    fresh = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    fresh |= {"num_attention_heads": 1, "max_position_embeddings": 128}
    tokens = {"type": "byte_level_bpe", "vocab_size": 300}
    start = {"model_name_or_path": None, "model_init": fresh, "tokenizer_init": tokens, "chat_template": "zephyr"}
    result = lab.run("sft", output_name="fresh", dataset_name=source, **start, **OPTIONS)
    resolved = lab.registry.resolve(result.model)
    assert "<|assistant|>" in tokenizer_of(resolved).chat_template
    assert resolved.manifest.chat_template_digest is not None
    with pytest.raises(ConfigError, match="eos_token: the tokenizer of tokenizer_init has its own"):
        lab.config("sft", output_name="x", dataset_name=source, eos_token="a", **start)


PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
THOUGHT = "<think>\n\n</think>\n\n4"


@pytest.mark.check
@pytest.mark.slow
@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_a_reply_that_is_learnt_is_sampled_where_the_prompt_opens_thinking(lab, tmp_path, opened) -> None:
    """Two newlines are one token; in the whole text it would reach from the end of the prompt into the reply."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from rlhf_pipeline.measure.generate import run_generate

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*letters, "ĊĊ"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    cut = pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(list(cut)), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    turn = "{{ m.role + ':' + ('" + THOUGHT[:-1].replace("\n", "\\n") + "' if m.role == 'assistant' else '') }}"
    asks = "{% if add_generation_prompt %}{{ 'assistant:" + opened.replace("\n", "\\n") + "' }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{{ m.content + '<end>' }}{% endfor %}" + asks
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, initializer_range=0.3)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": talk("2+2?", "4")}) + "\n")
    lengths = {"max_prompt_length": 48, "response_length": 32}
    splits = {"dataset_train_split": "all", "dataset_test_split": "all", "eval_strategy": "no"}
    changes = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(rows), "max_steps": 80}
    result = lab.run("sft", **changes, **lengths, **splits, learning_rate=3e-2, lr_scheduler_type="constant")
    assert result.metrics["eval_nll_per_sequence"] < 0.003
    config = lab.config("generate", max_prompt_length=48, max_new_tokens=32, samples=32)
    (found,) = run_generate("tuned", config, lab.home, texts=["2+2?"])["responses"]
    expected = (THOUGHT.removeprefix(opened), True)
    assert [(response["text"], response["ended"]) for response in found["responses"]] == [expected] * 32
