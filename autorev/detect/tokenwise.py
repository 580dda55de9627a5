"""Which modules act on each position of their input alone, proved on the operators of a call.

Such a module can be run on a few tokens at a time: linear layers, norms over features, activations and products, and
what is made of them. Attention, convolutions and pooling over positions, and routing, mix positions.

The call is run on fake tensors, for several numbers of positions, and every operator is asked where the positions of
its input are in its result (`positions`). Names of modules and classes tell nothing here. What operators do not show
ends the proof, too: a backward of its own, a hook on a tensor, state that is written, numbers drawn by Python.

Where positions meet in one call of causal attention, and nowhere else, a module can be run so, too (`causal`).
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from autorev.capture.record import ModuleCall
from autorev.detect.causal import ATTENTION, CausalAttention
from autorev.detect.masks import OperatorsAndMask, mask_among
from autorev.detect.own_gradients import refuse_own_gradients
from autorev.detect.positions import LAYOUT, MixesError, Operators, Positions
from autorev.errors import one_line
from autorev.hush import logs_hushed

WORTH = 2.0
"""A module that keeps less for backward, in sizes of its input, is not worth tiling."""
Computed = list[tuple[str, str]]
MANY = 2**16
"""Positions of the longest call that is tried; fake tensors take no memory."""


HERE = "the tensor"


@dataclass(frozen=True)
class TokenWise:
    """A module that acts on each position alone."""

    path: str
    axis: int
    """Of its input and of its output, whose positions are told apart: the longest but the last."""
    saved: float
    """What it keeps for backward, in sizes of its input."""
    draws_random: bool
    dims: int = 3
    """Of its input."""
    causal: bool = False
    """Does a position look at those before it, in one call of attention?"""
    mask: int | None = None
    """Which of the tensors that it is called with is a mask for its attention; that is causal as far as the mask is."""
    unmasked: bool = False
    """Is its attention causal by itself where it is called without the mask? So it is taken to be with a mask that has
    no values."""
    returned: Any = HERE
    """What the module returns, with `HERE` in the place of its one tensor."""


@dataclass(frozen=True)
class Mixing:
    """A module that does not, and why."""

    path: str
    reason: str


def token_wise(call: ModuleCall, axis: int | None = None, causal: bool = False) -> TokenWise | Mixing:
    """Does the module of `call`, recorded on fake tensors, act on each position alone, or (`causal`) do so but for one
    call of causal attention? `axis`: where the positions are, if not in the longest."""
    known = _answers.setdefault(call, {})
    if (axis, causal) not in known:
        known[axis, causal] = _answer(call, axis, causal)
    return known[axis, causal]


_answers: WeakKeyDictionary[ModuleCall, dict[tuple[int | None, bool], TokenWise | Mixing]] = WeakKeyDictionary()
"""Of recorded calls: every simulated step asks for those that it runs."""


def _answer(call: ModuleCall, axis: int | None, causal: bool) -> TokenWise | Mixing:
    hushed = logs_hushed("torch._subclasses.fake_tensor", logging.CRITICAL + 1)
    try:
        given = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, torch.Tensor)]
        with hushed, (getattr(given[0], "fake_mode", None) if given else None) or nullcontext():
            return _proved(call, axis, causal)
    except MixesError as error:
        return Mixing(call.path, str(error))
    except Exception as error:
        return Mixing(call.path, f"it cannot be run by itself ({one_line(error)})")


def _proved(call: ModuleCall, axis: int | None, causal: bool) -> TokenWise:
    if has_hooks_inside(call.module):
        raise MixesError(HOOKED)
    given = _given(call, axis, causal)
    positions, before, drawn = given.first.shape[given.axis], _held(call.module), _drawn()
    whole, returned = _computed(call, given, positions)
    if _held(call.module) != before:
        raise MixesError("its forward writes to attributes of the module")
    if call.buffers_written:
        raise MixesError(f"it updates {', '.join(call.buffers_written)}")
    if _drawn() != drawn:
        raise MixesError("it draws random numbers of Python or numpy")
    for other in (positions - 1, 2, 1, *([MANY] if hasattr(given.first, "fake_mode") else [])):
        found, other_returned = _computed(call, given, other)
        if returned != other_returned:
            raise MixesError("what it returns beside a tensor hangs on the number of positions")
        if found != whole and (other > 1 or _without_layout(found) != _without_layout(whole)):
            raise MixesError(f"its code does something else for {'more' if other == MANY else 'fewer'} positions")
    saved, dims = _saved(call) / max(_bytes(given.first), 1), given.first.dim()
    unmasked = given.mask is not None and _attends_without_it(call, given)
    attends = any(name == ATTENTION for name, _ in whole)
    return TokenWise(call.path, given.axis, saved, call.draws_random, dims, attends, given.mask, unmasked, returned)


def _attends_without_it(call: ModuleCall, given: _Given) -> bool:
    try:
        return bool(_computed(call, given, 2, masked=False))
    except Exception:  # its code may need the mask, whatever it says then
        return False


HOOKED = "a module in it has a hook, which is to see all positions"
_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks_inside(module: nn.Module) -> bool:
    """Would anybody's hook see a tile? Those of the module itself see all positions."""
    return any(vars(child)[kind] for child in module.modules() if child is not module for kind in _KINDS)


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def kind_of(module: nn.Module, structure: Any) -> Any:
    """What a proof holds for, to be compared: the modules, how they are set, and how they are called."""
    leaves, spec = tree_flatten(structure)
    given = tuple(map(_set_to, leaves))
    held = ((name, type(home), *_plain_of(home), *_plain_of(type(home))) for name, home in module.named_modules())
    return str(spec), given, tuple(held)


