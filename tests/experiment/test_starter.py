"""`rlhf init`: the file that it writes is valid, has its lengths from the data, and runs."""

from __future__ import annotations

import json
import re
from itertools import product

import pytest
import yaml

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.data.tokenizers import train_byte_level_bpe
from rlhf_pipeline.data.world.vocabulary import ASPECTS, GENRES
from rlhf_pipeline.experiment.starter import fitted
from rlhf_pipeline.experiment.starter_file import Quick, Starter
from rlhf_pipeline.models.loading import init_causal_lm, save_model
from tests.conftest import TINY_LLAMA
from tests.stages.test_conversations import CHATML
from tests.training.conftest import word_pairs


@pytest.fixture
def init(lab, tmp_path, monkeypatch, capsys):
    """Write rows beside the file and run `rlhf init`; returns the exit code, what was said, and the file's values.

    seconds: the time that the file is said to take; a function of the file's path, or None for an estimate.
    """
    monkeypatch.chdir(tmp_path)

    def run(rows, *words, out="experiment.yaml", name="my pairs.jsonl", seconds=lambda path, home: 60.0):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if seconds is not None:
            monkeypatch.setattr("rlhf_pipeline.experiment.estimate.time_of_experiment", seconds)
        code = main(["init", name, "--out", out, "--home", str(lab.home), *words])
        said = capsys.readouterr()
        path = tmp_path / out
        values = yaml.safe_load(path.read_text()) if code == 0 else None
        return code, said.out + said.err, values

    return run


def different(count):
    """Pairs of one word with different prompts of five words, each one token to the world's tokenizer."""
    words = product(GENRES + ASPECTS, repeat=4)
    return [{"prompt": " ".join(("the", *next(words))), "chosen": " great", "rejected": " dull"} for _ in range(count)]


