"""A digest of a tensor's values: enough to notice that a second run computed something else than the first.

Small tensors are looked at element by element, large ones at a grid of elements and at the sum of all, so that looking
at everything a branch saved costs a percent or two of the branch. What is kept are a few numbers. On a GPU they stay
there, and nothing waits for them.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch._C import _TorchDispatchModeKey
from torch.multiprocessing.reductions import StorageWeakRef

WHOLE = 4096
"""Elements up to which a tensor is looked at whole."""
SAMPLED = 512
"""Elements, at most about, that are looked at of a larger one."""
GLANCES = 8
"""Places of a large tensor that are compared bit for bit where the output tells whether the rest is the same."""
FLOAT_TOLERANCE = 1e-2
"""Relative difference of what a branch saved beyond which its second run, on a stream that is only right up to
rounding, is not the first one's."""
FLOOR = 1e-5
"""Differences that small, in terms of the largest values that the chain saved, are rounding whatever they are relative
to: the mean of a normalised stream is zero but for them."""
FLIPPED = 0.2
"""The same for integers and masks, of which rounding may have changed a few."""
PROJECTIONS = 2
RECENT = 64
"""Tensors whose digest is remembered for the next operator that saves them."""

Digest = int | tuple[float, ...] | torch.Tensor
"""A hash of the bytes; or count, norm and a few random projections, which a small difference changes by little."""


WAITED_FOR = frozenset({"cpu"})
"""Kinds of devices. To read a number on a GPU is to wait until it has computed all that was asked of it."""


def waited_for(device: torch.device) -> bool:
    """Are values there read as soon as they are made?"""
    return device.type in WAITED_FOR


def looked_at() -> bool:
    """Have tensors values at the moment? Fake tensors have none."""
    return torch._C._get_dispatch_mode(_TorchDispatchModeKey.FAKE) is None


def digest(tensor: torch.Tensor, exact: bool, wholly: bool = True) -> Digest | None:
    """Numbers that stand for `tensor`, for a comparison bit for bit (`exact`) or up to rounding; None where it has no
    values of its own (fake, meta, sparse, quantised). `wholly`: look at the sum of all elements, too."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return None
    if tensor.is_meta or tensor.is_quantized or not looked_at():
        return None
    on_cpu = waited_for(tensor.device)
    if not on_cpu and not tensor.is_floating_point() and tensor.numel() <= 2:
        return None  # fused attention without dropout leaves the seed that it saves unwritten
    if exact and on_cpu and (tensor.numel() <= WHOLE or not wholly) and _is_dense(tensor):
        return hash(_bytes(tensor)) if tensor.numel() <= WHOLE else _glance(tensor)
    whole = tensor.detach()
    large = whole.numel() > (WHOLE if wholly else WHOLE // 4)
    if large and whole.is_contiguous():
        # Odd, so that heads, groups and pairs are all met. Each element is a page of memory to wait for.
        part = whole.view(-1)[:: (whole.numel() // SAMPLED) | 1]
    else:
        part = (whole[_grid(whole.shape)] if large else whole).reshape(-1)
    if exact:
        # Bytes are what every dtype has, and by them NaN equals itself.
        seen = part.contiguous().view(torch.uint8)
        total = _sum_of_bits(whole) if large and wholly else None
        if on_cpu:
            return hash((_bytes(seen), 0 if total is None else int(total)))
        found = (seen.to(torch.int64) * _weights(seen.numel(), seen.device)).sum()
        return found if total is None else found * 3 + total
    if part.is_complex():
        part, whole = torch.view_as_real(part).reshape(-1), torch.view_as_real(whole)
    count = part.numel()
    overall = _size_and_sum(whole) if large else []
    if on_cpu:
        native = part.float() if part.dtype is torch.bfloat16 else part  # which numpy does not have
        values = np.frombuffer(_bytes(native.contiguous()), _numpy_dtype(native.dtype)).astype(np.float64)
        square = float(values @ values)
        if not math.isfinite(square):
            values = np.nan_to_num(values, posinf=0, neginf=0)  # of a mask
            square = float(values @ values)
        projections = (_signs(count) @ values).tolist()
        return count, math.sqrt(square), *projections, *(float(number) for number in overall)
    wide = part.to(torch.float64).nan_to_num(0, 0, 0)
    projected = torch.from_numpy(_signs(count)).to(wide.device) @ wide
    sizes = [wide.new_tensor([count]), wide.norm().view(1), projected, *(number.view(1) for number in overall)]
    return torch.cat(sizes)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Is the memory between its first and last element its own, in whatever order (q and k of attention)?"""
    if tensor.is_contiguous():
        return True
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 == tensor.numel() and 0 not in tensor.stride()


