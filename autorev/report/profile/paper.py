"""The founding paper's own measurements (arXiv 2512.02056), shown beside ours for reference: other hardware."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2512.02056"


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The largest batch on one GPU, with activations stored and reversible."""

    device: str
    stored: int
    reversible: int


@dataclass(frozen=True, slots=True)
class Gain:
    """Throughput of reversible over stored, each at its largest batch, at width 512."""

    blocks: int
    percent: float


LARGEST_BATCHES = (
    LargestBatch("24 GB", 6, 58),
    LargestBatch("A100, 40 GB", 12, 119),
    LargestBatch("A6000", 15, 140),
    LargestBatch("H100, 80 GB", 26, 257),
)
GAINS = (Gain(16, 20.7), Gain(32, 24.1), Gain(64, 48.8), Gain(96, 101.0))
BATCH_AT_96_BLOCKS = (52, 874)
"""Stored and reversible, beside the last gain."""
OVERHEAD_PERCENT = (30, 50)
"""How much longer a reversible step takes at equal batch: from, to."""
