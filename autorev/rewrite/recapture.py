"""Cuts of a live block for the calls that it gets: a graph holds for one kind of call, and is made anew for another.

Two calls are of one kind when everything agrees that Python code may have decided by: constants, dtypes, training
flags, sub-modules (an adapter may have been injected). Sizes count as well, until two captures that differ in a size
give the same code: then the code does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from autorev.capture.fake import fake_copy, new_fake_mode
from autorev.capture.record import RecordedCall, record
from autorev.capture.tracer import CapturedBlock
from autorev.errors import ConversionError

MOST_CUTS = 16
"""Cuts that one block keeps, the latest ones."""

Make = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, str]]
"""A call -> the cut for it, and its code as text."""


@dataclass(eq=False)
class _Entry:
    kind: Any
    sizes: tuple[int, ...]
    cut: Any
    code: str
    free: list[frozenset[int]] = field(default_factory=list)
    """Places in `sizes` that hold one size (a sequence's length, say) which the code does not depend on."""

    def serves(self, sizes: tuple[int, ...]) -> bool:
        """Is a call of these sizes one of the cut's?"""
        free = {place for group in self.free for place in group}
        fixed = all(sizes[place] == size for place, size in enumerate(self.sizes) if place not in free)
        return fixed and all(len({sizes[place] for place in group}) == 1 for group in self.free)

    def generalise(self, sizes: tuple[int, ...]) -> bool:
        """The same code served `sizes`: where they differ by one size only, it does not depend on that."""
        changed = frozenset(place for place, (old, new) in enumerate(zip(self.sizes, sizes, strict=True)) if old != new)
        if len({(self.sizes[place], sizes[place]) for place in changed}) != 1:
            return False
        self.free.append(changed)
        return True


class Recapture:
    """The cuts of one block; emptied where the block is copied or pickled, as graphs belong to one live block."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": []}

    def cut_for(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], make: Make) -> Any:
        """The cut for this call, from `make` where there is none yet."""
        kind, sizes = _kind(block, args, kwargs)
        alike = [entry for entry in self.entries if entry.kind == kind]
        for entry in alike:
            if entry.serves(sizes):
                return entry.cut
        cut, code = make(args, kwargs)
        for entry in alike:
            if entry.code == code and entry.generalise(sizes):
                return entry.cut
        self.entries = [*self.entries[-MOST_CUTS + 1 :], _Entry(kind, sizes, cut, code)]
        return cut


def _kind(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    leaves, structure = tree_flatten((args, kwargs))
    sizes: list[int] = []
    about: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            about.append((leaf.dim(), leaf.dtype, leaf.requires_grad))
            sizes += leaf.shape
        else:
            about.append(leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf))
    modules = tuple((id(module), module.training) for module in block.modules())
    flags = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return (structure, tuple(about), modules, flags), tuple(sizes)


@contextmanager
def fake_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[RecordedCall]:
    """A recorded call of a weightless copy of `block` with its own forward; fake tensors are switched on.

    Raises:
        CaptureError: the block cannot be copied.
    """
    mode = new_fake_mode()
    twin = fake_copy(block, mode)
    replaced = getattr(twin.__dict__.pop("forward", None), "replaced", None)
    if replaced is not None:
        twin.__dict__["forward"] = replaced
    fake_args, fake_kwargs = fake_copy((args, kwargs), mode)
    # A checkpoint around the model must not take what is saved here for its own.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t,), lambda packed: packed[0]), mode:
        yield record(twin, fake_args, fake_kwargs)


def on_live(captured: CapturedBlock, path: str, live: nn.Module) -> CapturedBlock:
    """The capture of a weightless copy, as one of `live`, with its real constants.

    Raises:
        ConversionError: a tensor that the code reaches by closure cannot be found in the live block.
    """
    constants = {name: _real(value, captured.module, path, live) for name, value in captured.constants.items()}
    return replace(captured, module=live, constants=constants)


def _real(value: torch.Tensor, twin: nn.Module, path: str, live: nn.Module) -> torch.Tensor:
    if not hasattr(value, "fake_mode"):
        return value
    for name, child in twin.named_modules():
        for key, held in vars(child).items():
            if held is value:
                found: torch.Tensor = getattr(live.get_submodule(name), key)
                return found
    raise ConversionError(
        f"the code of {path} makes a constant tensor of shape {tuple(value.shape)} that its graph cannot hold; use "
        "granularity='block', or exclude it"
    )