@pytest.mark.check
@pytest.mark.slow
def test_what_it_writes_runs_from_end_to_end(init, lab, tmp_path):
    prompts = [f"the {aspect} of this {genre} was" for aspect in ASPECTS for genre in GENRES]
    rows = [{**row, "prompt": prompts[n % len(prompts)]} for n, row in enumerate(word_pairs(60))]
    code, said, values = init(rows, "--model", "sft", "--seeds", "1")
    assert code == 0, said
    assert values["stages"]["sft"]["model_name_or_path"] == "sft@v1"
    assert values["stages"]["sft"]["dataset_name"] == "./my pairs.jsonl"
    quick = [f"{stage}.max_steps=2" for stage in ("sft", "reward", "judge", "dpo")]
    quick += [f"{stage}.use_cpu=true" for stage in ("sft", "reward", "judge", "ppo", "dpo", "compare")]
    quick += [f"{stage}.max_prompt_length=6" for stage in values["stages"]]
    quick += [f"{stage}.response_length=4" for stage in values["stages"]]
    quick += ["ppo.total_episodes=16", "ppo.rollout_batch_size=16", "compare.max_prompts=2"]
    quick += ["compare.max_new_tokens=2"]
    assert main(["run", str(tmp_path / "experiment.yaml"), "--home", str(lab.home), *quick]) == 0
    results = json.loads((lab.home / "reports/pairs/results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["sft@v2", "ppo@v1", "dpo@v1"]
    assert results["judge"].startswith("judge@")


def test_adapters_in_all_stages_on_one_copy_of_the_weights(init):
    code, said, values = init(different(60), "--model", "sft", "--lora")
    assert code == 0, said
    stages = values["stages"]
    assert all(stage["use_peft"] is True and stage["lora_r"] == 16 for stage in stages.values())
    assert [name for name, stage in stages.items() if stage.get("shared_base")] == ["ppo"]
    assert [stages[name]["learning_rate"] for name in ("sft", "reward", "ppo", "dpo")] == [2e-4, 1e-4, 3e-5, 1e-5]
    code, said, _ = init(different(60), "--lora", out="none.yaml")
    assert code == 2 and "--lora: found no --model" in said


def test_paths_mean_the_same_wherever_the_file_lies(init, lab, tmp_path, monkeypatch):
    """A file in another folder has whole paths: a relative one would be looked for where the command runs first."""
    (tmp_path / "deep").mkdir()
    lab.registry.resolve("sft").path.rename(tmp_path / "sft")  # the name of a stage
    code, said, values = init(different(60), "--model", "sft")
    assert code == 0, said
    assert values["stages"]["sft"]["model_name_or_path"] == "./sft"
    code, said, values = init(different(60), "--model", "sft", out="deep/experiment.yaml")
    assert code == 0, said
    assert values["stages"]["sft"]["model_name_or_path"] == str(tmp_path / "sft")
    assert values["stages"]["dpo"]["dataset_name"] == str(tmp_path / "my pairs.jsonl")


@pytest.mark.parametrize(
    "name", ["2024.jsonl", "true.jsonl", "a'b\"c: {d}.jsonl", "tab\there.jsonl", "ünï😀.jsonl", "e\x7f.jsonl"]
)
def test_names_that_yaml_would_take_for_something_else(init, name):
    code, said, values = init(different(60), "--model", "sft", name=name)
    assert code == 0, said
    assert values["stages"]["dpo"]["dataset_name"] == f"./{name}"
    assert isinstance(values["name"], str)


def test_splits_of_other_names(init):
    rows = [{**row, "split": "train_prefs" if n % 4 else "test_prefs"} for n, row in enumerate(different(40))]
    code, said, values = init(rows, "--model", "sft")
    assert code == 0, said
    for stage in values["stages"].values():
        assert (stage["dataset_train_split"], stage["dataset_test_split"]) == ("train_prefs", "test_prefs")
    assert values["compare"]["split"] == "test_prefs"
    leaked = [*rows, {**rows[1], "split": "test_prefs"}]
    code, said, values = init(leaked, "--model", "sft", out="leaked.yaml")
    assert code == 0 and values["stages"]["dpo"]["skip_bad_rows"] is True
    named = [{**row, "split": "one" if n % 2 else "two"} for n, row in enumerate(different(40))]
    code, said, _ = init(named, "--model", "sft", out="named.yaml")
    assert code == 2 and "found the splits two (20), one (20)" in said and "'train'" in said


def test_a_file_that_cannot_be_read_back_is_taken_away_and_another_ones_stays(init, tmp_path, monkeypatch):
    from rlhf_pipeline.experiment import starter_file

    file = starter_file._FILE
    with monkeypatch.context() as patch:
        patch.setattr(starter_file, "_FILE", file.replace("kl_coef", "kl_cof"))
        code, said, _ = init(different(60), "--model", "sft")
        assert code == 2 and "did you mean 'kl_coef'" in said and not (tmp_path / "experiment.yaml").exists()
    with monkeypatch.context() as patch:  # made by somebody while the data were read
        patch.setattr("os.path.lexists", lambda path: False)
        (tmp_path / "experiment.yaml").write_text("mine")
        assert init(different(60), "--model", "sft")[0] == 2
    assert (tmp_path / "experiment.yaml").read_text() == "mine"
    (tmp_path / "link.yaml").symlink_to(tmp_path / "nowhere")
    assert init(different(60), "--model", "sft", out="link.yaml")[0] == 2
    assert (tmp_path / "link.yaml").is_symlink()


def test_lengths_hold_all_but_a_hundredth_of_the_tokens(init):
    """Of 100 the nearest rank of .99 leaves out the longest: one word and its end, five words, to multiples of 8."""
    rows = different(100)
    rows[0]["chosen"], rows[1]["rejected"], rows[2]["prompt"] = " dull" * 40, " dull" * 12, "the" + " plot" * 60
    code, said, values = init(rows, "--model", "sft")
    assert code == 0, said
    for stage in values["stages"].values():
        assert (stage["max_prompt_length"], stage["response_length"]) == (8, 8)
    rows[3]["chosen"], rows[4]["prompt"] = (
        " dull" * 8,
        "the" + " plot" * 8,
    )  # two of each
    code, said, values = init(rows, "--model", "sft", out="longer.yaml")
    assert (values["stages"]["ppo"]["max_prompt_length"], values["stages"]["ppo"]["response_length"]) == (16, 16)


def test_few_pairs_give_the_judge_and_the_test_more_and_say_what_they_are_worth(init):
    code, said, values = init(different(400), "--model", "sft")
    assert code == 0
    shares = {"train": 0.6, "judge": 0.2, "validation": 0.05, "test": 0.15}
    assert all(stage["split_fractions"] == shares for stage in values["stages"].values())
    assert values["compare"]["split_fractions"] == shares
    assert values["stages"]["dpo"]["num_train_epochs"] == values["stages"]["reward"]["num_train_epochs"] == 3
    assert "pairs for the judge" in said and "test prompts: the 95 % interval of a win rate is about ±" in said
    code, said, values = init(different(3000), "--model", "sft", out="more.yaml")
    assert "num_train_epochs" not in values["stages"]["dpo"]
    assert "split_fractions" not in values["compare"] and "split_fractions" not in values["stages"]["sft"]


def test_from_scratch_positions_bound_the_lengths(init, tmp_path):
    rows = different(60)
    for row in rows:
        row["chosen"] = " ".join(f"word{n}" for n in range(900))
    code, said, values = init(rows)
    assert code == 0 and "512 positions" in said
    sft = values["stages"]["sft"]
    assert sft["max_prompt_length"] + sft["response_length"] == sft["model_init"]["max_position_embeddings"] == 512
    assert sft["max_prompt_length"] == 8  # which is all that the prompts need
    long = [{**row, "prompt": f"{row['prompt']} " * 300, "chosen": "good", "rejected": "bad"} for row in different(60)]
    code, said, values = init(long, out="long.yaml")
    assert code == 0 and "longer prompts are cut" in said and "left out" not in said
    assert values["stages"]["sft"]["response_length"] == 8 and values["stages"]["sft"]["max_prompt_length"] == 504
    assert [spec.name for spec in load_experiment(tmp_path / "experiment.yaml").stages] == [
        "sft",
        "reward",
        "judge",
        "ppo",
        "dpo",
    ]


def test_a_source_with_splits_and_no_judge_among_them(init):
    rows = [{**row, "split": "train" if n % 4 else "test"} for n, row in enumerate(different(40))]
    code, said, values = init(rows, "--model", "sft")
    assert code == 0, said
    assert list(values["stages"]) == ["sft", "reward", "ppo", "dpo"]
    assert "judge" not in values["compare"] and "judge" not in values["stages"]["ppo"]


def messages_of(rows):
    """The rows as messages, each with the role that its column has."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{name: [{"role": roles[name], "content": text}] for name, text in row.items()} for row in rows]


@pytest.mark.parametrize("base", [False, True])
def test_messages_give_a_model_without_a_chat_template_one(init, tmp_path, base):
    model = ("--model", chat_model(tmp_path / "base", template=None)) if base else ()
    code, said, values = init(messages_of(different(60)), *model)
    assert code == 0, said
    assert {stage["chat_template"] for stage in values["stages"].values()} == {"chatml"}
    code, said, values = init(different(60), *model, out="text.yaml")
    assert code == 0 and not any("chat_template" in stage for stage in values["stages"].values())


def test_a_first_look_from_scratch_has_whole_micro_batches(init):
    """Its rollouts are 32 responses in 4 minibatches of 8; the other stages take 16 at once."""
    code, said, values = init(different(60), "--quick")
    assert code == 0, said
    stages = values["stages"]
    assert (stages["ppo"]["per_device_train_batch_size"], stages["dpo"]["per_device_train_batch_size"]) == (8, 16)


def test_a_file_whose_test_split_holds_nothing_new_says_so(init):
    rows = different(20)
    rows = [{**row, "split": split} for split in ("train", "test") for row in rows]
    code, said, _ = init(rows, "--model", "sft", seconds=None)
    assert code == 0 and "0 test prompts" in said
    assert "rlhf run refuses this file as it is" in said and "no row of its evaluation splits is new" in said


@pytest.mark.parametrize("word", [" plot", ""])
def test_the_comment_on_lengths_is_true(init, tmp_path, word):
    """The model has 32 positions, and 99 % of the prompts have 65 tokens, or 5."""
    rows = [{**row, "prompt": row["prompt"] + word * 60} for row in different(60)]
    code, said, _ = init(rows, "--model", "sft")
    assert code == 0 and ("longer prompts are cut" in said) == bool(word)
    assert ("enough for 99 %" in (tmp_path / "experiment.yaml").read_text()) != bool(word)


def test_the_splits_of_preferences_are_taken(init):
    names = ("train_prefs", "train_prefs", "train_sft", "test_prefs", "test_gen")
    rows = [{**row, "split": names[n % len(names)]} for n, row in enumerate(different(40))]
    code, said, values = init(rows, "--model", "sft")
    assert code == 0, said
    for stage in ("sft", "reward", "dpo"):
        assert values["stages"][stage]["dataset_train_split"] == "train_prefs"
        assert values["stages"][stage]["dataset_test_split"] == "test_prefs"


def test_faulty_rows_are_counted_and_left_out(init):
    empty = {"prompt": "", "chosen": " great", "rejected": " dull"}
    code, said, values = init([*different(60), {"prompt": "x", "chosen": "y"}, empty], "--model", "sft", "--json")
    assert code == 0 and json.loads(said)["faulty_rows"] == 2, said
    assert values["stages"]["dpo"]["skip_bad_rows"] is True and values["compare"]["skip_bad_rows"] is True
    code, said, values = init(different(60), "--model", "sft", out="good.yaml")
    assert "skip_bad_rows" not in values["stages"]["dpo"]


RANKED = [{"prompt": row["prompt"]} for row in different(60)]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], (), "found demonstration, expected pairs or rankings"),
        (different(60), ("--model", "sfd"), "did you mean 'sft'"),
        (different(60), ("--model", "reward"), "reward@v1"),
        (different(60), ("--seeds", "0"), "seeds"),
        (different(2), (), "too few different prompts"),
        ([{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}] * 9, (), "too few different prompts"),
        ([{**row, "completions": ["b", "c"], "ranks": [1, 1]} for row in RANKED], (), "all are ties"),
    ],
)
def test_what_is_refused_leaves_no_file(init, tmp_path, rows, words, message):
    code, said, _ = init(rows, *words)
    assert code == 2 and message in said
    assert not (tmp_path / "experiment.yaml").exists()


def test_a_file_is_never_written_over(init, tmp_path):
    (tmp_path / "experiment.yaml").write_text("mine")
    code, said, _ = init(different(60))
    assert code == 2 and "--out" in said and (tmp_path / "experiment.yaml").read_text() == "mine"
    assert init(different(60), out="no/where.yaml")[0] == 2


def test_a_first_look_is_reduced_until_it_takes_an_hour(init):
    """A machine on which each pair takes 10 s of training, each episode 10 s, and each test prompt 1 s."""

    def seconds(path, home):
        values = yaml.safe_load(path.read_text())
        stages = values["stages"]
        rows, episodes = stages["dpo"]["max_train_samples"], stages["ppo"]["total_episodes"]
        return 10 * rows + 10 * episodes + values["compare"]["max_prompts"]

    rows = different(1200)  # 720 of them for training
    code, said, values = init(rows, "--model", "sft", "--quick", seconds=seconds)
    assert code == 0, said
    # 512 rows, 256 episodes, 64 prompts take 7,744 s; 3,420 / 7,744 = .4416 of them are 226, 113 and 28: whole sixteens
    # of rows and rollouts of episodes.
    stages = values["stages"]
    assert {one["max_train_samples"] for one in stages.values()} == {224}
    assert (stages["ppo"]["total_episodes"], stages["ppo"]["rollout_batch_size"]) == (96, 32)
    assert values["compare"]["max_prompts"] == stages["sft"]["max_eval_samples"] == 28 and values["seeds"] == [0]
    assert all((one["bf16"], one["logging_steps"]) == ("auto", 1) for one in stages.values())
    assert "max_eval_samples" not in stages["ppo"] and stages["ppo"]["save_steps"] == 4
    assert not any("warmup_steps" in one for one in stages.values())  # its first step would train nothing
    assert "about 54 min on this machine" in said and "cannot tell which method is better" in said  # 3,228 s
    code, said, _ = init(rows, "--model", "sft", out="whole.yaml", seconds=lambda path, home: 144_000.0)
    assert "about 40.0 h on this machine" in said and "rlhf init --quick writes a first look" in said


def test_a_first_look_that_cannot_be_short_says_so(init, tmp_path):
    words = ("--quick", "--model", "sft", "--lora")
    code, said, values = init(different(300), *words, seconds=lambda path, home: 1e6)
    assert code == 0 and "takes longer than an hour here" in said
    stages = values["stages"]
    assert stages["dpo"]["max_train_samples"] == 64 and stages["ppo"]["total_episodes"] == 32
    assert values["compare"]["max_prompts"] == 16
    text = (tmp_path / "experiment.yaml").read_text()
    assert re.search(r"64 of \d+ training pairs", text) and "32 PPO episodes" in text
    code, said, _ = init(different(300), *words, out="unknown.yaml", seconds=lambda path, home: None)
    assert code == 0 and "its time is not known" in said


def test_a_first_look_is_shortened_after_its_sizes_and_before_they_are_least():
    """A machine that takes 1 s for 10 rows x tokens of prompt and response."""
    splits = {"train": 5000, "test": 500}
    plan = Starter("x", "x", None, 1, 5500, 0, splits, "train", "test", None, 512, 256, quick=Quick())
    seen = []

    def seconds(one):
        seen.append((one.quick.rows, one.max_prompt_length, one.response_length))
        return one.quick.rows * (one.max_prompt_length + one.response_length) / 10

    found, time = fitted(plan, seconds)
    # 39,322 s: a quarter of the rows, which is their bound; 9,830 s and 4,915 s: half the lengths each time; 2,458 s.
    assert seen == [(512, 512, 256), (128, 512, 256), (128, 256, 128), (128, 128, 64)]
    assert (found.max_prompt_length, found.response_length, time) == (128, 64, 2457.6) and found.warnings == []


@pytest.mark.check
@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--lora",)])
@pytest.mark.parametrize("conversational", [False, True])
def test_a_first_look_passes_its_own_dry_run(init, lab, tmp_path, capsys, words, conversational):
    rows, model = different(80), "sft"
    if conversational:
        model = chat_model(tmp_path / "chat")
        rows = messages_of([{name: f"{text.strip()} {n}" for name, text in row.items()} for n, row in enumerate(rows)])
    code, said, _ = init(rows, "--model", model, "--quick", *words, seconds=None)
    assert code == 0, said
    assert main(["run", "experiment.yaml", "--home", str(lab.home), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["not_estimated"] == [] and 0 < told["total"]["seconds"] < 3600
    found = told["estimates"]
    assert found["ppo"]["episodes"] == 256 and found["dpo"]["rows"] == found["reward"]["rows"] > 20
    assert found["dpo"]["optimizer_steps"] == -(-found["dpo"]["rows"] // 16)


def chat_model(folder, template=CHATML):
    """A directory with a tiny random model whose tokenizer has a chat template, or None."""
    tokenizer = train_byte_level_bpe(["user assistant the plot was great"] * 4, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = template
    settings = {**TINY_LLAMA, "max_position_embeddings": 256}
    save_model(init_causal_lm(settings, tokenizer, seed=1), tokenizer, folder)
    return f"./{folder.name}"
