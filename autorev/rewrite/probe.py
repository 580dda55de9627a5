"""Choose each exact chain's grid: as fine as its activations, with head-room, allow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autorev.couplings.arithmetic import LEAST_FRACTION_BITS, FixedPoint, Floating, grid_for
from autorev.engine.chain import ReversibleChain
from autorev.errors import ConversionError

HEAD_ROOM = 16.0
"""Activations may become so many times as large as in the probe before they leave the grid."""
USUAL_FRACTION_BITS = 16


def choose_grids(
    model: nn.Module,
    chains: list[ReversibleChain],
    fraction_bits: int | Mapping[str, int] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[str]:
    """Set the grid of every exact chain of the converted `model`; returns notes for the user.

    The example call is run once in eval mode, without gradients, in float streams; random numbers and modes are put
    back.

    Raises:
        ConversionError: the activations are not finite, or too large for a useful grid.
    """
    exact = [chain for chain in chains if isinstance(chain.arithmetic, FixedPoint)]
    given = fraction_bits if isinstance(fraction_bits, Mapping) else {c.name: fraction_bits for c in exact}
    unknown = [chain for chain in exact if given.get(chain.name) is None]
    for chain in exact:
        bits = given.get(chain.name)
        if bits is not None:
            if not 0 <= bits <= 30:
                raise ConversionError(f"fraction_bits is between 0 and 30, not {bits}")
            chain.arithmetic = FixedPoint(bits)
    if not unknown:
        return []
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta or hasattr(t, "fake_mode") for t in tensors):
        for chain in unknown:
            chain.arithmetic = FixedPoint(USUAL_FRACTION_BITS)
        return [f"the model has no weights yet, so the grid was not fitted to them: 2^-{USUAL_FRACTION_BITS}"]
    for chain in unknown:
        chain.arithmetic, chain.largest = Floating(), 0.0
    try:
        with _undisturbed(model):
            model(*args, **kwargs)
        unseen = [chain.name for chain in unknown if chain.largest == 0]
        for chain in unknown:
            chain.arithmetic = FixedPoint(USUAL_FRACTION_BITS if chain.name in unseen else _bits_for(chain))
    finally:
        for chain in unknown:
            chain.largest = None
    return [f"the example call never reached {name}: its grid is 2^-{USUAL_FRACTION_BITS}" for name in unseen]


def _bits_for(chain: ReversibleChain) -> int:
    largest = chain.largest
    assert largest is not None
    if not math.isfinite(largest):
        raise ConversionError(f"the activations of {chain.name} are not finite in the example call; check the weights")
    bits = grid_for(largest, HEAD_ROOM)
    if bits < LEAST_FRACTION_BITS:
        raise ConversionError(
            f"the activations of {chain.name} reach {largest:.3g}, and a grid with room for {HEAD_ROOM:g} times that "
            f"would have steps of 2^-{bits}; give fraction_bits yourself, or use a coupling with |gamma| = 1 in "
            "arithmetic='float'"
        )
    return bits


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and afterwards the modes and random states as before."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for module in training:
            module.training = False  # not by `eval()`, which an exported graph refuses
        try:
            yield
        finally:
            for module in training:
                module.training = True
