"""The cause of a step's memory: every storage of one real step followed from birth to death.

A second run of the same step, under `MemoryTracker`: each byte gets a category, the module that allocated it, and the
block it belongs to. In forward the owner is the innermost module at work; in backward it is the one whose output's
gradient arrived last, or the module that is being run again.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from autorev.analysis import Category
from autorev.engine.carried import pass_of
from autorev.engine.tape import Tape
from autorev.patching import patched_here
from autorev.prediction.tracker import Live, MemoryTracker, Segment
from autorev.profiler.passes.step import TrainingStep, tensors_of
from autorev.profiler.readings import Holder, Memory, Timeline
from autorev.rewrite.block_forward import ReversibleForward
from autorev.rewrite.replacement import HANDLE

MOST_POINTS = 300
"""Of a time line; each is the highest of the events that it stands for."""
MOST_HOLDERS = 40


@dataclass(frozen=True, slots=True)
class _Event:
    """A live storage's change; None: it was not alive before, or is not after."""

    seconds: float
    block: int
    """At work; -1: none."""
    live: Live
    before: Category | None
    after: Category | None


class Ledger(MemoryTracker):
    """A tracker that writes down every event with its time."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[_Event] = []
        self.began = time.perf_counter()
        self.open = True
        self.owner_of: dict[int, str] = {}
        """Parameter id -> the module that it belongs to."""

    def born(self, key: int, live: Live) -> None:
        """See MemoryTracker."""
        self._write(live, None, live.category)
        super().born(key, live)

    def moved(self, live: Live, category: Category) -> None:
        """See MemoryTracker."""
        self._write(live, live.category, category)
        super().moved(live, category)

    def died(self, live: Live) -> None:
        """See MemoryTracker."""
        self._write(live, live.category, None)
        super().died(live)

    def _write(self, live: Live, before: Category | None, after: Category | None) -> None:
        if self.open:
            block = -1 if self.current.block is None else self.current.block
            self.events.append(_Event(time.perf_counter() - self.began, block, live, before, after))

    def _gradient_arrived(self, parameter: torch.Tensor) -> None:
        super()._gradient_arrived(parameter)
        if parameter.grad is not None:
            live = self.live.get(parameter.grad.untyped_storage()._cdata)
            if live is not None:
                live.owner = self.owner_of.get(id(parameter), live.owner)

    def adopt(self, model: nn.Module) -> None:
        """See MemoryTracker; every parameter is owned by its module."""
        for path, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                self.owner_of.setdefault(id(parameter), path)
            self.owner = path
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                self.see(tensor, Category.PARAMETERS)
        super().adopt(model)


def attribute(step: TrainingStep, memory: Memory, paths: tuple[str, ...]) -> tuple[Memory, int]:
    """`memory` with its cause added, and the FLOPs of the step; `paths` are the blocks, in calling order."""
    ledger = Ledger()
    marks: list[tuple[str, float, float]] = []
    watcher = _Watcher(ledger, step.model, paths)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        began = time.perf_counter() - ledger.began
        watcher.enter_phase(name)
        yield
        marks.append((name, began, time.perf_counter() - ledger.began))
        if name == "forward":
            watcher.forward_is_over()

    with ledger:
        ledger.adopt(step.model)
        for parameter, state in step.optimizer.state.items():
            ledger.owner = ledger.owner_of.get(id(parameter), "")
            for tensor in tensors_of(state):
                ledger.see(tensor, Category.OPTIMIZER_STATE)
        ledger.owner = "(inputs)"
        for tensor in tensors_of(step.call):
            ledger.see(tensor, Category.OTHER)
        with watcher.watching():
            step.run(phase)
        ledger.open = False
        segments = ledger.finish()
    return _cause(memory, ledger.events, marks, watcher), sum(segment.flops for segment in segments)


class _Watcher:
    """Tells a ledger which phase, block and module is at work, by hooks on every module."""

    def __init__(self, ledger: Ledger, model: nn.Module, paths: tuple[str, ...]) -> None:
        self.ledger = ledger
        self.path_of = {id(module): path for path, module in model.named_modules()}
        self.modules = list(model.modules())
        self.number_of = {path: number for number, path in enumerate(paths)}
        self.paths = paths
        self.phase = ""
        self.calling: list[str] = []
        self.behind = ""
        """In backward, the module whose output's gradient came last."""
        self.tapes: list[weakref.ref[Tape]] = []
        self.block_of: list[tuple[Segment, int]] = []
        self.kept: tuple[int, ...] = ()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            # Functions, not methods: a converted block may be copied in the step, with its hooks, but not with `self`.
            before, after = (lambda *call: self._enter(*call)), (lambda *call: self._leave(*call))
            for module in self.modules:
                stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
                stack.callback(module.register_forward_hook(after, prepend=True, always_call=True).remove)
            # Checkpointing keeps one for each block, and no dispatch mode hears of it.
            stack.enter_context(patched_here(torch, "get_rng_state", lambda original: self._random_state))
            yield

    def _random_state(self) -> torch.Tensor:
        state = torch.random.get_rng_state()
        self.ledger.see(state, Category.OTHER)
        return state

    def enter_phase(self, name: str) -> None:
        self.phase = name
        label = Category.LOGITS_AND_LOSS if name == "backward" else Category.OTHER
        self.ledger.owner = self.behind = {"optimizer": "(optimizer)", "backward": "(loss)"}.get(name, "")
        self.ledger.begin(name, None, label)

    def forward_is_over(self) -> None:
        """Count what every block keeps."""
        self._relabel()
        born_in = {id(segment): number for segment, number in self.block_of}
        kept = Counter[int]()
        for live in self.ledger.live.values():
            if live.category in (Category.STORED_ACTIVATIONS, Category.SIDE_BITS) and id(live.born) in born_in:
                kept[born_in[id(live.born)]] += live.bytes
        self.kept = tuple(kept[number] for number in range(len(self.paths)))

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = self.path_of.get(id(module))
        if path is None:
            return
        if self.phase == "forward" and path in self.number_of:
            self._begin_block(self.number_of[path])
            if self.number_of[path] == 0:
                _hook_first(args, lambda grad: self._enter_backward(None))
        self.calling.append(path)
        self.ledger.owner = path

    def _leave(self, module: nn.Module, args: Any, returned: Any) -> None:
        path = self.path_of.get(id(module))
        if path is None:
            return
        self.calling.pop()
        if self.phase == "forward" and path in self.number_of:
            self._end_block(self.number_of[path], module)
        if self.phase in ("forward", "backward"):
            _hook_first(returned, partial(self._gradient_came, path))
        self.ledger.owner = self.calling[-1] if self.calling else self.behind

    def _begin_block(self, number: int) -> None:
        self.ledger.begin("forward", number, Category.WORKING_SET)
        self.block_of.append((self.ledger.current, number))

    def _end_block(self, number: int, block: nn.Module) -> None:
        for forward in block.__dict__.get(HANDLE, ()):
            latest = pass_of(forward.chain).latest if isinstance(forward, ReversibleForward) else None
            if latest is not None and latest.tape.steps and all(known() is not latest.tape for known in self.tapes):
                self.tapes.append(weakref.ref(latest.tape))
        self._relabel()
        self.ledger.settle(Category.STORED_ACTIVATIONS)
        last = number == len(self.paths) - 1
        self.ledger.begin("forward", None, Category.LOGITS_AND_LOSS if last else Category.OTHER)

    def _relabel(self) -> None:
        """What the tapes hold has categories of its own; their states are new tensors after every step."""
        for tape in filter(None, (reference() for reference in self.tapes)):
            for lane in tape.lanes:
                self.ledger.relabel(lane.state.stream, Category.STREAMS)
                self.ledger.relabel(lane.state.partner, Category.STREAMS)
            for kept in [kept for step in tape.steps for kept in step.lanes] if self.phase == "forward" else ():
                if isinstance(kept.side, torch.Tensor):
                    self.ledger.relabel(kept.side, Category.SIDE_BITS)

    def _gradient_came(self, path: str, grad: torch.Tensor) -> None:
        self._relabel()
        self.behind = path
        if path in self.number_of:
            self._enter_backward(self.number_of[path])
        if not self.calling:
            self.ledger.owner = path

    def _enter_backward(self, number: int | None) -> None:
        if self.phase == "backward":
            label = Category.OTHER if number is None else Category.WORKING_SET
            self.ledger.begin("backward", number, label)


