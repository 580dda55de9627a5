"""Choose each exact chain's grid: as fine as its activations, with head-room, allow."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autorev.conversion.agreed import agreed
from autorev.couplings.arithmetic import FixedPoint, Floating, grid_for
from autorev.engine.chain import Magnitudes, ReversibleChain
from autorev.engine.eval_mode import eval_mode
from autorev.engine.grid import COARSEST_FOR_INPUT, USUAL_FRACTION_BITS
from autorev.engine.owned import is_fake
from autorev.engine.undisturbed import undisturbed
from autorev.errors import AutorevError, ConversionError, one_line
from autorev.integrations.accelerate import fetched

HEAD_ROOM = 16.0
"""Activations may become so many times as large as in the probe before they leave the grid."""


def choose_grids(
    model: nn.Module,
    chains: list[ReversibleChain],
    fraction_bits: int | Mapping[str, int] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[str]:
    """Set the grid of every exact chain of the converted `model`; returns notes for the user.

    The example call is run once in eval mode, without gradients, in float streams; random numbers and modes are put
    back. Several processes (torch.distributed) agree on the coarsest grid of all (`agreed`).

    Raises:
        ConversionError: the activations are not finite, or no grid fits the large ones and the small ones.
    """
    exact = [chain for chain in chains if isinstance(chain.arithmetic, FixedPoint)]
    names = [chain.name for chain in exact]
    by_name = fraction_bits if isinstance(fraction_bits, Mapping) else dict.fromkeys(names, fraction_bits)
    given = {_whole(name, names): bits for name, bits in by_name.items()}
    unknown = [chain for chain in exact if given.get(chain.name) is None]
    if strangers := sorted(set(given) - set(names)):
        raise ConversionError(f"fraction_bits names no chain {strangers[0]!r}; they are {', '.join(names)}")
    for chain in exact:
        bits = given.get(chain.name)
        if bits is not None:
            chain.arithmetic = FixedPoint(bits)
    if not unknown:
        return []
    brought = {id(tensor) for _, tensor in fetched(model)}
    if any(is_fake(t) and id(t) not in brought for t in (*model.parameters(), *model.buffers())):
        for chain in unknown:
            chain.arithmetic = FixedPoint(USUAL_FRACTION_BITS)
        return [f"the model has no weights yet, so the grid was not fitted to them: 2^-{USUAL_FRACTION_BITS}"]
    for chain in unknown:
        chain.arithmetic, chain.magnitudes = Floating(), defaultdict(Magnitudes)
    try:
        with undisturbed(model, (args, kwargs)), torch.no_grad(), eval_mode(model):
            try:
                model(*args, **kwargs)
            except AutorevError:
                raise
            except Exception as error:
                raise ConversionError(
                    f"the converted {type(model).__name__} could not be run on the example call in eval mode without "
                    f"gradients ({one_line(error)}); give fraction_bits, or use arithmetic='float'"
                ) from error
        unseen = [chain.name for chain in unknown if all(sizes.largest == 0 for sizes in _sizes(chain))]
        bits, notes = agreed({chain.name: _coarsest(chain) for chain in unknown})
        for chain in unknown:
            chain.arithmetic = FixedPoint(bits[chain.name])
    finally:
        for chain in unknown:
            chain.magnitudes = None
    return notes + [f"the example call never reached {name}: its grid is 2^-{USUAL_FRACTION_BITS}" for name in unseen]


def _sizes(chain: ReversibleChain) -> list[Magnitudes]:
    """Of each lane."""
    return list((chain.magnitudes or {}).values())


def _coarsest(chain: ReversibleChain) -> int:
    """For all lanes; each begins with a finer grid where this one is too coarse for it (`grid_at_start`)."""
    bits = [_bits_for(chain, sizes) for sizes in _sizes(chain) if sizes.largest != 0]
    return min(bits, default=USUAL_FRACTION_BITS)


def _bits_for(chain: ReversibleChain, sizes: Magnitudes) -> int:
    if not math.isfinite(sizes.largest):
        raise ConversionError(f"the activations of {chain.name} are not finite in the example call; check the weights")
    bits = grid_for(sizes.largest, HEAD_ROOM)
    if 2.0**-bits > COARSEST_FOR_INPUT * sizes.size_behind:
        raise ConversionError(
            f"the stream of {chain.name} reaches {sizes.largest:.3g} and then shrinks to {sizes.size_behind:.3g}: a "
            f"grid with room for the one (2^{-bits}) rounds the other away. Give fraction_bits yourself, exclude the "
            "blocks that make it so large, or use a coupling with |gamma| = 1 in arithmetic='float'"
        )
    return bits


def _whole(name: str, names: list[str]) -> str:
    """The chain that `name` is the end of: a part of a model that was converted by itself calls it so."""
    found = [whole for whole in names if whole.endswith(f".{name}")]
    return found[0] if name not in names and len(found) == 1 else name
