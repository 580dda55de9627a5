"""Where the time of a step goes: blocks one by one, and what a reversible chain adds.

A step of its own, with clocks around functions: slower than a timed one (on a GPU each clock waits for the device), so
its parts are shares, and the timed steps are the figure to go by.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

import autorev.couplings.arithmetic as arithmetic
from autorev.couplings.additive import Additive
from autorev.couplings.velocity import Velocity
from autorev.engine.replay import Replay
from autorev.in_place import Blocks
from autorev.patching import patched_here
from autorev.profiler.passes.step import TrainingStep, synchronize, tensors_of
from autorev.profiler.readings import BlockTime, Work

_COUPLING = ("step", "recover_input", "recover_output", "recover_partner")


def measure_work(step: TrainingStep, blocks: Blocks, flops: int) -> Work:
    """An instrumented step of a model whose method is in place."""
    watch = _Stopwatch(step.device)
    with ExitStack() as stack:
        for target, name, label in _clocked():
            stack.enter_context(patched_here(target, name, partial(watch.around, label)))
        times = stack.enter_context(_block_times(step.model, blocks.paths, watch))
        began = watch.now()
        step.run(watch.phase)
        total = watch.now() - began
    return Work(
        flops=flops,
        instrumented_seconds=total,
        overhead={label: round(seconds, 6) for label, seconds in watch.spent.items() if seconds},
        blocks=tuple(BlockTime(path, times[path, "forward"], times[path, "backward"]) for path in blocks.paths),
    )


def _clocked() -> Iterator[tuple[Any, str, str]]:
    """(holder, attribute, what its time is called)."""
    yield Replay, "run", "recomputation"
    for coupling in (Velocity, Additive):
        for name in _COUPLING:
            yield coupling, name, "coupling"
    yield arithmetic, "pack", "packing"
    yield arithmetic, "unpack", "packing"


class _Stopwatch:
    """Seconds by label; a label inside another's time is taken off it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)
        self.running: list[tuple[str, float]] = []
        self.phase_now = ""

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phase_now = name
        yield

    def around(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            with self.labelled(label):
                return function(*args, **kwargs)

        return clocked

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        now = self.now()
        if self.running:
            outer, since = self.running[-1]
            self.spent[outer] += now - since
        self.running.append((label, now))
        try:
            yield
        finally:
            now = self.now()
            _, since = self.running.pop()
            self.spent[label] += now - since
            if self.running:
                outer, _ = self.running[-1]
                self.running[-1] = (outer, now)


@contextmanager
def _block_times(model: nn.Module, paths: tuple[str, ...], watch: _Stopwatch) -> Iterator[dict[tuple[str, str], float]]:
    """(path, phase) -> seconds. A block's backward lasts from its output's gradient to that of the block before."""
    times: dict[tuple[str, str], float] = defaultdict(float)
    began: dict[str, float] = {}
    behind: list[tuple[str, float]] = []

    def switch(path: str | None) -> None:
        now = watch.now()
        if behind:
            last, since = behind.pop()
            times[last, "backward"] += now - since
        if path is not None:
            behind.append((path, now))

    def gradient_came(path: str | None, grad: torch.Tensor) -> None:
        if watch.phase_now == "backward":
            switch(path)

    def enter(path: str, first: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            began[path] = watch.now()
            if first:
                _hook((args, kwargs), lambda grad: gradient_came(None, grad))

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, returned: Any) -> None:
            times[path, "forward"] += watch.now() - began.pop(path)
            _hook(returned, lambda grad: gradient_came(path, grad))

        return hook

    with ExitStack() as stack:
        for path in paths:
            block = model.get_submodule(path)
            stack.callback(block.register_forward_pre_hook(enter(path, path == paths[0]), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave(path)).remove)
        yield times
        switch(None)


def _hook(structure: Any, hook: Callable[[torch.Tensor], None]) -> None:
    """`hook` on the first floating tensor that has a gradient."""
    for tensor in tensors_of(structure):
        if tensor.is_floating_point() and tensor.requires_grad:
            tensor.register_hook(hook)
            return
