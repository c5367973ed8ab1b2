"""People as the judge of collected data: it waits, goes on from where it stopped, and publishes what they said."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import yaml

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.data import world
from rlhf_pipeline.errors import BadInput, ConfigError
from rlhf_pipeline.experiment.done import find_done
from rlhf_pipeline.labelling.kinds import Item, Judgement, RankAction, Response, SkipAction, SubmitAction
from rlhf_pipeline.labelling.people import waits
from rlhf_pipeline.labelling.store import LabelStore, database

LOOP = {"judge": "people:loop", "output_name": "loop"}


def judgement(item: int, labeler: int, *, skipped: bool = False, repeat: int = 0) -> Judgement:
    ranks = [] if skipped else [1, 2]
    values = {"ratings": [None, None], "flags": [{}, {}], "seconds": 1.0, "at": 0.0, "shown": [0, 1]}
    return Judgement(labeler=labeler, item=item, repeat=repeat, ranks=ranks, skipped=skipped, reason="r", **values)


def test_which_items_wait() -> None:
    done, skip = (lambda item, who: judgement(item, who)), (lambda item, who: judgement(item, who, skipped=True))
    for judged, labelers, overlap, expected in (
        ([], 0, 1, 2),
        ([done(0, 1)], 1, 1, 1),
        ([done(0, 1), done(1, 1)], 1, 1, 0),
        ([done(0, 1), skip(1, 1)], 1, 1, 0),  # the only labeler has seen it
        ([done(0, 1), skip(1, 1)], 2, 1, 1),  # the other one may rank it
        ([done(0, 1), skip(1, 1), skip(1, 2)], 2, 1, 0),
        ([done(0, 1), done(1, 1)], 1, 2, 2),
        ([done(0, 1), skip(1, 1)], 1, 2, 2),  # a second labeler is still to come
        ([done(0, 1), done(0, 2), done(1, 1), skip(1, 2)], 2, 2, 0),
        ([done(0, 1), judgement(0, 1, repeat=1)], 1, 2, 2),  # a second sight is no second labeler
    ):
        assert waits([0, 1], judged, labelers, overlap) == expected, (judged, labelers, overlap)


def reward(item: Item) -> list[float]:
    prompt = item.columns["prompt_ids"]
    found = world.verdicts(
        [prompt] * len(item.responses), [one.ids for one in item.responses], [one.ended for one in item.responses]
    )
    return list(found.reward)


def label(store: LabelStore, ranks: Callable[[Item], list[int] | None], name: str = "Ann") -> int:
    """Give every item that is left its ranks; None skips the item."""
    labeler, count = store.labeler(name), 0
    while (task := store.task(labeler)) is not None:
        found = ranks(store.item(task.item))
        if found is None:
            store.record(labeler, task.task, SkipAction(reason="unreadable"), f"{labeler}-{task.task}-s")
        else:
            store.record(labeler, task.task, RankAction(ranks=found), f"{labeler}-{task.task}-r")
            store.record(labeler, task.task, SubmitAction(), f"{labeler}-{task.task}-d")
        count += 1
    return count


def by_reward(item: Item) -> list[int]:
    scores = reward(item)
    return [1 + sum(other > mine for other in scores) for mine in scores]


def records(lab, name: str) -> list[dict]:
    path = lab.registry.resolve_data(name).path / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs(rows: list[dict]) -> set[tuple]:
    return {
        (tuple(row["prompt_ids"]), frozenset([tuple(row["chosen_ids"]), tuple(row["rejected_ids"])])) for row in rows
    }


@pytest.mark.check
def test_it_samples_once_waits_and_publishes_what_people_said(lab, monkeypatch) -> None:
    with pytest.raises(
        BadInput, match=r"^\d+ items wait for labels: rlhf label serve loop, then run this again$"
    ) as error:
        lab.run("collect", **LOOP, num=40)
    assert lab.registry.data.numbers("loop") == []
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_pipeline.stages.collect.load_policy", None)  # nothing is sampled again
        with pytest.raises(BadInput) as again:
            lab.run("collect", **LOOP, num=40)
        assert str(again.value) == str(error.value)
        seen: list[int] = []

        def ranks(item: Item) -> list[int] | None:
            seen.append(item.number)
            return None if len(seen) == 1 else [1, 1] if len(seen) == 2 else by_reward(item)

        with LabelStore.open(database(lab.home, "loop")) as store:
            items = store.items()
            assert f"{label(store, ranks)} items wait" in str(error.value) and len(seen) == len(items)
        result = lab.run("collect", **LOOP, num=40)
    rows = records(lab, "loop")
    equal = sum(len(set(reward(item))) == 1 for item in items if item.number not in seen[:2])
    assert result.metrics["dropped"] == {
        "identical_pair": 40 - len(items),
        "skipped": 1,
        "tied_pair": 1 + equal,
    }
    assert result.metrics["records"] == len(rows) == len(items) - 2 - equal
    assert (result.metrics["judge"], result.metrics["labelers"]) == ("people:loop", 1)
    for row in rows:
        sides = [row["chosen_ids"], row["rejected_ids"]]
        ended = [row["chosen_ended"], row["rejected_ended"]]
        better, worse = world.verdicts([row["prompt_ids"]] * 2, sides, ended).reward
        assert better > worse and "label_probability" not in row and not any("score" in key for key in row)
    # The responses are those that another judge labels with the same seed.
    lab.run("collect", output_name="by_world", num=40)
    assert pairs(rows) < pairs(records(lab, "by_world"))
    made = lab.registry.resolve_data("loop").manifest
    assert made.parents["policy"].ref == "sft@v1" and made.cost["tokens_generated"] > 0 and not made.moves_optimum
    assert find_done(lab.config("collect", **LOOP, num=40), lab.registry).label == "loop@v1"
    assert lab.run("dpo", dataset_name="collected:loop", max_steps=1).model == "dpo@v1"


@pytest.mark.check
def test_a_second_collection_extends_the_project_and_waits_for_its_own_items(lab) -> None:
    with pytest.raises(BadInput):
        lab.run("collect", **LOOP, num=6)
    with LabelStore.open(database(lab.home, "loop")) as store:
        first = len(store.items())
        label(store, lambda item: [1, 2])
    with pytest.raises(BadInput, match="wait for labels"):
        lab.run("collect", **(LOOP | {"output_name": "more"}), num=6, first_record=6)
    assert lab.run("collect", **LOOP, num=6).metrics["records"] == first  # its items are labelled
    with LabelStore.open(database(lab.home, "loop")) as store:
        second = len(store.items()) - first
        assert label(store, lambda item: [2, 1]) == second
    result = lab.run("collect", **(LOOP | {"output_name": "more"}), num=6, first_record=6)
    assert result.metrics["records"] == second
    with LabelStore.open(database(lab.home, "loop")) as store:
        rejected = [item.responses[0].ids for item in store.items()[first:]]
    assert [row["rejected_ids"] for row in records(lab, "more")] == rejected


@pytest.mark.check
def test_three_responses_become_rankings_of_those_that_differ(lab) -> None:
    with pytest.raises(BadInput):
        lab.run("collect", **LOOP, num=12, k=3)
    with LabelStore.open(database(lab.home, "loop")) as store:
        items = store.items()
        label(store, lambda item: [*range(len(item.responses), 0, -1)])
    lab.run("collect", **LOOP, num=12, k=3)
    assert {len(item.responses) for item in items} <= {2, 3}
    rows = records(lab, "loop")
    assert [row["ranks"] for row in rows] == [[*range(len(item.responses), 0, -1)] for item in items]
    assert [row["completion_ids"] for row in rows] == [[one.ids for one in item.responses] for item in items]


def test_a_process_that_was_killed_before_the_items_were_stored_samples_nothing_again(lab, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("rlhf_pipeline.labelling.people.make_project", killed)
        lab.run("collect", **LOOP, num=6)
    assert not database(lab.home, "loop").exists()
    monkeypatch.setattr("rlhf_pipeline.stages.collect.load_policy", None)
    with pytest.raises(BadInput, match="items wait for labels"):
        lab.run("collect", **LOOP, num=6)


def test_a_project_that_does_not_fit_is_refused_before_anything_is_sampled(lab, monkeypatch) -> None:
    monkeypatch.setattr("rlhf_pipeline.stages.collect.load_policy", None)
    responses = [Response(text=text, source=text) for text in ("a", "b")]
    items = [Item(number=0, prompt="p", responses=responses)]
    for name, config, message in (
        ("arena", LabelConfig(name="arena", arena=("a", "b"), prompts="p"), "found an arena of this name"),
        ("texts", LabelConfig(name="texts", responses="file.jsonl"), "found responses with no token ids"),
    ):
        LabelStore.create(database(lab.home, name), config, items).close()
        with pytest.raises(BadInput, match=message):
            lab.run("collect", judge=f"people:{name}", output_name="x", num=4)


def test_what_a_config_must_not_say(lab) -> None:
    def refused(stage: str, **changes: object) -> str:
        with pytest.raises(ConfigError) as error:
            lab.config(stage, **changes)
        return str(error.value)

    assert "people:NAME" in refused("collect", judge="people:a/b")
    assert "at most 9" in refused("collect", **LOOP, k=10)
    assert "people decide themselves" in refused("collect", **LOOP, labels="rank")
    assert "as people gave them" in refused("collect", **LOOP, flip_rate=0.1)
    assert "people only label data" in refused("ppo", reward_model_path=None, reward_functions="people:loop")
    assert lab.config("collect", **LOOP).project == "loop" and lab.config("collect").project is None


def test_the_command_stops_with_exit_code_2_and_what_to_do(lab, capsys) -> None:
    command = ["data", "collect", "sft", "--prompts", "world:verdicts", "--judge", "people:loop", "--num", "4"]
    command += ["--name", "loop", "--home", str(lab.home), "use_cpu=true", "response_length=4", "max_prompt_length=6"]
    assert main(command) == 2
    assert "items wait for labels: rlhf label serve loop, then run this again" in capsys.readouterr().err


@pytest.mark.check
def test_rounds_with_people_stop_for_each_round_and_go_on(lab, tmp_path, capsys) -> None:
    """The second round's items come from the first round's policy, into the same project."""
    settings = {"use_cpu": True, "num_threads": 1, "max_prompt_length": 6, "response_length": 4}
    pairs = {"stage": "collect", "policy": "sft", "prompts": "world:verdicts", "judge": "people:loop", "num": 12}
    pairs["splits"] = ["train"]
    dpo = {"stage": "dpo", "model_name_or_path": "sft", "dataset_name": "pairs", "beta": 0.05, "max_steps": 1}
    dpo |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2}
    stages = {"pairs": settings | pairs | {"output_name": "from_people"}, "dpo": settings | dpo}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"name": "trial", "rounds": 2, "stages": stages}, sort_keys=False))
    command = ["run", str(path), "--home", str(lab.home), "--json"]
    assert main([*command, "--dry-run"]) == 0
    capsys.readouterr()
    for sources in ({"sft@v1"}, {"sft@v1", "dpo@v1"}):
        assert main(command) == 2
        (fault,) = json.loads(capsys.readouterr().out)["error"]["faults"]
        assert "items wait for labels: rlhf label serve loop" in fault["found"]
        with LabelStore.open(database(lab.home, "loop")) as store:
            assert {one.source for item in store.items() for one in item.responses} == sources
            assert fault["found"].startswith(f"{label(store, lambda item: [1, 2])} items wait")
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)["stages"]
    assert [made[name]["model"] for name in ("dpo", "dpo-2")] == ["dpo@v1", "dpo-2@v1"]
    assert main(command) == 0
    assert all(stage["skipped"] for stage in json.loads(capsys.readouterr().out)["stages"].values())
