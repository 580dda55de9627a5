"""A training step of the example call, on fake tensors; and what helps in it where no block can be reversed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain as joined
from typing import Any

import torch
from torch import nn

from autorev.analysis import Recommendation
from autorev.capture.fake import DATA_DEPENDENT, fake_copy
from autorev.capture.source import raised_line
from autorev.detect.finding import Finding
from autorev.errors import AutorevError, first_line, message_of
from autorev.format import format_bytes, plural
from autorev.methods import Method
from autorev.prediction.layout import Layout, layout_of
from autorev.prediction.simulate import StepTrace, simulate
from autorev.prediction.stored import grown_kept, grown_peak
from autorev.prediction.training import own_loss
from autorev.workload import Call

_HELPING = {
    "checkpoint": "around every block",
    "offload": "the inputs of the blocks wait in the host's memory",
    "checkpoint:tile=auto": "what acts on each position alone runs a tile at a time, too",
}
"""Methods for blocks of any kind, and what they do."""


def example_step(
    twin: nn.Module, call: Call, chains: Sequence[list[Finding]], others: Sequence[Finding], method: Method
) -> tuple[Layout, StepTrace]:
    """One step of the fake `twin`, with these chains of blocks, and the other blocks beside them, under `method`.

    Raises:
        AutorevError: there is nothing to simulate it on.
        Exception: whatever is wrong with a backward without values.
    """
    owned = joined(twin.parameters(), twin.buffers())
    mode: Any = next((tensor.fake_mode for tensor in owned if hasattr(tensor, "fake_mode")), None)
    if mode is None:
        raise AutorevError("the model has neither parameters nor buffers")
    with torch.inference_mode(False), torch.enable_grad(), mode:
        call = fake_copy(call, mode)
        layout = layout_of(list(chains), list(others), twin).under(method)
        if len(layout.lengths) != len(chains):
            raise AutorevError("the turns of a loop hand on more than their stream, and cannot be told apart")
        return layout, simulate(twin, call, layout, method, own_loss, counting_work=False)


def why_unknown(error: Exception) -> str:
    """Why a step could not be simulated."""
    if isinstance(error, DATA_DEPENDENT):
        return (
            f"its forward looks at the values of its tensors, {raised_line(error)}, as where tokens choose their "
            "experts, and a simulation has none; autorev.profile(model, batch), before the conversion, measures it"
        )
    return message_of(error) if isinstance(error, AutorevError) else first_line(error)


def plan_without_chains(twin: nn.Module, call: Call, refused: Sequence[Finding]) -> Recommendation:
    """How to train a model none of whose blocks can be reversed: PyTorch's own ways, lowest peak of the step first."""
    none = f"none of the {plural(len(refused), 'block')} can be reversed"
    if not any(finding.can_be_checkpointed for finding in refused):
        why = f"{none}, and no checkpoint can stand around them: they are turns of a loop, or must not run twice"
        return Recommendation(None, why, ("give what a turn of the loop does a module of its own",))
    put = 'autorev.convert(model, batch, method="{}") puts it in place'.format
    peaks: dict[str, int] = {}
    kept: dict[str, int] = {}
    try:
        for name in ("plain", *_HELPING):
            method = Method.parse(name)
            try:
                layout, trace = example_step(twin, call, (), refused, method)
            except AutorevError:
                if method.tile is None:
                    raise
                continue  # nothing in the blocks acts on each position alone
            peaks[name], kept[name] = grown_peak(trace, layout), grown_kept(trace, layout)
    except Exception as error:  # a backward without values, of anybody's code
        why = f"{none}; a checkpoint around each keeps its input alone, whatever it computes"
        return Recommendation(
            "checkpoint", f"{why} (how much that saves is not known: {why_unknown(error)})", (put("checkpoint"),)
        )
    best = "checkpoint" if peaks["checkpoint"] < peaks["plain"] else "plain"
    why = (
        f"{none}, and a checkpoint can stand around each: the step of the example call then peaks at "
        f"{format_bytes(peaks['checkpoint'])} instead of {format_bytes(peaks['plain'])} beside weights, their "
        f"gradients and optimiser state, and keeps {format_bytes(kept['checkpoint'])} instead of "
        f"{format_bytes(kept['plain'])} for backward"
    )
    steps = [
        f"{name}: {what}; a peak of {format_bytes(peaks[name])}: {put(name)}"
        for name, what in sorted(_HELPING.items(), key=lambda item: peaks.get(item[0], 0))
        if name in peaks and (name == "checkpoint" or peaks[name] < peaks["checkpoint"])
    ]
    return Recommendation(
        best, why, (*steps, "of a model that autorev builds itself, autorev.fit finds the fastest that fits")
    )