def _glance(tensor: torch.Tensor) -> int:
    """A few places of a large dense CPU tensor, without an operator: there are thousands of tensors a step."""
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    step = (size - 8) // (GLANCES - 1)
    return hash(b"".join([ctypes.string_at(start + number * step, 8) for number in range(GLANCES)]))


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Of the whole tensor as integers, wrapping round: it costs a read of the memory."""
    size = tensor.element_size()
    if (
        tensor.is_contiguous()
        and size < 8
        and tensor.numel() * size % 8 == 0
        and tensor.storage_offset() * size % 8 == 0
    ):
        return tensor.view(-1).view(torch.int64).sum()
    if tensor.is_complex():
        return _sum_of_bits(torch.view_as_real(tensor))
    return tensor.view(_INTEGERS[size]).sum(dtype=torch.int64)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _size_and_sum(tensor: torch.Tensor) -> list[torch.Tensor]:
    """(norm, sum) of the whole tensor in float64; infinities count as nothing."""
    floating = tensor if tensor.is_floating_point() else tensor.float()
    size, total = torch.linalg.vector_norm(floating, dtype=torch.float64), floating.sum(dtype=torch.float64)
    return [size.nan_to_num(0, 0, 0), total.nan_to_num(0, 0, 0)]


def _bytes(tensor: torch.Tensor) -> bytes:
    """The memory of a dense CPU tensor. (`tensor.numpy()` would mark its storage as one that is never to be
    resized, as FSDP resizes the storages of parameters.)"""
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()) if tensor.numel() else b""


@lru_cache(maxsize=64)
def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype


@lru_cache(maxsize=4096)
def _grid(shape: torch.Size) -> tuple[slice, ...]:
    """Every axis in strides, the longest axes in the longest: about `SAMPLED` elements."""
    steps, counts = [1] * len(shape), list(shape)
    while math.prod(counts) > SAMPLED:
        longest = max(range(len(counts)), key=counts.__getitem__)
        steps[longest] = steps[longest] * 2 + 1  # odd, so that heads, groups and pairs are all met
        counts[longest] = -(-shape[longest] // steps[longest])
    return tuple(slice(None, None, step) for step in steps)


@lru_cache(maxsize=256)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator).to(device)


@lru_cache(maxsize=256)
def _signs(count: int) -> np.ndarray:
    return np.random.RandomState(count).randint(0, 2, (PROJECTIONS, count)) * 2.0 - 1


def _groups(length: int, count: float, whole: int) -> list[tuple[int, tuple[int, ...], float]]:
    """(place of a norm, places of the sums that it is the size of, over how many elements) in a float's digest."""
    sampled = (1, tuple(range(2, 2 + PROJECTIONS)), count)
    at = 2 + PROJECTIONS
    return [sampled] if length <= at else [sampled, (at, (at + 1,), float(whole))]


@dataclass(eq=False)
class Comparison:
    """Second runs against first ones, over a whole chain; on a GPU the verdict is looked at later (`settle`)."""

    exact: bool
    pending: torch.Tensor | None = None
    recent: dict[Any, tuple[StorageWeakRef, Digest | None]] = field(default_factory=dict)
    scale: float | torch.Tensor = 0.0
    """The largest root mean square of a floating tensor in the first runs."""

    def _digest(self, tensor: torch.Tensor, wholly: bool) -> Digest | None:
        """What several operators save (the input of q, k and v) is looked at once, while it is the same memory."""
        wholly = wholly or not self.exact
        if tensor.numel() <= WHOLE or not wholly or tensor.is_meta or tensor.is_inference():
            return digest(tensor, self.exact, wholly)
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        known = self.recent.get(key)
        if known is not None and not known[0].expired():
            return known[1]
        found = digest(tensor, self.exact)
        self.recent[key] = StorageWeakRef(storage), found  # as long as it is here, its address is no other's
        if len(self.recent) > RECENT:
            del self.recent[next(iter(self.recent))]
        return found

    def first(self, tensor: torch.Tensor, wholly: bool = True) -> Digest | None:
        """Of a first run."""
        found = self._digest(tensor, wholly)
        if not self.exact and tensor.is_floating_point():
            if isinstance(found, tuple) and found[0]:
                self.scale = max(float(self.scale), found[1] / math.sqrt(found[0]))
            elif isinstance(found, torch.Tensor):
                size = found[1] / found[0].clamp(min=1).sqrt()
                self.scale = torch.maximum(torch.as_tensor(self.scale, device=size.device), size)
        return found

    def says_other(
        self, first: Digest | None, tensor: torch.Tensor, wholly: bool = True, rounding: float = FLOAT_TOLERANCE
    ) -> bool:
        """Is it known by now that `tensor`, of a second run, is another than the first run's? `rounding`: the relative
        difference of floats that is none, where the arithmetic is not exact."""
        second = None if first is None else self._digest(tensor, wholly)
        if first is None or second is None:
            return False
        if isinstance(first, int):
            return first != second
        tolerance = rounding if tensor.is_floating_point() else FLIPPED
        if isinstance(first, tuple) and isinstance(second, tuple):
            floor = FLOOR * float(self.scale)
            for size, at, count in _groups(len(first), first[0], tensor.numel()):
                allowed = 2 * (tolerance * max(first[size], second[size]) + floor * math.sqrt(count))
                if any(abs(first[i] - second[i]) > allowed for i in (size, *at)):
                    return True
            return False
        if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
            return True
        if first.dim():
            other = torch.zeros((), dtype=torch.bool, device=first.device)
            for size, at, count in _groups(first.numel(), 0, tensor.numel()):
                room = tolerance * torch.maximum(first[size], second[size])
                room = room + FLOOR * self.scale * (first[0] if not count else first.new_tensor(count)).sqrt()
                for i in (size, *at):
                    other |= (first[i] - second[i]).abs() > 2 * room
        else:
            other = first != second
        self.pending = other if self.pending is None else self.pending | other.to(self.pending.device)
        return False

    def settle(self) -> bool:
        """Did any differ, of those that were not known yet? Waits for the device."""
        pending, self.pending = self.pending, None
        return pending is not None and bool(pending)