def _first(structure: Any) -> torch.Tensor | None:
    """The first floating tensor with a gradient."""
    return next((t for t in tensors_of(structure) if t.is_floating_point() and t.requires_grad), None)


def _hook_first(structure: Any, hook: Any) -> None:
    tensor = _first(structure)
    if tensor is not None:
        tensor.register_hook(hook)


def _cause(memory: Memory, events: list[_Event], marks: list[tuple[str, float, float]], watcher: _Watcher) -> Memory:
    sizes = [event.live.bytes * ((event.after is not None) - (event.before is not None)) for event in events]
    totals = list(accumulate(sizes))
    peak = max(range(len(totals)), key=totals.__getitem__)
    alive: dict[int, tuple[Live, Category]] = {}
    for event in events[: peak + 1]:
        if event.after is None:
            alive.pop(id(event.live), None)
        else:
            alive[id(event.live)] = (event.live, event.after)
    categories: Counter[Category] = Counter()
    holders: Counter[tuple[str, Category]] = Counter()
    for live, category in alive.values():
        categories[category] += live.bytes
        holders[_owner(live.owner, category, watcher.paths), category] += live.bytes
    return replace(
        memory,
        attributed_bytes=totals[peak],
        categories={category.value: categories[category] for category in Category},
        holders=_largest(holders),
        block_bytes=watcher.kept,
        timeline=_timeline(events, totals, peak, marks),
    )


