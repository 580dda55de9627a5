"""Long fine-tunings by `autorev.finetune`, one after the other: each saved and gone on with as every run of it is.

What stands in a run's folder is copied to its line of the record whenever a command begins or ends a run, and by
`--table`, so that after a kill the curve so far is in the record, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autorev.finetuning.record import FILE, FineTuning
from autorev.finetuning.run import finetune
from benchmarks.long_runs.saved import Line, Lines, claimed
from benchmarks.long_runs.tables import of_trainings

SMOOTHED = 10
"""Steps that make one point of a recorded curve."""


@dataclass(frozen=True)
class Training:
    """One run."""

    options: dict[str, Any]
    """Of `autorev.finetune`."""
    callbacks: Callable[[Path], tuple[Any, ...]] = lambda folder: ()
    """Made of the run's folder."""
    questions: Callable[[Path, FineTuning], dict[str, float]] = field(default=lambda folder, record: {})
    """What is asked of the trained model in the folder; the answers stand in the line."""


def go_on(name: str, training: Training, lines: Lines, folder: Path) -> None:
    """One run, from where it is to its end."""
    out = folder / name
    begun = (out / FILE).is_file()
    if begun and FineTuning.read(out / FILE).complete:
        record = FineTuning.read(out / FILE)
    else:
        if not begun:  # killed before its first record
            shutil.rmtree(out, ignore_errors=True)
        record = finetune(
            out=out,
            resume=begun,
            callbacks=training.callbacks(out),
            progress=lambda what, share: print(f"{name}, {what}", file=sys.stderr, flush=True),
            **training.options,
        )
    lines.put({**line_of(name, record), "answers": training.questions(out, record)})
    for weights in (*out.glob("*.safetensors"), *out.glob("*.bin")):  # the record says what became of them
        weights.unlink()


def line_of(name: str, record: FineTuning) -> Line:
    """What a record shows of a run, as far as it came."""
    losses = [row.loss for row in record.logged]
    points = range(SMOOTHED, len(losses) + 1, SMOOTHED)
    return {
        "name": name,
        "status": "done" if record.complete else "running",
        "method": record.method.spec,
        "seed": record.recipe.seed,
        "step": len(losses),
        "steps": record.recipe.steps,
        "original": record.original.loss if record.original else None,
        "evaluations": [[each.step, round(each.loss, 5)] for each in record.evaluations],
        "curve": [[at, round(sum(losses[at - SMOOTHED : at]) / SMOOTHED, 4)] for at in points],
        "gamma": [[row.step, row.gamma] for row in record.logged[::SMOOTHED] if row.gamma is not None],
        "exported": record.vanilla.loss if record.vanilla else None,
        "peak_bytes": record.peak_bytes,
        "tokens_per_second": record.tokens_per_second,
        "machine": record.environment.machine,
        "command": record.command,
    }


def command(about: str, trainings: Callable[[Lines], dict[str, Training]], record: Path, folder: Path) -> None:
    """The command line of one experiment. `trainings` is asked again after each run: some follow from others."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="default: all that are left")
    parser.add_argument("--json", action="store_true", help="print the recorded lines in the place of the table")
    parser.add_argument("--table", action="store_true", help="print what is recorded, and run nothing")
    parser.add_argument("--record", type=Path, default=record, help="a file of JSON lines that is read and added to")
    parser.add_argument("--folder", type=Path, default=folder, help="where the runs lie")
    given = parser.parse_args()
    lines = Lines(given.record)
    known = trainings(lines)
    if unknown := [name for name in given.runs if name not in known]:
        parser.error(f"there is no run {unknown[0]!r}; choose of {', '.join(known)}")
    collect(list(known), lines, given.folder)
    if not given.table:
        with claimed(given.folder):
            while left := lines.left(given.runs or list(trainings(lines))):
                go_on(left[0], trainings(lines)[left[0]], lines, given.folder)
    found = list(lines.by_name.values())
    print(json.dumps(found) if given.json else "\n".join(of_trainings(found)))


def collect(names: list[str], lines: Lines, folder: Path) -> None:
    """Take up what the folders of runs hold that ended without a word."""
    for name in lines.left(names):
        if (folder / name / FILE).is_file():
            lines.put({**line_of(name, FineTuning.read(folder / name / FILE)), "status": "running"})