def _plain_of(home: Any) -> Iterator[tuple[str, Any]]:
    plain = (*_PLAIN, FunctionType, BuiltinFunctionType)
    return ((key, value) for key, value in vars(home).items() if isinstance(value, plain) and key[:2] != "__")


def _set_to(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.dim(), None if leaf.is_floating_point() else leaf.dtype
    return leaf if isinstance(leaf, _PLAIN) else type(leaf)


def _held(module: nn.Module) -> list[Any]:
    """What modules hold, to be compared: which objects, and how often tensors were written to."""

    def seen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return id(value), value._version
        if isinstance(value, dict):
            return id(value), [(key, seen(item)) for key, item in value.items() if not isinstance(item, nn.Module)]
        return id(value), [seen(item) for item in value] if isinstance(value, list | tuple | set | deque) else []

    return [(id(home), seen(vars(home))) for home in module.modules()]


def _drawn() -> Any:
    """Where Python's and numpy's random numbers are."""
    numpy: Any = np.random.get_state()  # noqa: NPY002 - the one that `np.random.rand` draws from
    return random.getstate(), bytes(numpy[1]), numpy[2:]


def tileable(call: ModuleCall, causal: bool = False) -> Iterator[TokenWise | Mixing]:
    """Of the modules that the module of `call` calls, the largest that act on each position alone, or attend causally
    (`causal`), and keep enough for backward to be worth it; of the others that keep as much, why they do not."""
    for child in call.children:
        found = token_wise(child)
        if causal and isinstance(found, Mixing):
            found = token_wise(child, causal=True)
        if isinstance(found, TokenWise):
            if found.saved >= WORTH:
                yield found
            continue
        below = list(tileable(child, causal))
        yield from below
        if not any(isinstance(one, TokenWise) for one in below):
            yield found


@dataclass(frozen=True)
class _Given:
    """What a module is called with."""

    tensors: list[torch.Tensor]
    axis: int
    """Of their positions."""
    causal: bool
    """May they meet in attention?"""
    mask: int | None

    @property
    def first(self) -> torch.Tensor:
        return self.tensors[0]

    def like(self, length: int) -> list[torch.Tensor]:
        """Of another number of positions; what there is one of in the example (a batch of one) need not stay one."""
        others = [tensor for number, tensor in enumerate(self.tensors) if number != self.mask]
        alone = [n for n in range(self.first.dim() - 1) if all(t.shape[n : n + 1] == (1,) for t in others)]
        made = []
        for number, tensor in enumerate(self.tensors):
            if number == self.mask:
                made.append(tensor.new_empty((*tensor.shape[:-2], length, length)))
                continue
            shape = [2 if n in alone else size for n, size in enumerate(tensor.shape)]
            shape[self.axis] = length
            fresh = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            made.append(fresh.requires_grad_().clone() if tensor.is_floating_point() else fresh)
        return made


def _given(call: ModuleCall, axis: int | None, causal: bool) -> _Given:
    leaves = tree_leaves((call.args, call.kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    for leaf in leaves:
        if not isinstance(leaf, (torch.Tensor, *_PLAIN)):
            raise MixesError(f"it is called with a {type(leaf).__name__}, which may hold anything")
    if not given or not given[0].is_floating_point() or given[0].dim() < 2:
        raise MixesError("its first argument is no stream")
    axis = position_axis(given[0]) if axis is None else axis
    if given[0].shape[axis] < 3:
        raise MixesError("there are too few positions to tell")
    return _Given(given, axis, causal, mask_among(given, axis, causal))


def position_axis(first: torch.Tensor) -> int:
    """The longest axis but the last; of several, the last of these."""
    sizes = first.shape[:-1]
    return max(range(len(sizes)), key=lambda axis: (sizes[axis], axis))


def _computed(call: ModuleCall, like: _Given, length: int, masked: bool = True) -> tuple[Computed, Any]:
    """The operators of a call on `length` positions, with the numbers that they are given; and what it returned, but
    for the tensor. `masked`: with its mask, if there is one.

    Raises:
        MixesError: one of them, or the result, does not keep positions apart.
    """
    leaves, spec = tree_flatten((call.args, call.kwargs))
    given = like.like(length)
    mask = None if like.mask is None else given[like.mask]
    unmarked = [tensor for tensor in given if tensor is not mask]
    fresh = iter(tensor if masked or tensor is not mask else None for tensor in given)
    args, kwargs = tree_unflatten([next(fresh) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
    attending = OperatorsAndMask(unmarked, like.axis, length, mask)
    watch, attention = (
        (attending, CausalAttention(attending)) if like.causal else (Operators(given, like.axis, length), nullcontext())
    )
    versions = [tensor._version for tensor in given]
    with torch.enable_grad(), watch, attention:
        result, returned = _one_tensor(call.module.forward(*args, **kwargs))
    if watch.refused is not None:
        raise watch.refused
    if [tensor._version for tensor in given] != versions:
        raise MixesError("it writes to its input")
    found = watch.positions(result)
    kept = found == Positions(like.axis) or (length == 1 and found is not None)
    if not kept or result.shape[: like.axis + 1] != given[0].shape[: like.axis + 1]:
        raise MixesError("its result has no value for each position")
    refuse_own_gradients(result, watch)
    if like.causal and length == 2:  # autograd itself says whether what it saved was written to since
        torch.autograd.grad(result, [tensor for tensor in given if tensor.requires_grad], torch.ones_like(result))
    return watch.computed, returned


def _one_tensor(result: Any) -> tuple[torch.Tensor, Any]:
    """The tensor that a module returned, and what it returned with `HERE` in its place."""
    leaves = tree_leaves(result)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if len(tensors) != 1 or not all(isinstance(leaf, _PLAIN) for leaf in leaves if leaf is not tensors[0]):
        raise MixesError(f"it returns a {type(result).__name__}, and not one tensor")
    return tensors[0], tree_map(lambda leaf: HERE if leaf is tensors[0] else leaf, result)


def _without_layout(computed: Computed) -> Computed:
    """Products of matrices are by one operator or by another as their memory lies."""
    alike = {"bmm": "mm", "baddbmm": "addmm"}
    return [(alike.get(name, name), numbers) for name, numbers in computed if name not in LAYOUT]


def _saved(call: ModuleCall) -> int:
    """Bytes that a call saves for backward, besides its inputs and parameters."""
    args, kwargs = call.args, call.kwargs
    known = [*tree_leaves((args, kwargs)), *call.module.parameters(), *call.module.buffers()]
    mine = {leaf.untyped_storage()._cdata for leaf in known if isinstance(leaf, torch.Tensor)}
    found: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in mine:
            found[storage._cdata] = storage
        return tensor.detach()  # with its graph, what a node returned and saved would never be freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call.module.forward(*args, **kwargs)
    return sum(storage.nbytes() for storage in found.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
