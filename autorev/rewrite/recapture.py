"""Cuts of a live block for the calls that it gets: a graph holds for one kind of call, and is made anew for another.

Two calls are of one kind when everything agrees that Python code may have decided by: constants, dtypes, training
flags, sub-modules (an adapter may have been injected). Sizes count as well, until two captures that differ in one size
give the same code: then the code seems not to depend on it. Every cut is compared with the block itself, bit for bit,
for each new combination of sizes that it is to serve.
"""

from __future__ import annotations

from collections import OrderedDict
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
from autorev.detect.cut import agree
from autorev.engine.chain import ORIGINAL, running
from autorev.errors import ConversionError

MOST_CUTS = 16
"""Cuts that one block keeps, the latest ones."""
MOST_SIZES = 1024
"""Combinations of sizes that one cut is known to serve; then it is compared anew."""


@dataclass(frozen=True, eq=False)
class Made:
    """A cut for one call."""

    cut: Any
    code: str
    """Of its graphs, as text: equal for cuts that do the same."""
    forward: Callable[..., Any]
    """Runs the whole block by the cut, as ordinary PyTorch."""


@dataclass(eq=False)
class _Entry:
    kind: Any
    sizes: tuple[int, ...]
    made: Made
    free: list[frozenset[int]] = field(default_factory=list)
    """Places in `sizes` that hold one size (a sequence's length, say) which the code does not seem to depend on."""
    served: set[tuple[int, ...]] = field(default_factory=set)
    """Sizes for which it was compared with the block."""

    def may_serve(self, sizes: tuple[int, ...]) -> bool:
        """Do the sizes differ only where the code does not seem to depend on them?"""
        free = {place for group in self.free for place in group}
        fixed = all(sizes[place] == size for place, size in enumerate(self.sizes) if place not in free)
        return fixed and all(len({sizes[place] for place in group}) == 1 for group in self.free)

    def generalise(self, sizes: tuple[int, ...]) -> None:
        """The same code was captured for `sizes`: where they differ by one size only, it depends on that no more."""
        changed = frozenset(place for place, (old, new) in enumerate(zip(self.sizes, sizes, strict=True)) if old != new)
        if len({(self.sizes[place], sizes[place]) for place in changed}) == 1:
            self.free.append(changed)

    def serve(self, sizes: tuple[int, ...]) -> Any:
        """The cut, which is known to hold for `sizes` from now on."""
        self.served = {*self.served, sizes} if len(self.served) < MOST_SIZES else {sizes}
        return self.made.cut


class Recapture:
    """The cuts of one block; emptied where the block is copied or pickled, as graphs belong to one live block."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": []}

    def cut_for(
        self,
        block: nn.Module,
        path: str,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        make: Callable[[tuple[Any, ...], dict[str, Any]], Made],
    ) -> Any:
        """The cut of `block` for this call, from `make` where there is none yet.

        Raises:
            ConversionError: the cut does not compute what `original`, the block's own forward, computes.
        """
        kind, sizes = _kind(block, args, kwargs)
        alike = [entry for entry in self.entries if entry.kind == kind]
        for entry in alike:
            if sizes in entry.served:
                return entry.made.cut
        for entry in alike:
            if entry.may_serve(sizes) and _holds(entry.made, block, original, args, kwargs):
                return entry.serve(sizes)
        made = make(args, kwargs)
        if not _holds(made, block, original, args, kwargs):
            raise ConversionError(
                f"{path}, taken apart into its steps, does not compute what it computes whole; use granularity='block' "
                "or exclude it, and please report the model"
            )
        for entry in alike:
            if entry.made.code == made.code:
                entry.generalise(sizes)
                return entry.serve(sizes)
        new = _Entry(kind, sizes, made)
        self.entries = [*self.entries[-MOST_CUTS + 1 :], new]
        return new.serve(sizes)


def _holds(
    made: Made, block: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Bit for bit; not asked where a cache is given, which the comparison would fill."""
    if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
        return True
    with torch.no_grad(), running(ORIGINAL), _without_hooks(block):
        return agree((original, made.forward), block, args, kwargs)


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
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t,), lambda packed: packed[0]), mode, _without_hooks(twin):
        yield record(twin, fake_args, fake_kwargs)


@contextmanager
def _without_hooks(block: nn.Module) -> Iterator[None]:
    """The user's hooks are for the user's calls: one that collects outputs must not collect these."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept = [(module, name, module.__dict__[name]) for module in block.modules() for name in names]
    try:
        for module, name, _ in kept:
            module.__dict__[name] = OrderedDict()
        yield
    finally:
        for module, name, hooks in kept:
            module.__dict__[name] = hooks


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
