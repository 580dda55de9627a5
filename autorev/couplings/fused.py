"""A step of the velocity family in one pass over the streams: `integers`, compiled.

By single operators, a step reads and writes the streams some fifteen times, and so does its inverse. On a GPU that is
what a coupling costs, so there both are `torch.compile`d. What is compiled is tried first, on a few numbers: where
there is no compiler, or where one bit of the result is another than that of the single operators, these go on being
used, and that is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch

from autorev.couplings.arithmetic import Arithmetic, FixedPoint, inverse_of, side_bits_of
from autorev.couplings.integers import advanced, decoded, packed, unpacked, velocity_before
from autorev.couplings.side_bits import ROWS
from autorev.errors import first_line

FUSED_ON = frozenset({"cuda"})
"""Kinds of devices. A CPU has half the time to gain, too (benchmarks/fused_*.md), but compiling takes a minute there,
and a C++ compiler."""
TRIED = 4096
"""Elements of the streams that a compiled step is tried on."""
IN_PLACE: dict[str, Any] = {"realize_reads_threshold": 64, "realize_opcount_threshold": 256}
"""For inductor: it writes results where the streams are, rather than into memory of its own, to be copied."""
_said: list[str] = []
"""Why compiled steps are not used; it was said."""


@dataclass(frozen=True, eq=False)
class Stepped:
    """What a step gave besides the new state."""

    side: torch.Tensor | None
    """As `side_bits.pack` makes it."""
    new: torch.Tensor
    """The new stream as the model reads it, in the branch's dtype."""
    largest: torch.Tensor
    """See `integers.Advanced`."""


@dataclass(frozen=True, eq=False)
class Kernels:
    """A step V' = V n / 2^k + F, H' = H + V' and its inverse, compiled for one k."""

    step: Callable[..., tuple[torch.Tensor, ...]]
    back: Callable[..., None]


