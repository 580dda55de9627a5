"""A digest of a tensor's values: enough to notice that a second run computed something else than the first.

Small tensors are looked at whole, of large ones a grid of elements, so that looking at everything a branch saved costs
a percent of the branch. What is kept are a few numbers. On a GPU they stay there, and nothing waits for them.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch._C import _TorchDispatchModeKey

WHOLE = 4096
"""Elements up to which a tensor is looked at whole."""
SAMPLED = 512
"""Elements, at most about, that are looked at of a larger one."""
FLOAT_TOLERANCE = 1e-2
"""Relative difference of what a branch saved beyond which its second run, on a stream that is only right up to
rounding, is not the first one's."""
FLOOR = 1e-5
"""Differences that small, in terms of the largest values that the chain saved, are rounding whatever they are relative
to: the mean of a normalised stream is zero but for them."""
FLIPPED = 0.2
"""The same for integers and masks, of which rounding may have changed a few."""
PROJECTIONS = 2

Digest = int | tuple[float, ...] | torch.Tensor
"""A hash of the bytes; or count, norm and a few random projections, which a small difference changes by little."""


def looked_at() -> bool:
    """Have tensors values at the moment? Fake tensors have none."""
    return torch._C._get_dispatch_mode(_TorchDispatchModeKey.FAKE) is None


def digest(tensor: torch.Tensor, exact: bool) -> Digest | None:
    """Numbers that stand for `tensor`, for a comparison bit for bit (`exact`) or up to rounding; None where it has no
    values of its own (fake, meta, sparse, quantised)."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return None
    if tensor.is_meta or tensor.is_quantized or not looked_at():
        return None
    on_cpu = tensor.device.type == "cpu"
    if not on_cpu and not tensor.is_floating_point() and tensor.numel() <= 2:
        return None  # fused attention without dropout leaves the seed that it saves unwritten
    part = tensor.detach()
    if part.numel() > WHOLE:
        part = part[_grid(part.shape)]
    part = part.reshape(-1)
    if exact:
        # Bytes are what every dtype has, and by them NaN equals itself.
        seen = part.contiguous().view(torch.uint8)
        if on_cpu:
            return hash(_bytes(seen))
        return (seen.to(torch.int64) * _weights(seen.numel(), seen.device)).sum()
    if part.is_complex():
        part = torch.view_as_real(part).reshape(-1)
    count = part.numel()
    if on_cpu:
        native = part.float() if part.dtype is torch.bfloat16 else part  # which numpy does not have
        values = np.frombuffer(_bytes(native.contiguous()), _numpy_dtype(native.dtype)).astype(np.float64)
        square = float(values @ values)
        if not math.isfinite(square):
            values = np.nan_to_num(values)
            square = float(values @ values)
        return count, math.sqrt(square), *(_signs(count) @ values).tolist()
    wide = part.to(torch.float64).nan_to_num()
    projections = torch.from_numpy(_signs(count)).to(wide.device) @ wide
    return torch.cat([wide.new_tensor([count]), wide.norm().view(1), projections])


def _bytes(tensor: torch.Tensor) -> bytes:
    """The memory of a contiguous CPU tensor. (`tensor.numpy()` would mark its storage as one that is never to be
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


@dataclass(eq=False)
class Comparison:
    """Second runs against first ones, over a whole chain; on a GPU the verdict is looked at later (`settle`)."""

    exact: bool
    pending: torch.Tensor | None = None
    scale: float | torch.Tensor = 0.0
    """The largest root mean square of a floating tensor in the first runs."""

    def first(self, tensor: torch.Tensor) -> Digest | None:
        """Of a first run."""
        found = digest(tensor, self.exact)
        if not self.exact and tensor.is_floating_point():
            if isinstance(found, tuple) and found[0]:
                self.scale = max(float(self.scale), found[1] / math.sqrt(found[0]))
            elif isinstance(found, torch.Tensor):
                size = found[1] / found[0].clamp(min=1).sqrt()
                self.scale = torch.maximum(torch.as_tensor(self.scale, device=size.device), size)
        return found

    def says_other(self, first: Digest | None, tensor: torch.Tensor) -> bool:
        """Is it known by now that `tensor`, of a second run, is another than the first run's?"""
        second = None if first is None else digest(tensor, self.exact)
        if first is None or second is None:
            return False
        if isinstance(first, int):
            return first != second
        tolerance = FLOAT_TOLERANCE if tensor.is_floating_point() else FLIPPED
        if isinstance(first, tuple) and isinstance(second, tuple):
            allowed = tolerance * max(first[1], second[1]) + FLOOR * float(self.scale) * math.sqrt(first[0])
            return any(abs(a - b) > 2 * allowed for a, b in zip(first, second, strict=True))
        if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
            return True
        if first.dim():
            room = tolerance * torch.maximum(first[1], second[1]) + FLOOR * self.scale * first[0].sqrt()
            other = ((first - second).abs() > 2 * room).any()
        else:
            other = first != second
        self.pending = other if self.pending is None else self.pending | other.to(self.pending.device)
        return False

    def settle(self) -> bool:
        """Did any differ, of those that were not known yet? Waits for the device."""
        pending, self.pending = self.pending, None
        return pending is not None and bool(pending)
