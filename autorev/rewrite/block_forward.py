"""What stands in for a block's `forward` once it is converted: it finds the stream, and takes the block as one step.

The class, the modules, the parameters, the hooks and the model's own loop stay as they are. The replacement is an
object in the block's `__dict__`; deleting it restores the block.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from autorev.detect.ends import find_stream, leaves, put
from autorev.engine.chain import ORIGINAL, ReversibleChain, Site, last_number, mode, take_step
from autorev.errors import ConversionError


@dataclass(eq=False)
class ReversibleForward(ABC):
    """The base: what a converted block of either granularity knows."""

    block: nn.Module
    path: str
    chain: ReversibleChain
    numbers: tuple[int, ...]
    """The chain's step that each call of the block in one forward pass begins with; one, unless weights are shared."""
    argument: str
    """The argument that carries the stream: `hidden_states`, `states[0]`."""
    output_at: tuple[Any, ...]
    """Where the stream is in what the block returns."""
    written: tuple[str, ...]
    overwrites: bool
    replaced: Callable[..., Any] | None
    """An instance-level `forward` that was there before (another library's)."""
    positional: tuple[str, ...] = field(init=False)
    """The names of the block's positional parameters."""
    rest: str = field(init=False)
    """The name of its `*args`."""

    def __post_init__(self) -> None:
        parameters = list(self.__signature__.parameters.values())
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = tuple(p.name for p in parameters if p.kind in kinds)
        self.rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")

    @property
    def original(self) -> Callable[..., Any]:
        """The block's own forward."""
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, as a step of its chain."""
        if mode() == ORIGINAL:
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return torch._dynamo.disable(self.run)(args, kwargs)
        return self.run(args, kwargs)

    @abstractmethod
    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward, with the block's steps taken in its chain."""

    def _refuse_transforms(self) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
            raise ConversionError(
                f"{self.path} is reversible: transforms of torch.func (grad, vmap, jvp, ...) and forward-mode "
                "derivatives cannot follow the state that it keeps beside autograd; call autorev.revert(model) first"
            )

    def _stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], torch.Tensor]:
        """Where the stream is among the arguments, and the stream."""
        self._refuse_transforms()
        try:
            place, stream = find_stream(self._named(args, kwargs), self.argument, args, kwargs)
        except (KeyError, IndexError, TypeError, ValueError):
            place, stream = (), None
        if not isinstance(stream, torch.Tensor) or not stream.is_floating_point():
            raise ConversionError(
                f"{self.path} was analysed with its stream in the argument {self.argument}, and is called without it; "
                "convert again with example arguments like this call's"
            )
        if getattr(self.block, "gradient_checkpointing", False) and self.block.training and torch.is_grad_enabled():
            raise ConversionError(
                f"{self.path} is reversible and keeps no activations, and gradient checkpointing around it would store "
                "its input and run it once more; call model.gradient_checkpointing_disable()"
            )
        return place, stream

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        names = [*self.positional, *(f"{self.rest}[{i}]" for i in range(len(args) - len(self.positional)))]
        return [*zip(names, args, strict=False), *kwargs.items()]

    def _number(self, stream: torch.Tensor) -> int:
        """The step that this call begins with."""
        if len(self.numbers) > 1:
            before = last_number(self.chain, stream)
            for number in self.numbers:
                if before is None or number > before:
                    return number
        return self.numbers[0]

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[Any, ...] | None) -> tuple[Any, bool]:
        """The call without its stream, and whether it can only be run once, as it fills a key-value cache.

        In training an empty cache is left out: nobody reads it, and a second run would fill it once more.
        """
        inputs: Any = (args, kwargs) if place is None else put((args, kwargs), place, None)
        if not torch.is_grad_enabled():
            return inputs, False
        once = False
        for where, value in [*(((0, i), v) for i, v in enumerate(args)), *(((1, k), v) for k, v in kwargs.items())]:
            if hasattr(value, "get_seq_length") and hasattr(value, "update"):
                if self.block.training and not _holds_tokens(value, self.block):
                    inputs = put(inputs, where, None)
                    _say(self.chain, "fill no key-value cache in training; use_cache=False says so beforehand")
                else:
                    once = True
                    _say(self.chain, "store their activations, as they are given a key-value cache; use_cache=False")
        return inputs, once


@dataclass(eq=False)
class WholeBlock(ReversibleForward):
    """The block is one step: f is everything it adds to its stream. Its own code runs, with whatever arguments."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One step."""
        place, stream = self._stream(args, kwargs)
        number = self._number(stream)
        branch = _Call(self, place)
        inputs, once = self._inputs(args, kwargs, place)
        site = Site(self.block, self.path, branch, self.written, self.overwrites, once)
        del args, kwargs
        last = number == len(self.chain.couplings) - 1
        (at, rest), new = take_step(self.chain, number, stream, site, inputs, last)
        return put(rest, at, new)

    def _output_place(self, returned: Any) -> tuple[Any, ...]:
        """Where the stream is; a block that returns a tuple or a tensor as it is asked has it first."""
        if isinstance(returned, torch.Tensor):
            return ()
        found = returned
        try:
            for key in self.output_at:
                found = found[key] if not isinstance(key, str) or isinstance(found, dict) else getattr(found, key)
        except (KeyError, IndexError, TypeError, AttributeError):
            found = None
        if isinstance(found, torch.Tensor) and found.dim():
            return self.output_at
        place = next((at for at, leaf in leaves(returned) if isinstance(leaf, torch.Tensor)), None)
        if place is None:
            raise ConversionError(f"{self.path} returned no tensor, so it has no stream; exclude it")
        return place


@dataclass(frozen=True, eq=False)
class _Call:
    """The block's own forward as a branch."""

    forward: WholeBlock
    place: tuple[Any, ...]

    def __call__(self, x: torch.Tensor, inputs: Any) -> tuple[Any, torch.Tensor]:
        args, kwargs = put(inputs, self.place, x)
        returned = self.forward.original(*args, **kwargs)
        at = self.forward._output_place(returned)
        out = dict(leaves(returned))[at]
        return (at, put(returned, at, None)), out


def _holds_tokens(cache: Any, block: nn.Module) -> bool:
    """Does the cache hold tokens of this block? The blocks before it have filled theirs in this very call."""
    if not cache.get_seq_length():
        return False
    index = next((m.layer_idx for m in block.modules() if isinstance(getattr(m, "layer_idx", None), int)), None)
    try:
        return bool(cache.get_seq_length(index)) if index is not None else True
    except (IndexError, KeyError, TypeError):
        return True


_told: WeakKeyDictionary[ReversibleChain, set[str]] = WeakKeyDictionary()


def _say(chain: ReversibleChain, what: str) -> None:
    """Once per chain."""
    told = _told.setdefault(chain, set())
    if what not in told:
        told.add(what)
        logging.getLogger("autorev").warning("the blocks of %s are reversible and %s", chain.name, what)