@dataclass(frozen=True)
class Fused:
    """Both on one grid."""

    kernels: Kernels
    grid: FixedPoint

    def step(
        self,
        stream: torch.Tensor,
        velocity: torch.Tensor,
        out: torch.Tensor,
        value: torch.Tensor,
        gamma: Fraction,
        c: float,
    ) -> Stepped:
        """Write H' and V' where H and V are."""
        unit = _number(self.grid.unit, _wide_of(out), stream.device)
        with torch.no_grad():
            numbers = (_number(gamma.numerator, torch.int32, stream.device), self._scale(c, out, value), unit)
            new, largest, *side = self.kernels.step(*_rows(stream, velocity, out, value), *numbers)
        return Stepped(side[0] if side else None, new.view(out.shape), largest)

    def back(
        self,
        velocity: torch.Tensor,
        out: torch.Tensor,
        value: torch.Tensor,
        side: torch.Tensor | None,
        gamma: Fraction,
        c: float,
    ) -> None:
        """Write V where V' is."""
        inverse = _number(inverse_of(gamma.numerator), torch.int32, velocity.device)
        if side is not None:
            _any_length(side, 0)
        with torch.no_grad():
            self.kernels.back(*_rows(velocity, out, value), inverse, self._scale(c, out, value), side)

    def _scale(self, c: float, out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _number(c / self.grid.unit, _wide_of(out, value), out.device)


def fused_for(arithmetic: Arithmetic, gamma: Fraction, *tensors: torch.Tensor) -> Fused | None:
    """For a step on these tensors: the state, the branch's output and its input. None: it is taken by single operators.

    Nothing compiled runs on tensors without values, or under a mode that wants to see every operator.
    """
    first, (out, value) = tensors[0], tensors[-2:]
    if first.device.type not in FUSED_ON or not isinstance(arithmetic, FixedPoint):
        return None
    if first.numel() % ROWS or not first.numel() or torch.compiler.is_compiling():
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    if any(not t.is_contiguous() or t.device != first.device or type(t) is not torch.Tensor for t in tensors):
        return None
    kernels = _tried(side_bits_of(gamma), first.device, out.dtype, value.dtype)
    return None if kernels is None else Fused(kernels, arithmetic)


@lru_cache(maxsize=256)
def _number(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As a tensor, so that nothing is compiled anew for another one; on the device, so that nothing waits for it."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def _wide_of(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """As `side_bits` takes them: eight rows."""
    rows = [tensor.detach().view(ROWS, -1) for tensor in tensors]
    for tensor in rows:
        _any_length(tensor, 1)
    return rows


def _any_length(tensor: torch.Tensor, axis: int) -> None:
    """Compile nothing anew for another length."""
    from torch._dynamo import maybe_mark_dynamic  # takes a while to import

    maybe_mark_dynamic(tensor, axis)


@lru_cache(maxsize=64)
def _tried(bits: int, device: torch.device, out: torch.dtype, value: torch.dtype) -> Kernels | None:
    """Compiled, and found to give the bits of single operators; None, and a warning, where that is not so."""
    if _said:
        return None
    kernels = Kernels(*(torch.compile(_named(part, bits), options=IN_PLACE) for part in (_step, _back)))
    try:
        with torch.inference_mode(False):
            problem = None if _agree(kernels, bits, device, out, value) else "its results are others"
    except Exception as error:  # of any part of a compiler
        problem = first_line(error)
    if problem is None:
        return kernels
    _said.append(problem)
    logging.getLogger("autorev").warning(
        "reversible steps on %s are taken by single operators, which is slower: compiling them failed (%s)",
        device.type,
        problem,
    )
    return None


def _named(function: Any, bits: int) -> Callable[..., Any]:
    """For so many bits: code of its own, for which torch counts by itself how often it is compiled."""
    code = function.__code__.replace(co_name=f"autorev{function.__name__}_{bits}")
    return FunctionType(code, function.__globals__, code.co_name, (bits,))


def _agree(kernels: Kernels, bits: int, device: torch.device, out_dtype: torch.dtype, in_dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    gamma, c, grid = Fraction(1 - 2**bits if bits else -1, 2**bits), 0.9375, FixedPoint(12, 0.7)
    stream, velocity = (
        torch.randint(-(2**n), 2**n, (TRIED,), generator=generator, dtype=torch.int32).to(device) for n in (24, 22)
    )
    value = grid.decode(stream, in_dtype)
    out = (value.float() + torch.randn(TRIED, generator=generator).to(device)).to(out_dtype)
    scaled, side = grid.scale(velocity.clone(), gamma)
    after = grid.add_branch(scaled, out, value, c)
    total, before = stream + after, velocity.clone()
    fused = Fused(kernels, grid)
    found = fused.step(stream, velocity, out, value, gamma, c)
    pairs = [(stream, total), (velocity, after), (found.new, grid.decode(total, out_dtype))]
    pairs += [] if side is None or found.side is None else [(found.side, side)]
    agree = all(torch.equal(a, b) for a, b in pairs) and int(found.largest) == int(total.abs().amax())
    fused.back(velocity, out, value, side, gamma, c)
    return agree and torch.equal(velocity, before)


# -- what is compiled


def _step(
    stream: torch.Tensor,
    velocity: torch.Tensor,
    out: torch.Tensor,
    value: torch.Tensor,
    numerator: torch.Tensor,
    scale: torch.Tensor,
    unit: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, ...]:
    """V' and H' in the memory of V and H. Returns H' decoded, the largest |H'|, and the side bits, if any."""
    step = advanced(stream, velocity, out, value, numerator, scale, bits)
    new = decoded(step.stream, unit, out.dtype)
    side = (packed(step.product, bits),) if bits else ()
    velocity.copy_(step.velocity)
    stream.copy_(step.stream)
    return new, step.largest, *side


def _back(
    velocity: torch.Tensor,
    out: torch.Tensor,
    value: torch.Tensor,
    inverse: torch.Tensor,
    scale: torch.Tensor,
    side: torch.Tensor | None,
    bits: int,
) -> None:
    """V in the memory of V'."""
    low = None if side is None else unpacked(side, bits)
    velocity.copy_(velocity_before(velocity, out, value, inverse, scale, bits, low))
