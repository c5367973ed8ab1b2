"""One of several processes of a stage, which `experiment/launch.py` starts."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.main import described, prepare_environment
from rlhf_pipeline.disk.storage import only_here


def main(answers: int) -> None:
    """Read a job from standard input, run it, and write the answer, one line, to the file descriptor `answers`."""
    os.set_inheritable(answers, False)
    prepare_environment()
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    with os.fdopen(answers, "w") as out:
        only_here(out)  # a child that outlives this process would keep the pipe open
        answer = _work(job)
        sys.stdout.flush()
        sys.stderr.flush()
        out.write(json.dumps(answer) + "\n")
    sys.stderr.flush()
    os._exit(0)  # the peers may be gone: nothing waits for them


def _outlive_nobody() -> None:
    """Stop this process if the parent has died: like a signal, with a checkpoint if there is something to keep."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _work(job: dict[str, Any]) -> dict[str, Any]:
    """Run the stage; {"result": ...} or {"failure": ...}."""
    from rlhf_pipeline.config.stages import STAGES

    try:
        load_libraries()
        from rlhf_pipeline.experiment.functions import stage_function

        config = STAGES[job["stage"]].model_validate(job["config"])
        result = stage_function(job["stage"])(config, Path(job["home"]), **job["options"])
        return {"result": result.as_dict() | {"stopped_by": result.stopped_by}}
    except (Exception, KeyboardInterrupt) as error:
        failure = described(error, [job["stage"], "--home", job["home"]])
        if job["debug"] and failure.kind != "interrupted":
            traceback.print_exc()
        told = {"code": failure.code, "kind": failure.kind, "message": failure.message}
        told |= {"faults": [vars(fault) for fault in failure.faults]}
        return {"failure": told | {"elsewhere": getattr(error, "elsewhere", False)}}
