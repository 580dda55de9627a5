"""The arguments of `convert`, as one method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from autorev.conversion.select import Chosen
from autorev.errors import ConversionError, SettingError
from autorev.methods import Method


def asked(method: str | Method, **options: Any) -> Method:
    """`method` with the options that are given beside it; a `planned` one may chunk the loss."""
    planned = options.pop("planned")
    given = {name: value for name, value in options.items() if value is not None}
    try:
        said = Method.parse(method) if isinstance(method, str) else method
        if not isinstance(said, Method):
            raise SettingError(f"a method is named by text, such as momentum:k=3, not {method!r}")
        usual = Method(said.name)
        for name in given:
            if getattr(said, name) != getattr(usual, name):
                raise SettingError(f"{name} is given in {said.spec} and beside it; give one of the two")
        how = replace(said, **given)
    except SettingError as error:
        raise ConversionError(str(error)) from None
    if how.name == "compile":
        raise ConversionError(
            "the method compile is nothing that convert does; call block.compile() on the blocks, or give "
            "compile='blocks'"
        )
    if how.loss != "full" and not planned:
        raise ConversionError(
            "no method of convert changes the loss; call autorev.chunk_loss(model), too, and leave loss=chunked out"
        )
    return how


def check_patterns(method: Method, chosen: Chosen) -> None:
    """Raises ConversionError where a pattern of `gamma` or `c` matches none of the blocks."""
    paths = [finding.path for chain in chosen.chains for finding in chain]
    for name in ("gamma", "c"):
        numbers = getattr(method, name)
        for pattern in numbers if isinstance(numbers, Mapping) else ():
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ConversionError(f"the pattern {pattern!r} of {name} matches none of the blocks to convert")
