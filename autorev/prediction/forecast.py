"""From a workload and a setting to predictions: simulate each method, compose its step, price it on a device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autorev.analysis import Category, DeviceInfo, Prediction
from autorev.capture.fake import every_layer_kept, fused_attention_dropout
from autorev.capture.record import record
from autorev.detect.chains import detect
from autorev.engine.past import attending_as_a_gpu
from autorev.errors import ConversionError, SettingError
from autorev.methods import PREDICTED, Method
from autorev.optimizers import Optimizer
from autorev.own_mode import OwnMode
from autorev.prediction.compose import StepCost, compose
from autorev.prediction.layout import Layout, layout_of
from autorev.prediction.scaling import ScaledTrace
from autorev.prediction.sharding import Division
from autorev.prediction.simulate import StepTrace, simulate
from autorev.prediction.stored import blocks_to_store
from autorev.prediction.training import DTYPES, loss_function
from autorev.prediction.ulysses import Ulysses
from autorev.prediction.update import Update, Updated, update_of, updated_by
from autorev.rewrite.tiled_forward import tiled_forwards
from autorev.setting import Setting
from autorev.workload import Call

PROBES = (32, 64, 96)
"""Sequence lengths at which a model is simulated that walks through its tokens one at a time."""

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
    walks: bool
    """Does the model walk through the sequence token by token, in Python? Then long ones are extrapolated."""
    walks_batch: bool = False
    """Likewise through the batch?"""
    division: Division | None = None
    """Among several GPUs."""
    probed: dict[tuple[Method, int], ScaledTrace] = field(default_factory=dict)
    """Method and batch -> its steps at `PROBES`."""
    simulated: dict[Any, tuple[list[int], StepTrace]] = field(default_factory=dict)
    """What blocks are run and how, batch and sequence -> the numbers of these blocks, and the step: what differs only
    in how many blocks are stored, or keep something, is simulated once."""

    def methods(self) -> tuple[Method, ...]:
        """The methods that say something about this model, with `keep_last` chosen."""
        chosen = [Method.parse(name) for name in (PREDICTED if self.layout.sites else PREDICTED[:1])]
        tiled, findings = [method for method in chosen if method.tile is not None], self.layout.run_findings
        try:
            _ = tiled and tiled_forwards(self.twin, findings, "auto", as_long=False)
        except ConversionError:
            chosen = [method for method in chosen if method not in tiled]
        return tuple(self.settled(m) for m in chosen if self.reversible or not m.reversible)

    def settled(self, method: Method) -> Method:
        """A reversible method with the `keep_last` that `convert` chooses for a step of the setting's size."""
        if not method.reversible or method.keep_last != "auto":
            return method
        if method.in_pieces:
            return replace(method, keep_last=0)
        alike, size = method.of_all_blocks, (self.setting.batch, self.setting.sequence)
        nothing, last = (self.trace(replace(alike, keep_last=n), *size) for n in (0, 1))
        stored = blocks_to_store(nothing, last, self.layout)
        return replace(method, keep_last=stored[0] if len(set(stored)) == 1 else stored)

    def trace(self, method: Method, batch: int, sequence: int | None) -> StepTrace:
        """One simulated step; of a model that walks through long sequences, the polynomial through short ones."""
        if self.walks and sequence is not None and sequence > PROBES[-1]:
            if (method, batch) not in self.probed:
                probes = tuple(self.trace(method, batch, probe) for probe in PROBES)
                self.probed[method, batch] = ScaledTrace(PROBES, probes)
            return self.probed[method, batch].at(sequence)
        layout = self.layout.under(method)
        active = sorted(layout.active)
        alike = tuple((s.chain, s.kind, s.stored, s.keeps) for s in map(layout.sites.__getitem__, active))
        known = replace(method, keep_last="auto", keep=None, host=None), batch, sequence, alike
        if known not in self.simulated:
            self.simulated[known] = active, self._simulate(method, batch, sequence)
        before, trace = self.simulated[known]
        return trace if before == active else trace.of_blocks(dict(zip(before, active, strict=True)))

    def _simulate(self, method: Method, batch: int, sequence: int | None) -> StepTrace:
        degree = self.setting.sequence_parallel
        attention = Ulysses(degree)
        with self.mode:
            call = self.example(batch, sequence if sequence is None else -(-sequence // degree))
            layout = self._layout_for(call).under(method)
            loss = loss_function(self.twin, self.setting.loss)
            with (
                fused_attention_dropout() if self.device_kind == "cuda" else nullcontext(),
                attending_as_a_gpu() if self.device_kind == "cuda" else nullcontext(),
                attention if degree > 1 else nullcontext(),
            ):
                autocast = DTYPES[self.setting.autocast] if self.setting.autocast else None
                accumulated = self.setting.accumulate > 1
                taken = self._taken_in_backward()
                trace = simulate(
                    self.twin,
                    call,
                    layout,
                    method,
                    loss,
                    autocast=autocast,
                    accumulated=accumulated,
                    taken=taken,
                    whole_attention=degree > 1,
                )
        if degree > 1 and not attention.calls:
            raise SettingError(
                f"{type(self.twin).__name__} calls no scaled_dot_product_attention, whose heads `sequence_parallel` "
                "divides; leave it out"
            )
        return trace

    def _layout_for(self, call: Call) -> Layout:
        """Inline blocks are run from their graph, which holds for one shape: they are traced anew for another."""
        if not self.layout.outlined:
            return self.layout
        detection = detect(record(self.twin, *call))
        return layout_of(detection.chains, detection.refused, self.twin)

    def cost(self, trace: StepTrace, method: Method) -> StepCost:
        """The step's memory and work, optimiser included."""
        update = self.update()
        layout = self.layout.under(method)
        return compose(trace, layout, update.state, update.temporary, self.division)

    def update(self) -> Update:
        """What the optimiser takes."""
        each = self.updated()
        return update_of(each) if self.division is None else self.division.update(each)

    def updated(self) -> list[Updated]:
        """The parameters that train."""
        return updated_by(self.twin, Optimizer.parse(self.setting.optimizer), self.device_kind)

    def standing(self, trace: StepTrace) -> int:
        """Bytes that are alive before the step."""
        more = 0 if self.division is None else self.division.standing().total()
        return sum(trace.start.values()) + more + self.update().state

    def _taken_in_backward(self) -> dict[nn.Parameter, int]:
        """What the update of each parameter takes whose gradient it frees."""
        return {one.parameter: one.temporary for one in self.updated() if one.frees_gradient}

    def prediction(self, method: Method, trace: StepTrace) -> Prediction:
        """The public form of a method's step."""
        cost = self.cost(trace, method)
        phase = max(cost.phase_peaks, key=lambda p: cost.phase_peaks[p])
        alive = cost.peak_categories[phase]
        return Prediction(
            method=method.known_as,
            peak_bytes=cost.phase_peaks[phase],
            phase=phase,
            categories={c.value: int(alive.get(c, 0)) for c in Category},
            phase_peaks=dict(cost.phase_peaks),
            kept_bytes=cost.kept_bytes,
            step_flops=cost.flops * self.setting.accumulate,
            step_seconds=self.seconds(cost),
            side_bits=trace.side_bits,
            preserves_function=method.preserves_function,
            host_bytes=cost.host_bytes + self.update().host,
            note=_note(method),
            keep_last=tuple(method.stored_of(chain) for chain in range(len(self.layout.lengths)))
            if method.reversible
            else (),
        )

    def peak(self, trace: StepTrace, method: Method) -> int:
        """Peak bytes of a step."""
        return max(self.cost(trace, method).phase_peaks.values())

    def seconds(self, cost: StepCost) -> float:
        """Roofline: matrix products take their FLOPs or their bytes, all else its bytes; host traffic overlaps."""
        products = max(cost.flops / self.device.peak_flops, cost.matmul_bytes / self.device.bandwidth)
        on_device = products + cost.other_bytes / self.device.bandwidth
        a_pass = max(on_device, 2 * cost.host_bytes / self.device.host_bandwidth)
        update = self.update()
        after = update.moved / self.device.bandwidth + update.linked / self.device.host_bandwidth
        return self.setting.accumulate * a_pass + after


def walks_through_sequence(twin: nn.Module, example: Example, batch: int) -> bool:
    """Does the number of operations grow with the sequence (Mamba without its kernels, recurrent layers)?

    Called under the twin's fake mode.
    """
    counts = []
    for sequence in (16, 32):
        counter = _OperationCount()
        args, kwargs = example(batch, sequence)
        try:
            with torch.no_grad(), every_layer_kept(), counter:
                twin(*args, **kwargs)
        except Exception:  # a model that cannot be so short; whether it can be called at all is seen elsewhere
            return False
        counts.append(counter.count)
    return counts[1] > 1.2 * counts[0]


class _OperationCount(OwnMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace != "prim"
        return func(*args, **(kwargs or {}))


def _note(method: Method) -> str:
    if not method.reversible:
        return method.known.source
    stored = method.keep_last if isinstance(method.keep_last, tuple) else (method.keep_last,)
    return f"{method.preset.numbers}; keep_last={', '.join(map(str, stored))}"
