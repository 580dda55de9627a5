"""The coupling's own cost: its step and inverse, compiled into one pass each, beside single operators."""

from __future__ import annotations

from benchmarks import fused
from benchmarks.gpu.device import Device
from benchmarks.gpu.record import Record, Row
from benchmarks.gpu.size import Size

TITLE = "Fused and eager coupling"
WHAT = (
    "A block's step and its inverse together, gamma = 1/8 with side bits, taking turns. Where compiling fails or gives "
    "other bits, single operators are used, and the reason stands here."
)
SHARE = 2
HEADS = (
    *("tokens x width", "bits", "operators, ms", "fused, ms", "ratio, median", "quartiles", "first, s"),
    *("MiB", "MiB, fused", "compiled by"),
)
SIZES = ((2048, 2048), (8192, 4096), (512, 576))
QUICK = ((16, 32),)
DTYPES = ("bf16", "fp32")


def run(device: Device, size: Size, record: Record) -> None:
    """Small and large streams."""
    for tokens, width in QUICK if device.quick else SIZES:
        for dtype in DTYPES[: 1 if device.quick else None]:
            record.piece(f"{tokens} x {width}, {dtype}", both, size, tokens, width, dtype)


def both(device: Device, size: Size, tokens: int, width: int, dtype: str) -> Row:
    """See `benchmarks.fused`."""
    with device.compiling() as compiler:
        found = fused.compared(device, tokens, width, dtype, size.rounds)
    return {**found, "passed": found["same"], "compiler": compiler}


def cells(row: Row, rows: list[Row]) -> list[tuple[str, ...]]:
    """As the report shows it."""
    bits = "the same" if row["same"] else "OTHERS"
    return [(row["piece"], bits, *fused.cells(row), row["compiler"])]
