"""Plant known faults in a copy of the package and require that the named tests catch each of them.

python scripts/mutants.py                     all mutants
python scripts/mutants.py --quick             those that tests of pure functions catch: no test trains a model
python scripts/mutants.py NAME [NAME ...]     some of them

For each mutant the package and the tests are copied to a temporary folder, one passage of the source is replaced, and
the named tests are run there: every one of them has to fail, by an assertion and not by an error. Unmutated they have
to pass. The exit code is 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "rlhf_pipeline"
COPIED = (PACKAGE, "tests", "pyproject.toml")

IDENTITY = "tests/rollout/test_gradient_identity.py::"
ANY_VALUES = IDENTITY + "test_with_lambda_1_any_value_function_gives_the_exact_gradient[table-20]"
OWN_CRITIC = IDENTITY + "test_with_lambda_1_the_critic_of_the_package_gives_the_exact_gradient[network]"
PACKED = IDENTITY + "test_the_packed_forward_pass_gives_the_probabilities_of_plain_ones[network]"
TOKEN_MEAN = IDENTITY + "test_the_mean_over_tokens_is_the_gradient_over_the_expected_length"
CRITIC = "tests/rollout/test_critic.py::test_the_fitted_critic_is_v_pi_at_every_prefix"
ROLLOUT = "tests/rollout/test_rollout.py::"
WEIGHTS = "tests/rollout/test_importance_weights.py::"
MASKED = "tests/algorithms/test_masked.py::"
POPULATION = "tests/rollout/test_dpo_population.py::"
DPO = POPULATION + "test_the_population_gradient_of_dpo_is_0_at_the_optimum_and_not_at_the_reference[table]"
IPO = POPULATION + "test_the_population_gradient_of_ipo_is_0_at_its_optimum_and_not_at_the_reference"
IPO_MEAN = POPULATION + "test_ipo_over_means_has_an_optimum_of_its_own"
SMOOTHED = POPULATION + "test_label_smoothing_moves_dpo_to_the_optimum_of_the_smoothed_labels"
RESPONSE_ALONE = POPULATION + "test_log_probabilities_are_of_the_responses_alone"
RANKINGS = "tests/stages/test_rankings.py::"
RANKED_REWARD = RANKINGS + "test_the_gradient_of_the_reward_model_is_that_of_its_pairs_written_out"
RANKED_DPO = RANKINGS + "test_the_gradient_of_dpo_is_that_of_its_pairs_written_out"
PLACKETT_LUCE = RANKINGS + "test_plackett_luce_is_the_product_of_its_choices"
LOOP, TRAINING = "training/loop.py", "tests/training/"
UNSEEN = TRAINING + "test_finite.py::test_what_the_model_says[dpo--inf]"
RESUMED = TRAINING + "test_resume.py::test_stopped_by_a_signal[{}]"
CHECKPOINT, FLIPS = "training/checkpoint.py", "tests/faults/test_flips.py::"
KEPT = TRAINING + "test_memory.py::test_what_a_failed_attempt_has_added_is_thrown_away[sft]"


@dataclass(frozen=True)
class Mutant:
    """One fault: in `file`, `old` (which occurs once) becomes `new`, and each of `tests` has to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"{PACKAGE}/{self.file}"

    @property
    def quick(self) -> bool:
        """Whether no test that has to fail trains a model."""
        return all(test.startswith(("tests/algorithms/", "tests/rollout/")) for test in self.tests)

    def apply(self, source: str) -> str:
        """Return the mutated source.

        Raises:
            ValueError: `old` does not occur exactly once.
        """
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.path} has {source.count(self.old)} times {self.old!r}, expected once")
        return source.replace(self.old, self.new)


