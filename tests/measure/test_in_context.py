"""Arms that answer with demonstrations in their context: their figures against plain forward passes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.run import compared, run_compare
from rlhf_pipeline.data import world
from rlhf_pipeline.data.samples import lowest_examples
from rlhf_pipeline.errors import ConfigError
from rlhf_pipeline.evaluation.sampled import draw
from rlhf_pipeline.measure import few_shot, icdpo
from rlhf_pipeline.measure.bench import find_policies, set_up
from rlhf_pipeline.measure.contexts import one_per_prompt, pool_of
from rlhf_pipeline.measure.few_shot import draw_sets
from rlhf_pipeline.measure.in_context import measure_in_context
from rlhf_pipeline.report import Results, load

CPU = torch.device("cpu")
pytestmark = pytest.mark.check


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory):
    """A laboratory to write reports and caches into."""
    return tiny.copy(tmp_path_factory.mktemp("in_context") / "home")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Six responses, or demonstrations, choose a set."""
    monkeypatch.setattr(few_shot, "CHOOSING", 6)


def bench_of(lab, arm="few_shot:sft", **changes):
    config = lab.config("evaluate", **changes)
    (found,) = find_policies(lab.registry, [arm], lambda _: None)
    options = {"reference": found.policy, "samples": config.samples, "seed": 0, "say": lambda _: None}
    return set_up(lab.registry, config, found, CPU, **options), found


def log_prob(lab, read: list[int], response: list[int], reference: str = "sft") -> torch.Tensor:
    """Log-probabilities of the next token at every position of a response, (R, V), by a plain forward pass."""
    from transformers import AutoModelForCausalLM

    if reference not in _MODELS:
        _MODELS[reference] = AutoModelForCausalLM.from_pretrained(lab.registry.resolve(reference).path).double().eval()
    with torch.no_grad():
        logits = _MODELS[reference](torch.tensor([read + response])).logits[0, len(read) - 1 : -1]
    return logits.log_softmax(-1)


_MODELS: dict = {}


@pytest.fixture(autouse=True, scope="module")
def forget():
    yield
    _MODELS.clear()


def joined(demonstrations, prompt: list[int]) -> list[int]:
    return [token for one in demonstrations for token in [*one.prompt_ids, *one.completions[0]]] + prompt


def test_the_set_is_the_one_under_which_validation_demonstrations_are_most_likely(home):
    bench, arm = bench_of(home, samples=1, max_prompts=2, in_context={"prefixes": 3})
    found = measure_in_context(bench, arm).facts
    pool = pool_of(bench, arm)
    sets = draw_sets(pool.examples, 2, 3, 0)
    assert len({tuple(one.prompt_key for one in chosen) for chosen in sets}) == 3
    held = lowest_examples(pool.data.split("demonstration", "validation", bench.tokenizer)[0], 6)
    assert {
        world.SPLITS[world.GENRES[g], world.ASPECTS[a]] for g, a in (world.parse_prompt(e.prompt_ids) for e in held)
    } == {"validation"}
    figures = []
    for chosen in sets:
        sums = []
        for one in held:
            (response,) = one.completions
            logs = log_prob(home, joined(chosen, one.prompt_ids), response)
            sums.append(float(logs[range(len(response)), response].sum()))
        figures.append(sum(sums) / 6)
    assert found["prefixes"] == pytest.approx(figures, abs=1e-4)
    assert found["chosen"] == figures.index(max(figures)) and max(figures) - min(figures) > 1e-3
    assert found["chosen_by"] == "likelihood" and found["method"] == "few_shot" and 10 < found["pool"] < 20


