"""Published recipes: how many run, what `rlhf import` carries, and that no key is dropped silently."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.foreign_files import read_config, with_dataset_info
from rlhf_pipeline.config.importing import import_config
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.yaml import dump
from rlhf_pipeline.data.templates import BUILT_IN
from rlhf_pipeline.errors import ConfigError
from rlhf_pipeline.foreign.open_instruct import TULU
from rlhf_pipeline.foreign.table import JOINT, Translation
from rlhf_pipeline.foreign.templates import AXOLOTL, LLAMAFACTORY
from rlhf_pipeline.foreign.tools import TOOLS, meaning
from rlhf_pipeline.foreign.torchtune import TEMPLATES

UNEDITED, MEANT = 24, 45
"""Lower bounds of the counts that `scripts/recipes.py` prints."""


@pytest.fixture(scope="module")
def script():
    """The script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
        yield importlib.import_module("recipes")


@pytest.fixture(scope="module")
def recipes(script) -> dict[str, Any]:
    """The stored recipes, as tool/name."""
    return {f"{recipe.tool}/{recipe.name}": recipe for recipe in script.stored()}


@pytest.fixture
def translated(recipes, tmp_path):
    """Translate a stored recipe by its table, with keys that this version may not have yet."""

    def run(name: str, **changes: Any) -> Translation:
        recipe = recipes[name]
        file = recipe.write(tmp_path)
        tool = TOOLS[recipe.tool]
        values = tool.flat(read_config(file))
        if recipe.tool == "llamafactory":
            values = with_dataset_info(values, file)
        return tool.translate({**values, **changes}, recipe.stage)

    return run


def test_the_counts_do_not_fall(script, recipes):
    runs, unedited, means, every = script.count()
    assert (unedited, every) == (25, 54) and len(recipes) == 54
    assert runs >= UNEDITED and means >= MEANT


def test_a_dpo_recipe_of_alignment_handbook_runs_unedited(recipes, tmp_path):
    loaded = load_config("dpo", recipes["alignment-handbook/zephyr-7b-beta-dpo-full"].write(tmp_path))
    config = loaded.config
    assert (config.learning_rate, config.beta, config.loss_type, config.num_train_epochs) == (5e-7, 0.01, "sigmoid", 1)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16
    assert vars(config.lengths()) == {"prompt": 512, "response": 512, "total": 1024}
    assert (config.dtype, config.bf16, config.warmup_steps, config.seed) == ("float32", True, 0.1, 42)
    entries = [(entry.dataset_name, entry.split, entry.fraction) for entry in config.datasets]
    source = "HuggingFaceH4/ultrafeedback_binarized"
    assert entries == [(source, "train_prefs", 1.0), (source, "test_prefs", 1.0)] and config.test_split_size == 2000
    assert (config.save_strategy, config.save_steps, config.eval_steps) == ("steps", 100, 100)
    assert (config.output_name, config.output_dir) == ("zephyr-7b-dpo-full", "data/zephyr-7b-dpo-full")
    assert any("dataset_mixture: read as datasets" in note for note in loaded.notes)