def _owner(path: str, category: Category, blocks: tuple[str, ...]) -> str:
    """The path with `*` for the block's number, so that equal blocks are one line."""
    if not path:
        return "(loss)" if category is Category.LOGITS_AND_LOSS else "(model)"
    for block in blocks:
        if path == block or path.startswith(f"{block}."):
            parent, _, _ = block.rpartition(".")
            return f"{parent}.*{path[len(block) :]}" if parent else f"*{path[len(block) :]}"
    return path


def _largest(holders: Counter[tuple[str, Category]]) -> tuple[Holder, ...]:
    ranked = [Holder(path, category.value, size) for (path, category), size in holders.most_common()]
    rest: Counter[str] = Counter()
    for holder in ranked[MOST_HOLDERS:]:
        rest[holder.category] += holder.bytes
    return (*ranked[:MOST_HOLDERS], *(Holder("(others)", category, size) for category, size in rest.most_common()))


def _timeline(events: list[_Event], totals: list[int], peak: int, marks: list[tuple[str, float, float]]) -> Timeline:
    began = marks[0][1]
    first = next(n for n, event in enumerate(events) if event.seconds >= began)
    width = max(1, (len(events) - first + MOST_POINTS - 1) // MOST_POINTS)
    buckets = [range(n, min(n + width, len(events))) for n in range(first, len(events), width)]
    chosen = {first - 1, *(max(bucket, key=totals.__getitem__) for bucket in buckets), len(events) - 1, peak}
    now: Counter[Category] = Counter()
    seconds: list[float] = []
    blocks: list[int] = []
    lines: dict[Category, list[int]] = {category: [] for category in Category}
    peak_at = 0
    for number, event in enumerate(events):
        if event.before is not None:
            now[event.before] -= event.live.bytes
        if event.after is not None:
            now[event.after] += event.live.bytes
        if number in chosen:
            if number == peak:
                peak_at = len(seconds)
            seconds.append(round(max(0.0, event.seconds - began), 5))
            blocks.append(event.block)
            for category, line in lines.items():
                line.append(now[category])
    return Timeline(
        seconds=tuple(seconds),
        categories={category.value: tuple(line) for category, line in lines.items() if any(line)},
        marks=tuple((name, round(a - began, 6), round(b - began, 6)) for name, a, b in marks),
        blocks=tuple(blocks),
        peak_at=peak_at,
    )
