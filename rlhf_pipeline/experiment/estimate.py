"""Describe what a run would do, without training: `--dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.config.grid import Node, StageSpec, expand
from rlhf_pipeline.config.mentions import functions
from rlhf_pipeline.config.ppo import WARMUP_OFFSET
from rlhf_pipeline.config.reward import RewardConfig
from rlhf_pipeline.config.reward_names import load_function
from rlhf_pipeline.config.rewards import LlmJudge
from rlhf_pipeline.config.stages import CollectConfig, PpoConfig, SftConfig, StageConfig, TrainingConfig
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.experiment.forecast import Forecast, about, forecast_comparison, forecast_run, shares, total_of
from rlhf_pipeline.experiment.outlook import Outlook
from rlhf_pipeline.experiment.progress import makespan
from rlhf_pipeline.experiment.run import checked, is_compared
from rlhf_pipeline.experiment.weights import bytes_in_4_bits, new_parameters, parameters_of, training_memory
from rlhf_pipeline.experiment.work import of_processes
from rlhf_pipeline.experiment.workers import threads_each
from rlhf_pipeline.models.needs import remarks_on, require_needs
from rlhf_pipeline.registry.adapters import chain_of, require_same_base
from rlhf_pipeline.registry.lengths import with_lengths
from rlhf_pipeline.registry.parents import parents_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import check_role
from rlhf_pipeline.registry.store import Registry, folder_for_copy
from rlhf_pipeline.rollout.llm import ChatModel
from rlhf_pipeline.stages.common import packed_rows, tokenizer_of
from rlhf_pipeline.stages.data import prompts_by_split
from rlhf_pipeline.stages.reward_sources import check_reward_models
from rlhf_pipeline.training.optimizer import require_schedule
from rlhf_pipeline.training.windows import total_steps

COMPARISON = "compare"
"""The name of the comparison among the estimates of an experiment; no stage has it."""


def llm_judges(config: StageConfig) -> list[LlmJudge]:
    """The language models that a stage asks."""
    if isinstance(config, CollectConfig):
        return [config.llm_judge] if config.llm_judge is not None else []
    rewards = config.rewards if isinstance(config, PpoConfig) else ()
    return [part.llm_judge for part in rewards if part.llm_judge is not None]


def _check_reward_models(config: StageConfig, parents: Mapping[str, Resolved]) -> None:
    """Check reward models that may read other tokens than the policy; those with its tokenizer's digest do not."""
    policy = parents.get("policy", parents.get("base"))
    rewards = {role: model for role, model in parents.items() if role.startswith(("reward_model", "judge"))}
    if policy is None or not isinstance(config, PpoConfig | CollectConfig):
        return
    ours = policy.manifest.tokenizer_digest if policy.manifest is not None else None
    known = [model.manifest.tokenizer_digest if model.manifest is not None else None for model in rewards.values()]
    changed = config.eos_token is not None  # a policy whose tokenizer is no longer that of its manifest
    if changed or any(digest is None or digest != ours for digest in known):
        check_reward_models(config, policy, rewards)


def estimate_stage(config: StageConfig, home: Path, *, processes: int = 1) -> dict[str, Any]:
    """Resolve the models, read the data and count updates, parameters and memory.

    Args:
        processes: how many train together.

    Raises:
        BadInput: anything that the run itself would refuse before training.
    """
    registry = Registry(home)
    config, _ = with_lengths(config, registry)
    config = of_processes(config, processes)
    result: dict[str, Any] = {"stage": config.stage, "output_name": config.output_name}
    named, parents = config.parents(), parents_of(registry, config)
    for role, parent in parents.items():
        check_role(parent, named[role].role)
        if role != "reference" or named[role] != named["base"]:
            result["model" if role == "base" else role] = parent.label
    _check_models(config, parents, home)
    said = remarks_on(parents["base"]) if "base" in parents else []
    node = Node(StageSpec(config.output_name, config.stage, config), None, {}, {})
    outlook = Outlook([node], [None], registry, said.append)
    if isinstance(config, CollectConfig):
        result |= _collect_counts(config, parents["policy"], home)
    else:
        result |= _training_counts(config, outlook, node, parents, processes if config.fsdp else 1) | {"data": said}
    return result | _work_of(outlook, node)


