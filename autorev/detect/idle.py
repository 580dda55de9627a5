"""Towers that the recorded call never came by: stacks of modules of which nothing can be said."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

from autorev.capture.record import RecordedCall
from autorev.format import format_count

_STACKS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_ABOUT_OTHERS = ("mask", "position", "cache", "past_", "output", "return_", "embeds", "labels", "type_ids", "logits")
"""What arguments are called that come beside a tower's own input."""


def idle_towers(recorded: RecordedCall) -> list[str]:
    """A sentence on each tower that did not run, with the arguments that the call left out."""
    root = recorded.root
    found = list(_idle(root.module, "", {id(call.module) for call in root.walk()}, set(recorded.readers)))
    given = {name for name, value in root.inputs().items() if value is not None}
    left_out = [name for name in named_inputs(root.module) if name not in given]
    inputs = f" ({', '.join(left_out)})" if left_out else ""
    return [
        f"{path} ({type(module).__name__}, {format_count(sum(p.numel() for p in module.parameters()))} parameters) was "
        f"not run by the example call, and is in no chain and in no figure: give a batch with its inputs{inputs}"
        for path, module in found
    ]


def named_inputs(module: nn.Module) -> list[str]:
    """The tensors that a module is made to be called with, by what its author called and annotated them as."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and "Tensor" in str(p.annotation)]
    return [name for name in named if not any(word in name for word in _ABOUT_OTHERS)]


def _idle(module: nn.Module, path: str, ran: set[int], read: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that hold a stack, and of which no module was called, and no tensor read."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        held = (*child.parameters(), *child.buffers())
        if any(id(inner) in ran for inner in child.modules()) or any(id(tensor) in read for tensor in held):
            if not isinstance(child, _STACKS):  # of blocks that a call skips, `not-called` tells
                yield from _idle(child, below, ran, read)
        elif held and any(isinstance(inner, _STACKS) and len(inner) > 1 for inner in child.modules()):
            yield below, child
