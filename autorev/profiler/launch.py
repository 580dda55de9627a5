"""Run a job in a fresh process, and make an outcome of whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import autorev
from autorev.profiler.job import Job, Outcome
from autorev.profiler.record import Status
from autorev.records import converter

_TAIL = 4096
"""Bytes of a dead worker's last words that are looked at."""


def run_in_fresh_process(job: Job, scratch: Path) -> Outcome:
    """What `python -m autorev.profiler.worker` makes of `job`; files go to `scratch`.

    The worker ends with this process, however that ends: it listens to a pipe that nobody writes to.
    """
    job_file, outcome_file, log_file = (scratch / name for name in ("job.json", "outcome.json", "log.txt"))
    job_file.write_text(json.dumps(converter().unstructure(job)), encoding="utf-8")
    outcome_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "autorev.profiler.worker", str(job_file), str(outcome_file)]
    path = [str(Path(autorev.__file__).parents[1]), *sys.path]  # a user's own classes are found where they are here
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONWARNINGS": "ignore"}
    with log_file.open("wb") as log:
        worker = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.PIPE, env=environment)
        try:
            worker.wait()
        finally:
            worker.kill()
            worker.communicate()
    try:
        outcome: Outcome = converter().structure(json.loads(outcome_file.read_text(encoding="utf-8")), Outcome)
    except (OSError, json.JSONDecodeError):  # none, or half of one
        return _died(worker.returncode, log_file)
    return outcome


def _died(code: int, log: Path) -> Outcome:
    if code == -signal.SIGKILL:
        return Outcome(
            Status.OUT_OF_MEMORY, "the process was killed (signal 9), as the system does when its memory runs out"
        )
    words = log.read_bytes()[-_TAIL:].decode(errors="replace").strip().splitlines()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Outcome(Status.FAILED, f"the process ended with {how}: {words[-1] if words else 'without a word'}")
