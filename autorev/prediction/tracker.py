"""Count the bytes of live tensors, operation by operation, on fake or on real tensors.

`MemoryTracker` is a dispatch mode that knows every storage by a weak reference: O(1) per operation. Each byte carries a
`Category`; the step is cut into *segments* (a block's forward, its backward, what lies between), and every segment
remembers what it changed for good and what was alive at its highest point.

Known limitations: temporaries inside one kernel are invisible; a storage is counted at its own size, not at what the
allocator rounds it up to.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from autorev.alike import standing_for
from autorev.analysis import Category
from autorev.capture.quantised import held_by
from autorev.operands import tensors_of
from autorev.own_mode import OwnMode

aten = torch.ops.aten
_device_of = torch.ops.prim.device.default
_cpu_attention = aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_attention_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass
class Segment:
    """A stretch of the step. Bytes are relative to where it began."""

    phase: str
    """forward, backward or optimizer."""
    block: int | None = None
    """The block's number, or None outside the blocks."""
    change: Counter[Category] = field(default_factory=Counter)
    """What it left behind (negative: freed), by category."""
    top: Counter[Category] = field(default_factory=Counter)
    """`change` at the segment's highest point."""
    top_bytes: int = 0
    flops: int = 0
    matmul_bytes: int = 0
    """Bytes read and written by operations that do `flops`."""
    other_bytes: int = 0
    """Bytes read and written by all other operations."""
    grown: int = 0
    """What it left behind of all that grows with the batch: parameters and their gradients do not."""
    grown_top: int = 0
    """The same at its own highest point."""
    freed: dict[int, Counter[Category]] = field(default_factory=dict)
    """Of what each block's forward had left behind, what it freed: where autocast ends, its copies of weights."""


@dataclass(eq=False)
class Live:
    """One storage."""

    bytes: int
    category: Category
    born: Segment
    owner: str = ""
    """Who allocated it, where somebody keeps track: `MemoryTracker.owner` at its birth."""
    of_weights: bool = False
    """Is it of a parameter's size, whatever the batch: a parameter, or a gradient of one?"""
    summed_from: tuple[Live, ...] = ()
    """Gradients of the same tensor that autograd's engine added up to this one."""


