"""Rankings in the reward model and in DPO: one tree per prompt, with the gradient of its pairs written out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import logsigmoid

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.comparisons import compare
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import DataError
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.selfcheck import inspect_model, read_reward_model
from rlhf_pipeline.stages.dpo import dpo_step
from rlhf_pipeline.stages.reward import reward_step
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.pairs import Criterion
from rlhf_pipeline.training.windows import ExampleBatch, counts_of

SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 50, "initializer_range": 0.5}
UNDROPPED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BETA = 0.4
ALL = {"dataset_train_split": "all", "dataset_test_split": "all"}


def example(prompt: list[int], *completions: list[int], ranks: tuple[int, ...] | None = None) -> Example:
    return Example(prompt, list(completions), [True] * len(completions), str(prompt), "f:1", ranks=ranks)


# Four completions of which two are tied, a pair, three with a response that comes twice, and five in order.
MIXED = [
    example([1, 2, 3], [4, 5], [6], [7, 8, 9], [10], ranks=(1, 2, 2, 3)),
    example([5, 6], [7], [8, 9]),
    example([2, 4], [11, 12], [13], [11, 12], ranks=(1, 2, 3)),
    example([3], [14, 15], [16], [17, 18], [19, 20, 21], [22], ranks=(1, 2, 3, 4, 5)),
]
PAIRS = [
    [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)],
    [(0, 1)],
    [(0, 1), (1, 2)],
    [(i, j) for j in range(5) for i in range(j)],
]
ORDERED = [MIXED[3], MIXED[1], MIXED[2]]  # without ties


@pytest.fixture(scope="module")
def scorer():
    from transformers import GPT2Config, GPT2ForSequenceClassification  # float64 throughout, unlike Llama's norms

    torch.manual_seed(0)
    config = GPT2Config(**SIZES, **UNDROPPED, num_labels=1, pad_token_id=0)
    return read_reward_model(GPT2ForSequenceClassification(config).double()).train()


@pytest.fixture(scope="module")
def policy():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **UNDROPPED)).double()
    return Policy(model, inspect_model(model)).train()


def micro_batch(model, examples: list[Example]) -> ExampleBatch:
    packed = pack(examples, layout=model.reader.layout)
    return ExampleBatch(packed, list(range(len(examples))), compared=compare(examples))


def gradient(loss: torch.Tensor, model) -> torch.Tensor:
    slopes = torch.autograd.grad(loss, list(model.model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([slope.flatten() for slope in slopes if slope is not None])


def reward_loss(scorer, examples: list[Example], **options):
    meter = CostMeter()
    return reward_step(scorer, micro_batch(scorer, examples), meter=meter, shape=FREE, **options)


FREE = ModelShape(0, 0, 0)


def dpo_loss(policy, examples: list[Example], loss_type: str, reference):
    options = {"reference": reference, "meter": CostMeter(), "shape": FREE}
    return dpo_step(policy, micro_batch(policy, examples), criterion=Criterion(BETA, ((loss_type, 1.0),)), **options)


def plain_scores(scorer, found: Example) -> list[torch.Tensor]:
    """Scores of plain transformers, one sequence at a time."""
    rows = [torch.tensor([found.prompt_ids + ids]) for ids in found.completions]
    return [scorer.model(input_ids=row).logits[0, 0] for row in rows]


def plain_logprobs(policy, found: Example) -> list[torch.Tensor]:
    """log pi(y | x) by plain transformers, one sequence at a time."""
    sums = []
    for ids in found.completions:
        logits = policy.model(input_ids=torch.tensor([found.prompt_ids + ids])).logits[0].log_softmax(-1)
        start = len(found.prompt_ids) - 1
        sums.append(sum(logits[start + place, token] for place, token in enumerate(ids)))
    return sums


def references(examples: list[Example]) -> torch.Tensor:
    """(examples, 5) made-up log-probabilities, NaN behind the last completion, as the cache keeps them."""
    draw = torch.Generator().manual_seed(2)
    rows = -3 * torch.rand(len(examples), 5, generator=draw, dtype=torch.float64)
    for row, found in zip(rows, examples, strict=True):
        row[len(found.completions) :] = torch.nan
    return rows


def test_the_gradient_of_the_reward_model_is_that_of_its_pairs_written_out(scorer):
    expected = torch.zeros((), dtype=torch.float64)
    centred = torch.zeros((), dtype=torch.float64)
    for found, pairs in zip(MIXED, PAIRS, strict=True):
        scores = plain_scores(scorer, found)
        expected = expected + sum(-logsigmoid(scores[i] - scores[j]) for i, j in pairs) / len(pairs)
        centred = centred + sum((scores[i] + scores[j]) ** 2 for i, j in pairs) / len(pairs)
    terms = reward_loss(scorer, MIXED, center_rewards_coefficient=0.3).terms
    for name, wanted, weight in (("bradley_terry", expected, 1.0), ("centering", centred, 0.3)):
        value, denominator, found_weight = terms[name]
        assert (denominator, found_weight) == ("prompts", weight)
        assert value.item() == pytest.approx(wanted.item(), abs=1e-10)
        torch.testing.assert_close(gradient(value, scorer), gradient(wanted, scorer), rtol=0, atol=1e-10)


def pair_loss(loss_type: str, chosen, rejected, ref_chosen, ref_rejected, sizes) -> torch.Tensor:
    if loss_type == "ipo_mean":
        chosen, ref_chosen = chosen / sizes[0], ref_chosen / sizes[0]
        rejected, ref_rejected = rejected / sizes[1], ref_rejected / sizes[1]
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -logsigmoid(BETA * h) if loss_type == "sigmoid" else (h - 1 / (2 * BETA)) ** 2


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "ipo_mean"])
def test_the_gradient_of_dpo_is_that_of_its_pairs_written_out(policy, loss_type):
    reference = references(MIXED)
    expected = torch.zeros((), dtype=torch.float64)
    for found, pairs, row in zip(MIXED, PAIRS, reference, strict=True):
        logps = plain_logprobs(policy, found)
        sizes = [len(ids) for ids in found.completions]
        terms = [pair_loss(loss_type, logps[i], logps[j], row[i], row[j], (sizes[i], sizes[j])) for i, j in pairs]
        expected = expected + sum(terms) / len(pairs)
    value, denominator, _ = dpo_loss(policy, MIXED, loss_type, reference).terms["dpo"]
    assert denominator == "prompts" and value.item() == pytest.approx(expected.item(), abs=1e-10)
    torch.testing.assert_close(gradient(value, policy), gradient(expected, policy), rtol=0, atol=1e-10)


def test_plackett_luce_is_the_product_of_its_choices(policy):
    reference = references(ORDERED)
    expected = torch.zeros((), dtype=torch.float64)
    for found, row in zip(ORDERED, reference, strict=True):
        scores = torch.stack([BETA * (x - ref) for x, ref in zip(plain_logprobs(policy, found), row)])
        for k in range(len(scores)):
            expected = expected - scores[k:].log_softmax(0)[0]
    value, denominator, _ = dpo_loss(policy, ORDERED, "plackett_luce", reference).terms["dpo"]
    assert denominator == "prompts" and value.item() == pytest.approx(expected.item(), abs=1e-10)
    torch.testing.assert_close(gradient(value, policy), gradient(expected, policy), rtol=0, atol=1e-10)


def test_a_pair_has_the_same_loss_alone_and_beside_a_ranking(scorer, policy):
    """Bit for bit the parts of which a batch is the sum: the pair path, and the index path that rankings bring."""
    pair, ranking = MIXED[1], MIXED[3]
    reference = references([pair, ranking])
    together = reward_loss(scorer, [pair, ranking]).terms["bradley_terry"][0]
    parts = [reward_loss(scorer, [found]).terms["bradley_terry"][0] for found in (pair, ranking)]
    assert together.item() == pytest.approx(sum(part.item() for part in parts), abs=1e-12)
    for name in ("sigmoid", "plackett_luce"):
        together = dpo_loss(policy, [pair, ranking], name, reference).terms["dpo"][0]
        parts = [
            dpo_loss(policy, [found], name, reference[i : i + 1]).terms["dpo"][0]
            for i, found in enumerate((pair, ranking))
        ]
        assert together.item() == pytest.approx(sum(part.item() for part in parts), abs=1e-12)


def test_for_pairs_plackett_luce_is_the_sigmoid_loss(policy):
    pairs = [MIXED[1], example([3], [14, 15], [16])]
    reference = references(pairs)
    listed, paired = (dpo_loss(policy, pairs, name, reference) for name in ("plackett_luce", "sigmoid"))
    one, other = listed.terms["dpo"][0], paired.terms["dpo"][0]
    assert one.item() == pytest.approx(other.item(), abs=1e-12)
    torch.testing.assert_close(gradient(one, policy), gradient(other, policy), rtol=0, atol=1e-12)
    for name, (value, _) in paired.metrics.items():
        assert listed.metrics[name][0].item() == pytest.approx(value.item(), abs=1e-12)


def test_metrics_are_sums_over_untied_pairs(scorer, policy):
    assert [counts_of([found])["pairs"] for found in MIXED] == [5, 1, 2, 10]
    assert [counts_of([found])["prompts"] for found in MIXED] == [1, 1, 1, 1]
    with torch.no_grad():
        scores = [[float(score) for score in plain_scores(scorer, found)] for found in MIXED]
        logps = [[float(logp) for logp in plain_logprobs(policy, found)] for found in MIXED]
    pairs = [(n, i, j) for n, found in enumerate(PAIRS) for i, j in found]
    metrics = reward_loss(scorer, MIXED).metrics
    assert {denominator for _, denominator in metrics.values()} == {"pairs"}
    assert metrics["accuracy"][0].item() == sum(scores[n][i] > scores[n][j] for n, i, j in pairs)
    assert metrics["margin"][0].item() == pytest.approx(sum(scores[n][i] - scores[n][j] for n, i, j in pairs))
    assert metrics["chosen_score"][0].item() == pytest.approx(sum(scores[n][i] for n, i, j in pairs))
    reference = references(MIXED)
    found = dpo_loss(policy, MIXED, "ipo_mean", reference).metrics
    rewards = [[BETA * (x - float(ref)) for x, ref in zip(*rows)] for rows in zip(logps, reference)]
    assert found["rewards/rejected"][0].item() == pytest.approx(sum(rewards[n][j] for n, i, j in pairs))
    assert found["rewards/accuracies"][0].item() == sum(rewards[n][i] > rewards[n][j] for n, i, j in pairs)
    assert found["logps/chosen"][0].item() == pytest.approx(sum(logps[n][i] for n, i, j in pairs))
    # Plackett-Luce has no ties, but the figures of pairs all the same.
    listed, split = (dpo_loss(policy, ORDERED, name, references(ORDERED)) for name in ("plackett_luce", "sigmoid"))
    for name, (value, denominator) in split.metrics.items():
        assert listed.metrics[name][1] == denominator
        assert listed.metrics[name][0].item() == pytest.approx(value.item(), abs=1e-12)


def test_a_reference_in_each_step_has_the_loss_of_the_cache(policy):
    from rlhf_pipeline.training.reference_cache import completion_logprob_sums

    cached = completion_logprob_sums(policy, ORDERED, responses_at_once=2, device="cpu")
    assert cached.shape == (3, 5) and cached.isnan().sum() == 3 + 2
    for name in ("plackett_luce", "ipo"):
        one, other = (dpo_loss(policy, ORDERED, name, source) for source in (cached, policy))
        assert one.terms["dpo"][0].item() == pytest.approx(other.terms["dpo"][0].item(), abs=1e-10)


def test_a_ranking_is_billed_as_the_one_tree_that_it_is():
    """5 completions of 2 tokens on a prompt of 4: 14 positions, where 10 pairs have 80."""
    found = example([1, 2, 3, 4], *[[10 + k, 20 + k] for k in range(5)])
    shape, meter = ModelShape(matmul=1000, head=0, attention=10), CostMeter()
    model = lambda batch: torch.zeros(batch.num_completions, dtype=torch.float64)  # noqa: E731
    step = ExampleBatch(pack([found]), [0], compared=compare([found]))
    reward_step(model, step, meter=meter, shape=shape)
    context = 10 + 5 * (5 + 6)  # the prompt's positions see 1 + ... + 4, a completion's 5 and 6
    assert meter.flops == 3 * (2 * 1000 * 14 + 4 * 10 * context) and meter.tokens_trained == 14


def test_train_rm_on_rankings(lab, rankings):
    source = rankings(30, ties=True)
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    untied = sum(a != b for row in rows for i, a in enumerate(row["ranks"]) for b in row["ranks"][:i])
    result = lab.run("train-rm", dataset_name=source, **ALL, max_steps=40, per_device_train_batch_size=30)
    metrics = result.metrics
    assert (metrics["train_pairs"], metrics["pairs"]) == (untied, untied)
    assert metrics["prompts"] == len({row["prompt"] for row in rows})
    steps = [row for row in lab.rows(result.run) if "loss/bradley_terry" in row]
    assert steps[-1]["loss/bradley_terry"] < 0.3 < steps[0]["loss/bradley_terry"] and steps[-1]["accuracy"] > 0.95
    assert metrics["accuracy"] > 0.95 and metrics["nll"] < math.log(2)
    assert set(metrics["baselines"]) == {"longer_wins", "tfidf"} and "bayes_accuracy" not in metrics
    assert metrics["gate"]["beats"]["coin"]


def test_held_out_figures_are_those_of_the_pairs(lab, rankings):
    """`rlhf evaluate` of one model, on the rankings and on their pairs written out."""
    from rlhf_pipeline.measure.evaluate import run_evaluate

    source = rankings(30, ties=True)
    made = lab.run("train-rm", dataset_name=source, **ALL)
    whole = run_evaluate(made.model, lab.config("evaluate", split="all"), lab.home)["metrics"]
    pairs = []
    for row in (json.loads(line) for line in Path(source).read_text().splitlines()):
        for i, a in enumerate(row["ranks"]):
            for j, b in enumerate(row["ranks"]):
                if a < b:
                    sides = {"chosen": row["completions"][i], "rejected": row["completions"][j]}
                    sides |= {"chosen_ended": row["ended"][i], "rejected_ended": row["ended"][j]}
                    pairs.append({"prompt": row["prompt"], **sides})
    written = lab.config("evaluate", split="all", prompts=rankings(rows=pairs))
    split = run_evaluate(made.model, written, lab.home)["metrics"]
    for name in ("accuracy", "accuracy_low", "accuracy_high", "pairs", "prompts", "nll", "brier", "ece"):
        assert whole[name] == pytest.approx(split[name], abs=1e-6), name
    assert whole["baselines"]["longer_wins"] == pytest.approx(split["baselines"]["longer_wins"], abs=1e-9)


@pytest.mark.check
@pytest.mark.parametrize("loss_type", ["sigmoid", "plackett_luce"])
def test_dpo_on_rankings(lab, rankings, loss_type):
    source = rankings(30)
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    changes = {"dataset_name": source, **ALL, "loss_type": loss_type, "per_device_train_batch_size": 30}
    result = lab.run("dpo", **changes, max_steps=40)
    steps = [row for row in lab.rows(result.run) if "loss/dpo" in row]
    sizes = [len(row["completions"]) for row in rows]
    # At the reference every order of K completions has probability 1 / K!, and every pair one half.
    start = sum(math.log(math.factorial(size)) for size in sizes) / 30 if loss_type != "sigmoid" else math.log(2)
    assert steps[0]["loss/dpo"] == pytest.approx(start, abs=1e-5)
    assert steps[-1]["loss/dpo"] < 0.8 * start and steps[-1]["rewards/accuracies"] > 0.9
    assert result.metrics["train_pairs"] == result.metrics["eval_pairs"] == sum(map(math.comb, sizes, [2] * 30))
    assert lab.registry.resolve(result.model).manifest.moves_optimum == {}


def test_a_second_run_has_the_references_from_the_cache(lab, rankings):
    changes = {"dataset_name": rankings(), "dataset_train_split": "all", "loss_type": "plackett_luce"}
    results = [lab.run("dpo", output_name=name, **changes) for name in ("one", "two")]
    results.append(lab.run("dpo", output_name="online", precompute_ref_log_probs=False, **changes))
    logs = [(Path(result.run) / "log.txt").read_text() for result in results]
    assert "computed and cached" in logs[0] and "from the cache" in logs[1]
    weights = [lab.weights(result.model) for result in results]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value)
        torch.testing.assert_close(weights[2][name], value, atol=1e-6, rtol=1e-5)
    assert results[0].cost["flops"] == results[1].cost["flops"]


@pytest.mark.check
def test_a_ranking_costs_a_fraction_of_its_pairs(lab, rankings):
    """On the bill of a step, by the formula: the same rankings natively and, split, in the order of `engine: trl`."""
    row = {"prompt": "the plot of this drama was", "ranks": list(range(1, 9))}
    row["completions"] = [f" {word}" for word in ("great", "fine", "dull", "awful", "funny", "scary", "slow", "loud")]
    changes = {"dataset_name": rankings(rows=[row]), **ALL, "reward_centering": "none", "max_steps": 1}
    changes["per_device_train_batch_size"] = 28
    whole, split = (lab.run("train-rm", output_name=name, engine=name, **changes) for name in ("native", "trl"))
    assert whole.cost["tokens_trained"] == 6 + 8 * 2 and split.cost["tokens_trained"] == 28 * 2 * (6 + 2)
    assert whole.metrics["train_pairs"] == split.metrics["train_pairs"] == 28


@pytest.mark.check
def test_collected_rankings_of_a_policy(lab):
    """Four responses to a prompt of which some are drawn twice."""
    lab.run("collect", k=4, num=60, labels="bradley-terry")
    changes = {"dataset_name": "collected:collected", **ALL}
    scored = lab.run("train-rm", **changes)
    listed = lab.run("dpo", **changes, loss_type="plackett_luce")
    split = lab.run("dpo", **changes, output_name="split")
    assert scored.metrics["train_pairs"] == listed.metrics["train_pairs"] == split.metrics["train_pairs"] > 100


def test_rankings_of_ties_only_are_left_out_and_counted(lab, rankings):
    rows = [
        {"prompt": "the plot of this drama was", "completions": [" great", " dull", " slow"], "ranks": ranks}
        for ranks in ([1, 2, 3], [1, 1, 1], [2, 1, 2])
    ]
    result = lab.run("train-rm", dataset_name=rankings(rows=rows), **ALL, max_steps=1)
    (report,) = lab.registry.resolve(result.model).manifest.data
    assert (report.kept, report.dropped) == (2, {"tied_ranking": 1})
    assert result.metrics["train_pairs"] == 3 + 2
    only = rankings(rows=rows[1:2])
    with pytest.raises(DataError, match=r"no example left of 1 rows \(tied_ranking 1\)"):
        lab.run("train-rm", dataset_name=only, **ALL)


def command(lab, tmp_path: Path, stage: str, **values) -> list[str]:
    config = tmp_path / f"{stage}.yaml"
    common = {"max_prompt_length": 6, "response_length": 4, "use_cpu": True, "num_threads": 1, "max_steps": 2}
    config.write_text(yaml.safe_dump({**common, "model_name_or_path": "sft", "output_name": "made", **ALL, **values}))
    return ["--home", str(lab.home), stage, "--config", str(config), "--json"]


@pytest.mark.parametrize(("stage", "changes"), [("train-rm", {}), ("dpo", {"loss_type": "plackett_luce"})])
def test_the_command(capsys, lab, rankings, tmp_path, stage, changes):
    assert main(command(lab, tmp_path, stage, dataset_name=rankings(12), **changes)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "made@v1" and result["metrics"]["train_pairs"] > 12
    assert Path(result["path"], "model.safetensors").is_file()


def test_the_command_refuses_ties_of_plackett_luce_with_the_row(capsys, lab, rankings, tmp_path):
    row = {"prompt": "the plot of this drama was", "completions": [" great", " dull", " slow"], "ranks": [1, 2, 3]}
    source = rankings(rows=[row, {**row, "ranks": [1, 2, 2]}, row])
    words = command(lab, tmp_path, "dpo", dataset_name=source, loss_type="plackett_luce")
    assert main(words) == 2
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).split())
    assert "rankings.jsonl:2: tied_ranking: 'completions[1]' and 'completions[2]' have the same rank" in text
    assert "1 of 3 rows cannot be used" in text and "Traceback" not in text
    assert not (lab.home / "models" / "made").exists()
    assert main([*words, "skip_bad_rows=true"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["train_pairs"] == 6


@pytest.mark.check
def test_the_training_loss_that_exact_reports_is_that_of_the_log(lab, rankings):
    """Read again after training, over all rankings: at the reference, where a step of 1e-12 leaves it."""
    from rlhf_pipeline.measure.exact import run_exact

    source = rankings(12)
    sizes = [len(json.loads(line)["completions"]) for line in Path(source).read_text().splitlines()]
    expected = {"sigmoid": math.log(2), "ipo_mean": 1.0, "plackett_luce": 0.0}  # (1 / (2 tau))^2 at tau = .5
    expected["plackett_luce"] = sum(math.log(math.factorial(size)) for size in sizes) / 12
    for name, value in expected.items():
        changes = {"dataset_name": source, **ALL, "loss_type": name, "learning_rate": 1e-12}
        lab.run("dpo", output_name=name, max_steps=1, per_device_train_batch_size=12, **changes)
        made = run_exact([name], lab.config("exact", max_new_tokens=1, prompts="world:verdicts"), lab.home)
        (row,) = [row for row in made.rows if row.name == f"{name}@v1"]
        assert row.training_loss.training_loss == pytest.approx(value, abs=1e-5)


def test_a_ranking_has_no_one_other_length(lab, rankings):
    with pytest.raises(DataError, match="ld_alpha compares the lengths of two responses"):
        lab.run("dpo", dataset_name=rankings(6), **ALL, ld_alpha=0.5)
