"""A conversion that outlives the process: its entry in the config that is saved beside the weights.

`autorev.load` applies it. A plain `from_pretrained` of the same folder gives the plain model, which ignores it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import nn

from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.velocity import Velocity
from autorev.integrations.peft import name_in_base
from autorev.integrations.transformers import saved_config

if TYPE_CHECKING:
    from autorev.engine.chain import ReversibleChain
    from autorev.methods import Method

KEY = "autorev"


def write(
    model: nn.Module,
    method: Method,
    blocks: list[str] | None,
    exclude: list[str] | None,
    chains: Mapping[str, ReversibleChain],
) -> None:
    """Write the conversion into the model's config, if it has one."""
    config = saved_config(model)
    if config is None:
        return
    grids = {n: c.arithmetic.fraction_bits for n, c in chains.items() if isinstance(c.arithmetic, FixedPoint)}
    for chain in chains.values():
        chain.grids = grids  # a chain that coarsens its grid writes it there
    numbers = {name: _plain(getattr(method, name)) for name in ("gamma", "c")}
    kept = ("arithmetic", "granularity", "keep_last", "tile", "keep", "host", "compile")
    how = {name: getattr(method, name) for name in kept}
    which = {"blocks": blocks, "exclude": exclude}
    setattr(config, KEY, {"method": method.name, **numbers, **how, **which, "fraction_bits": grids or None})


def update(model: nn.Module, chains: Iterable[ReversibleChain]) -> None:
    """Replace the entry's gamma and c by those that the chains have now, block by block."""
    entry = getattr(getattr(model, "config", None), KEY, None)
    if not isinstance(entry, Mapping):
        return
    gamma: dict[str, float] = {}
    c: dict[str, float] = {}
    for chain in chains:
        for path, coupling in zip(chain.paths, chain.couplings, strict=True):
            assert isinstance(coupling, Velocity)
            gamma.setdefault(path, float(coupling.gamma))
            c.setdefault(path, coupling.c)
    # Momentum is the coupling whose gamma is free; with gamma = 1 it is leapfrog.
    setattr(model.config, KEY, {**entry, "method": "momentum", "gamma": _plain(gamma), "c": _plain(c)})


def remove(model: nn.Module) -> None:
    """Remove the entry."""
    config = getattr(model, "config", None)
    if KEY in getattr(config, "__dict__", ()):  # a model's `config` may be any object: a dict, a tuple
        delattr(config, KEY)


def read(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of `convert` that `model` was converted with, as its config tells them; None: it does not."""
    entry = getattr(getattr(model, "config", None), KEY, None)
    if not isinstance(entry, Mapping):
        return None
    pairs = {name: dict(entry[name]) for name in ("gamma", "c") if isinstance(entry.get(name), list)}
    return {**entry, **pairs}


def for_base_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model that was converted within a wrapper of adapters, with the names of the model itself."""

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return name_in_base(value)
        if isinstance(value, Mapping):
            return {plain(name): number for name, number in value.items()}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return {name: plain(value) for name, value in settings.items()}


def _plain(value: Any) -> Any:
    """JSON's kinds of values. A mapping becomes pairs: its order counts, and a config is written with sorted keys."""
    if isinstance(value, Mapping):
        return [[str(pattern), float(number)] for pattern, number in value.items()]
    if isinstance(value, Fraction):
        return float(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return list(value)
    return value
