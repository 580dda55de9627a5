"""What `convert` is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from autorev.couplings.presets import Preset, preset_named
from autorev.errors import ConversionError
from autorev.given import is_count, wrong_number

Numbers = float | Mapping[str, float] | None
"""One number for all blocks, or a number per pattern of block paths."""
MOST_GIVEN = 30
"""Fraction bits that may be asked for."""


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
    check_numbers("gamma", request.gamma)
    check_numbers("c", request.c)
    if request.keep_last != "auto" and not is_count(request.keep_last, 0):
        raise ConversionError(f"keep_last is 'auto' or a number of blocks, 0 or more, not {request.keep_last!r}")
    if request.fraction_bits is not None and request.arithmetic == "float":
        raise ConversionError("fraction_bits belongs to arithmetic='exact'; leave it out")
    bits = request.fraction_bits
    for number in bits.values() if isinstance(bits, Mapping) else (bits,):
        if number is not None and not (is_count(number, 0) and number <= MOST_GIVEN):
            raise ConversionError(f"fraction_bits is a whole number between 0 and {MOST_GIVEN}, not {number!r}")
    return preset


def check_numbers(name: str, given: Numbers) -> None:
    """Raise unless `given` may be the gamma, or the c, of a coupling.

    Raises:
        ConversionError: it is no number, nor a dict of them.
    """
    if wrong := wrong_number(given):
        raise ConversionError(f"{name} is {wrong}")


def in_pieces(request: Request, preset: Preset) -> bool:
    """Is a step less than a block?"""
    return request.granularity == "sublayer" or preset.two_streams


def number_for(numbers: Numbers, path: str) -> float | None:
    """gamma or c of a block; None: the coupling's own."""
    if not isinstance(numbers, Mapping):
        return numbers
    return next((number for pattern, number in numbers.items() if fnmatchcase(path, pattern)), None)