# Values read from the files; batch: examples per optimizer step on one device.
CARRIED = {
    "llamafactory/llama3-lora-dpo": (
        {"learning_rate": 5e-6, "beta": 0.1, "loss_type": "sigmoid", "max_length": 2048, "num_train_epochs": 3.0}
        | {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": "all-linear", "use_peft": True},
        8,
    ),
    "llamafactory/llama3-full-sft": (
        {"learning_rate": 1e-5, "max_length": 2048, "num_train_epochs": 3.0, "instruction_style": "plain"}
        | {"text_as_chat": True, "seed": 42},
        2,
    ),
    "llamafactory/llama3-qlora-sft": (
        {"load_in_4bit": True, "use_bnb_nested_quant": True, "lora_r": 8, "test_split_size": 0.1},
        8,
    ),
    "axolotl/llama3-lora-1b": (
        {"learning_rate": 2e-4, "max_length": 2048, "num_train_epochs": 1, "packing": True, "warmup_steps": 10}
        | {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "instruction_style": "alpaca", "optim": "adamw_8bit"},
        4,
    ),
    "axolotl/qwen2-dpo": (
        {
            "learning_rate": 2e-4,
            "max_length": 2048,
            "num_train_epochs": 4,
            "column_mapping": {"prompt": "conversation"},
        },
        8,
    ),
    "open-instruct/sft-default": (
        {"learning_rate": 2e-5, "max_length": 4096, "num_train_epochs": 2, "max_grad_norm": 0.0, "dtype": "bfloat16"}
        | {"max_train_samples": 10000},
        16,
    ),
    "open-instruct/olmo2-7b-dpo": ({"beta": 5, "loss_type": "sigmoid_norm", "learning_rate": 5e-7}, 4),
    "openrlhf/llama3-dpo": (
        {"learning_rate": 5e-7, "beta": 0.1, "max_length": 8192, "num_train_epochs": 1.0, "adam_beta2": 0.95}
        | {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 0.03, "text_as_chat": True},
        256,
    ),
    "openrlhf/llama3-rm": ({"learning_rate": 9e-6, "reward_centering": "none"}, 256),
    "torchtune/llama3_2-1b-qlora": (
        {"learning_rate": 3e-4, "weight_decay": 0.01, "max_grad_norm": 0.0, "load_in_4bit": True, "lora_r": 64}
        | {"lora_target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        32,
    ),
    "torchtune/llama3_1-8b-lora-dpo": ({"max_steps": 1000, "beta": 0.1, "weight_decay": 0.05}, 32),
    "verl/gemma-2b-sft": ({"num_train_epochs": 3.0, "learning_rate": 1e-5, "weight_decay": 0.01}, 256),
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_a_table_carries(translated, name):
    expected, batch = CARRIED[name]
    config = translated(name).config
    assert {key: config.get(key) for key in expected} == expected
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] == batch


def test_the_chat_formats_of_torchtune_and_open_instruct():
    """What their tokenizers make of two turns, by hand."""
    jinja2 = pytest.importorskip("jinja2")
    turns = [{"role": "user", "content": "q "}, {"role": "assistant", "content": "a"}]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = {
        TEMPLATES["llama3_tokenizer"]: (
            "<s>" + header.format("user") + "q<|eot_id|>",
            header.format("assistant"),
            "a<|eot_id|>",
        ),
        TEMPLATES["qwen2_5_tokenizer"]: ("<|im_start|>user\nq <|im_end|>\n", "<|im_start|>assistant\n", "a<|im_end|>"),
        TULU: ("<|user|>\nq \n", "<|assistant|>\n", "a</s>"),
    }
    for text, (prompt, opening, completion) in expected.items():
        template = jinja2.Template(text)
        assert template.render(messages=turns, **tokens) == prompt + opening + completion
        assert template.render(messages=turns[:1], add_generation_prompt=True, **tokens) == prompt + opening


A_CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SPOKEN = {  # of a chat with the tokens <s> and </s>, by hand from the two tools' own tables
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nq\n\n### Response:\na</s>\n\n"
    ),
    "chatml": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
    "default": "Human: q</s>\nAssistant:a</s>\n",
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "a<|eot_id|>"
    ),
    "qwen": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    ),
    "zephyr": "<|system|>\nYou are Zephyr, a helpful assistant.</s><|user|>\nq</s><|assistant|>\na</s>",
    "gemma": "<s><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n",
}


