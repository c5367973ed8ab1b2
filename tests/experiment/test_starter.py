"""`rlhf init`: the file that it writes is valid, has its lengths from the data, and runs."""

from __future__ import annotations

import json
from itertools import product

import pytest
import yaml

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.data.world.vocabulary import ASPECTS, GENRES
from tests.training.conftest import word_pairs


@pytest.fixture
def init(lab, tmp_path, monkeypatch, capsys):
    """Write rows beside the file and run `rlhf init`; returns the exit code, what was said, and the file's values."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *words, out="experiment.yaml"):
        (tmp_path / "my pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = main(["init", "my pairs.jsonl", "--out", out, "--home", str(lab.home), *words])
        said = capsys.readouterr()
        path = tmp_path / out
        values = yaml.safe_load(path.read_text()) if code == 0 else None
        return code, said.out + said.err, values

    return run


def different(count):
    """Pairs of one word with different prompts of five words, each one token to the world's tokenizer."""
    words = product(GENRES + ASPECTS, repeat=4)
    return [{"prompt": " ".join(("the", *next(words))), "chosen": " great", "rejected": " dull"} for _ in range(count)]


@pytest.mark.slow
def test_what_it_writes_runs_from_end_to_end(init, lab, tmp_path):
    prompts = [f"the {aspect} of this {genre} was" for aspect in ASPECTS for genre in GENRES]
    rows = [{**row, "prompt": prompts[n % len(prompts)]} for n, row in enumerate(word_pairs(60))]
    code, said, values = init(rows, "--model", "sft", "--seeds", "1")
    assert code == 0, said
    assert values["stages"]["sft"]["model_name_or_path"] == "sft@v1"
    assert values["stages"]["sft"]["dataset_name"] == "my pairs.jsonl"
    quick = [f"{stage}.max_steps=2" for stage in ("sft", "reward", "judge", "dpo")]
    quick += [f"{stage}.use_cpu=true" for stage in ("sft", "reward", "judge", "ppo", "dpo", "compare")]
    quick += [f"{stage}.max_prompt_length=6" for stage in values["stages"]]
    quick += [f"{stage}.response_length=4" for stage in values["stages"]]
    quick += ["ppo.total_episodes=16", "ppo.rollout_batch_size=16", "compare.max_prompts=2"]
    assert main(["run", str(tmp_path / "experiment.yaml"), "--home", str(lab.home), *quick]) == 0
    results = json.loads((lab.home / "reports/pairs/results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["sft@v2", "ppo@v1", "dpo@v1"]
    assert results["judge"].startswith("judge@")


def test_a_directory_is_named_from_where_the_file_lies(init, lab, tmp_path):
    (tmp_path / "deep").mkdir()
    model = lab.registry.resolve("sft").path.rename(tmp_path / "model")
    code, said, values = init(different(30), "--model", "model", out="deep/experiment.yaml")
    assert code == 0, said
    assert values["stages"]["sft"]["model_name_or_path"] == "./../model" and model.is_dir()
    assert values["stages"]["dpo"]["dataset_name"] == "../my pairs.jsonl"


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
    assert "pairs for the judge" in said and "test prompts: a win rate is known to about +- " in said
    code, said, values = init(different(3000), "--model", "sft", out="more.yaml")
    assert "num_train_epochs" not in values["stages"]["dpo"]
    assert "split_fractions" not in values["compare"] and "split_fractions" not in values["stages"]["sft"]


def test_from_scratch_positions_bound_the_lengths(init, tmp_path):
    rows = different(30)
    for row in rows:
        row["chosen"] = " ".join(f"word{n}" for n in range(900))
    code, said, values = init(rows)
    assert code == 0 and "512 positions" in said
    sft = values["stages"]["sft"]
    assert sft["max_prompt_length"] + sft["response_length"] == sft["model_init"]["max_position_embeddings"] == 512
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


def test_faulty_rows_are_counted_and_left_out(init):
    empty = {"prompt": "", "chosen": " great", "rejected": " dull"}
    code, said, values = init([*different(20), {"prompt": "x", "chosen": "y"}, empty], "--model", "sft", "--json")
    assert code == 0 and json.loads(said)["faulty_rows"] == 2, said
    assert values["stages"]["dpo"]["skip_bad_rows"] is True and values["compare"]["skip_bad_rows"] is True
    code, said, values = init(different(20), "--model", "sft", out="good.yaml")
    assert "skip_bad_rows" not in values["stages"]["dpo"]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], (), "found demonstration, expected pairs or rankings"),
        (different(3), ("--model", "sfd"), "did you mean 'sft'"),
        (different(3), ("--seeds", "0"), "seeds"),
    ],
)
def test_what_is_refused_leaves_no_file(init, tmp_path, rows, words, message):
    code, said, _ = init(rows, *words)
    assert code == 2 and message in said
    assert not (tmp_path / "experiment.yaml").exists()


def test_a_file_is_never_written_over(init, tmp_path):
    (tmp_path / "experiment.yaml").write_text("mine")
    code, said, _ = init(different(3))
    assert code == 2 and "--out" in said and (tmp_path / "experiment.yaml").read_text() == "mine"
    assert init(different(3), out="no/where.yaml")[0] == 2
