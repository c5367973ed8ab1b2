"""A worker process of `rlhf run --jobs N`: it runs the jobs that its parent gives it, one after another."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue

from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.main import INTERRUPTED, described
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.disk.storage import only_here
from rlhf_pipeline.errors import visible
from rlhf_pipeline.experiment.workers import Answer, Job


def main(answers: int) -> int:
    """Run jobs until an empty line comes; returns the exit code of the job that failed, else 0.

    Args:
        answers: the file descriptor that the answers are written to, one line for each job.
    """
    os.set_inheritable(answers, False)
    jobs: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    with os.fdopen(answers, "w") as out:
        only_here(out)  # a child that outlives this process would keep the pipe open
        try:
            load_libraries()
            import torch

            threads = torch.get_num_threads()
            while line := jobs.get().strip():
                torch.set_num_threads(threads)  # an earlier job may have set its own
                answer = work(Job.read(line))
                out.write(answer.line())
                out.flush()
                if answer.code:  # its memory and its state are not used again
                    return answer.code
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


def _listen(jobs: SimpleQueue[str]) -> None:
    """Pass on the lines of the parent; if the parent has died, kill this process and its children."""
    for line in iter(sys.stdin.readline, ""):
        jobs.put(line)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def work(job: Job) -> Answer:
    """Run a stage, or measure for a comparison; all output goes to the log of the job."""
    _write_to(job.log)
    try:
        answer = _measured(job) if job.stage == CompareConfig.stage else _made(job)
    except (Exception, KeyboardInterrupt) as error:
        failure = described(error, ["run", "--home", job.home])
        text = failure.message
        if failure.kind == "unexpected":
            traceback.print_exc()
            text = f"unexpected {type(error).__name__}: {error}; its traceback is in the log"
        sys.stderr.write("".join(f"error: {line}\n" for line in visible(text).split("\n")))
        answer = Answer(code=failure.code, text=text)
    sys.stdout.flush()
    sys.stderr.flush()
    return answer


def _made(job: Job) -> Answer:
    from rlhf_pipeline.config.stages import STAGES
    from rlhf_pipeline.experiment.functions import stage_function

    config = STAGES[job.stage].model_validate(job.config)
    result = stage_function(job.stage)(config, Path(job.home), resume=job.resume, number=job.number)
    return Answer(result.model, result.cost.get("wall_seconds"), result.stopped_by)


def _measured(job: Job) -> Answer:
    from rlhf_pipeline.compare.ahead import measure_ahead
    from rlhf_pipeline.compare.points import Point

    points = None if job.points is None else [Point(**values) for values in job.points]
    measure_ahead(CompareConfig.model_validate(job.config), Path(job.home), points)
    return Answer()


def _write_to(log: str) -> None:
    """Append what this process and its children print to a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)
