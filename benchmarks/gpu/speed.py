"""Seconds a step: methods that live in one process, share their parameters and take turns, compiled and not."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

import autorev
from autorev.conversion.convert import chains_of
from autorev.errors import first_line, is_out_of_memory
from autorev.format import format_bytes, format_seconds
from autorev.in_place import Blocks, in_place
from autorev.methods import Method
from autorev.profiler.passes.step import TrainingStep, optimizer_for
from autorev.workload import Call
from benchmarks.gpu.device import Device, NoTwin
from benchmarks.gpu.record import Record, Row
from benchmarks.gpu.setting import method_of, ready, setting_of
from benchmarks.gpu.size import Size
from benchmarks.step_time import twin_of

TITLE = "Seconds a step"
WHAT = (
    "Methods take turns in one process; a ratio is taken in each round. The first step compiles where blocks are "
    "compiled one by one (`block.compile()`), and compiles the coupling's arithmetic."
)
SHARE = 5
HEADS = ("method", "median", "fastest", "of checkpointing: median ratio", "quartiles", "peak", "first step")
MOMENTUM = "momentum:k=3,keep_last=0"
AGAINST = "checkpoint"
PLAIN = ("plain", AGAINST, MOMENTUM, f"{MOMENTUM},keep=attention", "leapfrog:keep_last=0", "offload")
TILED = (AGAINST, f"{AGAINST}:tile=auto", f"{MOMENTUM},tile=auto", f"{MOMENTUM},tile=auto,host=side_bits")
COMPILED = (AGAINST, "plain", MOMENTUM)
LONGEST = 60.0
"""Seconds that the rounds take at most; there are three at least."""


def run(device: Device, size: Size, record: Record) -> None:
    """Three groups, of which each has checkpointing to compare with."""
    if device.quick:
        record.piece("quick", in_turns, size, (AGAINST, MOMENTUM), (MOMENTUM,))
        return
    record.piece("eager", in_turns, size, PLAIN, (), limit=300)
    record.piece("compiled", in_turns, size, (AGAINST, MOMENTUM), COMPILED, limit=400)
    record.piece("tiles", in_turns, size, TILED, (), limit=300)


def in_turns(device: Device, size: Size, specs: tuple[str, ...], compiled: tuple[str, ...]) -> Row:
    """Of methods as they are and of those `compiled`. What does not fit is left out, and said."""
    prepared = ready(device, size)
    optimizer = optimizer_for(prepared.model, setting_of(size).optimizer)
    steps: dict[str, TrainingStep] = {}
    found: dict[str, Row] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack, device.compiling() as compiler:
        for name, spec in [*((spec, spec) for spec in specs), *((f"{spec}, compiled", spec) for spec in compiled)]:
            print(name, file=sys.stderr, flush=True)
            twin = twin_of(prepared.model)
            step = TrainingStep(twin, prepared.call, optimizer)
            try:
                stack.enter_context(_placed(twin, spec, prepared.blocks, prepared.call, name != spec))
                first = device.seconds(step.run)
                peak = device.highest(step.run)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                left_out[name] = first_line(error)
            if name in left_out:  # behind the clause: the error held the step's tensors
                optimizer.zero_grad()
                device.free()
                continue
            steps[name], found[name] = step, {"first": first, "peak": peak, "seconds": []}
        if not any(name != AGAINST for name in steps) or AGAINST not in steps:
            raise NoTwin(f"nothing to compare: {left_out}")
        began = time.monotonic()
        for turn in range(size.rounds):
            for name, step in steps.items():
                found[name]["seconds"].append(device.seconds(step.run))
            if turn >= 2 and time.monotonic() - began > LONGEST:
                break
    drifts = {name: max(autorev.drift(step.model).values()) for name, step in steps.items() if chains_of(step.model)}
    return {"methods": found, "left out": left_out, "compiler": compiler, "drift": drifts, "tokens": size.tokens}


@contextmanager
def _placed(twin: nn.Module, spec: str, blocks: Blocks, call: Call, compiled: bool) -> Iterator[None]:
    own = compiled and spec == AGAINST  # whose checkpoints stand around compiled blocks, as people have them
    with in_place(twin, method_of("plain" if own else spec), blocks, call):
        if own:
            enable: Any = twin.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        for path in blocks.paths if compiled else ():
            twin.get_submodule(path).compile()
        yield


def cells(row: Row, rows: list[Row]) -> list[tuple[str, ...]]:
    """As the report shows it."""
    base = row["methods"][AGAINST]["seconds"]
    shown = []
    for name, each in row["methods"].items():
        times = each["seconds"]
        low, middle, high = statistics.quantiles((t / b for t, b in zip(times, base, strict=True)), n=4)
        figures = [format_seconds(statistics.median(times)), format_seconds(min(times)), f"{middle:.3f}"]
        title = f"`{Method.parse(name.removesuffix(', compiled'))}`{', compiled' if 'compiled' in name else ''}"
        shown.append(
            (title, *figures, f"{low:.3f} to {high:.3f}", format_bytes(each["peak"]), f"{each['first']:.1f} s")
        )
    shown += [(f"`{name}`", f"left out: {why}", *[""] * (len(HEADS) - 2)) for name, why in row["left out"].items()]
    return shown
