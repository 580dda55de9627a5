"""Every method in fresh processes that take turns, and a record that is whole at any moment."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from autorev.engine.undisturbed import undisturbed
from autorev.errors import AutorevError, first_line
from autorev.format import format_bytes
from autorev.methods import Method
from autorev.profiler.advise import advise
from autorev.profiler.job import Job, Outcome, Source, Sweep
from autorev.profiler.launch import run_in_fresh_process
from autorev.profiler.options import SweepRequest
from autorev.profiler.passes.measure import measure
from autorev.profiler.passes.predicted import predict_method
from autorev.profiler.record import Profile, Result, Status
from autorev.profiler.subject import Subject

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction that is done."""
WARM_UP = 2
"""Steps before the first timed one. The first makes the optimiser's state; the second still waits for fresh pages."""


@dataclass(eq=False)
class Schedule:
    """Which process measures what, and when; the record is written after each."""

    subject: Subject
    record: Profile
    scratch: Path
    folder: str | Path | None
    on: str
    depth: int | None
    model: str | None
    progress: Progress
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        tokens = pickled = None
        if self.subject.tokens is not None:
            file = self.scratch / "tokens.pt"
            torch.save(self.subject.tokens, written := BytesIO())
            file.write_bytes(written.getbuffer())  # whose error, unlike torch's, says that the disk is full
            tokens = str(file)
        self.launch: Callable[[Job], Outcome] = partial(run_in_fresh_process, scratch=self.scratch)
        if self.subject.live is not None:
            pickled = str(self.scratch / "model.pt")
            why = _unpicklable(self.subject.live, pickled)
            if why:
                self.launch = self._here
                note = f"every method ran in one process, as {why}; give package.module:factory for fresh ones"
                self.record = replace(self.record, notes=tuple(dict.fromkeys((*self.record.notes, note))))
        threads = self.record.environment.threads
        self.source = Source(self.model, pickled, self.depth, tokens, self.on, threads, self.trust_remote_code)

    def _here(self, job: Job) -> Outcome:
        assert self.subject.live is not None
        threads = torch.get_num_threads()
        try:
            with undisturbed(self.subject.live[0]):
                return measure(job, copy.deepcopy(self.subject.live))
        finally:
            torch.set_num_threads(threads)

    def predict(self) -> None:
        """Predictions of every method that has one."""
        if self.subject.forecaster is None:
            return
        for result in self.record.results:
            self.progress(f"predicting {result.method.title}", 0.0)
            try:
                prediction = predict_method(self.subject.forecaster, result.method)
            except Exception as error:  # a model that cannot be simulated can be measured all the same
                why = str(error) if isinstance(error, AutorevError) else first_line(error)
                note = f"{result.method.title} could not be predicted: {why}"
                self.record = replace(self.record, notes=tuple(dict.fromkeys((*self.record.notes, note))))
                continue
            self.record = self.record.with_result(replace(result, prediction=prediction))

    def measure(self, rounds: int, steps: int) -> None:
        """The rounds: each measures every method once, beginning with another one."""
        methods = [result.method for result in self.record.results]
        for number in range(rounds):
            start = number % len(methods)
            for at, method in enumerate([*methods[start:], *methods[:start]]):
                done = self.record.result(method.spec)
                assert done is not None
                passes = done.memory is None
                if done.status in (Status.REFUSED, Status.FAILED) or any(r.number == number for r in done.rounds):
                    continue
                if done.status is Status.OUT_OF_MEMORY and passes:
                    continue
                what = f"{method.title}, round {number + 1} of {rounds}"
                self.progress(what, (number * len(methods) + at) / (rounds * len(methods)))
                job = Job(
                    source=self.source,
                    method=method,
                    blocks=self.subject.blocks,
                    setting=self.subject.setting,
                    round=number,
                    warmup=WARM_UP,
                    steps=steps,
                    passes=passes,
                    snapshot=self._snapshot(method) if passes else None,
                )
                self._keep(self._merged(done, self.launch(job)))

    def sweep(self, request: SweepRequest, limit: tuple[int, bool] | None, longest_step: float) -> None:
        """The points of one axis for every method that ran."""
        measured = [r for r in self.record.results if r.memory is not None]
        for at, result in enumerate(measured):
            spec = result.method.spec
            if any(p.axis == request.axis and p.method == spec for p in self.record.points):
                continue
            self.progress(f"{result.method.title} along {request.axis}", at / len(measured))
            values = request.values or (() if limit or self.on == "cuda" else self._doubled(request.axis))
            total = torch.cuda.get_device_properties(0).total_memory if self.on == "cuda" else None
            sweep = Sweep(
                axis=request.axis,
                values=values,
                limit=self.subject.longest_sequence if request.axis == "sequence" else None,
                budget_bytes=limit[0] if limit and not limit[1] else total,
                extra_bytes=limit[0] if limit and limit[1] else None,
                steps=3,
                longest_step=longest_step,
            )
            job = Job(
                source=self.source,
                method=result.method,
                blocks=self.subject.blocks,
                setting=self.subject.setting,
                round=0,
                warmup=WARM_UP,
                steps=0,
                passes=False,
                sweep=sweep,
            )
            outcome = self.launch(job)
            self.record = replace(self.record, points=(*self.record.points, *outcome.points))
            if outcome.status is not Status.MEASURED:
                note = f"{result.method.title} along {request.axis}: {outcome.status}, {outcome.reason}"
                self.record = replace(self.record, notes=tuple(dict.fromkeys((*self.record.notes, note))))
            self.write()

    def finish(self, predicted: bool) -> Profile:
        """The complete record, with its recommendation."""
        if predicted:
            pending = (Status.PENDING, Status.PREDICTED)
            results = (replace(r, status=Status.PREDICTED) if r.status in pending else r for r in self.record.results)
            self.record = replace(self.record, results=tuple(results))
        record = replace(self.record, complete=True)
        self.record = replace(record, recommendation=advise(record))
        self.write()
        return self.record

    def _doubled(self, axis: str) -> tuple[int, ...]:
        """Without a budget there is no largest size to look for."""
        setting = self.subject.setting
        own = (setting.batch if axis == "batch" else setting.sequence) or 1
        limit = self.subject.longest_sequence if axis == "sequence" else None
        return tuple(own * factor for factor in (1, 2, 4) if limit is None or own * factor <= limit)

    def _merged(self, done: Result, outcome: Outcome) -> Result:
        rounds = done.rounds if outcome.round is None else (*done.rounds, outcome.round)
        memory = done.memory or outcome.memory
        status, reason = outcome.status, outcome.reason
        budget = self.record.budget_bytes
        if status is Status.MEASURED and memory is not None and budget is not None and memory.peak_bytes > budget:
            status = Status.OUT_OF_MEMORY
            reason = f"it needs {format_bytes(memory.peak_bytes)}, and the budget is {format_bytes(budget)}"
        return replace(
            done,
            status=status,
            reason=reason,
            rounds=rounds,
            memory=memory,
            work=done.work or outcome.work,
            fidelity=done.fidelity or outcome.fidelity,
            side_bits=max(done.side_bits, outcome.side_bits),
        )

    def _snapshot(self, method: Method) -> str | None:
        if self.on != "cuda" or self.folder is None:
            return None
        file = "".join(letter if letter.isalnum() else "-" for letter in method.spec)
        return str(Path(self.folder) / "snapshots" / f"{self.record.name}_{file}.pickle")

    def _keep(self, result: Result) -> None:
        self.record = self.record.with_result(result)
        self.write()

    def write(self) -> None:
        """Write the record as it is now, where it has a place."""
        if self.folder is not None:
            self.record.write_into(self.folder)


def _unpicklable(live: Any, path: str) -> str:
    """Why a fresh process could not have the model; empty when it can: it then lies in the file `path`."""
    model, (args, kwargs) = live
    homeless = next((type(m).__name__ for m in model.modules() if type(m).__module__ == "__main__"), None)
    if homeless:
        return f"its class {homeless} is defined in the program itself"
    try:
        torch.save((model, args, kwargs), path)
    except Exception as error:
        return f"it cannot be saved ({first_line(error)})"
    return ""
