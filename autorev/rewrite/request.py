"""What `convert` is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from autorev.couplings.presets import Preset, preset_named
from autorev.errors import ConversionError

Numbers = float | Mapping[str, float] | None
"""One number for all blocks, or a number per pattern of block paths."""


@dataclass(frozen=True)
class Request:
    """The arguments of `convert`."""

    coupling: str = "momentum"
    gamma: Numbers = None
    c: Numbers = None
    arithmetic: str = "exact"
    blocks: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = None
    keep_last: int | Literal["auto"] = "auto"
    granularity: str = "block"
    fraction_bits: int | Mapping[str, int] | None = None


def check_request(request: Request) -> Preset:
    """The preset of a request whose options make sense.

    Raises:
        ConversionError: one does not.
    """
    preset = preset_named(request.coupling)
    if request.arithmetic not in ("exact", "float"):
        raise ConversionError(f"arithmetic is 'exact' or 'float', not {request.arithmetic!r}")
    if request.granularity not in ("block", "sublayer"):
        raise ConversionError(f"granularity is 'block' or 'sublayer', not {request.granularity!r}")
    number = isinstance(request.keep_last, int) and request.keep_last >= 0
    if request.keep_last != "auto" and not number:
        raise ConversionError(f"keep_last is 'auto' or a number of blocks, 0 or more, not {request.keep_last!r}")
    if request.fraction_bits is not None and request.arithmetic == "float":
        raise ConversionError("fraction_bits belongs to arithmetic='exact'; leave it out")
    return preset


def in_pieces(request: Request, preset: Preset) -> bool:
    """Is a step less than a block?"""
    return request.granularity == "sublayer" or preset.two_streams


def number_for(numbers: Numbers, path: str) -> float | None:
    """gamma or c of a block; None: the coupling's own."""
    if not isinstance(numbers, Mapping):
        return numbers
    return next((number for pattern, number in numbers.items() if fnmatchcase(path, pattern)), None)
