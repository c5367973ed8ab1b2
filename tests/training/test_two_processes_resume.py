"""1, 2 and 4 processes (DDP over gloo): the same losses with LoRA and in PPO, and each resumes what another began."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Lab
from tests.once import once
from tests.two_processes import in_processes, run_of, run_stages, same

pytestmark = [pytest.mark.slow, pytest.mark.check]

SETTINGS = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "max_grad_norm": 1.0, "max_steps": 5, "max_train_samples": 18}
LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q_proj", "v_proj"]}
ADAPTED = ("sft", "train-rm", "dpo")
# A step has four examples: how many on each of so many processes.
EACH = {1: 4, 2: 2, 4: 1}
PPO = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "num_ppo_epochs": 1, "num_mini_batches": 1}
WHOLE = {"train-rm": SETTINGS, "dpo": {**SETTINGS, **LORA}, "ppo": {**PPO, "max_steps": 5}}

WORKER = """
import json, os, random, signal, sys
from dataclasses import replace
from pathlib import Path
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import Interrupted
from rlhf_pipeline.experiment.functions import stage_function
from rlhf_pipeline.training import ppo_rollouts, session

def given(setup, module, update):
    # Responses of 1 to 4 tokens that are a function of the prompt; the shorter ones end.
    examples = []
    for prompt in ppo_rollouts.prompts_of(setup, update):
        draw = random.Random(str(prompt.prompt_ids))
        ids = [draw.randrange(5, 25) for _ in range(draw.randint(1, 4))]
        if ended := len(ids) < 4:
            ids[-1] = next(iter(setup.stop_ids))
        examples.append(replace(prompt, completions=[ids], ended=[ended]))
    return ppo_rollouts.Sampled(examples), None

ppo_rollouts._sample = given
home, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
fit = session.fit

def stopping(at):
    def wrapped(*args, on_update, **options):
        def hook(step, metrics, window):
            if step == at and os.environ.get("RANK", "0") == "0":
                os.kill(os.getpid(), signal.SIGTERM)
            on_update(step, metrics, window)
        return fit(*args, on_update=hook, **options)
    return wrapped

for stage, values, stop_at in runs:
    session.fit = stopping(stop_at)
    try:
        stage_function(stage)(load_config(stage, None, extra=values).config, home, quiet=True)
    except Interrupted:
        assert stop_at
    else:
        assert not stop_at
"""


def run_in(lab, count: int, runs: list) -> None:
    """Run (stage, config, step at which the first process gets a signal or 0) one after another in `count` ranks."""
    run_stages(lab, count, WORKER, runs)


@pytest.fixture(scope="module")
def several(tiny, tmp_path_factory):
    """A home with the runs of one, two and four processes, and those that one number began and another resumed."""

    def make(folder: Path) -> Lab:
        lab = tiny.copy(folder / "home")

        def adapted(count: int) -> list:
            changes = {**SETTINGS, **LORA, "per_device_train_batch_size": EACH[count]}
            return [(stage, lab.config(stage, output_name=f"{stage}-lora-{count}", **changes), 0) for stage in ADAPTED]

        def ppo(count: int) -> tuple:
            changes = {**PPO, "max_steps": 1, "per_device_train_batch_size": 16 // count}
            return "ppo", lab.config("ppo", **changes, output_name=f"given-{count}"), 0

        def cut(stage: str, first: int, then: int, stop_at: int = 0) -> tuple:
            changes = {**WHOLE[stage], "per_device_train_batch_size": EACH[first]}
            return stage, lab.config(stage, **changes, output_name=f"{stage}-{first}-{then}"), stop_at

        run_in(lab, 1, [*adapted(1), ppo(1), *(cut(s, 1, then, 2 * (then > 1)) for s in WHOLE for then in EACH)])
        run_in(lab, 2, [*adapted(2), ppo(2), *(cut(s, 2, then, 2 * (then != 2)) for s in WHOLE for then in EACH)])
        run_in(lab, 2, [cut(stage, 1, 2) for stage in WHOLE])
        run_in(lab, 4, [cut(stage, first, 4) for stage in WHOLE for first in (1, 2)])
        run_in(lab, 1, [cut(stage, 2, 1) for stage in WHOLE])
        return lab

    return once(tmp_path_factory, "several", make)


@pytest.mark.parametrize("stage", ADAPTED)
def test_adapters_have_the_same_losses(several, stage):
    same(several, f"{stage}-lora-2", f"{stage}-lora-1")
    rows = several.rows(run_of(several, f"{stage}-lora-1"))
    name = next(key for key in rows[0] if key.startswith("loss/"))
    assert abs(rows[0][name] - rows[-1][name]) > 1e-3


def test_ppo_takes_the_same_first_update_given_the_same_rollouts(several):
    same(several, "given-2", "given-1")
    found, start = several.weights("given-2"), several.weights("sft")
    assert max(float((found[name] - start[name]).abs().max()) for name in start if name in found) > 1e-3
    (row,) = several.rows(run_of(several, "given-2"))
    assert row["episodes"] == 16


@pytest.mark.parametrize("stage", list(WHOLE))
@pytest.mark.parametrize(("first", "then"), [(1, 2), (1, 4), (2, 1), (2, 4)])
def test_what_one_number_of_processes_began_another_resumes(several, stage, first, then):
    same(several, f"{stage}-{first}-{then}", f"{stage}-{first}-{first}")
    log = (run_of(several, f"{stage}-{first}-{then}") / "log.txt").read_text()
    assert f"resumed at step 2 of 5; it began in {first} processes" in log
    manifest = several.registry.resolve(f"{stage}-{first}-{then}").manifest
    whole = several.registry.resolve(f"{stage}-{first}-{first}").manifest
    assert manifest.metrics.get("processes", 1) == first
    assert manifest.cost["optimizer_steps"] == whole.cost["optimizer_steps"] == 5


STOPPED = """
import json, os, signal, sys
from pathlib import Path
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import Interrupted
from rlhf_pipeline.experiment.functions import stage_function
from rlhf_pipeline.training import session

make = session.optimizer_of
session.optimizer_of = lambda *given: (os.kill(os.getpid(), signal.SIGTERM), make(*given))[1]
try:
    stage_function("dpo")(load_config("dpo", None, extra=json.loads(sys.argv[2])).config, Path(sys.argv[1]), quiet=True)
except Interrupted as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_signal_before_the_first_update_ends_all_at_once(tiny, tmp_path):
    lab = tiny.copy(tmp_path / "home")
    values = json.dumps(lab.config("dpo", output_name="stopped").model_dump(mode="json"))
    codes, outputs = in_processes(2, STOPPED, str(lab.home), values)
    assert codes == [143, 143], "\n".join(outputs)
    assert all("stopped by signal 15 before an update" in output for output in outputs)
    assert not (run_of(lab, "stopped") / "checkpoints").exists()
