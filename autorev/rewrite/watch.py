"""Runs a module's own forward and takes its residual adds as the steps of a chain.

A `TorchFunctionMode` sees every torch function that the code calls, and where an add ends a residual step (`adds`),
the code is given the coupled stream in place of the sum. Between two such adds the code runs under the step's own
checkpoint, and is written down (`recording`) for the second run. Which path the code takes is its own decision, at
every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from autorev.capture.scripted import scripted_as_written
from autorev.capture.source import caller_place
from autorev.detect.ends import replace_leaf
from autorev.detect.scaling import PRODUCTS, is_held
from autorev.engine.chain import ReversibleChain
from autorev.engine.replay import Replay
from autorev.engine.step import Branch, Step
from autorev.errors import ConversionError
from autorev.patching import patched_here
from autorev.rewrite.adds import KnownAdds, Place, Start
from autorev.rewrite.layout import Multiplied, laid_out
from autorev.rewrite.recording import Recording
from autorev.rewrite.streams import FUNCTIONS, SUMS, Skip, Streams


class Watch(TorchFunctionMode):
    """One call of one module."""

    def __init__(
        self,
        module: nn.Module,
        path: str,
        chain: ReversibleChain,
        numbers: tuple[int, ...],
        total: int,
        known: KnownAdds,
        branch: Branch,
        analyse: Callable[[], None],
    ) -> None:
        """`numbers`: steps of the chain that the call may begin with; `total`: how many it takes; `analyse` adds what
        this very call does to `known`."""
        super().__init__()
        self.module, self.path, self.chain, self.numbers, self.total = module, path, chain, numbers, total
        self.known, self.branch, self.analyse = known, branch, analyse
        self.name = path or "the model itself"
        self.paths = {id(child): name for name, child in module.named_modules()}
        self.paused = 0
        self.taken = 0
        self.step: Step | None = None
        self.running: AbstractContextManager[None] | None = None
        self.recording: Recording | None = None
        self.passed: dict[Start, int] = {}
        """How often the code has come by a place where the stream may begin."""
        self.streams = Streams()
        """Those of the code's tensors that are the stream."""
        self.renamed: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        """A tensor that the code added to in place -> the stream that it is now."""

    @property
    def begun(self) -> bool:
        """Has the stream been met?"""
        return self.step is not None or self.taken > 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the call of the module's own forward."""

        def applying(original: Any) -> Any:
            def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
                result = self._leaf(partial(original, cls), args, kwargs, in_place=False)
                if not self.paused:
                    self.streams.mark_view(args, result)
                return result

            return apply

        try:
            with (
                self,
                patched_here(nn.Module, "__call__", lambda original: partial(self._call_module, original)),
                patched_here(torch.autograd.Function, "apply", applying),
                scripted_as_written(),
            ):
                yield
        except BaseException as error:
            if self.running is not None:
                self.running.__exit__(type(error), error, error.__traceback__)
                self.running = None
            raise

    # -- steps

    def begin(self, stream: torch.Tensor, numbers: tuple[int, ...] | None = None) -> torch.Tensor:
        """The next step begins with `stream`; returns what the code is given for it."""
        self.paused += 1  # what the engine does is no part of the code
        try:
            return self._begin(stream, numbers or self.numbers)
        finally:
            self.paused -= 1

    def _begin(self, stream: torch.Tensor, numbers: tuple[int, ...]) -> torch.Tensor:
        self.step = Step(self.chain, (stream,), numbers, self.branch)
        self.number = self.step.number
        (given,) = self.step.given()
        self.recording = None
        if self.step.replay is not None:
            self.recording = Recording(given)
            self.step.replay.roots.append(self.module)  # what its parameters are sharded with
        self.running = self.step.running()
        self.running.__enter__()
        self.streams = Streams()
        self.streams.mark(given, ())
        return given

    def _close(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], skip: Skip) -> torch.Tensor:
        """The add, or the product with a constant, that ends the step."""
        form = laid_out(skip.form)
        assert self.step is not None
        assert self.running is not None
        tiled = self._tiled_at_the_end(self.step)
        saved = self.step.saved.count if tiled is not None else 0
        out = self._leaf(FUNCTIONS[name], args, kwargs, in_place=False)
        for layout in reversed(form):
            out = self._leaf(layout.back, (out,), {}, in_place=False)
        if self.recording is not None:
            assert self.step.replay is not None
            if tiled is not None and self.step.saved.count > saved:
                tiled = None  # autograd will ask for what the add saves before it comes to the tiles
            _hand_over(self.recording, self.step.replay, self.recording.slot_of(out), tiled)
        self.running.__exit__(None, None, None)
        self.running = self.recording = None
        step, self.step = self.step, None
        if not is_held(skip.factor):
            raise ConversionError(
                f"{self.name} multiplies its stream by {skip.factor:g} in this call, which no reversible step can "
                "undo; exclude it"
            )
        (new,) = step.take((out,), (skip.factor,))
        self.taken += 1
        if self.taken < self.total:
            new = self.begin(new, (self.number + 1,))
        else:
            self.streams = Streams()
            self.streams.mark(new, ())
        for layout in form:
            new = self._leaf(layout.forth, (new,), {}, in_place=False)
        self.streams.mark(new, form)
        if _in_place(name):  # the tensor that is written to, the skip or the branch, is the stream from here on
            self.renamed[id(args[0])] = weakref.ref(args[0]), new
            self._rename_in(self.module)
        return new

    def _tiled_at_the_end(self, step: Step) -> int | None:
        """The recording's latest call, if it is of a tiled module whose tiles autograd will all ask for."""
        if self.recording is None or step.replay is None or not step.replay.tiled:
            return None
        seen = step.replay.tiled[-1]
        hooked = seen.module._forward_hooks or torch.nn.modules.module._global_forward_hooks
        return None if hooked or not seen.wholly_asked_for else self.recording.last_call_of(seen.module)

    def end(self, returned: Any) -> Any:
        """The forward has returned; what it returned, with the coupled stream in it.

        Raises:
            ConversionError: it did not take the steps that a read-out over both streams needs.
        """
        if self.step is not None:
            # The steps that are left were skipped in this call. What ran since the last one only reads the stream.
            if self.chain.averages:
                raise ConversionError(
                    f"{self.name} took {self.taken} of its {self.total} residual steps in this call, and the coupling "
                    "reads the mean of both streams out behind the last one; use another coupling, or exclude it"
                )
            assert self.running is not None
            if self.recording is not None:
                assert self.step.replay is not None
                _hand_over(self.recording, self.step.replay, None)
            self.running.__exit__(None, None, None)
            self.running = None
            self.step.leave_open()
        if not self.renamed:
            return returned
        for child in self.module.modules():
            self._rename_in(child)
        return tree_map_only(torch.Tensor, self._current, returned)

    # -- what the code does

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if self.renamed:
            args, kwargs = tree_map_only(torch.Tensor, self._current, (args, kwargs))
        name = getattr(func, "__name__", "")
        if not self.begun:
            return self._looked_for_start(func(*args, **kwargs))
        place = caller_place() if name in SUMS or name in PRODUCTS else None
        skip = None if place is None else self.streams.skip(name, args, kwargs)
        if place is not None and skip is None and place in self.known.closing:
            raise ConversionError(
                f"{self.name}: the add at {place[0]} ended a residual step when it was analysed, "
                "and none of what it adds is the stream in this call: the code, or a hook, has replaced or changed the "
                "stream since the step before. Exclude the block, or change the stream inside of a branch"
            )
        if place is not None and skip is not None and self._ends_step(place, name):
            if self.step is None:
                raise ConversionError(
                    f"{self.name} takes more residual steps in this call than the {self.total} it was converted with; "
                    "convert with example arguments like these"
                )
            return self._close(name, args, kwargs, skip)
        result = self._leaf(func, args, kwargs, in_place=_in_place(name))
        if name == "stack":
            self.streams.stacked = {id(result): [*args[0]]}
        if skip is not None:
            self.streams.mark(result, (*laid_out(skip.form), Multiplied(skip.factor)))
        else:
            self.streams.mark_alias(func, name, args, kwargs, result)
        return result

    def _call_module(self, run: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = self.paths.get(id(module))
        if self.paused or (path is not None and path in self.known.opened) or module is self.module:
            return run(module, *args, **kwargs)
        if self.renamed:
            args, kwargs = tree_map_only(torch.Tensor, self._current, (args, kwargs))
        full = ".".join(filter(None, (self.path, path or type(module).__name__)))
        if self.step is not None:
            self.step.add_module(module, full)
        result = self._leaf(partial(run, module), args, kwargs, in_place=False)
        if not self.begun:
            return self._looked_for_start(result)
        self.streams.mark_view(args, result)
        return result

    def _leaf(self, function: Callable[..., Any], args: Any, kwargs: Any, in_place: bool) -> Any:
        """Run `function` unwatched, and write it down as one call."""
        recording = None if self.paused else self.recording
        self.paused += 1
        try:
            return function(*args, **kwargs) if recording is None else recording.call(function, args, kwargs, in_place)
        finally:
            self.paused -= 1

    def _current(self, tensor: torch.Tensor) -> torch.Tensor:
        while True:
            found = self.renamed.get(id(tensor))
            if found is None or found[0]() is not tensor:
                return tensor
            tensor = found[1]

    def _rename_in(self, module: nn.Module) -> None:
        """What the code has kept on a module (`self.kept = x`), and has added to in place since, is the stream, too."""
        for holder in (vars(module), *(value for value in vars(module).values() if type(value) in (list, dict))):
            for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                if type(value) is torch.Tensor and (now := self._current(value)) is not value:
                    holder[key] = now

    def _looked_for_start(self, result: Any) -> Any:
        """The loop's stream, if this is it, as the first step has it."""
        here: Place | None = None
        for start in self.known.starts:
            if start.place is None:
                continue
            here = here or caller_place()
            if start.place != here:
                continue
            seen = self.passed.get(start, 0)
            self.passed[start] = seen + 1
            if seen != start.after:
                continue
            stream = result
            try:
                for item in start.items:
                    stream = stream[item]
            except (KeyError, IndexError, TypeError):
                continue
            if isinstance(stream, torch.Tensor) and stream.is_floating_point():
                return replace_leaf(result, start.items, self.begin(stream))
        return result

    def _ends_step(self, place: Place, name: str) -> bool:
        if name in SUMS and not self.known.knows(place):
            self.paused += 1
            try:
                self.analyse()
            finally:
                self.paused -= 1
            if not self.known.knows(place):
                raise ConversionError(
                    f"{self.name} adds to its stream at {place[0]}, which it did not when it was analysed, nor when "
                    "this call was: whether that ends a residual step is not known. Use granularity='block', or give "
                    "the loop's body a module of its own"
                )
        return place in self.known.closing


def _hand_over(recording: Recording, replay: Replay, result: int | None, tiled: int | None = None) -> None:
    """What the code did is how the step is run again; `result`: the recording's slot of what it returns; `tiled`: the
    call which only the residual add comes after."""
    replay.mutates_input = recording.writes_to_input
    replay.add_arguments(recording.arguments())
    replay.again = repeated = recording.finish(result, tiled)
    if tiled is not None:
        replay.again_but_for_tiles = repeated.but_for_tiles


def _in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in ("__iadd__", "__isub__", "__setitem__", "iadd")
