"""A conversion that outlives the process: written into a `transformers` config, and applied by `autorev.load`.

A plain `from_pretrained` of the same folder gives the vanilla model, which ignores the entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.velocity import Velocity
from autorev.errors import ConversionError, ModelNotFoundError, one_line
from autorev.files import path_of
from autorev.models.load import class_in
from autorev.models.weights import load_weights

if TYPE_CHECKING:
    from autorev.engine.chain import ReversibleChain
    from autorev.methods import Method

KEY = "autorev"
_PEFT = "base_model.model."
"""Where a PEFT model holds the model."""


def remember(
    model: nn.Module,
    method: Method,
    blocks: list[str] | None,
    exclude: list[str] | None,
    chains: Mapping[str, ReversibleChain],
) -> None:
    """Write the conversion into the model's config, if it has one."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return
    grids = {n: c.arithmetic.fraction_bits for n, c in chains.items() if isinstance(c.arithmetic, FixedPoint)}
    for chain in chains.values():
        chain.grids = grids  # a chain that coarsens its grid writes it there
    numbers = {name: _plain(getattr(method, name)) for name in ("gamma", "c")}
    how = {name: getattr(method, name) for name in ("arithmetic", "granularity", "keep_last")}
    which = {"blocks": blocks, "exclude": exclude}
    setattr(config, KEY, {"coupling": method.name, **numbers, **how, **which, "fraction_bits": grids or None})


def remember_numbers(model: nn.Module, chains: Iterable[ReversibleChain]) -> None:
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
    setattr(model.config, KEY, {**entry, "coupling": "momentum", "gamma": _plain(gamma), "c": _plain(c)})


def forget(model: nn.Module) -> None:
    """Remove the entry."""
    config = getattr(model, "config", None)
    if config is not None and KEY in vars(config):
        delattr(config, KEY)


def converted_as(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of `convert` that `model` was converted with, as its config tells them; None: it does not."""
    entry = getattr(getattr(model, "config", None), KEY, None)
    if not isinstance(entry, Mapping):
        return None
    pairs = {name: dict(entry[name]) for name in ("gamma", "c") if isinstance(entry.get(name), list)}
    return {**entry, **pairs}


def for_base_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model that was converted within PEFT's, as the model itself reads them: shorter names."""

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return value.removeprefix(_PEFT)
        if isinstance(value, Mapping):
            return {plain(name): number for name, number in value.items()}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return {name: plain(value) for name, value in settings.items()}


def load(folder: str | Path, *, trust_remote_code: bool = False, **from_pretrained: Any) -> nn.Module:
    """A model saved by `save_pretrained`, converted as it was when it was saved.

    `trust_remote_code`: code that stands beside its config, or that the config names, may run. `from_pretrained`:
    further keyword arguments of the `transformers` function of that name.

    Raises:
        ModelNotFoundError: the folder holds no config.json.
        ModelBuildError: transformers cannot load it, or its weights are not those of its config.
        UntrustedCodeError: it names code, which is not trusted.
        ConversionError: it was not converted when it was saved, or cannot be converted that way any more.
    """
    from autorev.conversion.convert import convert

    path = path_of(folder)
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{path} holds no config.json; give the folder that save_pretrained wrote")
    cls, _ = class_in(path, trust_remote_code)
    model: nn.Module = load_weights(cls, path, **from_pretrained)
    settings = converted_as(model)
    if settings is None:
        raise ConversionError(
            f"{path} holds a model that was not converted; use transformers' from_pretrained, and autorev.convert"
        )
    forget(model)
    try:
        convert(model, **for_base_model(settings))
    except TypeError as error:
        raise ConversionError(
            f"{path}/config.json has an autorev entry of another version: {one_line(error)}"
        ) from None
    return model


def _plain(value: Any) -> Any:
    """JSON's kinds of values. A mapping becomes pairs: its order counts, and a config is written with sorted keys."""
    if isinstance(value, Mapping):
        return [[str(pattern), float(number)] for pattern, number in value.items()]
    if isinstance(value, Fraction):
        return float(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return list(value)
    return value
