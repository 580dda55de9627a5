"""A fresh process that measures one job: `python -m autorev.profiler.worker JOB.json OUTCOME.json`."""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from pathlib import Path

from autorev.profiler.job import Job
from autorev.records import converter


def main() -> None:
    """Read the job, measure it, write the outcome; end when the process that launched this one does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job_file, outcome_file = sys.argv[1:]
    job = converter().structure(json.loads(Path(job_file).read_text(encoding="utf-8")), Job)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model's own, once for each of many processes
        from autorev.profiler.passes.measure import measure

        outcome = measure(job)
    Path(outcome_file).write_text(json.dumps(converter().unstructure(outcome)), encoding="utf-8")


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # until the pipe's other end is closed
    os._exit(1)


if __name__ == "__main__":
    main()
