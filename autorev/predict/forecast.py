"""From a workload and a setting to predictions: simulate each strategy, compose its step, price it on a device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autorev.analysis import Category, DeviceInfo, Prediction, Setting, Sweep
from autorev.capture.fake import fused_attention_dropout
from autorev.capture.record import record
from autorev.detect.chains import detect
from autorev.predict.compose import StepCost, compose
from autorev.predict.scaling import ScaledTrace
from autorev.predict.simulate import Layout, StepTrace, layout_of, simulate
from autorev.predict.strategies import STRATEGIES, Strategy
from autorev.predict.training import loss_function, optimizer_bytes
from autorev.workload import Call

RESERVE_BYTES = 2**30
"""What a framework's context and fragmentation take from a device before the first tensor; an estimate."""

MOST_CORRECTIONS = 5
"""Simulated steps to settle how far a strategy reaches; two are the rule."""
CLOSE = 0.002
"""Relative difference at which a proposed peak and the simulated one are the same."""

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
        """The strategies that say something about this model.

        `keep_last=1` spares the last block's recomputation for nothing when the step peaks in that block's backward. Where
        it peaks in the loss, what is kept is alive beside the logits: then `keep_last=0` is the better choice.
        """
        chosen = STRATEGIES if self.layout.sites else STRATEGIES[:1]
        if not self.reversible:
            return tuple(s for s in chosen if s.kind != "reversible")
        sample = next(s for s in chosen if s.name == "leapfrog")
        peaks = [
            self.peak(self.trace(replace(sample, keep_last=n), self.setting.batch, self.setting.sequence), sample)
            for n in (0, 1)
        ]
        keep_last = int(peaks[1] <= 1.001 * peaks[0])
        return tuple(
            replace(s, keep_last=keep_last, note=f"{s.note}; keep_last={keep_last}") if s.kind == "reversible" else s
            for s in chosen
        )

    def trace(self, strategy: Strategy, batch: int, sequence: int | None) -> StepTrace:
        """One simulated step."""
        with self.mode:
            call = self.example(batch, sequence)
            layout = self._layout_for(call)
            loss = loss_function(self.twin, self.setting.loss)
            fused: AbstractContextManager[None] = fused_attention_dropout() if self.device_kind == "cuda" else nullcontext()
            with fused:
                return simulate(self.twin, call, layout, strategy, loss)

    def _layout_for(self, call: Call) -> Layout:
        """Inline blocks are run from their graph, which holds for one shape: they are traced anew for another."""
        if not self.layout.outlined:
            return self.layout
        detection = detect(record(self.twin, *call))
        return layout_of(detection.chains, detection.refused, self.twin)

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

    def limit(self, strategy: Strategy, scaled: ScaledTrace, axis: str) -> tuple[int, ScaledTrace]:
        """The largest size along `axis` that fits the device, and the trace sharpened around it.

        The polynomial proposes a size and a simulated step at that size disposes.
        """
        room = self.device.memory_bytes - RESERVE_BYTES
        batch, sequence = self.setting.batch, self.setting.sequence
        most = 2**20 if axis == "batch" else self.longest_sequence or 2**24
        size = 0
        for _ in range(MOST_CORRECTIONS):
            curve = scaled
            size = largest(lambda n: self.peak(curve.at(n), strategy) <= room, most)  # noqa: B023 - used at once
            if size == 0 or size in scaled.points:
                break
            trace = self.trace(strategy, *((size, sequence) if axis == "batch" else (batch, size)))
            simulated, proposed = self.peak(trace, strategy), self.peak(scaled.at(size), strategy)
            scaled = scaled.with_point(size, trace)
            if simulated <= room and abs(simulated - proposed) <= CLOSE * proposed:
                break
        return size, scaled

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


