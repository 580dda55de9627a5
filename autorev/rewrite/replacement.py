"""An object in the place of one module's `forward`: how it is put there, found again, and taken out.

The class, the modules, the parameters, the hooks and the model's own loop stay as they are. The replacement is an
object in the module's `__dict__`; deleting it restores the module.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame

from autorev.engine.mode import ORIGINAL, mode
from autorev.errors import ConversionError
from autorev.rewrite.compiled import CompiledBlock, inside_of, never_compiled

HANDLE = "_autorev_replacements"
"""Where a module keeps its replaced forwards, the first one first: other libraries may wrap `forward` afterwards."""
_REPLICATE = "_replicate_for_data_parallel"
TO_BE_EXPORTED = (
    "call autorev.revert(model) first, or export a copy that is reverted: where gamma trained the model, that is "
    "another function, and autorev.verify says by how much"
)


class _NoCodeError(ConversionError, AttributeError):
    """To who asks whether it has code it has none, as it always was."""


@dataclass(eq=False)
class Replacement(ABC):
    """The base: an object in the place of one module's `forward`."""

    block: nn.Module
    path: str
    replaced: Callable[..., Any] | None = field(init=False, default=None)
    """An instance-level `forward` that was there before (another library's)."""
    reverted: bool = field(init=False, default=False)
    """Was it taken out, while somebody's wrapper still calls it? Then it does nothing."""

    def __post_init__(self) -> None:
        self.replaced = self.block.__dict__.get("forward")

    def install(self) -> None:
        """Put it in the place of the module's forward."""
        home = self.block.__dict__
        self.replaced = home.get("forward")
        home["forward"] = self
        home.setdefault(HANDLE, []).append(self)
        home[_REPLICATE] = self.replicate

    def remove(self) -> None:
        """Take it out; where a wrapper holds on to it, it passes calls through from now on."""
        home = self.block.__dict__
        self.reverted = True
        home[HANDLE].remove(self)
        if not home[HANDLE]:
            del home[HANDLE]
            home.pop(_REPLICATE, None)
        if home.get("forward") is self:
            if self.replaced is None:
                del home["forward"]
            else:
                home["forward"] = self.replaced

    def replicate(self) -> nn.Module:
        """`nn.DataParallel` copies modules by their attributes: a replica's forward runs the replica."""
        replica: nn.Module = type(self.block)._replicate_for_data_parallel(self.block)
        for number, replacement in enumerate(self.block.__dict__[HANDLE]):
            own = replacement.for_replica(replica)
            replica.__dict__[HANDLE] = [*replica.__dict__[HANDLE][:number], own]
            replica.__dict__["forward"] = own
            replica.__dict__[_REPLICATE] = own.replicate
        return replica

    def for_replica(self, replica: nn.Module) -> Replacement:
        """The same for a copy of the module."""
        own = copy.copy(self)
        own.block = replica
        return own

    @property
    def passes_through(self) -> bool:
        """Does it leave calls to the module's own forward?"""
        return self.reverted

    @property
    def original(self) -> Callable[..., Any]:
        """The module's own forward."""
        if self.replaced is not None:
            return self.replaced
        bound: Callable[..., Any] = type(self.block).forward.__get__(self.block)
        return bound

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def __name__(self) -> str:
        return "forward"

    @property
    def __self__(self) -> nn.Module:
        return self.block

    @property
    def __func__(self) -> Callable[..., Any]:
        return self.on

    @property
    def __code__(self) -> Any:
        raise self._no_code()

    @property
    def __globals__(self) -> Any:
        raise self._no_code()

    def _no_code(self) -> _NoCodeError:
        return _NoCodeError(
            f"{self.path or 'the model itself'} is converted by autorev, and its forward has no code that torch.export "
            f"or torch.jit.script could read; {TO_BE_EXPORTED}"
        )

    def on(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward of `module`: who knows it for a method (accelerate) binds it to a shallow copy of the module."""
        own = self
        if module is not self.block:
            own = copy.copy(self)
            own.block = module
        return own(*args, **kwargs)

    @never_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        callback = set_eval_frame(None)
        try:
            if self.passes_through:
                forward = self.original
                set_eval_frame(callback)
                return forward(*args, **kwargs)
            with inside_of(callback):
                return self.own()(*args, **kwargs) if mode() == ORIGINAL else self.run(args, kwargs)
        finally:
            set_eval_frame(callback)

    def own(self) -> Callable[..., Any]:
        """The module's own forward, compiled if the module is."""
        return self.original

    @abstractmethod
    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward, converted."""


@dataclass(eq=False)
class CompilingReplacement(Replacement):
    """One whose module's own forward is compiled where the module, or what calls it, is."""

    compiling: CompiledBlock = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.compiling = CompiledBlock(self.block)

    def for_replica(self, replica: nn.Module) -> Replacement:
        """It compiles the copy by itself."""
        own = super().for_replica(replica)
        assert isinstance(own, CompilingReplacement)
        own.compiling = CompiledBlock(replica, compiler=self.compiling.compiler)
        return own

    def own(self) -> Callable[..., Any]:
        """The module's own forward, compiled."""
        return self.compiling.compiled(self.original)


def replacements_of(model: nn.Module) -> Iterator[Replacement]:
    """Every replaced forward in `model`, whoever has wrapped it since.

    Raises:
        ConversionError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"this is of models, torch.nn.Modules, and a {type(model).__name__} is none")
    for module in model.modules():
        own = getattr(module.__dict__.get("forward"), "__func__", None) is inspect.getattr_static(
            type(module), "forward"
        )
        if HANDLE in module.__dict__ and (own or "forward" not in module.__dict__):
            # A library that had wrapped the forward before has put back what it had found: the conversion is gone.
            for lost in module.__dict__[HANDLE][::-1]:
                lost.remove()
        yield from module.__dict__.get(HANDLE, ())


@contextmanager
def installed(forwards: Iterable[Replacement]) -> Iterator[None]:
    """While it lasts, they are in place."""
    with ExitStack() as stack:
        for forward in forwards:
            forward.install()
            stack.callback(forward.remove)
        yield
