"""What stands in for a block's `forward` once it is converted: it finds the stream, and takes the block as one step.

The class, the modules, the parameters, the hooks and the model's own loop stay as they are. The replacement is an
object in the block's `__dict__`; deleting it restores the block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from autorev.detect.ends import find_stream, flatten_with_path, replace_leaf
from autorev.detect.scaling import Factor, is_held
from autorev.engine.carried import pass_of
from autorev.engine.chain import ReversibleChain
from autorev.engine.mode import is_written_down
from autorev.engine.plain_data import without_history
from autorev.engine.step import Branch, Step
from autorev.errors import ConversionError
from autorev.integrations.transformers import is_asked_for, is_cache, is_checkpointed
from autorev.rewrite.compiled import compiler_of
from autorev.rewrite.replacement import TO_BE_EXPORTED, CompilingReplacement

Places = tuple[tuple[Any, ...], ...]
"""In nested tuples, lists, dicts and dataclasses, one for each lane."""


@dataclass(eq=False)
class ReversibleForward(CompilingReplacement):
    """The base of what takes blocks as steps."""

    chain: ReversibleChain
    numbers: tuple[int, ...]
    """The chain's step that each call of the block in one forward pass begins with; one, unless weights are shared."""
    argument: str
    """The argument that carries the stream: `hidden_states`, `states[0]`."""
    output_at: tuple[Any, ...]
    """Where the stream is in what the block returns."""
    written: tuple[str, ...]
    mutates_input: bool
    positional: tuple[str, ...] = field(init=False)
    """The names of the block's positional parameters."""
    rest: str = field(init=False)
    """The name of its `*args`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parameters = list(self.__signature__.parameters.values())
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = tuple(p.name for p in parameters if p.kind in kinds)
        self.rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")

    def install(self) -> None:
        """Put it in the place of the block's forward; a block that is compiled has its branch compiled instead."""
        super().install()
        self.compiling.begin()

    def remove(self) -> None:
        """Take it out."""
        super().remove()
        self.compiling.end()

    @property
    def is_compiled(self) -> bool:
        """Is it by itself, and not as part of something larger?"""
        return self.compiling.compiler is not None or compiler_of(self.replaced) is not None

    def own(self) -> Callable[..., Any]:
        """The block's own forward, compiled where the block is."""
        if self.chain.magnitudes is not None:
            # A grid is being chosen: once, without gradients, as training will never run it.
            return getattr(self.original, "_torchdynamo_orig_callable", self.original)
        return super().own()

    def _refuse_transforms(self) -> None:
        if is_written_down():
            raise ConversionError(
                f"{self.path} is reversible: a trace (torch.export, torch.jit.trace, torch.onnx.export) holds "
                f"operators, and neither the checks between them nor a way back; {TO_BE_EXPORTED}"
            )
        if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
            raise ConversionError(
                f"{self.path} is reversible: transforms of torch.func (grad, vmap, jvp, ...) and forward-mode "
                "derivatives cannot follow the state that it keeps beside autograd; call autorev.revert(model) first"
            )

    def _stream(
        self, argument: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], torch.Tensor]:
        """Where the stream is among the arguments, and the stream, which is the one called `argument`."""
        self._refuse_transforms()
        try:
            place, stream = find_stream(self._named(args, kwargs), argument, args, kwargs)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            place, stream = (), None
        if not isinstance(stream, torch.Tensor) or not stream.is_floating_point():
            raise ConversionError(
                f"{self.path} was analysed with its stream in the argument {argument}, and is called without it; "
                "convert again with example arguments like this call's"
            )
        if hasattr(stream, "placements"):
            raise ConversionError(
                f"{self.path} is given a stream that is spread over processes (a DTensor), and a reversible chain "
                "keeps whole ones; let the blocks hand on local tensors (use_local_output=True), or call "
                "autorev.revert(model)"
            )
        if is_checkpointed(self.block) and self.block.training and torch.is_grad_enabled():
            raise ConversionError(
                f"{self.path} is reversible and keeps no activations, and gradient checkpointing around it would store "
                "its input and run it once more; call model.gradient_checkpointing_disable()"
            )
        return place, stream

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        names = [*self.positional, *(f"{self.rest}[{i}]" for i in range(len(args) - len(self.positional)))]
        return [*zip(names, args, strict=False), *kwargs.items()]

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any], *places: tuple[Any, ...]) -> tuple[Any, bool]:
        """The call without its streams, and whether it can be run again: not if it fills a key-value cache.

        A cache that the caller handed over, or asked for by `use_cache=True`, is filled, and the block is stored. One
        that the model makes by itself in training is left out: nobody reads it, and a second run would fill it again.
        """
        inputs: Any = _with_leaves((args, kwargs), places, (None,) * len(places))
        if not torch.is_grad_enabled():
            return inputs, True
        recomputable = True
        for where, value in [*(((0, i), v) for i, v in enumerate(args)), *(((1, k), v) for k, v in kwargs.items())]:
            if not is_cache(value):
                continue
            given = pass_of(self.chain).given
            if self.block.training and given is not None and not is_asked_for(value, given):
                inputs = replace_leaf(inputs, where, None)
                _left_empty[value] = True
                self.chain.warn_once("fill no key-value cache that the model makes by itself in training")
            elif value in _left_empty:
                raise ConversionError(
                    f"the key-value cache that {self.path} is given was left empty by the call that returned it, as "
                    "reversible blocks fill none in training unless they are asked to; call the model with "
                    "use_cache=True, or with a cache of your own, from the first segment on"
                )
            else:
                recomputable = False
                self.chain.warn_once("store their activations, as they are given a key-value cache; use_cache=False")
        return inputs, recomputable

    def _writes(self) -> Callable[[nn.Module, str], bool]:
        """(module, name): is that a buffer which the block was seen to update?"""
        known: set[tuple[int, str]] = set()
        for written in self.written:
            path, _, name = written.rpartition(".")
            try:
                known.add((id(self.block.get_submodule(path)), name))
            except AttributeError:
                continue  # the module was replaced since
        return lambda module, name: (id(module), name) in known