REWARD_KL = "-kl_coef * k1(logprobs, ref_logprobs)"
K2 = "-kl_coef * 0.5 * (logprobs - ref_logprobs) ** 2"
K3 = "-kl_coef * (torch.expm1(ref_logprobs - logprobs) + logprobs - ref_logprobs)"
LAST, BEFORE_LAST = "last = mask.sum(1) - 1\n", "last = (mask.sum(1) - 2).clamp_min(0)\n"
LOG_RATIOS = "return chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs"
NO_REFERENCE = "return chosen_logprobs, rejected_logprobs"
MUTANTS = (
    Mutant(
        "eos-dropped-from-mask",
        "training/ppo_windows.py",
        "mask=torch.arange(width, device=self.device) < lengths[:, None],",
        "mask=torch.arange(width, device=self.device) < (lengths - ended.long()).clamp_min(1)[:, None],",
        (ANY_VALUES,),
    ),
    Mutant(
        "mean-per-sequence",
        "algorithms/policy.py",
        "        masked_sum(torch.maximum(unclipped, clipped), mask),\n",
        "        (masked_sum(torch.maximum(unclipped, clipped), mask, 1) / mask.sum(1)).sum(),\n",
        (ANY_VALUES, TOKEN_MEAN),
    ),
    Mutant(
        "importance-weights-upside-down",
        "algorithms/policy.py",
        "torch.where(mask, old_logprobs - sampler_logprobs, ",
        "torch.where(mask, sampler_logprobs - old_logprobs, ",
        (WEIGHTS + "test_choices_of_another_sampler_after_the_same_prefixes_give_the_exact_gradient[table]",),
    ),
    Mutant(
        "sampler-of-old-weights",
        "training/ppo_windows.py",
        "            self.engine.load_weights(self.actor_critic)\n",
        "",
        ("tests/stages/test_vllm.py::test_the_engine_samples_with_the_weights_of_each_update",),
    ),
    Mutant("gamma-95", "rollout/rollout.py", "gamma=gamma, lam=lam)", "gamma=0.95, lam=lam)", (ANY_VALUES,)),
    Mutant("k2-in-reward", "algorithms/advantages.py", REWARD_KL, K2, (ANY_VALUES,)),
    Mutant("k3-in-reward", "algorithms/advantages.py", REWARD_KL, K3, (ANY_VALUES,)),
    Mutant("kl-sign", "algorithms/advantages.py", REWARD_KL, REWARD_KL[1:], (ANY_VALUES,)),
    Mutant("score-one-token-early", "algorithms/advantages.py", LAST, BEFORE_LAST, (ANY_VALUES,)),
    Mutant("score-at-first-token", "algorithms/advantages.py", LAST, "last = 0 * mask.sum(1)\n", (ANY_VALUES,)),
    Mutant(
        "old-and-new-swapped",
        "algorithms/policy.py",
        "torch.where(mask, logprobs - old_logprobs, ",
        "torch.where(mask, old_logprobs - logprobs, ",
        (ANY_VALUES,),
    ),
    Mutant(
        "unmasked-whitening",
        "algorithms/masked.py",
        "torch.stack([mask.sum().double(), active.sum()",
        "torch.stack([torch.ones_like(mask).sum().double(), active.sum()",
        (
            MASKED + "test_masked_mean_is_0_and_masked_variance_1",
            MASKED + "test_padding_changes_no_whitened_value",
            ROLLOUT + "test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens",
            ROLLOUT + "test_padding_changes_no_figure_and_no_advantage",
        ),
    ),
    Mutant(
        "value-at-the-token",
        "models/roles.py",
        "hidden = hidden_states(self.critic, batch, batch.predict_index)",
        "hidden = hidden_states(self.critic, batch, batch.token_index)",
        (OWN_CRITIC, CRITIC),
    ),
    Mutant(
        "second-completion-predicted-by-the-first",
        "data/batch.py",
        "predict_index = torch.where(offset == 0, before[completion_index], token_index - 1)",
        "predict_index = token_index - 1",
        (PACKED,),
    ),
    Mutant("reference-dropped", "algorithms/preference.py", LOG_RATIOS, NO_REFERENCE, (DPO, IPO)),
    Mutant(
        "chosen-and-rejected-swapped",
        "training/pairs.py",
        "chosen, rejected = values.view(-1, 2).unbind(1)",
        "rejected, chosen = values.view(-1, 2).unbind(1)",
        (DPO, IPO, RESPONSE_ALONE),
    ),
    Mutant(
        "prompt-tokens-in-the-sum",
        "data/tokenize.py",
        "    return Example(\n        prompt,\n        completions,\n",
        "    return Example(\n        prompt[:1],\n        [prompt[1:] + ids for ids in completions],\n",
        (RESPONSE_ALONE,),
    ),
    Mutant(
        "mean-instead-of-sum",
        "training/pairs.py",
        "split_pairs(lengths, compared) if objective.length_normalised else (1, 1)",
        "split_pairs(lengths, compared)",
        (DPO, IPO),
    ),
    Mutant(
        "sum-instead-of-mean",
        "algorithms/preference.py",
        "Objective(ipo_loss, length_normalised=True)",
        "Objective(ipo_loss)",
        (IPO_MEAN,),
    ),
    Mutant(
        "eos-behind-cut-responses",
        "data/tokenize.py",
        "    return ids[:-1] if closed and len(ids) > 1 else ids",
        "    return ids if closed else [*ids, eos]",
        (DPO, IPO),
    ),
    Mutant("ipo-1-over-tau", "algorithms/preference.py", "1.0 / (2.0 * beta)", "1.0 / beta", (IPO, IPO_MEAN)),
    Mutant(
        "pairs-of-a-ranking-count-one-each",
        "data/comparisons.py",
        "return self.siblings.to(like).reciprocal()",
        "return torch.ones_like(self.siblings).to(like)",
        (RANKED_REWARD, RANKED_DPO),
    ),
    Mutant(
        "tied-completions-are-pairs",
        "data/tokenize.py",
        "for i, j in pairs if ranks[i] != ranks[j])",
        "for i, j in pairs)",
        (RANKED_REWARD, RANKED_DPO),
    ),
    Mutant(
        "plackett-luce-chooses-among-all",
        "algorithms/preference.py",
        "device=scores.device).triu() & mask[:, None, :]",
        "device=scores.device) & mask[:, None, :]",
        (PLACKETT_LUCE,),
    ),
    Mutant(
        "smoothing-ignored",
        "stages/dpo.py",
        "target=smoothed_target(target, label_smoothing),",
        "target=target,",
        (SMOOTHED,),
    ),
    Mutant(
        "soft-labels-ignored",
        "stages/dpo.py",
        "target = None if targets is None else targets[micro_batch.indices].to(logprobs)",
        "target = None",
        (DPO, IPO, IPO_MEAN),
    ),
    Mutant("unchecked-figures", LOOP, "[grad_norm, *figures(seen)]", "[grad_norm]", (UNSEEN,)),
    Mutant("failed-attempt-kept", LOOP, "partial(optimizer.zero_grad, set_to_none=True))", "lambda: None)", (KEPT,)),
    # Resuming and what checkpoints and manifests know of damage.
    Mutant(
        "random-numbers-not-restored",
        CHECKPOINT,
        "    set_random_states(load_file(checkpoint.directory / FILES[2]))\n",
        "    load_file(checkpoint.directory / FILES[2])\n",
        (TRAINING + "test_resume.py::test_dropout_goes_on_where_it_was",),
    ),
    Mutant(
        "optimizer-begins-anew",
        CHECKPOINT,
        'load_state_dict({"state": entries,',
        'load_state_dict({"state": {},',
        (RESUMED.format("sft-3"), RESUMED.format("dpo-3")),
    ),
    Mutant(
        "schedule-begins-anew",
        CHECKPOINT,
        '    scheduler.load_state_dict({**checkpoint.state["scheduler"], "lr_lambdas": kept})\n',
        "",
        (RESUMED.format("train-rm-3"),),
    ),
    Mutant(
        "data-read-from-the-start",
        "training/session.py",
        "plan.windows(prepared, start)",
        "plan.windows(prepared, 0)",
        (RESUMED.format("sft-3"), RESUMED.format("train-rm-3")),
    ),
    Mutant(
        "metrics-repeated",
        "training/run.py",
        "log.rewind(checkpoint.step if checkpoint else 0)",
        "log.rewind(10**9)",
        (TRAINING + "test_resume.py::test_killed[dpo-4]",),
    ),
    Mutant(
        "checkpoint-unchecked",
        CHECKPOINT,
        "if file_entry(path).model_dump() != expected:",
        "if expected is None:",
        (FLIPS + "test_every_flipped_bit_and_every_cut_is_seen_and_the_file_named",),
    ),
    Mutant(
        "seal-unchecked",
        "data/sealed.py",
        " or sha256(blank.encode()).hexdigest() != found:",
        ":",
        (FLIPS + "test_every_bit_of_a_manifest_counts",),
    ),
)


