"""One run: its directory, log, accelerator, cost meter and signals."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import nn

from rlhf_pipeline.config.dump import config_digest, dump_yaml
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.disk.storage import replace_text
from rlhf_pipeline.errors import BadInput, Interrupted
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.needs import remarks_on, require_needs
from rlhf_pipeline.models.sharding import shard
from rlhf_pipeline.registry.lengths import with_lengths
from rlhf_pipeline.registry.parents import parents_of
from rlhf_pipeline.registry.store import Registry, folder_for_copy
from rlhf_pipeline.training.accelerator import make_accelerator, seed_everything
from rlhf_pipeline.training.checkpoint import Checkpoint, clear_leftovers, newest_checkpoint, put_damaged_aside
from rlhf_pipeline.training.cost import CostMeter, reset_peak_memory
from rlhf_pipeline.training.failure import FOLDER as FAILURE
from rlhf_pipeline.training.launcher import with_launcher
from rlhf_pipeline.training.precision import uses_bf16
from rlhf_pipeline.training.ranks import of_the_first
from rlhf_pipeline.training.run_directory import (
    CONFIG,
    made_before,
    open_directory,
    read_status,
    unfinished_with_other_config,
    write_status,
)
from rlhf_pipeline.training.trackers import Trackers
from rlhf_pipeline.training.tracking import RunLog, say_in_handler

if TYPE_CHECKING:
    from accelerate import Accelerator


C = TypeVar("C", bound=TrainingConfig)


@dataclass
class Run(Generic[C]):
    """Everything that a stage needs around its own work.

    number: the version number that is reserved for its model, if there is one.
    """

    stage: str
    config: C
    registry: Registry
    directory: Path
    accelerator: Accelerator
    log: RunLog
    checkpoint: Checkpoint | None
    meter: CostMeter
    memory: Memory
    number: int | None = None
    stopped_by: int | None = None
    phase: Literal["preparing", "updating", "ending"] = "preparing"

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def sharded(self) -> bool:
        """Whether the weights are divided between several processes."""
        return self.config.fsdp and self.accelerator.num_processes > 1

    @property
    def loads_on(self) -> torch.device:
        """Where models are loaded: on the run's device, or on the CPU until `placed` divides them."""
        return torch.device("cpu") if self.sharded else self.device

    def placed(self, *models: nn.Module) -> None:
        """Divide models between the processes if the run is sharded; see `shard`."""
        for model in models if self.sharded else ():
            shard(model, self.device, reshard_after_forward=self.config.fsdp_reshard_after_forward)

    def prepared(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and its optimizer for the training loop."""
        if not self.sharded:
            return self.accelerator.prepare(model, optimizer)
        return self.accelerator.prepare_model(model, evaluation_mode=True), self.accelerator.prepare(optimizer)

    def everywhere(self, fact: bool) -> bool:
        """Whether something holds in every process of a sharded run, in which all must make the same passes."""
        if not self.sharded:
            return fact
        return bool(self.accelerator.gather(torch.tensor([int(fact)], device=self.device)).all())

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def shares(self) -> int:
        """The number of processes that the run began with.

        A window has the per-device batches of as many, also when fewer or more processes resume the run and divide it.
        """
        before = self.checkpoint.state["extra"].get("inputs", {}) if self.checkpoint is not None else {}
        return int(before.get("processes", self.accelerator.num_processes))

    @property
    def origin(self) -> str:
        """The name of this run in manifests: its folder, and a mark that a later folder of the same name lacks."""
        return f"{self.id}/{read_status(self.directory).get('token')}"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"


def _agree_on_directory(
    accelerator: Accelerator, home: Path, config: TrainingConfig, digest: str, resume: bool
) -> tuple[Path, IO[str] | None]:
    """The run's directory and its lock; with several processes the first one chooses the directory for all.

    Raises:
        BadInput: another process is training this run.
    """
    chosen: str | None = None
    lock, refused = None, None
    if accelerator.is_main_process:
        try:
            directory, lock = open_directory(home, config.output_name, digest, resume=resume)
            token = read_status(directory).get("token") or uuid.uuid4().hex[:12]
            write_status(directory, status="running", pid=os.getpid(), token=token)
            chosen = str(directory)
        except BadInput as error:
            refused = error
    chosen = of_the_first(accelerator, chosen)
    if chosen is None:
        raise refused or BadInput("the first process could not open the run")
    return Path(chosen), lock


@contextmanager
def open_run(
    stage: str,
    config: C,
    home: Path,
    *,
    resume: bool = True,
    quiet: bool = False,
    notes: Sequence[str] = (),
    number: int | None = None,
) -> Iterator[Run[C]]:
    """Resume the unfinished run of a config, or start a new one.

    Options that follow from the parent model are filled into the config first.

    Args:
        number: the version number that is reserved for the model of this run.

    Yields:
        Run. On exit, signal handlers and log are restored; the run counts as finished only after `finish`.
    """
    started = time.perf_counter()
    reset_peak_memory()
    if config.output_dir is not None:
        folder_for_copy(config.output_dir, config.output_name)
    config, asked = with_launcher(config)
    config, lengths = with_lengths(config, Registry(home))
    parents = parents_of(Registry(home), config)
    require_needs(config, parents)
    digest = config_digest(config)
    accelerator = make_accelerator(config)
    seed_everything(config.seed)
    directory, lock = _agree_on_directory(accelerator, home, config, digest, resume)
    quiet = quiet or not accelerator.is_main_process
    log = RunLog(
        directory,
        title=config.output_name,
        logging_steps=config.logging_steps,
        quiet=quiet,
        writes=accelerator.is_main_process,
    )
    try:
        for note in notes:
            log.say(f"note: {note}")
        for line in [*asked, *([lengths] if lengths else [])]:
            log.say(line)
        for line in remarks_on(parents["base"]) if "base" in parents else ():
            log.say(line)
        if accelerator.is_main_process:
            begun = (directory / CONFIG).exists()
            if not begun:
                described = config.model_dump(mode="json")
                other = unfinished_with_other_config(directory, config.output_name, described)
                for line in [*made_before(home, config.output_name, digest), *other]:
                    log.say(f"note: {line}")
            replace_text(directory / CONFIG, dump_yaml(config))
            for place in (directory, directory / "snapshots", directory / "checkpoints"):
                clear_leftovers(place)
            put_damaged_aside(directory / "checkpoints", warn=log.say)
        checkpoint = newest_checkpoint(directory / "checkpoints", warn=log.say)
        if accelerator.is_main_process:
            if begun and checkpoint is None:
                why = "engine trl writes none" if config.engine == "trl" else "save_steps is off"
                why = "" if config.save_steps or config.save_strategy in ("epoch", "best") else f" ({why})"
                log.say(f"nothing to resume: no checkpoint{why}; run {directory.name} starts again from the beginning")
            log.rewind(checkpoint.step if checkpoint else 0)
            log.trackers = Trackers(config, directory, log.say) if config.report_to else None
        meter = CostMeter(started=started)
        memory = Memory(log.say, meter)
        run = Run(stage, config, Registry(home), directory, accelerator, log, checkpoint, meter, memory, number)
        count, threads = accelerator.num_processes, f"{torch.get_num_threads()} threads"
        each = threads if count == 1 else f"{count} processes of {threads}" + run.sharded * ", which divide the weights"
        memory.repeats = not run.sharded
        log.say(f"{stage}: run {run.id}, {accelerator.device}, {each}, seed {config.seed}")
        if config.bf16 == "auto":
            log.say(f"bf16 auto: {'on, it is faster on this machine' if uses_bf16(config) else 'off on this machine'}")
        with _signals(run):
            yield run
    except BadInput:
        # A run that stopped at a faulty input has nothing to resume.
        if accelerator.is_main_process and run_is_empty(directory):
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        log.close()
        if lock is not None:
            lock.close()


def run_is_empty(directory: Path) -> bool:
    """Whether a run has no metrics, checkpoints, snapshots or failure."""
    metrics = directory / "metrics.jsonl"
    kept = [directory / name for name in ("checkpoints", "snapshots", FAILURE)]
    return not any(path.exists() for path in kept) and not (metrics.exists() and metrics.stat().st_size)


class _Stopped(BaseException):
    """A signal before the first update; a BaseException, so that no `except Exception` of a library catches it."""


@contextmanager
def _signals(run: Run):
    """SIGINT and SIGTERM let the current update finish; a second signal ends the process at once.

    Before the first update a process stops at once; whatever started several processes then ends the others. After the
    last update the model is first evaluated and registered.

    Raises:
        Interrupted: a signal arrived before the first update.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: Any) -> None:
        if run.stopped_by is not None:
            os._exit(128 + number)
        run.stopped_by = number
        if run.phase == "preparing":
            raise _Stopped
        if run.phase == "ending":
            ending = f"signal {number}: all updates are done, registering the model (repeat to stop at once)"
            say_in_handler(run.log.say, ending)
            return
        then = "writing a checkpoint" if run.config.engine == "native" else "stopping"
        say_in_handler(run.log.say, f"signal {number}: finishing this update, then {then} (repeat to stop at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stopped:
        number = run.stopped_by or signal.SIGINT
        told = f"stopped by signal {int(number)} before an update; run the same command again"
        raise Interrupted(told, number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
