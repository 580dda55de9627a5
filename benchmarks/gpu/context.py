"""The context ladder: the longest sequence that trains, by method, in the whole memory of the card and in less of it.

A search by doubling, the line through what was measured, and halving (`autorev.profiler.passes.sweep`). On a GPU the
allocator refuses what does not fit, on a CPU its events are counted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from autorev.format import NOTHING, format_bytes, format_seconds
from autorev.profiler.job import Job, Sweep
from autorev.profiler.passes.measure import measure
from autorev.profiler.passes.prepare import find_blocks
from autorev.profiler.record import Status
from benchmarks.gpu.device import Device
from benchmarks.gpu.record import Record, Row
from benchmarks.gpu.setting import method_of, setting_of, source_of
from benchmarks.gpu.size import Size

TITLE = "The context ladder"
WHAT = (
    "The longest sequence of one sample that trains within so much memory, weights and states included; the next "
    "longer one (beyond a hundred steps of 16 tokens, one that is 1 to 2 % longer) was tried, and did not fit."
)
SHARE = 7
HEADS = ("method", "memory", "tokens", "of plain", "peak", "s a step", "tried")
METHODS = (
    *("plain", "checkpoint", "momentum:k=3,keep_last=0,tile=auto", "checkpoint:tile=auto"),
    *("momentum:k=3,keep_last=0,tile=auto,host=side_bits", "offload:tile=auto", "momentum:k=3,keep_last=0"),
    *("leapfrog:keep_last=0,tile=auto",),
)
QUICK = ("plain", "momentum:k=3,keep_last=0")
CARDS = (8, 12, 16, 24, 48)
"""Smaller cards, in GiB, whose memory a larger one plays when there are minutes left."""
LONGEST_STEP = 8.0
"""Seconds: the search ends where a step would take longer."""
LIMIT = 300
MOST_TOKENS = 2**20


def run(device: Device, size: Size, record: Record) -> None:
    """The whole memory first, then that of smaller cards."""
    rungs = [size.memory, *(card * 2**30 for card in CARDS if card * 2**30 < 0.8 * size.memory)]
    for memory in rungs[:1] if device.quick else rungs:
        for spec in QUICK if device.quick else METHODS:
            record.piece(f"{spec} in {format_bytes(memory)}", longest, size, spec, memory, limit=LIMIT)


def longest(device: Device, size: Size, spec: str, memory: int) -> Row:
    """The search, as a profile makes it."""
    most = 16 * size.tokens if device.quick else MOST_TOKENS
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.pt"
        torch.save(size.text(most), tokens)
        model, call = size.built(device)
        job = Job(
            source=source_of(device, size, str(tokens)),
            method=method_of(spec),
            blocks=find_blocks(model, call),
            setting=setting_of(size),
            round=0,
            warmup=0,
            steps=0,
            passes=False,
            sweep=Sweep("sequence", (), most, memory, None, 1, LONGEST_STEP),
        )
        found = measure(job, (model, call))
    if found.status is not Status.MEASURED:
        return {"status": found.status.value, "reason": found.reason}
    largest = [point for point in found.points if point.status is Status.MEASURED]
    best = max(largest, key=lambda point: point.value, default=None)
    return {
        "method": spec,
        "memory": memory,
        "tokens": best.value if best else 0,
        "found": best.largest if best else True,
        "why": best.reason if best else "",
        "peak": best.peak_bytes if best else None,
        "step": best.step_seconds if best else None,
        "tried": [(point.value, point.status.value, point.peak_bytes) for point in found.points],
    }


def cells(row: Row, rows: list[Row]) -> list[tuple[str, ...]]:
    """As the report shows it."""
    plain = [other["tokens"] for other in rows if other["method"] == "plain" and other["memory"] == row["memory"]]
    tokens = f"{row['tokens']:,}" if row["found"] else f"at least {row['tokens']:,} ({row['why']})"
    return [
        (
            f"`{row['method']}`",
            format_bytes(row["memory"]),
            tokens,
            f"{row['tokens'] / plain[0]:.2f}x" if plain and plain[0] else NOTHING,
            NOTHING if row["peak"] is None else format_bytes(row["peak"]),
            NOTHING if row["step"] is None else format_seconds(row["step"]),
            str(len(row["tried"])),
        )
    ]
