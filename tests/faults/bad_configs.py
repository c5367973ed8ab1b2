"""Config files with one thing wrong each, and the place that the message must name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

SFT = "model_name_or_path: base\ndataset_name: world:verdicts\noutput_name: x\n"
RM = "model_name_or_path: base\ndataset_name: collected:pairs\noutput_name: x\n"
PPO = RM + "reward_model_path: reward\ntotal_episodes: 640\n"
DPO = RM
COMPARE = "arms: [a, b]\n"
COLLECT = "policy: base\nprompts: world:verdicts\njudge: world\nnum: 8\noutput_name: x\n"
EXPERIMENT = """\
name: trial
stages:
  first: {stage: sft, model_init: {model_type: llama}, tokenizer_init: world, dataset_name: world:verdicts}
  pairs: {stage: collect, policy: first, prompts: world:verdicts, judge: world, num: 8}
  last: {stage: dpo, model_name_or_path: first, dataset_name: pairs}
"""
COMMANDS = {
    "sft": (["sft", "--config"], SFT),
    "train-rm": (["train-rm", "--config"], RM),
    "ppo": (["ppo", "--config"], PPO),
    "dpo": (["dpo", "--config"], DPO),
    "compare": (["compare", "--config"], COMPARE),
    "collect": (["data", "collect", "--config"], COLLECT),
    "run": (["run"], EXPERIMENT),
}


@dataclass(frozen=True)
class BadConfig:
    """A bad config. content: its bytes. place: what stands behind the file's name. says: words in the same line."""

    name: str
    command: str
    content: bytes
    place: str
    says: tuple[str, ...] = ()
    overrides: tuple[str, ...] = field(default=())

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write it into a folder; returns the words of the command that reads it."""
        path = folder / "config.yaml"
        path.write_bytes(self.content)
        return (*COMMANDS[self.command][0], str(path), *self.overrides)

    def missing(self, folder: Path, said: str) -> str:
        """What is not said of it as it should be: no line with its place and the words, or far too much."""
        wanted = f"{folder / 'config.yaml'}{self.place}" if self.place else ""
        named = any(wanted in line and all(word in line for word in self.says) for line in said.splitlines())
        return "" if named and len(said) < 20_000 else f"{wanted} with {self.says} is not named: {said[-2000:]}"


def _line(name: str, command: str, text: str, *says: str) -> BadConfig:
    """A good config with lines behind it, of which the last is wrong; its key is named."""
    content = COMMANDS[command][1] + text
    key = text.splitlines()[-1].partition(":")[0]
    return BadConfig(name, command, content.encode(), f":{content.rstrip().count(chr(10)) + 1}: {key}", says)


def _whole(name: str, command: str, content: str | bytes, place: str, *says: str) -> BadConfig:
    return BadConfig(name, command, content.encode() if isinstance(content, str) else content, place, says)


def _with(name: str, command: str, override: str, *says: str) -> BadConfig:
    """A good config with a bad override."""
    return BadConfig(name, command, COMMANDS[command][1].encode(), "", (override, *says), (override,))


VALUES = [
    _line("misspelt key", "sft", "lerning_rate: 1e-4", "did you mean 'learning_rate'"),
    _line("key of another stage", "sft", "kl_coef: 0.1", "it is a key of ppo"),
    _line("key of nothing", "train-rm", "wings: 2", "train-rm has no such key"),
    _line("key that is not used", "dpo", "disable_dropout: true", "dropout is off"),
    _line("key of a later version", "dpo", "load_in_8bit: true", "not available yet"),
    _line("text for a number", "sft", "learning_rate: fast", "found 'fast'", "a number"),
    _line("list for a number", "dpo", "beta: [0.1]", "a number"),
    _line("mapping for a number", "dpo", "beta: {value: 0.1}", "a number"),
    _line("true for a number", "sft", "seed: true", "not true or false"),
    _line("number for text", "sft", "dataset_config: 7", "text"),
    _line("null for a number", "train-rm", "learning_rate: null", "no value"),
    _line("negative rate", "sft", "learning_rate: -1e-5", "> 0"),
    _line("rate of zero", "dpo", "learning_rate: 0", "> 0"),
    _line("NaN", "dpo", "beta: .nan", "finite"),
    _line("infinity", "ppo", "kl_coef: .inf", "finite"),
    _line("number beyond floats", "ppo", "vf_coef: 1e999", "finite"),
    _line("discount above 1", "ppo", "gamma: 1.5", "<= 1"),
    _line("negative clip", "ppo", "cliprange: -0.2", "> 0"),
    _line("half a batch", "sft", "per_device_train_batch_size: 0.5", "whole number"),
    _line("batch of none", "sft", "per_device_train_batch_size: 0", ">= 1"),
    _line("negative seed", "sft", "seed: -1", ">= 0"),
    _line("seed of 33 bits", "sft", "seed: 8589934592", "4.29497e+09"),
    _line("seed of 5000 digits", "sft", "seed: " + "9" * 5000, "cannot be read as int"),
    _line("no such schedule", "dpo", "lr_scheduler_type: liner", "did you mean 'linear'"),
    _line("no such loss", "dpo", "loss_type: sigmiod", "did you mean 'sigmoid'"),
    _line("no such dtype", "ppo", "dtype: float8", "float32"),
    _line("steps neither counted nor -1", "sft", "max_steps: -2", "-1"),
    _line("beta of momentum at 1", "sft", "adam_beta1: 1.0", "< 1"),
    _line("smoothing of a half", "dpo", "label_smoothing: 0.5"),
    _line("snapshot at step 0", "ppo", "snapshot_steps: [0, 4]", ">= 1"),
    _line("fractions that sum to 2", "sft", "split_fractions: {train: 1, test: 1}", "sum of 1"),
    _line("negative fraction", "sft", "split_fractions: {train: 1.5, test: -0.5}", ">= 0"),
    _line("fraction of a strange name", "sft", "split_fractions: {train: 1, ²: -1}", ">= 0"),
    _line("lengths that contradict", "sft", "response_length: 4\nmax_prompt_length: 4\nmax_length: 9", "is not"),
    _line("no token for the prompt", "dpo", "response_length: 4\nmax_length: 4", "leaves"),
    _line("warm-up longer than the run", "sft", "max_steps: 5\nwarmup_steps: 9", "at most max_steps"),
    _line("two sources", "sft", "datasets: [{dataset_name: world:verdicts}]", "one of the two"),
    _line("source of weight 0", "ppo", "datasets: [{dataset_name: a, weight: 0}]", "> 0"),
    _line("no such world", "compare", "prompts: world:nowhere", "'world:verdicts'"),
    _line("file that is not there", "compare", "prompts: nowhere.jsonl", "there is no 'nowhere.jsonl'"),
    _line("home of nobody", "compare", "prompts: ~nobody-of-this-name/rows.jsonl", "not a path"),
    _line("path too long", "compare", "prompts: ./" + "x" * 5000, "not a path"),
    _line("two models to start from", "sft", "model_init: {model_type: llama}", "one of the two"),
    _line("tokenizer without a model", "sft", "tokenizer_init: world", "model_init"),
    _line("engine of another stage", "ppo", "engine: trl"),
    _line("no such engine", "dpo", "engine: tlr", "native"),
    _line("reward twice", "ppo", "reward_functions: [{source: world}]", "reward_model_path"),
    _line("arm twice", "compare", "baseline: a", "is also an arm"),
    _line("split that chooses and shows", "compare", "validation_split: test", "another split"),
    _line("name of a device", "compare", "name: con", "Windows"),
    _line("name with a path", "compare", "name: ../up", "letters"),
    _line("one response a prompt", "collect", "k: 1", ">= 2"),
    _line("two names of one key", "ppo", "kl_coef: 0.1\nbeta: 0.1", "same key"),
    _line("key in an entry misspelt", "ppo", "datasets: [{dataset_nam: a}]", "dataset_name"),
]

TEXT = [
    _whole("key twice", "dpo", DPO + "beta: .1\nbeta: .2\n", ":5: beta", "given twice, first on line 4"),
    _whole("key twice inside", "sft", SFT + "split_fractions: {train: 1, train: 0}\n", ":4: split_fractions.train"),
    _whole("tab", "sft", SFT + "split_fractions:\n\ttrain: 1\n", ":5", "not YAML"),
    _whole("cut in a list", "dpo", DPO + "datasets: [{dataset_name: a},", ":4", "not YAML"),
    _whole("cut in a quote", "dpo", DPO + 'attn_implementation: "ea', ":4", "not YAML"),
    _whole("no space behind the colon", "dpo", "model_name_or_path:base\n", ":1", "lines of `key: value`"),
    _whole("a list", "ppo", "- a\n- b\n", ":1", "found a sequence"),
    _whole("one word", "train-rm", "hello\n", ":1", "found a scalar"),
    _whole("JSON of a list", "sft", "[1, 2]", ":1", "found a sequence"),
    _whole("two documents", "sft", SFT + "---\n" + SFT, ":4", "not YAML"),
    _whole("Latin-1", "sft", (SFT + "dataset_config: café\n").encode("latin-1"), ":4", "not UTF-8"),
    _whole("UTF-16", "sft", SFT.encode("utf-16"), ":1", "UTF-16"),
    _whole("NUL bytes", "sft", SFT.encode() + b"seed: \0\0\n", ":4", "does not allow"),
    _whole("control character", "sft", SFT + "seed: \x07\n", ":4", "does not allow"),
    _whole("binary", "ppo", bytes(range(256)), ":2", "not UTF-8"),
    _whole("object of Python", "sft", SFT + "seed: !!python/object/apply:os.getpid []\n", ":4: seed", "!!python"),
    _whole("tag of our own", "sft", SFT + "seed: !secret 3\n", ":4: seed", "!secret"),
    _whole("set", "sft", SFT + "datasets: !!set {a, b}\n", ":4: datasets", "!!set"),
    _whole("bytes", "sft", SFT + "dataset_config: !!binary YWJj\n", ":4: dataset_config", "!!binary"),
    _whole("tag that does not fit", "sft", SFT + "seed: !!int many\n", ":4: seed", "'many' cannot be read as int"),
    _whole("tag of true that does not fit", "sft", SFT + "bf16: !!bool maybe\n", ":4: bf16", "'maybe' cannot be read"),
    _whole("alias of nothing", "sft", SFT + "seed: *there\n", ":4", "not YAML"),
    _whole("alias of itself", "sft", SFT + "model_init: &a {model_type: *a}\n", ":4", "aliases expand"),
    _whole("alias bomb", "sft", "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")), ":", "aliases expand"),
    _whole("bomb of merges", "sft", "a: &a {}\n" + "".join(
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi")), ":",
        "aliases expand"),
    _whole("deep nesting", "sft", SFT + "model_init: " + "[" * 20_000, ":4", "nested too deeply"),
    _whole("deep nesting, closed", "sft", SFT + "model_init: " + "[" * 90 + "]" * 90, ":4", "more than 50 levels deep"),
    _whole("half a character", "sft", SFT + 'dataset_config: "\\ud800"\n', ":4: dataset_config", "surrogate"),
    _whole("key that is a number", "dpo", DPO + "3: 4\n", ":4", "'3' is not the name of a key"),
    _whole("key that is a list", "dpo", DPO + "? [a]\n: b\n", ":4", "a key that is a sequence"),
    _whole("line of 10 MB", "sft", SFT + "learning_rat: " + "x" * 10_000_000, ": more than", "a YAML file of a config"),
    _whole("empty", "dpo", "", ": model_name_or_path", "missing"),
    _whole("nothing but comments", "ppo", "# beta: 1\n", ": dataset_name", "missing"),
    _whole("model without a tokenizer", "sft", "model_init: {model_type: llama}\ndataset_name: world:verdicts\n"
        "output_name: x\n", ": tokenizer_init", "missing"),
    _whole("no arms", "compare", "arms: []\n", ":1: arms", "at least one"),
    _whole("one arm", "compare", "arms: [a]\n", ":1: arms", "is the only model"),
    _whole("same arm twice", "compare", "arms: [a, a, b]\n", ":1: arms.1", "named twice"),
]  # fmt: skip

EXPERIMENTS = [
    _whole("experiment without stages", "run", "name: trial\n", ": stages", "missing"),
    _whole("experiment with no stage", "run", "name: trial\nstages: {}\n", ":2: stages", "found none"),
    _whole("stages that are a list", "run", "name: trial\nstages: [sft]\n", ":2: stages", "a mapping"),
    _whole("stage of no kind", "run", EXPERIMENT + "  more: {config: a.yaml}\n", ":6: stages.more.stage", "missing"),
    _whole("stage of an unknown kind", "run", EXPERIMENT.replace("stage: dpo", "stage: dbo"), ":5: stages.last.stage"),
    _whole("stage's config not there", "run", EXPERIMENT + "  more: {stage: dpo, config: no.yaml}\n",
        ":6: stages.more.config", "there is no such file"),
    _whole("later stage named", "run", EXPERIMENT.replace("policy: first", "policy: last"), ":4: stages.pairs.policy",
        "a later stage"),
    _whole("stage of the wrong kind named", "run", EXPERIMENT.replace("dataset_name: pairs", "dataset_name: first"),
        ":5: stages.last.dataset_name", "does not make data"),
    _whole("unknown model named", "run", EXPERIMENT.replace("model_name_or_path: first", "model_name_or_path: frist"),
        ":5: stages.last.model_name_or_path", "did you mean 'first'"),
    _whole("unknown key of a stage", "run", EXPERIMENT.replace("dataset_name: pairs", "dataset_name: pairs, bta: 1"),
        ":5: stages.last.bta", "did you mean 'beta'"),
    _whole("seed twice", "run", EXPERIMENT + "seeds: [1, 1]\n", ":6: seeds.1", "given twice"),
    _whole("seeds that are text", "run", EXPERIMENT + "seeds: [one]\n", ":6: seeds.0", "whole number"),
    _whole("sweep of nothing", "run", EXPERIMENT + "sweep: {last.beta: []}\n", ":6: sweep", "last.beta"),
    _whole("sweep of an unknown stage", "run", EXPERIMENT + "sweep: {lost.beta: [1, 2]}\n", ":6: sweep"),
    _whole("sweep of one value twice", "run", EXPERIMENT + "sweep: {last.beta: [1, 1.0]}\n", ":6: sweep"),
    _whole("comparison of unknown arms", "run", EXPERIMENT + "compare: {arms: [lost, last]}\n", ":6: compare.arms.0"),
    _whole("experiment of one key", "run", "nam: trial\nstages: {a: {stage: sft}}\n", ":1: nam", "did you mean 'name'"),
    _whole("experiment that is a directory's name", "run", "name: ../up\n" + EXPERIMENT.partition("\n")[2], ":1: name"),
]  # fmt: skip

OVERRIDES = [
    _with("override without a value", "dpo", "beta", "not an override"),
    _with("override of nothing", "dpo", "=3", "not an override"),
    _with("override that is no YAML", "dpo", "beta=[1", "not YAML"),
    _with("override out of range", "ppo", "gamma=2", "<= 1"),
    _with("override with a strange digit", "dpo", "split_fractions.²=1", "a sum of 1"),
    _with("override of an unknown stage", "run", "lost.beta=1", "has no 'lost'"),
    _with("override with a tag", "sft", "seed=!!set {a}", "!!set"),
    _with("override nested too deeply", "sft", "seed=" + "[" * 5000, "nested too deeply"),
]

BAD = [*VALUES, *TEXT, *EXPERIMENTS, *OVERRIDES]