def rendered(text: str, messages: list[dict[str, str]], eos: str = "</s>", **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    options |= {"bos_token": "<s>", "eos_token": eos}
    return render_jinja_template([messages], chat_template=text, **options)[0][0]


@pytest.mark.parametrize("tool", ["llamafactory", "axolotl"])
def test_named_templates_make_the_text_of_their_tool(translated, tool):
    recipe, key, model, ours = {
        "llamafactory": ("llama3-full-sft", "template", "model_name_or_path", LLAMAFACTORY),
        "axolotl": ("llama3-dpo-lora-8b", "chat_template", "base_model", AXOLOTL),
    }[tool]
    for name, found in ours.items():
        if not found.text:
            continue
        changes = {key: name, model: "org/base", "special_tokens.eos_token": None}
        config = translated(f"{tool}/{recipe}", **changes).config
        eos, text = config.get("eos_token"), BUILT_IN.get(config["chat_template"], config["chat_template"])
        same = {"qwen_25": "qwen", "qwen3_nothink": "chatml", "smollm": "chatml", "yi": "chatml"}.get(name, name)
        expected = SPOKEN[same]
        if (tool, name) == ("axolotl", "alpaca"):
            expected = "<s>### Instruction:\nq\n\n### Response:\na</s>\n\n"
        assert rendered(text, A_CHAT, eos or "</s>") == expected, name
        asked = rendered(text, A_CHAT[:1], eos or "</s>", add_generation_prompt=True)
        assert expected.startswith(asked) and expected[len(asked)] == "a", name
        assert eos == {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>"}.get(same), name


def test_a_named_template_that_is_the_models_own_stays(translated):
    """The models' own templates are those that TRL keeps."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    for name, model, kept, says in (
        ("llama3", "meta-llama/Meta-Llama-3-8B-Instruct", "llama3", "llama3"),
        ("qwen", "Qwen/Qwen2.5-0.5B-Instruct", "qwen2_5", "qwen"),
        ("qwen3_nothink", "Qwen/Qwen3-4B-Instruct-2507", "qwen3_instruct_2507", "chatml"),
        ("gemma", "google/gemma-2-9b-it", "gemma", "gemma"),
        ("gemma3", "google/gemma-3-1b-it", "gemma3", "gemma"),
    ):
        found = translated("llamafactory/llama3-full-sft", template=name, model_name_or_path=model)
        assert [loss.changes_training for loss in found.lost if loss.key == "template"] == [False], name
        assert "chat_template" not in found.config
        text = (Path(spec.origin).parent / "chat_templates" / f"{kept}.jinja").read_text(encoding="utf-8")
        assert rendered(text, A_CHAT) == SPOKEN[says], name
    for name, model in (("llama3", "meta-llama/Llama-3.1-8B-Instruct"), ("qwen", "Qwen/Qwen2-7B-Instruct")):
        assert (
            "chat_template"
            in translated("llamafactory/llama3-full-sft", template=name, model_name_or_path=model).config
        )  # their own have a date, and another system message
    for tool, recipe, changes in (
        ("llamafactory", "llama3-full-sft", {"template": "vicuna"}),
        ("llamafactory", "llama3-full-sft", {"template": "gemma", "model_name_or_path": "google/gemma-2b"}),
        ("axolotl", "llama3-dpo-lora-8b", {"chat_template": "mistral_v1"}),
    ):
        (loss,) = [one for one in translated(f"{tool}/{recipe}", **changes).lost if "template" in one.key]
        assert loss.changes_training and "write it as Jinja text into chat_template" in loss.why


def test_a_jinja_template_of_axolotl_is_a_text_or_a_file(translated):
    for given, key in (("{{ messages }}", "chat_template"), ("chat.jinja", "chat_template_path")):
        config = translated("axolotl/llama3-dpo-lora-8b", chat_template="jinja", chat_template_jinja=given).config
        assert config[key] == given
    odd = translated("axolotl/llama3-dpo-lora-8b", chat_template="chatml", **{"special_tokens.eos_token": "<e>"})
    assert odd.config["eos_token"] == "<e>" and rendered(odd.config["chat_template"], A_CHAT) == SPOKEN["chatml"]


def test_the_batches_of_ppo(translated):
    config = translated("verl/qwen2-7b-ppo-rm").config
    sizes = ("rollout_batch_size", "num_mini_batches", "per_device_train_batch_size", "response_length", "kl_coef")
    assert [config[key] for key in sizes] == [1024, 4, 16, 512, 0.001]
    config = translated("openrlhf/llama3-ppo").config
    assert [config[key] for key in sizes] == [1024, 8, 2, 1024, 0.01] and config["total_episodes"] == 100_000
    config = translated("llamafactory/llama3-lora-ppo").config
    assert [config[key] for key in sizes] == [8, 8, 1, 512, 0.2]
    config = translated("torchtune/mistral-7b-ppo").config
    assert [config[key] for key in sizes] == [64, 2, 32, 58, 0.01]


def test_the_pretraining_stream_and_normalised_scores(translated):
    """OpenRLHF reads its pretraining data with a weight of .05 unless another is given; without data it has none."""
    found = translated("openrlhf/llama3-ppo")
    assert found.config["normalize_rewards"] is True and "ptx_coef" not in found.config
    assert any(note.startswith("normalize_rewards: by the scores of the run") for note in found.notes)
    assert "normalize_rewards" not in translated("openrlhf/llama3-ppo", normalize_reward=False).config
    whole = {"split": "train", "fraction": 1.0}
    config = translated("openrlhf/llama3-ppo", pretrain_data="org/text").config
    assert (config["ptx_coef"], config["ptx_dataset"]) == (0.05, [{"dataset_name": "org/text", **whole}])
    mixture = {"pretrain_data": "a/b,c/d", "pretrain_data_probs": "0.2,0.8", "pretrain_split": "part", "ptx_coef": 0.3}
    config = translated("openrlhf/llama3-ppo", **mixture).config
    entries = [(entry["dataset_name"], entry["split"], entry["weight"]) for entry in config["ptx_dataset"]]
    assert config["ptx_coef"] == 0.3 and entries == [("a/b", "part", 0.2), ("c/d", "part", 0.8)]
    assert "ptx_coef" not in translated("openrlhf/llama3-ppo", ptx_coef=0.3).config
    assert translated("llamafactory/llama3-lora-ppo", ppo_score_norm=True).config["normalize_rewards"] is True


def test_all_rows_of_a_source_are_trained_on(translated):
    config = translated("open-instruct/sft-default").config
    names = [(entry["dataset_name"], entry["split"], entry["fraction"]) for entry in config["datasets"]]
    assert names == [("allenai/tulu-v2-sft-mixture", "train", 0.5), ("HuggingFaceH4/no_robots", "train", 0.8)]
    (entry,) = translated("llamafactory/llama3-lora-dpo").config["datasets"]
    assert entry["dataset_name"].endswith("data/dpo_en_demo.json")
    assert {key: entry[key] for key in ("split", "fraction", "max_samples")} == {
        "split": "all",
        "fraction": 1.0,
        "max_samples": 1000,
    }


SAYS_THE_STAGE = ("rl", "reward_model", "stage", "program", "loss._component_", "dataset_info")
"""Keys that the stage follows from, and the list of data sets, which is no key."""


def _other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return type(value)(value * 2 + 1)
    if isinstance(value, list):
        return [*value, "other"]
    return {**value, "other": 1.0} if isinstance(value, dict) else f"{value}other"


def test_no_key_is_dropped_silently(recipes, translated):
    """Each key is written, or in `lost`; another value of a key that is read with others changes the result."""
    silent = []
    for name, recipe in recipes.items():
        if recipe.tool not in TOOLS:
            continue
        found, tool = translated(name), TOOLS[recipe.tool]
        told = {loss.key for loss in found.lost} | set(found.origin.values())
        for key, value in found.given.items():
            entry = tool.entry(key)
            if value is None or key in {*told, *SAYS_THE_STAGE} or (entry is not None and value in entry.off):
                continue
            if entry is JOINT:
                try:
                    other = translated(name, **{key: _other(value)})
                except ConfigError:
                    continue
                if (other.config, other.lost) != (found.config, found.lost):
                    continue
            elif entry is not None and entry.ours and entry.values is not None:
                written = entry.values(value) if callable(entry.values) else entry.values[value]
                if written is None:
                    continue  # a value such as `false` that means this package's default
            silent.append(f"{name}: {key}")
    assert not silent, "\n".join(silent)


def test_an_unknown_key_is_lost_and_may_change_training(translated):
    found = translated("axolotl/llama3-lora-1b", sequence_length=9, unheard_of=1)
    by_key = {loss.key: loss for loss in found.lost}
    assert by_key["unheard_of"].changes_training and "did you mean 'sequence_len'" in by_key["sequence_length"].why


def test_an_import_loads(recipes, tmp_path):
    """What `import_config` returns is a valid config, but for files that are not here and numbers to be given."""
    for name, recipe in recipes.items():
        found = import_config(recipe.write(tmp_path / name))
        assert found.stage == recipe.stage and found.tool == recipe.tool.replace("alignment-handbook", "trl"), name
        left = [note for note in found.notes if note.startswith("to mend") and ": there is no '" not in note]
        assert all("total_episodes: missing" in note for note in left), (name, left)


def test_the_command_writes_yaml_and_what_is_lost(recipes, tmp_path, capsys):
    file = recipes["axolotl/llama3-dpo-lora-8b"].write(tmp_path)
    assert main(["import", str(file)]) == 0
    out, told = capsys.readouterr()
    (tmp_path / "ours.yaml").write_text(out)
    config = load_config("dpo", tmp_path / "ours.yaml").config
    assert (config.learning_rate, config.num_train_epochs, config.max_length) == (2e-4, 4, 4096)
    assert f"{file}: a config of axolotl, for `rlhf dpo --config FILE`" in told
    assert "lost, which changes what is trained: load_in_8bit: True: 4 bits or none are here" in told
    assert "no effect here: " in told
    assert main(["import", str(file), "--json", "--from", "axolotl"]) == 0
    found = json.loads(capsys.readouterr()[0])
    assert found["config"]["learning_rate"] == 2e-4 and found["stage"] == "dpo"
    eight = next(loss for loss in found["lost"] if loss["key"] == "load_in_8bit")
    assert eight == {
        "key": "load_in_8bit",
        "value": True,
        "why": "4 bits or none are here",
        "changes_training": True,
    }


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("a: 1\n", "x.yaml", "found no key that tells the tool"),
        ("rl: grpo\nbase_model: m\n", "x.yaml", "found 'grpo'"),
        ("stage: mpo\ncutoff_len: 9\n", "x.yaml", "found 'mpo'"),
        ("trl grpo --model_name_or_path m\n", "x.sh", "starts no known program"),
        ("echo hello\n", "x.sh", "starts no known program"),
        ("", "x.yaml", "found no keys"),
    ],
)
def test_a_file_that_is_not_for_this_package(tmp_path, text, name, expected):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=expected):
        import_config(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ("model_name_or_path: m\ndesirable_weight: 1.5\nundesirable_weight: 0.5\nbeta: 0.2\n", "trl"),
        (
            "stage: kto\nmodel_name_or_path: m\ncutoff_len: 9\nkto_chosen_weight: 1.5\nkto_rejected_weight: 0.5\n"
            "pref_beta: 0.2\n",
            "llamafactory",
        ),
        ("rl: kto\nbase_model: m\nkto_desirable_weight: 1.5\nkto_undesirable_weight: 0.5\nrl_beta: 0.2\n", "axolotl"),
    ],
)
def test_kto_of_each_tool(tmp_path, text, tool):
    (tmp_path / "x.yaml").write_text(text)
    result = import_config(tmp_path / "x.yaml")
    assert (result.tool, result.stage) == (tool, "dpo")
    keys = ("loss_type", "desirable_weight", "undesirable_weight", "beta")
    assert [result.config[key] for key in keys] == ["kto", 1.5, 0.5, 0.2]
    assert not [one.key for one in result.lost if one.changes_training]


def test_kto_of_a_script_of_trl(tmp_path):
    (tmp_path / "x.sh").write_text("trl kto --model_name_or_path m --dataset_name org/labels --beta 0.2\n")
    result = import_config(tmp_path / "x.sh")
    assert (result.stage, result.config["loss_type"], result.config["beta"]) == ("dpo", "kto", 0.2)
    assert "loss_type kto: the default of trl" in result.notes


def test_labels_of_llamafactory_have_their_column(tmp_path):
    (tmp_path / "data").mkdir()
    entry = {
        "hf_hub_url": "org/labels",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "good"},
    }
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"labels": entry}))
    (tmp_path / "x.yaml").write_text("stage: kto\ncutoff_len: 9\ndataset: labels\n")
    (source,) = import_config(tmp_path / "x.yaml").config["datasets"]
    assert source["column_mapping"] == {"conversations": "messages", "label": "good"}


@pytest.mark.parametrize(
    ("tool", "name", "key", "value"),
    [
        ("axolotl", "llama3-lora-1b", "datasets", 3.7),
        ("axolotl", "llama3-lora-1b", "train_on_inputs", [1]),
        ("axolotl", "qwen2-reward", "datasets", [{"path": []}]),
        ("llamafactory", "llama3-lora-dpo", "stage", [{}]),
        ("llamafactory", "llama3-lora-dpo", "template", [1]),
        ("open-instruct", "dpo-default", "keep_last_n_checkpoints", "true"),
        ("open-instruct", "olmo2-7b-sft", "checkpointing_steps", "ü"),
        ("torchtune", "qwen2_5-0_5b-full", "max_steps_per_epoch", [{}]),
    ],
)
def test_a_value_of_another_kind_is_named(recipes, tmp_path, tool, name, key, value):
    file = recipes[f"{tool}/{name}"].write(tmp_path)
    file.write_text(dump({**read_config(file), key: value}))
    with pytest.raises(ConfigError) as error:
        import_config(file, tool)
    assert [fault.key for fault in error.value.faults] == [key]
    assert f"{key}: found {value}, which cannot be read" in str(error.value)


def test_values_of_another_kind_at_several_keys(recipes, tmp_path):
    file = recipes["llamafactory/llama3-lora-dpo"].write(tmp_path)
    file.write_text(dump({**read_config(file), "stage": [{}], "template": [1]}))
    with pytest.raises(ConfigError, match="values of several keys cannot be read"):
        import_config(file)


def test_wrong_options_of_import(tmp_path):
    (tmp_path / "x.yaml").write_text("base_model: m\n")
    with pytest.raises(ConfigError, match="did you mean 'axolotl'"):
        import_config(tmp_path / "x.yaml", "axolotle")
    with pytest.raises(ConfigError, match="one of sft, train-rm, ppo, dpo"):
        import_config(tmp_path / "x.yaml", None, "kto")


def test_a_shell_script_is_read_as_the_shell_reads_it(tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(
        "set -x\nDATA=org/pairs\nread -r -d '' commands <<EOF\nopenrlhf.cli.train_dpo \\\n   --dataset $DATA \\\n"
        "   --learning_rate 5e-7 \\\n   --bf16 \\\n   --adam_betas 0.9 0.95\nEOF\n    # --ipo [for IPO]\n"
        "deepspeed --module $commands\n"
    )
    assert read_config(script) == {
        "program": "openrlhf.cli.train_dpo",
        "dataset": "org/pairs",
        "learning_rate": 5e-7,
        "bf16": True,
        "adam_betas": [0.9, 0.95],
    }
    script.write_text(
        "files=\"['$HOME/a.parquet', 'b.parquet']\"\n"
        'python3 -m verl.trainer.main_ppo \\\n    data.train_files="$files" \\\n'
        "    +trainer.val=null \\\n    trainer.logger=['console'] $@\n"
    )
    assert read_config(script) == {
        "program": "verl.trainer.main_ppo",
        "data.train_files": ["$HOME/a.parquet", "b.parquet"],
        "trainer.val": None,
        "trainer.logger": ["console"],
    }


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("base_model", "a key of axolotl: use model_name_or_path"),
        ("cutoff_len", "a key of llamafactory"),
        ("sequence_len", "a key of axolotl: use max_length"),
        ("pref_loss", "a key of llamafactory: use loss_type"),
        ("lmbda", "a key of torchtune: use lam"),
        ("deepspeed", "it distributes the work"),
    ],
)
def test_a_key_of_another_tool_gets_its_meaning(faults, key, expected):
    assert expected in meaning(key)
    for stage in ("sft", "dpo", "ppo", "train-rm"):
        fix = faults(stage, **{key: "x"})[key].fix
        assert expected in fix and "did you mean" not in fix


def test_a_misspelt_key_still_gets_the_nearest_spelling(faults):
    assert meaning("learning_rat") == ""
    assert faults("dpo", learning_rat=1)["learning_rat"].fix == "did you mean 'learning_rate'?"
