"""Groups of responses in two processes: each group lives in one, and both take the step of a single process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Lab
from tests.once import once
from tests.two_processes import run_of, run_stages, same

pytestmark = [pytest.mark.slow, pytest.mark.check]

ONE_WINDOW = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "num_ppo_epochs": 1, "num_mini_batches": 1, "max_steps": 1}
RUNS = {
    "rloo": {"algorithm": "rloo", "whiten_advantages": True},
    "normalised": {"algorithm": "rloo", "normalize_rewards": True, "reward_scale": 2.0},
    "ptx": {"ptx_coef": 0.5, "ptx_dataset": "world:verdicts", "ptx_batch_size": 13},
    "grpo": {"algorithm": "grpo", "kl_in": "loss", "scale_rewards": "group", "loss_normalization": "responses"},
}

WORKER = """
import json, random, sys
from dataclasses import replace
from pathlib import Path
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.experiment.functions import stage_function
from rlhf_pipeline.training import ppo_rollouts

def given(setup, module, update):
    # Responses of 1 to 4 tokens that are a function of the prompt and of their number; the shorter ones end.
    examples = []
    for prompt in ppo_rollouts.prompts_of(setup, update):
        for number in range(setup.config.num_generations):
            draw = random.Random(f"{prompt.prompt_ids} {number}")
            ids = [draw.randrange(5, 25) for _ in range(draw.randint(1, 4))]
            if ended := len(ids) < 4:
                ids[-1] = next(iter(setup.stop_ids))
            examples.append(replace(prompt, completions=[ids], ended=[ended]))
    return ppo_rollouts.Sampled(examples), None

ppo_rollouts._sample = given
home, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
for stage, values in runs:
    stage_function(stage)(load_config(stage, None, extra=values).config, home, quiet=True)
"""


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """A home with each run in one process, in two, and in two that divide the weights."""

    def make(folder: Path) -> Lab:
        lab = tiny.copy(folder / "home")

        def config(name: str, how: str, count: int, **more):
            size = {"num_generations": 4, "per_device_train_batch_size": 8 // count}
            return "ppo", lab.config("ppo", output_name=f"{name}-{how}", **size, **RUNS[name], **ONE_WINDOW, **more)

        run_stages(lab, 1, WORKER, [config(name, "1", 1) for name in RUNS])
        two = [config(name, "2", 2) for name in RUNS]
        run_stages(lab, 2, WORKER, [*two, *(config(name, "divided", 2, fsdp=True) for name in RUNS)])
        return lab

    return once(tmp_path_factory, "groups", make)


@pytest.mark.parametrize("how", ["2", "divided"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_take_the_step_of_one(both, name, how):
    same(both, f"{name}-{how}", f"{name}-1", within=2e-5)
    found, start = both.weights(f"{name}-{how}"), both.weights("sft")
    assert max(float((found[key] - start[key]).abs().max()) for key in start) > 1e-3
    (row,) = both.rows(run_of(both, f"{name}-{how}"))
    assert row["episodes"] == 16 and row["objective/scores_std"] > 0
