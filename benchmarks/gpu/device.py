"""What the sections ask of a device, in the same words of every kind: code that is one kind's own stands here alone.

On a CPU each word has its twin: the allocator's events in the place of a GPU's counters, the current stream in the
place of another one, reads of single numbers in the place of synchronisations.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autorev import devices
from autorev.engine import digest
from autorev.profiler.passes.watch import PeakWatch

COMPILE = torch.compile


class NoTwin(Exception):  # noqa: N818 - no error: what a device has no counterpart of, for the reason it holds
    """This cannot be looked at on this device."""


@dataclass(frozen=True)
class Device:
    """Where models are trained. Its methods run in the processes that train them."""

    kind: str
    """cpu, cuda, xpu or mps."""
    name: str
    memory_bytes: int
    count: int
    """Of such devices."""
    quick: bool = False
    """Everything is tried, and nothing is worth being called a measurement."""

    @property
    def start_method(self) -> str:
        """How a process is begun: a context of CUDA does not outlive a fork, and the kit begins none before."""
        return "forkserver" if self.kind == "cpu" else "spawn"

    @property
    def torch(self) -> torch.device:
        """As torch has it."""
        return torch.device(self.kind)

    @property
    def module(self) -> Any:
        """`torch.cuda` and the like."""
        return getattr(torch, self.kind)

    def synchronize(self) -> None:
        """Wait until it has done what it was given."""
        if self.kind != "cpu":
            self.module.synchronize()

    def free(self) -> None:
        """Give back what nobody holds any more, as after a step that did not fit."""
        gc.collect()
        if self.kind != "cpu":
            self.module.empty_cache()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one call, until the device has done it."""
        self.synchronize()
        began = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - began

    def highest(self, run: Callable[[], Any]) -> int:
        """The most bytes that are allocated while it runs, beyond those that were before."""
        watch = PeakWatch(self.torch)
        before = self.module.memory_allocated() if self.kind != "cpu" else 0
        watch.begin([])
        run()
        return watch.end() - before

    def peak(self, run: Callable[[], Any], standing: list[torch.Tensor]) -> int:
        """The most bytes that are allocated while it runs; `standing` was before, which a CPU's allocator forgot."""
        watch = PeakWatch(self.torch)
        watch.begin(standing)
        run()
        return watch.end()

    def random_state(self) -> torch.Tensor:
        """Of its own generator."""
        return torch.get_rng_state() if self.kind == "cpu" else self.module.get_rng_state()

    @contextmanager
    def on_another_stream(self) -> Iterator[None]:
        """As who overlaps copies with kernels trains. A CPU has one stream."""
        if self.kind == "cpu":
            yield
            return
        usual, other = torch.accelerator.current_stream(), torch.Stream(device=self.torch)
        other.wait_stream(usual)
        with other:
            yield
        usual.wait_stream(other)

    def waits(self, run: Callable[[], Any]) -> int:
        """How often `run` waits for the device."""
        if self.kind == "cuda":
            return _synchronisations(run)
        if self.kind == "cpu":
            with _Reads() as reads:
                run()
            return reads.count
        raise NoTwin(f"torch does not tell how often a program waits for {self.kind}")

    @contextmanager
    def not_waited_for(self) -> Iterator[None]:
        """A CPU plays a device whose values are read once a pass; the others are such devices."""
        with mock.patch.object(digest, "WAITED_FOR", frozenset()):
            yield

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Models there may be converted, so that the kit can show whether they are right."""
        with mock.patch.object(devices, "REVERSIBLE_ON", devices.REVERSIBLE_ON | {self.kind}):
            yield

    @contextmanager
    def compiling(self) -> Iterator[str]:
        """What `torch.compile` compiles by, in words. In a quick run on a CPU nothing generates code, which takes a
        minute and needs a C++ compiler."""
        if not (self.quick and self.kind == "cpu"):
            yield "inductor"
            return

        def traced(*args: Any, **how: Any) -> Any:
            return COMPILE(*args, backend="aot_eager", **{**how, "options": None})

        with mock.patch.object(torch, "compile", traced):
            yield "aot_eager, which traces and generates no code: inductor takes a minute on a CPU"


class _Reads(TorchDispatchMode):
    """How often a number is read, for which a program would wait on a GPU. Random states, which are compared, lie on
    the host there, too: bytes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        self.count += read and args[0].dtype is not torch.uint8
        return func(*args, **(kwargs or {}))


def _synchronisations(run: Callable[[], Any]) -> int:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(each.message) for each in said)