class MemoryTracker(OwnMode):
    """See the module's docstring. Enter it after the fake mode, and build nothing before `adopt`ing it."""

    def __init__(self, counting_work: bool = True) -> None:
        super().__init__()
        self.live: dict[int, Live] = {}
        self.segments: list[Segment] = []
        self.current = Segment("forward")
        self.label = Category.OTHER
        self.owner = ""
        self.gradients: set[int] = set()
        self.counting_work = counting_work
        self._for_all: Segment | None = None
        self._hooks: list[Any] = []
        self._history: list[tuple[Segment, Live, int]] = []
        """Births and deaths; which of them are of weights is known when the step is over."""

    # -- segments --------------------------------------------------------------------------------------------------

    def begin(self, phase: str, block: int | None, label: Category) -> None:
        """Close the current segment and open the next; what it allocates is called `label` unless told otherwise."""
        self.segments.append(self.current)
        self.current = Segment(phase, block)
        self.label = label

    def free_for_all(self) -> None:
        """What the next segment frees of one block's, it frees of all blocks that this one stands for."""
        self.begin("forward", None, Category.OTHER)
        self._for_all = self.current

    def settle(self, category: Category) -> None:
        """What the current segment allocated as working set and still holds is `category` from now on."""
        for live in self.live.values():
            if live.born is self.current and live.category is Category.WORKING_SET:
                self.moved(live, category)

    def finish(self) -> list[Segment]:
        """Close the last segment and return all of them."""
        self.segments.append(self.current)
        self.current = Segment("after")  # what is freed from here on is no part of the step
        for hook in self._hooks:
            hook.remove()
        for segment, live, size in self._history:
            if not live.of_weights:
                segment.grown += size
                segment.grown_top = max(segment.grown_top, segment.grown)
        self._history.clear()
        return self.segments

    @contextmanager
    def labelled(self, label: Category) -> Iterator[None]:
        """Allocations in this stretch are `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def total(self) -> Counter[Category]:
        """Bytes alive now, by category."""
        totals: Counter[Category] = Counter()
        for live in self.live.values():
            totals[live.category] += live.bytes
        return totals

    # -- storages --------------------------------------------------------------------------------------------------

    def adopt(self, model: nn.Module) -> None:
        """Count a model's parameters and buffers, and its gradients: those that are there, and when they appear."""
        for tensor in held_by(model):
            self.see(tensor, Category.PARAMETERS)
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._gradient_arrived(parameter)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient_arrived))

    def see(self, tensor: torch.Tensor, category: Category | None = None) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or storage.nbytes() == 0:
            return
        weakref.finalize(storage, self._freed, key).atexit = False
        live = Live(storage.nbytes(), category or self.label, self.current, self.owner)
        live.of_weights = live.category in (Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
        self.born(key, live)

    def _live_of(self, tensor: Any) -> Live | None:
        return self.live.get(tensor.untyped_storage()._cdata) if isinstance(tensor, torch.Tensor) else None

    def relabel(self, tensor: torch.Tensor, category: Category) -> None:
        """A counted tensor is `category` from now on."""
        live = self._live_of(tensor)
        if live is not None and live.category is not category:
            self.moved(live, category)

    def born(self, key: int, live: Live) -> None:
        """A storage is alive from now on."""
        self.live[key] = live
        self._history.append((self.current, live, live.bytes))
        self._count(live.category, live.bytes)

    def moved(self, live: Live, category: Category) -> None:
        """A live storage is `category` from now on."""
        self._count(live.category, -live.bytes)
        live.category = category
        self._count(category, live.bytes)

    def died(self, live: Live) -> None:
        """A storage is gone, or its memory was taken over."""
        self._history.append((self.current, live, -live.bytes))
        self._count(live.category, -live.bytes)
        if self.current is self._for_all and live.born.block is not None:
            self.current.freed.setdefault(live.born.block, Counter())[live.category] += live.bytes

    def _freed(self, key: int) -> None:
        live = self.live.pop(key, None)
        if live is not None:
            self.gradients.discard(key)
            self.died(live)

    def _gradient_arrived(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.see(parameter.grad, Category.GRADIENTS)
            self.relabel(parameter.grad, Category.GRADIENTS)
            self._is_of_weights(self._live_of(parameter.grad))
            self.gradients.add(parameter.grad.untyped_storage()._cdata)

    def _is_of_weights(self, live: Live | None) -> None:
        if live is not None:
            live.of_weights = True
            for part in live.summed_from:
                self._is_of_weights(part)

    def _count(self, category: Category, size: int) -> None:
        segment = self.current
        segment.change[category] += size
        if size > 0:
            total = sum(segment.change.values())
            if total > segment.top_bytes:
                segment.top_bytes, segment.top = total, segment.change.copy()

    # -- operations ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device_of and isinstance(args[0], FakeTensor) and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # autograd's engine asks for it more often than it computes
        with torch._C.DisableTorchFunction():  # function modes have seen what the model called, and are slow
            return self._counted(func, args, kwargs or {})

    def _counted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func is aten.add.Tensor and self._is_accumulation(args):
            # Under a dispatch mode autograd adds gradients out of place; in real training it adds in place.
            func = aten.add_.Tensor
            self._is_of_weights(self._live_of(args[1]))
        parts: list[Live | None] = []
        if func is aten.add.Tensor and self._is_summed_by_engine(args):
            parts = [self._live_of(part) for part in args]
            self._forget(args[0])
        result = func(*args, **kwargs)
        made = tensors_of((result,))
        if func is aten._to_copy.default and self._is_parameter(args[0]):
            self.see(result, Category.PARAMETERS)  # autocast's copy of a weight
        for tensor in made:
            self.see(tensor)
        total = self._live_of(result) if parts else None
        if total is not None:
            total.summed_from = tuple(part for part in parts if part is not None)
        if self.counting_work:
            self._count_work(func, args, kwargs, result, made)
        return result

    def _is_parameter(self, tensor: Any) -> bool:
        live = self._live_of(tensor)
        return live is not None and live.category is Category.PARAMETERS

    def _is_accumulation(self, args: Any) -> bool:
        if not self.gradients or len(args) != 2 or not isinstance(args[0], torch.Tensor):
            return False
        return args[0].untyped_storage()._cdata in self.gradients

    def _is_summed_by_engine(self, args: Any) -> bool:
        """Does autograd's engine add up two gradients of one tensor? It reuses the first one's memory."""
        if self.current.phase != "backward" or len(args) != 2 or not isinstance(args[0], torch.Tensor):
            return False
        live = self.live.get(args[0].untyped_storage()._cdata)
        frame = sys._getframe(3)
        while frame.f_back is not None and frame.f_code.co_name in ("_fn", "inner"):  # torch's own wrappers of modes
            frame = frame.f_back
        return (
            live is not None
            and live.born.phase == "backward"
            and live.bytes == args[0].numel() * args[0].element_size()
            and frame.f_code.co_name == "_engine_run_backward"
        )

    def _forget(self, tensor: torch.Tensor) -> None:
        """The tensor's memory is taken over by the result of the next operation."""
        live = self.live.pop(tensor.untyped_storage()._cdata, None)
        if live is not None:
            self.died(live)

    def _count_work(self, func: Any, args: Any, kwargs: Any, result: Any, made: list[torch.Tensor]) -> None:
        read = tensors_of(args, kwargs)
        inputs = {t.untyped_storage()._cdata for t in read}
        if made and all(t.untyped_storage()._cdata in inputs for t in made) and not _writes(func):
            return  # a view moves nothing
        moved = standing_for() * sum(t.numel() * t.element_size() for t in (*read, *made))
        flops = standing_for() * flops_of(func, args, kwargs, result)
        self.current.flops += flops
        if flops:
            self.current.matmul_bytes += moved
        else:
            self.current.other_bytes += moved


@cache
def _writes(func: Any) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Floating-point operations of matrix products, convolutions and attention; 0 for everything else.

    torch's own formulas, and the CPU's fused attention, which they lack. A causal mask does not halve the count.
    """
    if func is _cpu_attention:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if func is _cpu_attention_backward:
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
