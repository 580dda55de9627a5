"""`compile=blocks|graph` of `convert`: every branch compiled by itself, or a whole training pass as one graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.velocity import Velocity
from autorev.engine.mode import is_written_down
from autorev.engine.owned import is_fake
from autorev.engine.undisturbed import undisturbed
from autorev.errors import first_line
from autorev.integrations.transformers import without_cache
from autorev.keeps import NOTHING
from autorev.rewrite.block_forward import ReversibleForward
from autorev.rewrite.built import BuiltChain
from autorev.rewrite.traced_block import TracedBlock, dynamo_bypassing_wrapper
from autorev.workload import Call

_CALL = "_compiled_call_impl"
"""What `nn.Module.compile` sets."""
ROUNDING: dict[str, Any] = {"emulate_precision_casts": True}
"""For inductor: what is bfloat16 in the model's code is rounded to it, however it is fused. Both runs of a branch then
round alike."""
_compiled: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Model -> how `compile_whole` has it called."""


def compile_branches(forwards: Iterable[ReversibleForward]) -> None:
    """Each by itself; blocks that are compiled already stay so."""
    for forward in forwards:
        if not forward.is_compiled:
            forward.compiling.compile_branch()


def why_no_graph(model: nn.Module, built: list[BuiltChain], call: Call) -> str | None:
    """Why a training pass of the converted `model` is no single graph; None: it is one."""
    if dynamo_bypassing_wrapper is None:
        name = "torch._higher_order_ops.dynamo_bypassing_wrapper"
        return f"torch {torch.__version__} has no {name}, which torch 2.9 to 2.13 have; install one of these"
    for item in built:
        if why := _cannot_be_traced(item):
            return f"{item.chain.name}: {why}"
    if any(is_fake(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return "the model has no weights yet, so it cannot be tried"
    return _tried(model, call)


def _cannot_be_traced(item: BuiltChain) -> str | None:
    chain = item.chain
    if not isinstance(chain.arithmetic, FixedPoint):
        return "it is in float arithmetic"
    if not all(isinstance(forward, TracedBlock) for forward in item.forwards):
        return "its blocks are taken in steps or tiles, or are turns of a loop"
    if item.lanes > 1:
        return "its blocks carry several streams"
    if any(finding.multiplies for finding in item.findings):
        return "its blocks multiply their stream by a constant, which changes the unit of the state"
    if any(coupling.random or not isinstance(coupling, Velocity) for coupling in chain.couplings):
        return "its coupling is drawn anew for each pass, or has two streams"
    if any(keeps != NOTHING for keeps in chain.keeps):
        return "keep= and host= act on operators that a compiled graph does not show"
    return None


def _tried(model: nn.Module, call: Call) -> str | None:
    """The example call, compiled as in training, without a code generator."""
    args, kwargs = without_cache(model, call)
    compiled = torch.compile(model._call_impl, backend="aot_eager", fullgraph=True)
    try:
        with undisturbed(model), _training(model), torch.enable_grad():
            compiled(*args, **kwargs)
    except Exception as error:  # of any part of a compiler, or the model's own
        inner = getattr(error, "inner_exception", error)
        return first_line(inner)
    return None


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = True
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def compile_whole(model: nn.Module) -> None:
    """Calls of the model that record gradients run compiled; others as before: generation compiles nothing."""
    home = model.__dict__
    if home.get(_CALL) is not None:
        return  # the user's own
    plain: Any = model._call_impl
    graph: Any = torch.compile(plain, options=ROUNDING)

    def call(*args: Any, **kwargs: Any) -> Any:
        return graph(*args, **kwargs) if torch.is_grad_enabled() and not is_written_down() else plain(*args, **kwargs)

    home[_CALL] = _compiled[model] = call


def leave_uncompiled(model: nn.Module) -> None:
    """Undo `compile_whole`, in `model` and in models inside it."""
    for module in model.modules():
        call = _compiled.pop(module, None)
        if call is not None and module.__dict__.get(_CALL) is call:
            del module.__dict__[_CALL]