@dataclass(eq=False)
class WholeBlock(ReversibleForward):
    """The block is one step: f is everything it adds to its stream. Its own code runs, with whatever arguments.

    A block may carry several streams, and is one step of all of them.
    """

    beside: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """(argument, place in what is returned) of every stream but the first."""
    factors: tuple[Factor, ...] = ()
    """What the block multiplies each stream by; empty: by 1."""

    @property
    def lanes(self) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        """(argument, place in what is returned) of every stream."""
        return (self.argument, self.output_at), *self.beside

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One step."""
        found = [self._stream(argument, args, kwargs) for argument, _ in self.lanes]
        places, streams = tuple(place for place, _ in found), tuple(stream for _, stream in found)
        inputs, recomputable = self._inputs(args, kwargs, *places)
        forward = self.own()
        self.compiling.say_how(self.chain, in_steps=False)
        writes = self._writes()
        branch = Branch(self.block, self.path, self.block.training, writes, self.mutates_input, recomputable)
        step = Step(self.chain, streams, self.numbers, branch)
        del args, kwargs, found, streams
        if step.replay is not None:
            # Of the inputs, only values are needed again. Kept with their history, one that an earlier block of the
            # chain returned (T5's position bias) would close a circle through autograd's graph that no one collects.
            kept = tree_map(without_history, inputs)
            step.replay.add_arguments(kept)
            # Containers are made anew for each run: the block may write to a dict or a context that it is given.
            step.replay.again = lambda *xs: self._branch(forward, places, tree_map(without_history, kept), xs)
        with step.running():
            (outputs_at, rest), outs = self._branch(forward, places, inputs, step.given())
        if step.replay is not None and step.is_one_tiled_call(self.block):
            step.replay.ends_with_tiles()
        factors = tuple(held_factor(factor, self.block, self.path) for factor in self.factors)
        return _with_leaves(rest, outputs_at, step.take(outs, factors))

    def _branch(
        self, forward: Callable[..., Any], places: Places, inputs: Any, xs: tuple[torch.Tensor, ...]
    ) -> tuple[tuple[Places, Any], tuple[torch.Tensor, ...]]:
        """The block's own forward: ((where each lane's stream is in what it returns, the rest of that), x + f(x))."""
        args, kwargs = _with_leaves(inputs, places, xs)
        returned = forward(*args, **kwargs)
        outputs_at = tuple(self._output_place(returned, at) for _, at in self.lanes)
        if len(set(outputs_at)) < len(outputs_at):
            raise ConversionError(
                f"{self.path} was analysed as a block that returns {len(outputs_at)} streams, and returns fewer; "
                "convert again with example arguments like this call's"
            )
        leaves = dict(flatten_with_path(returned))
        rest = _with_leaves(returned, outputs_at, (None,) * len(outputs_at))
        return (outputs_at, rest), tuple(leaves[at] for at in outputs_at)

    def _output_place(self, returned: Any, output_at: tuple[Any, ...]) -> tuple[Any, ...]:
        """Where the stream is; a block that returns a tuple or a tensor as it is asked has it first."""
        if isinstance(returned, torch.Tensor):
            return ()
        found = returned
        try:
            for key in output_at:
                found = found[key] if not isinstance(key, str) or isinstance(found, dict) else getattr(found, key)
        except (KeyError, IndexError, TypeError, AttributeError):
            found = None
        if isinstance(found, torch.Tensor) and found.dim():
            return output_at
        place = next((at for at, leaf in flatten_with_path(returned) if isinstance(leaf, torch.Tensor)), None)
        if place is None:
            raise ConversionError(f"{self.path} returned no tensor, so it has no stream; exclude it")
        return place


def held_factor(factor: Factor, module: nn.Module, path: str) -> float:
    """What `module` multiplies its stream by in its next call.

    Raises:
        ConversionError: a chain cannot take a step with that.
    """
    value = factor.value(module)
    if not is_held(value):
        raise ConversionError(
            f"{path} multiplies its stream by {value:g} in this call, which no reversible step can undo; exclude it"
        )
    return value


def _with_leaves(structure: Any, places: Places, values: tuple[Any, ...]) -> Any:
    for place, value in zip(places, values, strict=True):
        structure = replace_leaf(structure, place, value)
    return structure


_left_empty: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Caches that blocks did not fill."""