def _check_models(config: StageConfig, parents: Mapping[str, Resolved], home: Path) -> None:
    """Check what a stage loads: its models, reward functions and language models.

    Raises:
        BadInput: what the run itself would refuse.
    """
    require_needs(config, parents)
    if isinstance(config, PpoConfig) and config.shared_base:
        for role in config.parents():
            if role.startswith("reward_model"):
                require_same_base(parents["base"], parents[role], FourBits.of(config))
    for source in functions(config):
        load_function(source)
    for judge in llm_judges(config):
        ChatModel.of(judge, home)
    _check_reward_models(config, parents)


def _collect_counts(config: CollectConfig, policy: Resolved, home: Path) -> dict[str, Any]:
    """The entries of the dry run of `collect` on its prompts."""
    (data,) = config.sources()
    found = read_records(*data, home=home, skip_bad_rows=config.skip_bad_rows, splits=config.splits)
    tokenizer = tokenizer_of(policy, config.trust_remote_code, config)
    prompts, reports = prompts_by_split(found, config, tokenizer, Style.of(policy.config))
    notes = found.notes(functions=any(functions(config)))
    lines = [report.summary() for report in reports] + notes
    return {"prompts": len(prompts), "records": config.num, "responses_each": config.k, "data": lines}


def _training_counts(
    config: TrainingConfig, outlook: Outlook, node: Node, parents: Mapping[str, Resolved], parts: int
) -> dict[str, Any]:
    """The entries of a training stage's dry run on its rows, its steps and its memory in one of `parts` processes."""
    if config.output_dir is not None:
        folder_for_copy(config.output_dir, config.output_name)
    examples = outlook.training(node)
    counted = "prompts" if config.reads_prompts else "rows"
    result: dict[str, Any] = {counted: len(examples), "lengths": vars(config.lengths())}
    if isinstance(config, PpoConfig):
        if stream := outlook.stream(node):
            result["stream_examples"] = len(stream)
        require_schedule(config, config.updates, offset=WARMUP_OFFSET)
        result |= {
            "updates": config.updates,
            "episodes": config.updates * config.rollout_batch_size,
            "optimizer_steps": config.updates * config.num_ppo_epochs * config.num_mini_batches,
        }
    else:
        size = config.per_device_train_batch_size * (config.gradient_accumulation_steps or 1)
        rows = packed_rows(config, examples)
        count = len(examples if rows is None else rows)
        result["optimizer_steps"] = total_steps(count, size, config.num_train_epochs, config.max_steps)
        require_schedule(config, result["optimizer_steps"])
    if isinstance(config, RewardConfig) and config.reward_centering == "reference_samples":
        count = config.reward_centering_samples
        result["reward_centering"] = {"responses": count, "tokens_at_most": count * config.sampled_lengths().response}
    if "base" in parents:
        parameters = parameters_of(chain_of(parents["base"])[0])
    else:
        parameters = new_parameters(config) if isinstance(config, SftConfig) else None
    if parameters is not None:
        result["parameters"] = parameters
        adapter = None
        if config.use_peft:
            adapter = result["trained_parameters"] = outlook.models(node).trained
        memory = training_memory(parameters, adapter, config, bytes_in_4_bits(config, parents), parts)
        result["memory_mib_without_activations"] = round(memory / 2**20, 1)
    return result


def _work_of(outlook: Outlook, node: Node) -> dict[str, Any]:
    """The entries of a stage's dry run on its amounts of work and its time."""
    found = forecast_run(outlook, node)
    figures = {name: value for name, value in found.figures.items() if name not in ("rows", "prompts", "records")}
    result: dict[str, Any] = {"estimate": figures, "about": list(found.notes)}
    if found.speed is not None:
        result["machine"] = found.speed.as_dict()
        result["about"] = [f"{about(figures['seconds'], found.speed)} ({shares(figures)})", *found.notes]
    return result


