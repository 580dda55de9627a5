"""One method, measured in this process: the order of the passes, and what becomes of their failures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from autorev.errors import AutorevError, first_line, is_out_of_memory
from autorev.in_place import NotApplicable, in_place
from autorev.profiler.job import Job, Outcome
from autorev.profiler.passes.allocator import measure_memory
from autorev.profiler.passes.attribution import attribute
from autorev.profiler.passes.fidelity import measure_fidelity
from autorev.profiler.passes.prepare import Prepared, prepare_model
from autorev.profiler.passes.step import TrainingStep, optimizer_for
from autorev.profiler.passes.stopwatch import measure_work
from autorev.profiler.passes.sweep import sweep
from autorev.profiler.readings import Fidelity, Memory, Round, Work
from autorev.profiler.record import Status
from autorev.workload import Call


def measure(job: Job, live: tuple[torch.nn.Module, Call] | None = None) -> Outcome:
    """Run `job` here and now, on a model at hand if one is given; whatever goes wrong is part of the outcome."""
    try:
        if job.sweep is not None:
            return Outcome(Status.MEASURED, points=tuple(sweep(job, live)))
        return _measured(job, prepare_model(job.source, job.setting, job.blocks, live))
    except NotApplicable as reason:
        return Outcome(Status.REFUSED, str(reason))
    except AutorevError as error:
        return Outcome(Status.FAILED, str(error))
    except Exception as error:
        return Outcome(Status.OUT_OF_MEMORY if is_out_of_memory(error) else Status.FAILED, first_line(error))


def _measured(job: Job, prepared: Prepared) -> Outcome:
    fidelity: Fidelity | None = None
    memory: Memory | None = None
    work: Work | None = None
    model, call = prepared.model, prepared.call
    if job.passes:
        # First, while the model is what it was, and without its memory in the way of the others.
        fidelity = measure_fidelity(model, call, job.method, job.blocks, prepared.texts)
    with in_place(model, job.method, job.blocks, call) as placed:
        step = TrainingStep(model, call, optimizer_for(model, job.setting.optimizer), job.setting.autocast)
        for _ in range(job.warmup):
            step.run()
        times = [step.timed() for _ in range(job.steps)]
        if job.passes:
            if placed.host is not None:
                placed.host.peak = 0
            memory = measure_memory(step, Path(job.snapshot) if job.snapshot else None)
            memory = replace(memory, host_bytes=placed.host.peak if placed.host else 0)
            if job.method.name != "compile":  # which would run uncompiled under a dispatch mode, or with hooks
                memory, flops = attribute(step, memory, job.blocks.paths)
                work = measure_work(step, job.blocks, flops)
        bits = placed.side_bits
    timed = Round(
        job.round,
        forward=tuple(t["forward"] for t in times),
        backward=tuple(t["backward"] for t in times),
        optimizer=tuple(t["optimizer"] for t in times),
    )
    return Outcome(Status.MEASURED, "", timed if times else None, memory, work, fidelity, bits)
