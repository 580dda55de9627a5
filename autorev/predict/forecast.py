"""From a workload and a setting to predictions: simulate each strategy, compose its step, price it on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autorev.analysis import Category, DeviceInfo, Prediction, Reach, Setting, Sweep
from autorev.predict.compose import StepCost, compose
from autorev.predict.scaling import ScaledTrace
from autorev.predict.simulate import Layout, StepTrace, simulate
from autorev.predict.strategies import STRATEGIES, Strategy
from autorev.predict.training import loss_function, optimizer_bytes
from autorev.workload import Call

RESERVE_BYTES = 2**30
"""What a framework's context and fragmentation take from a device before the first tensor; an estimate."""

Example = Callable[[int, int | None], Call]


@dataclass(frozen=True, eq=False)
class Forecaster:
    """A fake twin ready to be simulated; each method runs it a few times and counts."""

    twin: nn.Module
    mode: FakeTensorMode
    layout: Layout
    example: Example
    setting: Setting
    device: DeviceInfo
    device_kind: str
    reversible: bool
    """Are there chains to reverse?"""
    resizable: bool
    longest_sequence: int | None

    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies that say something about this model."""
        chosen = STRATEGIES if self.layout.sites else STRATEGIES[:1]
        return tuple(s for s in chosen if self.reversible or s.kind != "reversible")

    def trace(self, strategy: Strategy, batch: int, sequence: int | None) -> StepTrace:
        """One simulated step."""
        with self.mode:
            call = self.example(batch, sequence)
            loss = loss_function(self.twin, self.setting.loss)
            return simulate(self.twin, call, self.layout, strategy, loss)

    def cost(self, trace: StepTrace, strategy: Strategy) -> StepCost:
        """The step's memory and work, optimiser included."""
        state, temporary, _ = self.optimizer()
        return compose(trace, self.layout, state, temporary, strategy.kind == "offload")

    def optimizer(self) -> tuple[int, int, int]:
        """(state, temporary, moved) bytes of an update."""
        return optimizer_bytes(self.twin, self.setting.optimizer, self.device_kind)

    def prediction(self, strategy: Strategy, trace: StepTrace) -> Prediction:
        """The public form of a strategy's step."""
        cost = self.cost(trace, strategy)
        phase = max(cost.phase_peaks, key=lambda p: cost.phase_peaks[p])
        alive = cost.peak_categories[phase]
        return Prediction(
            strategy=strategy.name,
            peak_bytes=cost.phase_peaks[phase],
            phase=phase,
            categories={c.value: int(alive.get(c, 0)) for c in Category},
            phase_peaks=dict(cost.phase_peaks),
            kept_bytes=cost.kept_bytes,
            step_flops=cost.flops,
            step_seconds=self.seconds(cost),
            side_bits=strategy.side_bits,
            preserves_function=strategy.preserves_function,
            note=strategy.note,
        )

    def seconds(self, cost: StepCost) -> float:
        """Roofline: each kind of work takes at least its FLOPs or its bytes, and host traffic overlaps with all of it."""
        products = max(cost.flops / self.device.peak_flops, cost.matmul_bytes / self.device.bandwidth)
        moved = cost.other_bytes + self.optimizer()[2]
        on_device = products + moved / self.device.bandwidth
        return max(on_device, 2 * cost.host_bytes / self.device.host_bandwidth)

    # -- how far it goes -------------------------------------------------------------------------------------------

    def along_batch(self, strategy: Strategy, here: StepTrace) -> ScaledTrace:
        """The step at any batch size."""
        batch, sequence = self.setting.batch, self.setting.sequence
        # Not from a batch of one: kernels treat an axis of one element differently (views instead of copies).
        other = batch + 2 if batch > 1 else 3
        traces = {batch: here, other: self.trace(strategy, other, sequence)}
        if batch == 1:
            traces = {2: self.trace(strategy, 2, sequence), 3: traces[3]}
        points = tuple(sorted(traces))
        return ScaledTrace(points, tuple(traces[p] for p in points))

    def along_sequence(self, strategy: Strategy, here: StepTrace) -> ScaledTrace:
        """The step at any sequence length."""
        batch, sequence = self.setting.batch, self.setting.sequence
        assert sequence is not None
        limit = self.longest_sequence or 4 * sequence
        points = tuple(sorted({sequence, max(sequence // 2, 8), min(2 * sequence, max(limit, sequence // 4))}))
        if len(points) < 3:
            points = tuple(sorted({*points, max(sequence // 4, 4)}))
        traces = [here if p == sequence else self.trace(strategy, batch, p) for p in points]
        return ScaledTrace(points, tuple(traces))

    def peak(self, trace: StepTrace, strategy: Strategy) -> int:
        """Peak bytes of a trace."""
        return max(self.cost(trace, strategy).phase_peaks.values())

    def reach(self, strategy: Strategy, batches: ScaledTrace | None, lengths: ScaledTrace | None) -> Reach:
        """The largest batch and the longest sequence that fit the device."""
        room = self.device.memory_bytes - RESERVE_BYTES
        batch: int | None = None
        if batches is not None:
            batch = largest(lambda b: self.peak(batches.at(b), strategy) <= room, 2**20)
        length: int | None = None
        if lengths is not None:
            most = self.longest_sequence or 2**24
            length = largest(lambda s: self.peak(lengths.at(s), strategy) <= room, most)
        return Reach(strategy.name, batch, length)

    def sweep(self, axis: str, strategy: Strategy, scaled: ScaledTrace, values: tuple[int, ...]) -> Sweep:
        """Peaks along one axis, for the figures."""
        peaks = tuple(self.peak(scaled.at(value), strategy) for value in values)
        return Sweep(axis, strategy.name, values, peaks)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n <= `most` with `fits(n)`, for a test that turns from true to false once; 0 when none fits."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def powers_around(value: int, most: int) -> tuple[int, ...]:
    """Powers of two from an eighth of `value` up to `most`, with `value` itself."""
    first = max(value // 8, 1)
    values = {value}
    power = 1
    while power <= most:
        if power >= first:
            values.add(power)
        power *= 2
    return tuple(sorted(v for v in values if v <= max(most, value)))


def rename(prediction: Prediction, strategy: Strategy) -> Prediction:
    """The prediction of a strategy with the same memory and work under its own name."""
    return replace(
        prediction,
        strategy=strategy.name,
        note=strategy.note,
        preserves_function=strategy.preserves_function,
        side_bits=strategy.side_bits,
    )