def estimate_experiment(
    path: Path, overrides: Sequence[str], home: Path, *, jobs: int = 1, processes: int = 1
) -> dict[str, Any]:
    """Check an experiment as `rlhf run` does; report which of its runs are done and what the others will take.

    A run that depends on an unfinished run cannot be looked up: its inputs do not exist yet.

    Args:
        jobs: the number of runs at a time; each is estimated with its share of the threads. processes: how many train
            each model together.
    """
    registry = Registry(home)
    experiment = load_experiment(path, overrides, known_models=registry.models.names())
    nodes = expand(experiment)
    done = checked(experiment, nodes, registry)
    states = ["to run" if found is None else f"already done, {found.label}" for found in done]
    finished = sum(found is not None for found in done)
    if jobs > 1:
        nodes = tuple(_with_threads(node, threads_each(jobs)) for node in nodes)
    outlook = Outlook(nodes, done, registry)
    waiting = [node for node, ready in zip(nodes, done, strict=True) if ready is None]
    found = {node.label: forecast_run(outlook, _shared(node, processes)) for node in waiting}
    if experiment.compare is not None and (finished < len(nodes) or not is_compared(experiment, nodes, done, registry)):
        found[COMPARISON] = forecast_comparison(outlook, experiment.compare)
    unknown = [name for name, one in found.items() if one.seconds is None]
    told: dict[str, list[str]] = {}
    for name, one in found.items():
        for text in one.notes:
            told.setdefault(text, []).append(name)
    lines = [f"{', '.join(names)}: {text}" for text, names in told.items()]
    result: dict[str, Any] = {
        "experiment": experiment.name,
        "runs": len(nodes),
        "done": finished,
        "to_run": len(nodes) - finished,
        "stages": {node.label: f"{node.spec.stage}: {state}" for node, state in zip(nodes, states, strict=True)},
        "estimates": {name: one.figures for name, one in found.items()},
        "total": total_of(list(found.values())),
        "not_estimated": unknown,
        "notes": list(experiment.notes),
    }
    speed = next((one.speed for one in found.values() if one.speed is not None), None)
    if speed is not None:
        result["machine"] = speed.as_dict()
        left = f"; without {', '.join(unknown)}" if unknown else ""
        if jobs == 1:
            seconds, what = result["total"]["seconds"], "whole experiment"
        else:
            seconds, what = _seconds_at_once(nodes, found, jobs), f"whole experiment, {jobs} runs at a time"
            result["at_once"] = {"jobs": jobs, "seconds": seconds}
        lines.insert(0, f"{what}: {about(seconds, speed)}{left}")
    return result | {"about": lines}


def _with_threads(node: Node, threads: int | None) -> Node:
    """The node with this number of threads, unless its config sets one."""
    config = node.spec.config
    if config.num_threads or threads is None:
        return node
    return replace(node, spec=replace(node.spec, config=config.model_copy(update={"num_threads": threads})))


def _seconds_at_once(nodes: Sequence[Node], found: Mapping[str, Forecast], jobs: int) -> float:
    """The time of an experiment's unfinished runs with up to `jobs` at a time, and of its comparison after them, whose
    models `jobs` processes measure."""
    left = [place for place, node in enumerate(nodes) if node.label in found]
    seconds = [found[nodes[place].label].seconds or 0.0 for place in left]
    inputs = [{left.index(one) for one in nodes[place].inputs.values() if one in left} for place in left]
    after = found[COMPARISON].seconds if COMPARISON in found else None
    return makespan(seconds, inputs, jobs) + (after or 0.0) / jobs


def _shared(node: Node, processes: int) -> Node:
    return replace(node, spec=replace(node.spec, config=of_processes(node.spec.config, processes)))


def time_of_experiment(path: Path, home: Path) -> float | None:
    """The estimated seconds of an experiment; None if those of a part are not known.

    Raises:
        BadInput: what the dry run refuses.
    """
    plan = estimate_experiment(path, (), home)
    return None if plan["not_estimated"] else plan["total"]["seconds"]
