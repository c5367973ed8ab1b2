"""`rlhf doctor`: whether this machine and its packages can run the other commands."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from rlhf_pipeline.cli.options import Common
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_table
from rlhf_pipeline.data.processes import machine_memory, usable_cores

GIB = 2**30
LEAST_DISK, LEAST_MEMORY = 1.0, 2.0  # GiB: less is a warning
OPTIONAL = {
    "peft": "LoRA, DoRA and QLoRA adapters (use_peft)",
    "bitsandbytes": "8-bit and paged optimizers (optim: adamw_8bit), 4-bit weights (load_in_4bit)",
    "vllm": "PPO's sampling by vLLM (rollout_engine: vllm)",
    "flash_attn": "attn_implementation: flash_attention_2",
    "gguf": "GGUF weights, make real",
    "tensorboard": "report_to: tensorboard",
    "wandb": "report_to: wandb",
    "trackio": "report_to: trackio",
    "mlflow": "report_to: mlflow",
}
"""Packages that only some keys need, and what for."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: a fault stops commands, a warning is about speed, memory or some keys."""

    name: str
    state: Literal["ok", "not installed", "warning", "fault"]
    found: str
    fix: str = ""


def doctor(common: Common) -> None:
    """Check versions, devices, memory, disk and optional packages; exit 1 if something will not work."""
    findings = [*_packages(), *_machine(), *_torch(), *_home(common.home_path), *_optional(), *_combinations()]
    faults = [finding for finding in findings if finding.state == "fault"]
    if common.json:
        emit_json({"ok": not faults, "checks": [asdict(finding) for finding in findings]})
    else:
        rows = [(finding.name, finding.state, finding.found) for finding in findings]
        emit_table("rlhf doctor", ("what", "state", "found"), rows, folds=("found",))
        emit_lines([f"{one.state}: {one.name}: {one.found}; {one.fix}" for one in findings if one.fix])
        counted = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}: see above"
        emit_lines([counted if faults else "all commands can run"])
    if faults:
        raise typer.Exit(1)


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_older(version: str, least: str) -> bool:
    """Whether a version is older than another one, by its numbers: 5.9 is older than 5.20, 2.13.0+cpu is not 2.14."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3]]

    return numbers(version) < numbers(least)


def _packages() -> Iterator[Check]:
    """Python, this package, and the packages that it requires."""
    ours = version_of("rlhf-pipeline")
    yield Check("python", "ok", platform.python_version())
    yield Check("rlhf-pipeline", "ok", ours or "not installed by pip: run from its folder")
    for line in importlib.metadata.requires("rlhf-pipeline") or [] if ours else []:
        name, least = re.match(r"([A-Za-z0-9._-]+)(?:>=([0-9.]+))?", line).groups()  # type: ignore[union-attr]
        if "extra ==" in line:
            continue
        found = version_of(name)
        if found is None:
            yield Check(name, "fault", "not installed", f"pip install '{name}>={least}'")
        elif least and is_older(found, least):
            yield Check(name, "fault", f"{found}, older than {least}", f"pip install -U '{name}>={least}'")
        else:
            yield Check(name, "ok", found)


def _machine() -> Iterator[Check]:
    """Processor, memory."""
    usable = usable_cores()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > usable:
        found = f"OMP_NUM_THREADS={threads} on {usable} cores"
        yield Check("processor", "warning", found, f"set OMP_NUM_THREADS to at most {usable}")
    else:
        yield Check(
            "processor", "ok", f"{platform.machine()}, {usable} cores, {threads or 'torch chooses the'} threads"
        )
    total, free = machine_memory()
    if total is not None and free is not None:
        found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
        fix = "close other programs, or use smaller batches" if free < LEAST_MEMORY * GIB else ""
        yield Check("memory", "warning" if fix else "ok", found, fix)


def _torch() -> Iterator[Check]:
    """The devices that torch sees."""
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        yield Check("torch", "fault", f"does not import: {error}", "install torch again")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            yield Check(f"cuda:{index}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB, {bf16}")
    elif torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple's GPU")
    elif torch.version.cuda or shutil.which("nvidia-smi"):
        why = "torch is built for CUDA but finds no GPU" if torch.version.cuda else "torch is a CPU build beside a GPU"
        yield Check("gpu", "warning", why, "install the build of torch that fits the driver, or use use_cpu: true")
    else:
        yield Check("gpu", "ok", f"none; torch uses the CPU with {torch.get_num_threads()} threads")


def _home(home: Path) -> Iterator[Check]:
    """Whether the home directory, or the nearest folder above it, can be written, and its free disk."""
    place = home.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Check("home", "fault", f"{home}: not writable ({error.strerror})", "choose another one by --home DIR")
        return
    yield Check("home", "ok", f"{home}{'' if home.exists() else ', which does not exist yet'}")
    free = shutil.disk_usage(place).free
    fix = "free some space, or choose another disk by --home DIR" if free < LEAST_DISK * GIB else ""
    yield Check("disk", "warning" if fix else "ok", f"{free / GIB:.1f} GiB free at {place}", fix)


def _optional() -> Iterator[Check]:
    """Packages that only some keys need."""
    from rlhf_pipeline.config.rollout_engine import INSTALL, vllm_version

    for package, what in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            how = INSTALL if package == "vllm" else f"pip install {package}"
            yield Check(package, "not installed", f"only for {what}: {how}")
        else:
            version = vllm_version() if package == "vllm" else version_of(package)
            yield Check(package, "ok", f"{version or 'installed'}: {what}")


def _combinations() -> Iterator[Check]:
    """Versions that do not work together, or have never been tried together."""
    from rlhf_pipeline.config.rollout_engine import INSTALL, RANGE, vllm_version

    vllm, (oldest, too_new) = vllm_version(), RANGE
    if vllm and (is_older(vllm, oldest) or not is_older(vllm, too_new)):
        found = f"vllm {vllm}: fits this package from {oldest} on and below {too_new}"
        yield Check("vllm version", "warning", found, INSTALL)
    for package, least, what in (("peft", "0.21", "tested"), ("bitsandbytes", "0.50", "load_in_4bit is tested")):
        if (version := version_of(package)) and is_older(version, least):
            found = f"{package} {version}: {what} with {least} and newer"
            yield Check(f"{package} version", "warning", found, f"pip install -U '{package}>={least}'")
    if version_of("flash_attn") and shutil.which("nvidia-smi") is None:
        found = "flash_attn is installed, but there is no NVIDIA GPU"
        yield Check("flash_attn and device", "warning", found, "leave attn_implementation out")
