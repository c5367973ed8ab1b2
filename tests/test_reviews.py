"""`make reviews` on a handful of made-up reviews: the data that it prepares, its reward, and the whole experiment."""

from __future__ import annotations

import io
import json
import math
import random
import zipfile
from pathlib import Path

import pytest

from rlhf_pipeline.errors import BadInput
from scripts import reviews, sentiment

GOOD, BAD = ("great", "fun", "moving", "sharp"), ("dull", "awful", "lazy", "tired")
PLAIN = [
    "the",
    "film",
    "has",
    "a",
    "story",
    "and",
    "an",
    "actor",
    "who",
    "walks",
    "in",
    "the",
    "rain",
    "while",
    "a",
    "dog",
    "looks",
    "at",
    "the",
    "house",
]


def made_up(number: int, words: tuple[str, ...], length: int = 90) -> str:
    chosen = random.Random(number)
    text = [chosen.choice(words if chosen.random() < 0.3 else PLAIN) for _ in range(length)]
    return f"review {number} : " + " ".join(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both data sets: the reviews zipped, the sentences as files, one of them in latin-1."""
    folder = tmp_path_factory.mktemp("polarity")
    with zipfile.ZipFile(folder / "reviews.zip", "w") as archive:
        for number in range(60):
            kind, words = ("pos", GOOD) if number % 2 else ("neg", BAD)
            archive.writestr(f"somewhere/{kind}/cv{number:03}.txt", made_up(number, words))
        archive.writestr("somewhere/README", "not a review")
    for kind, words in (("pos", GOOD), ("neg", BAD)):
        first = 1000 if kind == "pos" else 2000  # no two sentences alike but for what they are about
        lines = [made_up(first + number, words, 8) for number in range(60)]
        (folder / f"rt-polarity.{kind}").write_bytes(("\n".join([*lines, "déjà vu"]) + "\n").encode("latin-1"))
    return folder


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "build" / "reviews"
    reviews.prepare(data, out, say=io.StringIO().write)
    return out


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_review_is_cut_into_rows_that_give_back_its_words() -> None:
    words = [f"w{number}" for number in range(2 * reviews.WINDOW + reviews.LEAD + 1)]
    rows = list(reviews.windows(words, "train"))
    assert [row["ended"] for row in rows] == [False, False, True]
    assert " ".join(row["prompt"] + row["completion"] for row in rows).split() == words
    assert all(len(row["prompt"].split()) == reviews.LEAD for row in rows)


def test_an_opening_of_two_splits_is_held_out() -> None:
    first = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    second = ["one", "two", "three", "four", "other", "words", "stand", "here", "now"]
    found = {row["prompt"]: row["split"] for row in reviews.openings([("train", first), ("test", second)])}
    held = " ".join(second[: reviews.OPENINGS[len(second) % len(reviews.OPENINGS)]])
    assert len(second) % len(reviews.OPENINGS) == 3 and held == "one two three four other words"
    assert found[held] == "test" and found["one two three"] == "train" and len(found) == 6 + 1
    twice = {row["prompt"]: row["split"] for row in reviews.openings([("test", first), ("train", first)])}
    assert list(twice.values()).count("test") == 1 and len(twice) == 6


def test_what_is_prepared(prepared: Path) -> None:
    texts, prompts = rows_of(prepared / "reviews.jsonl"), rows_of(prepared / "openings.jsonl")
    assert len([row for row in texts if row["ended"]]) == 60
    by_split: dict[str, set[str]] = {}
    for row in prompts:
        by_split.setdefault(row["split"], set()).add(row["prompt"])
    assert set(by_split) == {"train", "judge", "validation", "test"}
    assert sum(map(len, by_split.values())) == len(set().union(*by_split.values()))
    assert len(rows_of(prepared / "sentences.jsonl")) == 122


def test_the_reward_is_the_log_odds_of_prompt_and_continuation(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVIEWS_DIR", str(prepared))
    good, bad, whole = sentiment.log_odds(["a great", "an awful", "a great fun"], [" fun film", " lazy film", " film"])
    assert good == whole and good > 1 > -1 > bad
    model = sentiment.classifier(prepared / "sentences.jsonl")
    probability = model.predict_proba(["a great fun film"])[0, 1]
    assert good == pytest.approx(math.log(probability / (1 - probability)), rel=1e-9)


def test_the_held_out_sentences_are_not_fitted(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(range(11))
    assert sentiment.held_out(items, False) == [0, 5, 10]
    assert sorted(sentiment.held_out(items, True) + sentiment.held_out(items, False)) == items
    path = tmp_path / "sentences.jsonl"
    path.write_bytes((prepared / "sentences.jsonl").read_bytes())
    fitted: list[str] = []
    fit = sentiment.fit
    monkeypatch.setattr(sentiment, "fit", lambda texts, labels: fitted.extend(texts) or fit(texts, labels))
    found = sentiment.quality(path)
    texts, _ = sentiment.read_sentences(path)
    assert fitted == [text for number, text in enumerate(texts) if number % 5] and len(fitted) == 97
    assert found["sentences"] == 25 and found["accuracy"] > 0.8
    with pytest.raises(FileNotFoundError, match="make reviews DATA"):
        sentiment.classifier(tmp_path / "absent.jsonl")


def test_a_rest_that_would_be_all_prompt_is_left_out() -> None:
    words = [f"w{number}" for number in range(reviews.WINDOW + reviews.LEAD)]
    (row,) = reviews.windows(words, "train")
    assert not row["ended"] and len((row["prompt"] + row["completion"]).split()) == reviews.WINDOW


def test_a_file_that_is_there_twice_is_read_once(data: Path, tmp_path: Path) -> None:
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with zipfile.ZipFile(tmp_path / "reviews.zip") as archive:
        archive.extractall(tmp_path)
    with zipfile.ZipFile(tmp_path / "sentences.zip", "w") as archive:
        archive.write(tmp_path / "rt-polarity.pos", "elsewhere/rt-polarity.pos")
    said = io.StringIO()
    reviews.prepare(tmp_path, tmp_path / "out", say=said.write)
    assert "from 60 reviews" in said.getvalue() and "122 labelled sentences" in said.getvalue()


def test_members_of_a_zip_file_are_read_and_never_written(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for name in ("../../escaped/pos/cv001.txt", "/tmp/escaped-reviews/pos/cv002.txt", "pos/../../../cv003.txt"):
            archive.writestr(name, made_up(1, GOOD))
    found = [name.as_posix() for name, _ in reviews.members(folder)]
    assert len(found) == 3
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip", "data"]
    assert not Path("/tmp/escaped-reviews").exists()


def test_a_zip_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews, "MOST_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pos/cv001.txt", b"\0" * ((1 << 20) + 1))
    assert (tmp_path / "bomb.zip").stat().st_size < 10_000
    with pytest.raises(BadInput, match=r"bomb\.zip: unpacks to more than 1 MiB"):
        list(reviews.members(tmp_path))


def test_a_zip_file_that_was_cut_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "reviews.zip").write_bytes((data / "reviews.zip").read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"reviews\.zip: not a complete zip file"):
        reviews.prepare(tmp_path, tmp_path / "out", say=print)


@pytest.mark.parametrize("missing", ["reviews", "sentences"])
def test_a_folder_without_the_data_is_refused(data: Path, tmp_path: Path, missing: str) -> None:
    for path in data.iterdir():
        if (path.suffix == ".zip") != (missing == "reviews"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(BadInput, match=f"found no {missing}.*v1.0"):
        reviews.prepare(tmp_path, tmp_path / "out", say=print)
    with pytest.raises(BadInput, match="no such folder"):
        reviews.prepare(tmp_path / "absent", tmp_path / "out", say=print)
    assert not (tmp_path / "out").exists()


TINY = [
    "sft.model_init.hidden_size=16",
    "sft.model_init.intermediate_size=32",
    "sft.model_init.num_hidden_layers=1",
    "sft.model_init.max_position_embeddings=512",
    "sft.tokenizer_init.vocab_size=400",
    "sft.max_prompt_length=96",
    "sft.response_length=300",
    "pairs.num=400",
    "pairs.max_prompt_length=64",
    "sweep.ppo.kl_coef=[.1,1]",
    "sweep.ppo_true.kl_coef=[.1,1]",
    "sweep.dpo.beta=[.1,1]",
    "compare.samples=2",
    "compare.best_of=[2]",
    "compare.max_prompts=4",
]
STAGES = ("reward", "judge", "preferred", "dpo", "ppo", "ppo_true")


@pytest.mark.check
def test_the_whole_experiment(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_pipeline.experiment.run import run_experiment

    monkeypatch.chdir(prepared.parent.parent)
    monkeypatch.setenv("REVIEWS_DIR", str(prepared))
    small = [f"{name}.max_steps=2" for name in ("sft", *STAGES)]
    small += [f"{name}.max_prompt_length=64" for name in STAGES]
    small += [f"{name}.snapshot_steps=1" for name in ("dpo", "ppo", "ppo_true", "preferred")]
    small += [f"{name}.rollout_batch_size=8" for name in ("ppo", "ppo_true")]
    small += [f"{name}.per_device_train_batch_size=4" for name in ("ppo", "ppo_true")]
    every = [f"{name}.use_cpu=true" for name in ("sft", "pairs", *STAGES, "compare")]
    config = Path(reviews.__file__).parent.parent / "configs" / "reviews" / "experiment.yaml"
    result = run_experiment(config, [*TINY, *small, *every], tmp_path / "home", quiet=True)
    found = result["comparison"]
    assert found.true_reward == "scripts.sentiment:log_odds" and found.primary == "true_reward"
    assert set(found.arms) == {"ppo", "dpo", "ppo_true", "preferred"}
    assert {arm: len(curve.points) for arm, curve in found.frontier.arms.items()} == {
        "ppo": 4,
        "dpo": 4,
        "ppo_true": 4,
        "preferred": 2,
    }
    assert [entry.what for entry in found.comparable.differences] == ["preference data"]
    assert (tmp_path / "home" / "reports" / "reviews" / "index.html").is_file()


@pytest.mark.check
def test_the_experiment_on_a_pretrained_model(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_pipeline.experiment.run import run_experiment
    from tests.test_real import small_base

    monkeypatch.chdir(prepared.parent.parent)
    monkeypatch.setenv("REVIEWS_DIR", str(prepared))
    small_base(Path("build/smollm2"), [made_up(number, GOOD) for number in range(20)])
    changes = [f"{name}.use_cpu=true" for name in ("sft", "pairs", "reward", "preferred", "dpo", "ppo", "ppo_true")]
    changes += ["sft.max_prompt_length=96", "sft.response_length=300", "pairs.num=400", "pairs.max_prompt_length=64"]
    for name in ("reward", "preferred", "dpo", "ppo", "ppo_true"):
        changes += [f"{name}.max_steps=2", f"{name}.max_prompt_length=64"]
    changes += [f"{name}.snapshot_steps=1" for name in ("dpo", "ppo", "ppo_true")]
    changes += ["compare.use_cpu=true", "compare.max_prompts=4", "compare.samples=2", "compare.snapshots=true"]
    config = Path(reviews.__file__).parent.parent / "configs" / "real" / "sentiment" / "experiment.yaml"
    found = run_experiment(config, changes, tmp_path / "home", quiet=True)["comparison"]
    assert found.true_reward == "scripts.sentiment:log_odds" and found.primary == "true_reward"
    assert {arm: len(curve.points) for arm, curve in found.frontier.arms.items()} == {
        "ppo": 2,
        "dpo": 2,
        "ppo_true": 2,
        "preferred": 1,
    }
    assert (tmp_path / "home" / "reports" / "real-sentiment" / "index.html").is_file()