def test_the_set_is_the_one_whose_responses_the_reward_model_prefers(home, monkeypatch):
    monkeypatch.setattr(few_shot, "CHOOSING", 64)
    bench, arm = bench_of(home, samples=1, max_prompts=2, reward_model="reward", in_context={"prefixes": 3})
    found = measure_in_context(bench, arm).facts
    assert found["chosen_by"] == "reward@v1" and len(set(found["prefixes"])) == 3
    assert found["chosen"] == found["prefixes"].index(max(found["prefixes"]))
    # The figure of a set is what the reward model gives to responses behind it, as read behind the prompt alone.
    pool = pool_of(bench, arm)
    (first, *_), policy = draw_sets(pool.examples, 2, 3, 0), bench.policy(arm.policy)
    held = one_per_prompt(pool.data.split("demonstration", "validation", bench.tokenizer)[0])
    plain = list(held)
    read = [replace(one, prompt_ids=joined(first, one.prompt_ids)) for one in plain]
    drawn = draw(policy, replace(bench.plan, prompts=read, samples=64 // len(plain)))
    back = [replace(e, prompt_ids=one.prompt_ids) for e, one in zip(drawn.examples, plain, strict=True)]
    scores = [float(bench.scorer.score([one]).mean()) for one in back]
    assert found["prefixes"][0] == pytest.approx(sum(scores) / len(scores), abs=1e-5)


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_kl_is_of_the_policy_behind_demonstrations_to_the_reference_behind_the_prompt(home, at_once):
    bench, arm = bench_of(home, samples=3, max_prompts=3, per_device_eval_batch_size=at_once)
    found = measure_in_context(bench, arm)
    pool = pool_of(bench, arm)
    chosen = draw_sets(pool.examples, 2, 4, 0)[found.facts["chosen"]]
    kl, ratio, entropy = [], [], []
    for example in found.examples:
        assert len(example.prompt_ids) == 6  # of the prompt alone
        for response in example.completions:
            mine = log_prob(home, joined(chosen, example.prompt_ids), response)
            theirs = log_prob(home, example.prompt_ids, response)
            kl.append(float((mine.exp() * (mine - theirs)).sum()))
            ratio.append(float((mine - theirs)[range(len(response)), response].sum()))
            entropy.append(float(-(mine.exp() * mine).sum()))
    np.testing.assert_allclose(found.values["kl"], kl, atol=1e-5)
    np.testing.assert_allclose(found.values["kl_k1"], ratio, atol=1e-5)
    np.testing.assert_allclose(found.values["entropy"], entropy, atol=1e-5)
    assert min(kl) > 1e-3
    size = len(joined(chosen, []))
    assert set(found.values["context_tokens"]) == {size}
    assert found.values["tokens_read"].tolist() == [size + 6 + n for n in found.values["length"]]
    assert {len(one) for one in (found.values["true_reward"], found.values["kl"])} == {9}


def test_responses_depend_on_the_demonstrations_and_not_on_the_batch(home):
    drawn = []
    for at_once in (1, 4, 64):
        bench, arm = bench_of(home, samples=4, max_prompts=4, per_device_eval_batch_size=at_once)
        drawn.append([example.completions for example in measure_in_context(bench, arm).examples])
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0] != [example.completions for example in draw(bench.policy(arm.policy), bench.plan).examples]


@pytest.fixture(scope="module")
def results(home) -> Results:
    config = home.config(
        "compare", arms=["few_shot:sft"], baseline="sft", samples=4, best_of=[2], reward_model="reward", name="shots"
    )
    return compared(config, home.home, quiet=True)


def test_a_row_of_the_comparison(home, results):
    baseline, row = results.rows[:2]
    assert (row.name, row.arm, row.stage) == ("few_shot:sft@v1", "few_shot:sft@v1", "few_shot")
    assert (row.beta, row.optimum, row.moves_optimum) == (None, "other", {"in_context": "few_shot"})
    assert results.reference == "sft@v1" and row.metrics["kl"].mean > 1e-3
    assert row.in_context.method == "few_shot" and row.in_context.demonstrations == 2
    assert baseline.in_context is None and "context_tokens" not in baseline.metrics
    assert row.cost.flops == row.cost.tokens_trained == 0 and baseline.cost.flops > 0
    assert not list(results.find(primary=True))  # one arm: it is compared with the baseline alone
    assert any(
        line.text.startswith("few_shot:sft@v1 is not trained: it answers with 2") for line in results.verdict.lines
    )
    (entry,) = (one for one in results.lineage if one.model == "few_shot:sft@v1")
    assert entry.parents == {"policy": "sft@v1"}
    assert "few_shot:sft@v1" not in results.configs and results.arms["few_shot:sft@v1"].cost.flops == 0


def test_the_comparison_keeps_what_it_measured(home, results, monkeypatch):
    from rlhf_pipeline.measure import evaluate

    monkeypatch.setattr(evaluate, "measure_in_context", None)
    config = home.config(
        "compare", arms=["few_shot:sft"], baseline="sft", samples=4, best_of=[2], reward_model="reward", name="shots"
    )
    assert compared(config, home.home, quiet=True).rows == results.rows


def test_arms_with_and_without_training_and_a_baseline_with_demonstrations(home):
    config = home.config("compare", arms=["sft"], baseline="few_shot:sft", samples=2, best_of=[2, 3], name="turned")
    found = compared(config, home.home, quiet=True)
    assert found.baseline == "few_shot:sft@v1" and found.reference == "sft@v1"
    assert found.rows[1].metrics["kl"].mean == pytest.approx(0, abs=1e-6)
    best = [row for row in found.rows if row.n]
    assert [row.samples for row in best] == [3, 3] and "tokens_read" in best[0].metrics
    assert found.rows[1].win_rate is not None


@pytest.mark.slow
def test_the_command_line(home, capsys):
    def rlhf(*words):
        code = main(["--home", str(home.home), *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    given = ["use_cpu=true", "num_threads=1", "samples=2", "in_context.demonstrations=1"]
    code, out, err = rlhf("evaluate", "few_shot:sft", *given, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["model"] == "few_shot:sft@v1" and found["in_context"]["demonstrations"] == 1
    assert found["metrics"]["context_tokens"]["mean"] > 6
    code, out, err = rlhf("compare", "few_shot:sft", "sft", *given, "exact=false", "name=cli")
    assert code == 0, err
    assert "few_shot:sft@v1" in out and "tokens read" in out
    assert (home.home / "reports" / "cli" / "index.html").is_file()
    given = ["use_cpu=true", "num_threads=1", "samples=1", "in_context.source=collected:pairs", "max_prompts=4"]
    code, out, err = rlhf("evaluate", "icdpo:sft", *given, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found["accuracy"]) == {"icdpo:sft@v1", "log p of sft@v1"} and found["in_context"]["candidates"] == 3
    code, out, err = rlhf("evaluate", "few_shot:sft", "split=all")
    assert code == 2 and "Traceback" not in err and "validation_split" in err


# In-context DPO.


def shown(text: str) -> list[str]:
    return text.split()


def similar(prompt: list[int], pool, count: int):
    """The demonstrations of the most similar prompts by BM25, term by term."""
    documents, query = [shown(world.decode(one.prompt_ids)) for one in pool], shown(world.decode(prompt))
    mean = sum(map(len, documents)) / len(documents)

    def score(document):
        total = 0.0
        for term in set(query):
            n, f = sum(term in one for one in documents), document.count(term)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            total += idf * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * len(document) / mean))
        return total

    order = sorted(range(len(pool)), key=lambda place: (-round(score(documents[place]), 9), place))[:count]
    return [pool[place] for place in reversed(order)]


def total(lab, read: list[int], response: list[int]) -> float:
    return float(log_prob(lab, read, response)[range(len(response)), response].sum())


def bare(ids: list[int]) -> list[int]:
    return [token for token in ids if token != world.EOS_ID]


def by_hand(lab, bench, arm, n: int, rejected: bool):
    """For each response of the plan: the best candidate, its log-ratio, tokens that are read, and copies."""
    pool = pool_of(bench, arm, "pair" if rejected else "demonstration").examples
    policy, samples, rows = bench.policy(arm.policy), bench.plan.samples, []
    contexts = [
        replace(one, prompt_ids=joined(similar(one.prompt_ids, pool, 2), one.prompt_ids)) for one in bench.plan.prompts
    ]
    drawn = [draw(policy, replace(bench.plan, prompts=contexts, seed=1_000_003 * c)) for c in range(n)]
    for place, prompt in enumerate(bench.plan.prompts):
        near = similar(prompt.prompt_ids, pool, 2)
        behind = joined(near, prompt.prompt_ids)
        other = prompt.prompt_ids
        if rejected:
            other = [token for one in near for token in [*one.prompt_ids, *one.completions[1]]] + prompt.prompt_ids
        for i in range(samples):
            candidates = [one.examples[place].completions[i] for one in drawn]
            scores = [total(lab, behind, ids) - total(lab, other, ids) for ids in candidates]
            copies = [bare(ids) in [bare(one.completions[0]) for one in near] for ids in candidates]
            allowed = [k for k in range(n) if not copies[k]] or [0]
            best = max(allowed, key=lambda k: (scores[k], -k)) if not all(copies) else 0
            ratio = total(lab, behind, candidates[best]) - total(lab, prompt.prompt_ids, candidates[best])
            read = sum(2 * len(behind) + len(other) + 3 * len(ids) for ids in candidates)
            rows.append((candidates[best], ratio, read, sum(copies) / n, sum(map(len, candidates))))
    return rows


@pytest.mark.parametrize("rejected", [False, True], ids=["one_sided", "two_sided"])
def test_the_best_candidate_by_the_contrast(home, rejected):
    given = {"score": "two_sided", "source": "collected:pairs"} if rejected else {}
    bench, arm = bench_of(home, "icdpo:sft", samples=8, in_context=given)
    found, rows = measure_in_context(bench, arm), by_hand(home, bench, arm, 3, rejected)
    assert [ids for example in found.examples for ids in example.completions] == [row[0] for row in rows]
    bound = math.log(3) - 2 / 3
    np.testing.assert_allclose(found.values["kl"], [bound + row[1] for row in rows], atol=1e-4)
    assert found.values["tokens_read"].tolist() == [row[2] for row in rows]
    assert found.values["copies"].tolist() == pytest.approx([row[3] for row in rows])
    assert found.values["tokens_generated"].tolist() == [row[4] for row in rows]
    assert found.values["length"].tolist() == [len(row[0]) for row in rows]
    assert found.facts["kl_is_bound"] and found.facts["candidates"] == 3 and found.facts["method"] == "icdpo"
    assert found.facts["score"] == ("two_sided" if rejected else "one_sided")
    assert any(row[3] > 0 for row in rows)  # the guard had something to do
    first = draw_again(bench, arm)
    assert [row[0] for row in rows] != first  # and the choice as well


def draw_again(bench, arm):
    """The first candidates."""
    pool = pool_of(bench, arm, "pair" if bench.config.in_context.score == "two_sided" else "demonstration").examples
    asked = [
        replace(one, prompt_ids=joined(similar(one.prompt_ids, pool, 2), one.prompt_ids)) for one in bench.plan.prompts
    ]
    drawn = draw(bench.policy(arm.policy), replace(bench.plan, prompts=asked))
    return [ids for example in drawn.examples for ids in example.completions]


def test_candidates_do_not_depend_on_the_batch(home):
    drawn = []
    for at_once in (1, 5, 64):
        bench, arm = bench_of(home, "icdpo:sft", samples=2, max_prompts=3, per_device_eval_batch_size=at_once)
        drawn.append([example.completions for example in measure_in_context(bench, arm).examples])
    assert drawn[0] == drawn[1] == drawn[2]


def test_where_all_candidates_are_copies_the_first_is_returned(home, monkeypatch):
    monkeypatch.setattr(icdpo, "is_copy", lambda *_: True)
    bench, arm = bench_of(home, "icdpo:sft", samples=2, max_prompts=3, in_context={})
    found = measure_in_context(bench, arm)
    assert set(found.values["only_copies"]) == set(found.values["copies"]) == {1.0}
    assert [ids for example in found.examples for ids in example.completions] == draw_again(bench, arm)


def test_the_two_sided_contrast_needs_rejected_responses(home):
    bench, arm = bench_of(home, "icdpo:sft", in_context={"score": "two_sided"})
    with pytest.raises(
        ConfigError, match=r"in_context\.score: two_sided reads rejected responses.*set in_context\.source"
    ):
        measure_in_context(bench, arm)


@pytest.mark.parametrize("score", ["one_sided", "two_sided"])
def test_accuracy_of_the_contrast_beside_log_p_and_the_reward_model(home, score):
    given = {"source": "collected:pairs", "score": score}
    bench, arm = bench_of(home, "icdpo:sft", max_prompts=7, reward_model="reward", in_context=given)
    read = icdpo.pairs_of_source(bench, arm)
    found = icdpo.pair_accuracy(bench, arm, read)
    pool = pool_of(bench, arm, "pair" if score == "two_sided" else "demonstration").examples
    right: dict[str, dict[str, list[float]]] = {"icdpo:sft@v1": {}, "log p of sft@v1": {}, "reward@v1": {}}
    for pair in read:
        near = similar(pair.prompt_ids, pool, 2)
        behind, against = joined(near, pair.prompt_ids), pair.prompt_ids
        if score == "two_sided":
            against = [token for one in near for token in [*one.prompt_ids, *one.completions[1]]] + pair.prompt_ids
        contrast = [total(home, behind, ids) - total(home, against, ids) for ids in pair.completions]
        plain = [total(home, pair.prompt_ids, ids) for ids in pair.completions]
        scores = bench.scorer.score([pair]).tolist()
        for name, (chosen, other) in zip(right, (contrast, plain, scores), strict=True):
            right[name].setdefault(pair.prompt_key, []).append((chosen > other) + 0.5 * (chosen == other))
    assert 3 < len(read) <= 7 and set(found) == set(right)
    for name, prompts in right.items():
        assert found[name].mean == pytest.approx(sum(sum(v) / len(v) for v in prompts.values()) / len(prompts)), name


def test_a_comparison_of_in_context_dpo(home):
    config = home.config(
        "compare",
        arms=["icdpo:sft", "few_shot:sft"],
        baseline="sft",
        samples=2,
        in_context={"source": "collected:pairs", "candidates": 2},
        reward_model="reward",
        name="contrast",
    )
    found = run_compare(config, home.home, quiet=True)
    row = next(one for one in found.rows if one.arm == "icdpo:sft@v1")
    assert (row.stage, row.beta, row.optimum) == ("icdpo", None, "other")
    assert row.in_context.candidates == 2 and row.in_context.kl_is_bound and row.in_context.chosen is None
    assert {"kl", "copies", "only_copies", "tokens_read", "tokens_generated"} <= set(row.metrics)
    assert {"icdpo:sft@v1", "log p of sft@v1", "reward@v1", "longer wins"} <= set(found.preferences.scorers)
    assert found.preferences.scorers["icdpo:sft@v1"].nll is None
    (contrast,) = found.find(figure="true_reward", kind="as trained")
    assert contrast.at == "as trained, with a different optimum for icdpo:sft@v1 and few_shot:sft@v1"
    page = Path(found.report).read_text()
    assert "The KL of icdpo:sft@v1 is an upper bound." in page and "best of 2 candidates" in page
    assert load(found.path) == found
