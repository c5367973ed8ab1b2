"""Measurements with a decoder: whose figures they are, what is kept of them, and the commands."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.run import compared, run_compare
from rlhf_pipeline.config.decoding import KL_OF
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.measure import evaluate
from rlhf_pipeline.measure.evaluate import run_evaluate
from rlhf_pipeline.measure.exact import run_exact
from rlhf_pipeline.measure.generate import run_generate
from rlhf_pipeline.report import load
from rlhf_pipeline.stages.collect import run_collect

PROMPT = "this comedy was"
OF_POLICY = ("kl", "kl_k1", "kl_k3", "entropy")


@pytest.fixture(scope="module")
def arms(tiny, tmp_path_factory):
    """A laboratory with a PPO and a DPO model."""
    lab = tiny.copy(tmp_path_factory.mktemp("arms") / "home")
    lab.run("ppo", max_steps=4)
    lab.run("dpo", max_steps=6, snapshot_steps=2)
    return lab


def compare(lab, **changes):
    given = {"arms": ["ppo", "dpo"], "baseline": "sft", "samples": 2, "max_new_tokens": 4}
    return compared(lab.config("compare", **{**given, **changes}), lab.home, quiet=True)


GREEDY = {"do_sample": False, "samples": None}


@pytest.mark.check
def test_kl_and_frontier_are_those_of_the_policy(arms):
    """With a decoder: its rewards in the rows, but KL, frontier and contrasts at a KL as without it."""
    options = {"samples": 1, "snapshots": True, "validation_split": None, "reward_model": "reward"}
    plain = compare(arms, **options)
    for decoder in (GREEDY, {"top_k": 2}, {"do_sample": False, "samples": None, "num_beams": 3}):
        found = compare(arms, **{**options, **decoder})
        assert found.samples == 1 and found.decoding.model_dump()["do_sample"] is decoder.get("do_sample", True)
        assert found.frontier == plain.frontier and found.frontier is not None
        assert found.overoptimisation == plain.overoptimisation and found.overoptimisation
        at_kl = [one for one in found.contrasts if one.kind in ("matched KL", "area")]
        assert [(one.figure, one.estimate, one.why_not) for one in at_kl] == [
            (one.figure, one.estimate, one.why_not) for one in plain.contrasts if one.kind in ("matched KL", "area")
        ]
        for row, own in zip(found.rows, plain.rows, strict=True):
            assert [row.metrics[name] for name in OF_POLICY] == [own.metrics[name] for name in OF_POLICY]
        assert [row.per_prompt["true_reward"] for row in found.rows] != [
            row.per_prompt["true_reward"] for row in plain.rows
        ]
        assert found.verdict.lines[0].text == f"responses are made by {found.decoding.text}; {KL_OF}"
    assert plain.decoder is None and plain.verdict.lines[0].topic != "decoding"


@pytest.mark.check
def test_the_greedy_responses_are_those_of_the_likeliest_tokens(arms):
    """By plain forward passes; one response to a prompt gives a win rate, since there is no random number in it."""
    found = compare(arms, **GREEDY, shown_prompts=8)
    registry, texts = arms.registry, {}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("sft", "ppo", "dpo"):
        path = registry.resolve(name).path
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        for shown in found.samples_shown:
            ids = tokenizer(shown.prompt)["input_ids"]
            start = len(ids)
            with torch.no_grad():
                while len(ids) < start + 4 and tokenizer.eos_token_id not in ids[start:]:
                    ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1, : len(tokenizer)].argmax()))
            words = [token for token in ids[start:] if token != tokenizer.eos_token_id]
            texts[f"{name}@v1", shown.prompt] = tokenizer.decode(words)
    for shown in found.samples_shown:
        for name, (response,) in shown.responses.items():
            assert response.text.split() == texts[name, shown.prompt].split()
    by_name = {row.name: row for row in found.rows}
    mine, theirs = (by_name[name].per_prompt["true_reward"] for name in ("ppo@v1", "sft@v1"))
    won = sum((a > b) + 0.5 * (a == b) for a, b in zip(mine, theirs, strict=True)) / len(mine)
    assert by_name["ppo@v1"].win_rate.mean == pytest.approx(won)
    assert found.ranking is not None


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The decoders of what is measured from now on, instead of read."""
    names: list[str] = []
    measure = evaluate.measure

    def watched(bench, policy, scorer=None):
        names.append(bench.plan.decoding.text)
        return measure(bench, policy, scorer)

    monkeypatch.setattr(evaluate, "measure", watched)
    return names


@pytest.mark.check
def test_a_measurement_is_kept_for_its_decoder_alone(arms, measured, tmp_path):
    lab = arms.copy(tmp_path / "home")
    for folder in (lab.home / "cache").glob("measured-*"):
        folder.unlink()
    one = {"arms": ["dpo"], "exact": False}
    compare(lab, **one)
    assert measured == ["sampling"] * 2
    measured.clear()
    compare(lab, **one, top_p=0.9)
    assert measured == ["sampling, top_p 0.9"] * 2  # the policies' own samples are read
    measured.clear()
    compare(lab, **one, top_p=0.8)
    assert measured == ["sampling, top_p 0.8"] * 2
    measured.clear()
    compare(lab, **one, top_p=0.9)
    compare(lab, **one)
    assert measured == []


