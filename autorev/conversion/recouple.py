"""Other numbers for a model that is converted already: a schedule moves gamma while the model trains."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from fractions import Fraction

from torch import nn

from autorev.conversion import config_entry
from autorev.conversion.convert import chains_of
from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.choose import check_dyadic
from autorev.couplings.velocity import Bdia, Velocity, compensated
from autorev.engine.chain import ReversibleChain
from autorev.errors import ConversionError, SettingError
from autorev.methods import Numbers, check_numbers, number_for


def recouple(model: nn.Module, *, gamma: Numbers, c: Numbers = None) -> None:
    """Give the converted blocks of `model` another gamma and c, between two training steps.

    Weights, grids and stored blocks stay as they are; a forward pass whose backward is still to come keeps the numbers
    that it was made with. The config remembers the new ones.

    Args:
        gamma: a number n / 2^k for all blocks, or a dict from block patterns to numbers; blocks that no pattern
            matches keep theirs.
        c: likewise. Default: `autorev.couplings.velocity.compensated`, which keeps a pretrained model nearest to itself
            whatever its gammas are.

    Raises:
        ConversionError: the model is not converted, its coupling has no gamma, or exact arithmetic cannot use one.
    """
    chains = chains_of(model)
    if not chains:
        raise ConversionError(f"{type(model).__name__} is not converted; call autorev.convert(model) first")
    if gamma is None:
        raise ConversionError("gamma is a number, or a dict from block patterns to numbers, not None")
    try:
        check_numbers("gamma", gamma)
        check_numbers("c", c)
    except SettingError as error:
        raise ConversionError(str(error)) from None
    paths = [path for chain in chains for path in chain.paths]
    for name, numbers in (("gamma", gamma), ("c", c)):
        for pattern in numbers if isinstance(numbers, Mapping) else ():
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ConversionError(f"the pattern {pattern!r} of {name} matches none of the converted blocks")
    new = [_couplings(chain, gamma, c) for chain in chains]
    for chain, couplings in zip(chains, new, strict=True):
        chain.couple_by(couplings)
    config_entry.update(model, chains)


def _couplings(chain: ReversibleChain, gamma: Numbers, c: Numbers) -> list[Velocity]:
    if not isinstance(chain.arithmetic, FixedPoint):
        raise ConversionError(f"{chain.name} is in float arithmetic, which drifts as gamma moves; convert it exactly")
    before: list[Velocity] = []
    for coupling in chain.couplings:
        if not isinstance(coupling, Velocity) or isinstance(coupling, Bdia):
            raise ConversionError(
                f"{chain.name} is coupled by {type(coupling).__name__.lower()}, whose numbers are its own; convert "
                "with momentum, leapfrog or midpoint to give it others"
            )
        before.append(coupling)
    gammas = []
    for old, path in zip(before, chain.paths, strict=True):
        number = number_for(gamma, path)
        chosen = old.gamma if number is None else Fraction(number)
        check_dyadic(chosen, path)
        gammas.append(chosen)
    if c is None:
        factors = _per_block(chain.paths, compensated(gammas))
    else:
        given = [number_for(c, path) for path in chain.paths]
        factors = [old.c if number is None else float(number) for old, number in zip(before, given, strict=True)]
    for factor, path in zip(factors, chain.paths, strict=True):
        if not abs(factor) > 0:  # NaN included
            raise ConversionError(f"c = {factor} for {path}: the branches would be switched off; give another number")
    return [Velocity(g, factor) for g, factor in zip(gammas, factors, strict=True)]


def _per_block(paths: list[str], factors: list[float]) -> list[float]:
    """The steps of one block share the mean: a config remembers one number per block."""
    by_block: dict[str, list[float]] = {}
    for path, factor in zip(paths, factors, strict=True):
        by_block.setdefault(path, []).append(factor)
    return [sum(by_block[path]) / len(by_block[path]) for path in paths]
