"""Numbers and names as a person reads them: the one place where bytes become GiB."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

NOTHING = "-"
"""What stands where an analysis has no figure."""
_PLAIN = frozenset("\n\t\xa0\u202f\u3000")
"""Spaces that Python does not call printable."""


@dataclass(frozen=True, slots=True)
class ByteUnit:
    """One unit for figures that are compared with each other, as in a column of a table."""

    name: str
    size: int

    def number(self, count: int) -> str:
        """The figure alone, to three digits; the unit stands in the heading."""
        return _three_digits(count / self.size)


_units = (ByteUnit("GiB", 2**30), ByteUnit("MiB", 2**20), ByteUnit("KiB", 2**10))


def unit_for(counts: Iterable[int]) -> ByteUnit:
    """GiB where the largest of `counts` reaches one, MiB below, KiB for toys."""
    largest = max(counts, default=0)
    return next((unit for unit in _units if largest >= unit.size), _units[-1])


def format_bytes(count: int) -> str:
    """`24.1 GiB`, `512 MiB`, `0`."""
    if not count:
        return "0"
    unit = unit_for([count])
    return f"{unit.number(count)} {unit.name}"


def format_integer(count: int) -> str:
    """`65,536`."""
    return f"{count:,}"


def format_count(count: int) -> str:
    """`134.5 M`, `8.03 B`; exact below a million."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{_three_digits(count / size)} {letter}"
    return format_integer(count)


def format_seconds(seconds: float) -> str:
    """`162 ms`, `1.35 s`, `12.5 min`."""
    if seconds >= 120:
        return f"{_three_digits(seconds / 60)} min"
    if seconds >= 1:
        return f"{_three_digits(seconds)} s"
    if seconds >= 1e-3:
        return f"{_three_digits(seconds * 1e3)} ms"
    return f"{_three_digits(seconds * 1e6)} us"


def format_flops(flops: float) -> str:
    """`13.6 TFLOP`."""
    return f"{_decimal(flops)}FLOP"


def format_flop_rate(rate: float) -> str:
    """`989 TFLOP/s`."""
    return f"{_decimal(rate)}FLOP/s"


def format_bandwidth(rate: float) -> str:
    """`3.35 TB/s`: decimal, as vendors count it."""
    return f"{_decimal(rate)}B/s"


def format_share(part: int, whole: int | None) -> str:
    """`part` as a percentage of `whole`."""
    return f"{100 * part / whole:.0f} %" if whole else NOTHING


def format_change(part: float, whole: float | None) -> str:
    """`-62 %`, `+18 %`: how far `part` is from `whole`."""
    return f"{round(100 * (part / whole - 1)):+d} %" if whole else NOTHING


def format_ratio(part: float | None, whole: float | None) -> str:
    """`0.98`: `part` over `whole`."""
    return NOTHING if part is None or not whole else f"{part / whole:.3f}"


def format_rate(rate: float | None) -> str:
    """`1,234`, `98.7`: tokens or samples a second."""
    return NOTHING if rate is None else _three_digits(rate)


def format_error(error: float) -> str:
    """`3.1e-07`; `0` where there is none at all."""
    return f"{error:.1e}" if error else "0"


def format_shape(shape: tuple[int, ...]) -> str:
    """`8 x 2048 x 576`."""
    return " x ".join(str(size) for size in shape) or "scalar"


def plural(count: int, noun: str) -> str:
    """`1 block`, `30 blocks`."""
    return f"{format_integer(count)} {noun}{'' if count == 1 else 's'}"


def sentence(text: str) -> str:
    """`text` cleaned, with a capital and a full stop; a name that opens it keeps its own letters."""
    text = clean(text)
    first = text.split(" ", 1)[0]
    if first.rstrip(",:;").isalpha() and first.islower():
        text = text[0].upper() + text[1:]
    return text if not text or text[-1] in ".!?)" else f"{text}."


def clean(text: str) -> str:
    """`text` on one line, made `visible`: a model's name may hold anything, escape codes too."""
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """`text` with everything that would steer a terminal, or reorder the letters of a line, as `\\x1b`, `\\u202e`."""
    return "".join(letter if letter.isprintable() or letter in _PLAIN else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _decimal(value: float) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{_three_digits(value / size)} {prefix}"
    return f"{_three_digits(value)} "


def _three_digits(value: float) -> str:
    # 9.996 is 10.0, not 10.00: the number of decimals follows from the rounded figure.
    for decimals, limit in ((2, 9.995), (1, 99.95)):
        if value < limit:
            return f"{value:.{decimals}f}"
    return f"{value:,.0f}"
