"""Run one training step of a fake twin under a method, and cut it into segments.

Only the blocks that `Layout.active` names are run: the first, the last and one typical block of each kind. The others
hand the stream on, and the typical block's segments stand in for theirs, so a model of 100 blocks costs as much as one
of three.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward

from autorev.alike import few_of_them
from autorev.analysis import Category
from autorev.capture.fake import every_layer_kept
from autorev.capture.generators import shared_generators_left
from autorev.capture.record import named_arguments
from autorev.detect.ends import find_stream, flatten_with_path, replace_leaf
from autorev.detect.outline import Outlined
from autorev.engine.host_store import HostStore
from autorev.hush import logs_hushed
from autorev.integrations.transformers import without_caches
from autorev.methods import Method
from autorev.prediction.chains import Chains, Run
from autorev.prediction.layout import Layout, Site
from autorev.prediction.tracker import MemoryTracker, Segment
from autorev.rewrite.checkpointed_forward import CHECKPOINTS, checkpoint_of, on_copies
from autorev.rewrite.replacement import installed
from autorev.rewrite.tiled_forward import blocks_run_twice, tiled_forwards
from autorev.workload import Call


@dataclass
class StepTrace:
    """The segments of one simulated step, and what was alive before it."""

    start: dict[Category, int]
    segments: list[Segment]
    stream_bytes: dict[int, int]
    """Bytes of the stream that enters each block that was run."""
    side_bits: int = 0
    """The most that a recomputed block keeps of an element."""
    host_bytes: dict[int, int] = field(default_factory=dict)
    """What each block that was run leaves on the host until backward."""

    def of_blocks(self, numbers: dict[int, int]) -> StepTrace:
        """The same, with other numbers for the blocks that were run."""

        def renumbered(found: dict[int, Any]) -> dict[int, Any]:
            return {numbers[block]: value for block, value in found.items()}

        segments = [
            replace(s, block=None if s.block is None else numbers[s.block], freed=renumbered(s.freed))
            for s in self.segments
        ]
        streams, host = renumbered(self.stream_bytes), renumbered(self.host_bytes)
        return StepTrace(self.start, segments, streams, self.side_bits, host)


def simulate(
    twin: nn.Module,
    call: Call,
    layout: Layout,
    method: Method,
    loss_of: Callable[[nn.Module, Call], torch.Tensor],
    counting_work: bool = True,
    autocast: torch.dtype | None = None,
    accumulated: bool = False,
    taken: Mapping[nn.Parameter, int] | None = None,
    whole_attention: bool = False,
) -> StepTrace:
    """One forward and backward pass of `twin` under `method`; without `counting_work` its memory alone.

    The twin's forwards are patched while it runs and restored afterwards; gradients are dropped.

    Args:
        autocast: the dtype that the forward pass computes in, where it is not that of the weights.
        accumulated: are there gradients of a pass before, to which those of this one are added?
        taken: bytes that updating a parameter takes, of those that are updated as soon as their gradient is there, and
            whose gradient is freed then.
        whole_attention: is it never tiled, as several GPUs exchange tokens for heads around it?
    """
    for parameter in twin.parameters() if accumulated else ():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    tracker = MemoryTracker(counting_work)
    with ExitStack() as stack:
        stack.enter_context(every_layer_kept())
        stack.enter_context(shared_generators_left(twin))
        stack.enter_context(few_of_them())
        stack.enter_context(without_caches(twin))
        stack.enter_context(logs_hushed("autorev", logging.CRITICAL))  # what the engine says is for those who train
        if method.tile is not None:
            twice = blocks_run_twice(method, layout.chains, layout.stored, layout.refused)
            tile, pieces = method.tile, method.in_pieces
            tiled = tiled_forwards(twin, layout.run_findings, tile, pieces, False, () if whole_attention else twice)
            stack.enter_context(installed(tiled.forwards))
        host = HostStore()
        chains = Chains(layout, method, host)
        stack.enter_context(tracker)
        tracker.adopt(twin)
        for parameter, size in (taken or {}).items():
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(_update, size)).remove)
        for _, leaf in flatten_with_path(call):
            if isinstance(leaf, torch.Tensor):
                tracker.see(leaf, Category.OTHER)
        start = tracker.total()
        tracker.begin("forward", None, Category.OTHER)
        steps = _Steps(layout, method, chains, host, tracker)
        stack.enter_context(steps.patched())
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = loss_of(twin, call)
            if autocast is not None:
                tracker.free_for_all()  # its copies of weights end with it
        tracker.begin("backward", None, Category.LOGITS_AND_LOSS)
        _backward(loss)
        del loss
        tracker.begin("optimizer", None, Category.OTHER)
        segments = tracker.finish()[1:]
    for parameter in twin.parameters():
        parameter.grad = None
    return StepTrace(dict(start), segments, steps.stream_bytes, chains.side_bits, steps.host_bytes)


def _update(size: int, parameter: torch.Tensor) -> None:
    """An update of one parameter in backward."""
    torch.empty(size, dtype=torch.uint8, device=parameter.device)
    parameter.grad = None


def _backward(loss: torch.Tensor) -> None:
    """`loss.backward()` in which blocks that run a second time are seen by the function modes, as in the first run.

    Torch's own hands itself to the modes that are active, and so takes them off for as long as it runs.
    """
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Steps:
    """Wraps every block's forward for the length of one simulated step."""

    def __init__(self, layout: Layout, method: Method, chains: Chains, host: HostStore, tracker: MemoryTracker) -> None:
        self.layout, self.method, self.chains, self.host, self.tracker = layout, method, chains, host, tracker
        self.active = layout.active
        self.calls: dict[int, int] = {}
        self.returned: dict[Any, Any] = {}
        self.stream_bytes: dict[int, int] = {}
        self.host_bytes: dict[int, int] = {}
        self.last_outputs: list[weakref.ref[torch.Tensor]] = []

    @contextmanager
    def patched(self) -> Iterator[None]:
        with ExitStack() as stack:
            modules = {id(s.module): s.module for s in self.layout.sites if s.turn is None}.values()
            for module in modules:
                stack.enter_context(mock.patch.object(module, "forward", self._wrapper(module, module.forward)))
            for module, outlined in self.layout.outlined.items():
                forward = self._outlined_forward(module, outlined, module.forward)
                stack.enter_context(mock.patch.object(module, "forward", forward))
            yield

    def _wrapper(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        sites = {site.call: site for site in self.layout.sites if site.module is module}

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            call = self.calls.get(id(module), 0)
            self.calls[id(module)] = call + 1
            site = sites.get(call)
            if site is None:
                return forward(*args, **kwargs)
            named = list(named_arguments(site.module, args, kwargs))
            found = [find_stream(named, argument, args, kwargs) for argument, _ in site.lanes if argument]
            (place, stream), *beside = found
            # The closure lives on in the graph where a block is recomputed: it must not hold the stream.
            blank = replace_leaf((args, kwargs), place, None)
            del args, kwargs, named, found

            checkpointed = self.method.name in CHECKPOINTS and not site.stored
            own = on_copies(site.module, forward, site.overwritten) if checkpointed else forward

            def run(value: torch.Tensor) -> Any:
                args, kwargs = replace_leaf(blank, place, value)
                return (self.chains.forward_of(site) or own)(*args, **kwargs)

            return self._block(site, run, stream, *(tensor for _, tensor in beside))

        # No plain function: of those, proofs of what a module does take each for another way that it is set.
        simulated = partial(wrapped)
        simulated.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # which `inspect` asks for
        return simulated

    def _outlined_forward(
        self, module: nn.Module, outlined: Outlined, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        sites = {site.turn: site for site in self.layout.sites if site.module is module}

        def call_turn(number: int, turn: Callable[..., Any], stream: torch.Tensor, *inputs: Any) -> Any:
            return self._block(sites[number], lambda value: turn(value, *inputs), stream)

        @wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            assert outlined.forward is not None
            named = dict(named_arguments(module, args, kwargs))
            outlined.call_turn = call_turn
            return outlined.forward(*(named[name] for name in outlined.captured.placeholders))

        return wrapped

    def _block(self, site: Site, run: Run, stream: torch.Tensor, *beside: torch.Tensor) -> Any:
        """`beside`: its other streams, which `run` holds."""
        if site.number not in self.active:
            returned = self.returned[site.chain, site.kind]
            for (_, at), value in zip(site.lanes, (stream, *beside), strict=True):
                returned = replace_leaf(returned, at, value)
            return returned
        self.tracker.begin("forward", site.number, Category.WORKING_SET)
        self.stream_bytes[site.number] = sum(t.numel() * t.element_size() for t in (stream, *beside))
        returned_last = [known() for known in self.last_outputs]
        for value in (stream, *beside):
            if value.requires_grad and all(value is not last for last in returned_last):
                value.register_hook(lambda grad: self._enter_backward(None))
        del beside, value, returned_last
        before = self.host.bytes
        returned = self._under_method(site, run, stream)
        self.host_bytes[site.number] = self.host.bytes - before
        leaves, blank = dict(flatten_with_path(returned)), returned
        for _, at in site.lanes:
            if leaves[at].requires_grad:
                leaves[at].register_hook(lambda grad: self._enter_backward(site.number))
            blank = replace_leaf(blank, at, None)
        self.last_outputs = [weakref.ref(leaves[at]) for _, at in site.lanes]
        self.returned[site.chain, site.kind] = blank
        self._name_state(site)
        self.tracker.settle(Category.STORED_ACTIVATIONS)
        last_site = site.number == max(self.active)
        del leaves, stream
        self.tracker.begin("forward", None, Category.LOGITS_AND_LOSS if last_site else Category.OTHER)
        return returned

    def _under_method(self, site: Site, run: Run, stream: torch.Tensor) -> Any:
        if not stream.requires_grad and not any(p.requires_grad for p in site.module.parameters()):
            return run(stream)  # nothing of it is ever kept
        if self.method.reversible:
            in_chain = site.chain is not None and site.turn is not None
            return self.chains.take_turn(site, run, stream) if in_chain else run(stream)
        if site.stored or self.method.name not in CHECKPOINTS:
            return run(stream)
        return checkpoint_of(self.method, site.keeps, self.host)(run, stream)

    def _enter_backward(self, number: int | None) -> None:
        label = Category.OTHER if number is None else Category.WORKING_SET
        now = self.tracker.current
        if now.phase == "backward" and (number is None or now.block != number):  # each of its streams brings a gradient
            if number is not None:
                self._name_state(self.layout.sites[number])
            self.tracker.begin("backward", number, label)

    def _name_state(self, site: Site) -> None:
        """What the engine keeps of the site's chain, by what it is."""
        for category, tensor in self.chains.kept(site):
            self.tracker.relabel(tensor, category)