def copy_sources(target: Path) -> None:
    """Copy what the tests need; no bytecode, which could be mistaken for that of a mutated file."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def run_tests(directory: Path, tests: Sequence[str]) -> tuple[dict[str, list[str]], str]:
    """Run tests in a copy: per test the outcomes of its cases ("passed", "assertion", "error"); and the output."""
    report = directory / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    settings = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=directory, env={**os.environ, **settings}, capture_output=True, text=True)
    outcomes: dict[str, list[str]] = {test: [] for test in tests}
    cases = ElementTree.parse(report).iter("testcase") if report.is_file() else ()
    for case in cases:
        identity = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        for test in {identity, identity.split("[")[0]} & set(outcomes):
            outcomes[test].append(_outcome(case))
    return outcomes, done.stdout + done.stderr


def _outcome(case: ElementTree.Element) -> str:
    failure = case.find("failure")
    if failure is not None:
        return "assertion" if failure.get("message", "").startswith(("assert", "AssertionError")) else "error"
    return "passed" if case.find("error") is None and case.find("skipped") is None else "error"


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: "caught", or why it was not."""

    mutant: Mutant
    word: str
    seconds: float
    output: str


def try_mutant(mutant: Mutant) -> Verdict:
    """Run a mutant's tests in a mutated copy."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        directory = Path(folder)
        copy_sources(directory)
        path = directory / mutant.path
        path.write_text(mutant.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
        outcomes, output = run_tests(directory, mutant.tests)
    if any("error" in found or not found for found in outcomes.values()):
        word = "BROKEN: an error instead of a failed assertion"
    elif not all("assertion" in found for found in outcomes.values()):
        word = "SURVIVED: " + ", ".join(test for test, found in outcomes.items() if "assertion" not in found)
    else:
        word = "caught"
    return Verdict(mutant, word, time.perf_counter() - start, output)


def main(arguments: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS) -> int:
    """Try the mutants, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to try (default: all)")
    parser.add_argument("--quick", action="store_true", help="only mutants whose tests train no model")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried at once (default: 2)")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - {mutant.name for mutant in mutants}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in mutants if not options.names or mutant.name in options.names]
    chosen = [mutant for mutant in chosen if mutant.quick or not options.quick]
    for mutant in chosen:
        mutant.apply((ROOT / mutant.path).read_text(encoding="utf-8"))

    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_sources(Path(folder))
        outcomes, output = run_tests(Path(folder), sorted({test for mutant in chosen for test in mutant.tests}))
    if failing := [test for test, found in outcomes.items() if set(found) != {"passed"}]:
        print(output, "without a mutant these do not pass:", *failing, sep="\n")
        return 1
    print(f"{len(outcomes)} tests pass without a mutant")

    width = max(len(mutant.name) for mutant in chosen)
    survivors = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for verdict in pool.map(try_mutant, chosen):
            mutant = verdict.mutant
            print(f"{mutant.name:{width}}  {mutant.file:24}  {verdict.seconds:5.1f} s  {verdict.word}", flush=True)
            if verdict.word != "caught":
                survivors.append(verdict)
    for verdict in survivors:
        print(f"\n--- {verdict.mutant.name}: {verdict.word}\n{verdict.output}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
