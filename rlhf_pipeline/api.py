"""The Python API: one function for each command that makes something, and `load`.

Each function takes a config as a dict or as the path of a YAML file, and keyword overrides of its keys. It raises the
errors of `rlhf_pipeline.errors` and returns the object that the command prints with --json. Nothing heavy is imported
before a function is called.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rlhf_pipeline.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_pipeline.config.base import CommandConfig
    from rlhf_pipeline.registry.manifest import Manifest
    from rlhf_pipeline.registry.store import Registry
    from rlhf_pipeline.report.results import Results

Config = Mapping[str, Any] | str | os.PathLike[str] | None
Home = str | os.PathLike[str] | None

HOME_VARIABLE = "RLHF_HOME"
DEFAULT_HOME = "rlhf_home"


def home_directory(home: Home = None) -> Path:
    """Return the home directory: `home`, else $RLHF_HOME, else ./rlhf_home.

    Raises:
        BadInput: it is a file, or its path has control characters.
    """
    found = Path(home or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)
    if any(ord(char) < 32 or ord(char) == 127 for char in str(found)):
        raise BadInput(f"--home {str(found)!r}: expected a path without control characters")
    if found.exists() and not found.is_dir():
        raise BadInput(f"--home {found}: found a file, expected a directory (or a path where one can be made)")
    return found


def printable(value: Any) -> Any:
    """Return a value as JSON prints it: parts of results.json keep their form, NaN and infinities become None."""
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {str(key): printable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [printable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_models(config: CommandConfig, registry: Registry) -> None:
    """Check the models that a config names in the same way as its stage, before the libraries are imported.

    Raises:
        UnknownReference, MismatchError, DamagedFile.
    """
    from rlhf_pipeline.config.mentions import mentions
    from rlhf_pipeline.registry.roles import check_role

    for mention in mentions(config):
        if mention.role != "data":
            check_role(registry.resolve(mention.text), "policy" if mention.role == "policy" else "reward_model")


def _train(stage: str, config: Config, home: Home, resume: bool, quiet: bool, overrides: Mapping[str, Any]) -> Any:
    """Run a training stage; return what its command prints."""
    from rlhf_pipeline.config.load import load_config
    from rlhf_pipeline.registry.store import Registry

    loaded, place = load_config(stage, config, extra=overrides), home_directory(home)
    check_models(loaded.config, Registry(place))
    from rlhf_pipeline.experiment.functions import stage_function

    result = stage_function(stage)(loaded.config, place, resume=resume, quiet=quiet, notes=loaded.notes)
    return result.as_dict()


def sft(
    config: Config = None, /, *, home: Home = None, resume: bool = True, quiet: bool = False, **overrides: Any
) -> dict[str, Any]:
    """Fine-tune a language model on demonstrations, as `rlhf sft` does, and register it.

    Args:
        config: keys and values, or the path of a YAML file. overrides: more keys; they win over `config`.
        home: the home directory; by default $RLHF_HOME, else ./rlhf_home.
        resume: whether to resume an unfinished run of the same config. quiet: print no progress.

    Returns:
        {"stage", "model", "path", "run", "metrics", "cost"}.

    Raises:
        BadInput: a fault of config, data or models. RunFailed: the run failed. Interrupted: a signal stopped it.
    """
    return _train("sft", config, home, resume, quiet, overrides)


def train_rm(
    config: Config = None, /, *, home: Home = None, resume: bool = True, quiet: bool = False, **overrides: Any
) -> dict[str, Any]:
    """Train a reward model on preference pairs, as `rlhf train-rm` does; see `sft`."""
    return _train("train-rm", config, home, resume, quiet, overrides)


def ppo(
    config: Config = None, /, *, home: Home = None, resume: bool = True, quiet: bool = False, **overrides: Any
) -> dict[str, Any]:
    """Train a policy by PPO, as `rlhf ppo` does; see `sft`."""
    return _train("ppo", config, home, resume, quiet, overrides)


def dpo(
    config: Config = None, /, *, home: Home = None, resume: bool = True, quiet: bool = False, **overrides: Any
) -> dict[str, Any]:
    """Train a policy by DPO, as `rlhf dpo` does; see `sft`."""
    return _train("dpo", config, home, resume, quiet, overrides)


def collect(config: Config = None, /, *, home: Home = None, quiet: bool = False, **overrides: Any) -> dict[str, Any]:
    """Sample and label responses of a policy, as `rlhf data collect` does, and publish the pairs; see `sft`."""
    from rlhf_pipeline.config.collect import CollectConfig
    from rlhf_pipeline.config.load import load_config

    loaded, place = load_config("collect", config, extra=overrides), home_directory(home)
    from rlhf_pipeline.labelling.people import collect as collect_data

    return collect_data(loaded.of(CollectConfig), place, notes=loaded.notes, quiet=quiet).as_dict()


def compare(
    config: Config = None, /, *, home: Home = None, quiet: bool = False, jobs: int = 1, **overrides: Any
) -> dict[str, Any]:
    """Compare policies (`arms`), as `rlhf compare` does, and write the report; see `sft`.

    Args:
        jobs: the number of processes that measure.

    Returns:
        the content of results.json; `load(path of results.json)` gives the same as typed objects.
    """
    from rlhf_pipeline.config.compare import CompareConfig
    from rlhf_pipeline.config.load import load_config

    loaded, place = load_config("compare", config, extra=overrides), home_directory(home)
    from rlhf_pipeline.experiment.helpers import helped

    checked = loaded.of(CompareConfig)
    with helped(checked, place, jobs):
        from rlhf_pipeline.compare.run import run_compare

        return printable(run_compare(checked, place, quiet=quiet))


def run(
    experiment: Mapping[str, Any] | str | os.PathLike[str],
    /,
    *,
    home: Home = None,
    resume: bool = True,
    quiet: bool = False,
    jobs: int = 1,
    executor: Literal["local", "ray"] = "local",
    **overrides: Any,
) -> dict[str, Any]:
    """Run the unfinished stages of an experiment and compare, as `rlhf run` does; see `sft`.

    Args:
        experiment: the experiment's YAML file, or its content. In the content, configs of stages are relative to the
            working directory.
        jobs: the number of processes that run stages and measure for the comparison; 1: all in this process.
        executor: local, or ray: each stage runs on a node of a Ray cluster.
        overrides: keys of the experiment, or of a stage: `**{"dpo.beta": 0.3}`.
    """
    words = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    from rlhf_pipeline.experiment.run import run_experiment

    source = experiment if isinstance(experiment, Mapping) else Path(experiment)
    options: dict[str, Any] = {"resume": resume, "quiet": quiet, "jobs": jobs, "executor": executor}
    return printable(run_experiment(source, words, home_directory(home), **options))


class LoadedModel(NamedTuple):
    """A model with its tokenizer, as transformers has them, and its manifest if it is registered."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest | None