@pytest.mark.check
def test_evaluate_reports_the_kl_of_the_policy(arms):
    def run(**changes):
        config = arms.config("evaluate", max_new_tokens=4, reward_model="reward", **changes)
        return run_evaluate("dpo", config, arms.home)

    plain, found = run(samples=3, best_of=[2]), run(samples=3, best_of=[2], top_k=1)
    assert [found["metrics"][name] for name in OF_POLICY] == [plain["metrics"][name] for name in OF_POLICY]
    assert found["metrics"]["score"] != plain["metrics"]["score"]
    assert found["decoding"]["top_k"] == 1 and plain["decoding"]["top_k"] == 0
    assert plain["best_of_n"][0].kl_bound is not None and found["best_of_n"][0].kl_bound is None
    greedy = run(do_sample=False)
    assert greedy["samples"] == 1
    assert greedy["metrics"]["score"].mean == pytest.approx(found["metrics"]["score"].mean)  # top_k 1 is greedy


@pytest.mark.check
def test_collect_exact_and_ppo_ignore_the_generation_config(arms, tmp_path):
    """As in SmolLM2's files: a generation_config with a temperature, top_k and top_p."""
    made = []
    for number in range(2):
        lab = arms.copy(tmp_path / f"home-{number}")
        folder = tmp_path / f"model-{number}"
        shutil.copytree(lab.registry.resolve("sft").path, folder, ignore=shutil.ignore_patterns("manifest.json"))
        if number:
            path = folder / "generation_config.json"
            values = json.loads(path.read_text()) if path.exists() else {}
            leaky = {"do_sample": True, "temperature": 0.2, "top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0}
            path.write_text(json.dumps({**values, **leaky}))
        name = str(folder)
        collected = run_collect(lab.config("collect", policy=name, num=20), lab.home)
        records = read_records(f"collected:{collected.model}", home=lab.home).records
        config = lab.config("exact", prompts="world:verdicts", max_new_tokens=2, max_prompts=2, max_prompt_length=6)
        rows = run_exact([name], config.model_copy(update={"beta": 0.5, "reference": "sft"}), lab.home).rows
        row = next(row for row in rows if row.model == name)
        lab.run("ppo", model_name_or_path=name, output_name="trained", max_steps=1)
        generated = run_generate(name, lab.config("generate", samples=8, max_new_tokens=4), lab.home, texts=[PROMPT])
        weights = {key: value.tolist() for key, value in lab.weights("trained").items()}
        completions = [(record.prompt, record.completions) for record in records]
        made.append((completions, row.reward, row.kl, row.objective, weights, generated["responses"]))
    assert made[0] == made[1]


def command(lab, capsys, *words: str) -> str:
    code = main([*words, "use_cpu=true", "num_threads=1", "--home", str(lab.home)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


@pytest.mark.check
def test_the_commands(arms, capsys):
    words = ("--max-new-tokens", "4", "--json")
    given = ("--prompt", PROMPT, "--no-do-sample")
    greedy = json.loads(command(arms, capsys, "generate", "dpo", *given, *words))
    assert greedy["decoding"]["do_sample"] is False
    ((response,),) = [one["responses"] for one in greedy["responses"]]
    again = ("--prompt", PROMPT, "--top-k", "1", "--samples", "3", "--seed", "5")
    found = json.loads(command(arms, capsys, "generate", "dpo", *again, *words))
    assert [one["text"] for one in found["responses"][0]["responses"]] == [response["text"]] * 3
    beams = ("--no-do-sample", "--num-beams", "3", "--length-penalty", "0")
    assert f"responses are made by beam search, num_beams 3, length_penalty 0; {KL_OF}" in " ".join(
        command(arms, capsys, "evaluate", "dpo", *beams, *words[:2]).split()
    )
    told = command(arms, capsys, "compare", "ppo", "dpo", *beams, "--name", "beams", "exact=false", *words[:2])
    assert f"decoding: responses are made by beam search, num_beams 3, length_penalty 0; {KL_OF}" in " ".join(
        told.split()
    )
    results = load(arms.home / "reports/beams/results.json")
    assert (results.decoding.num_beams, results.samples) == (3, 1)
    page = (arms.home / "reports/beams/index.html").read_text()
    assert "beam search, num_beams 3, length_penalty 0" in page and "how responses are made" in page


@pytest.mark.parametrize("name", ["generate", "evaluate", "compare"])
def test_options_that_do_nothing_together_are_refused_by_the_commands(tiny, capsys, name):
    models = ["sft", "reward"] if name == "compare" else ["sft"]
    words = [name, *models, "--no-do-sample", "--top-k", "5", "--num-beams", "2", "--home", str(tiny.home)]
    assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "top_k" in said and "do_sample is false, so nothing is sampled" in said
    assert main([name, *models, "--temperature", "0", "--home", str(tiny.home)]) == 2
    assert "for greedy decoding, set do_sample: false" in " ".join(capsys.readouterr().err.split())


@pytest.mark.check
def test_the_page_of_a_decoder_says_whose_the_frontier_is(arms):
    options = {"name": "decoded", "snapshots": True, "validation_split": None, "samples": 1, "top_k": 2}
    given = {"arms": ["ppo", "dpo"], "baseline": "sft", "max_new_tokens": 4}
    results = run_compare(arms.config("compare", **given, **options), arms.home, quiet=True)
    page = (arms.home / "reports/decoded/index.html").read_text()
    assert results.frontier is not None
    assert "Responses are samples of the policies themselves, not of the decoder (sampling, top_k 2)." in page