def load(
    reference: str | os.PathLike[str],
    /,
    *,
    home: Home = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> LoadedModel | Results:
    """Load a model for use with transformers, or the results of a comparison as typed objects.

    An adapter is added to the weights of its base.

    Args:
        reference: name, name@vN, name@alias, directory or hub id of a model; or a results.json, or its folder.
        dtype, device: of the model. trust_remote_code: run code from the model's repository.

    Returns:
        `LoadedModel` (model, tokenizer, manifest), in evaluation mode; or `rlhf_pipeline.report.Results`.

    Raises:
        UnknownReference, MismatchError, DamagedFile.
    """
    path = Path(reference)
    results = path / "results.json" if path.is_dir() else path
    if results.name.endswith(".json") and results.is_file():
        from rlhf_pipeline.report import load as load_results

        return load_results(results)
    from rlhf_pipeline.registry.integrity import verify_files
    from rlhf_pipeline.registry.roles import role_of
    from rlhf_pipeline.registry.store import Registry

    resolved = Registry(home_directory(home)).resolve(os.fspath(reference))
    verify_files(resolved)
    role, _ = role_of(resolved)
    import torch

    from rlhf_pipeline.models.adapted import load_adapted
    from rlhf_pipeline.models.loading import load_causal_lm, load_sequence_classifier
    from rlhf_pipeline.stages.common import onto, tokenizer_of

    loader: Any = load_sequence_classifier if role == "reward_model" else load_causal_lm
    model = load_adapted(loader, resolved, dtype=dtype, merged=True, trust_remote_code=trust_remote_code)
    return LoadedModel(
        onto(torch.device(device), model).eval(), tokenizer_of(resolved, trust_remote_code), resolved.manifest
    )
