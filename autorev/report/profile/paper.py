"""The founding paper's own measurements (arXiv 2512.02056), shown beside ours for reference: other hardware."""

from __future__ import annotations

from collections.abc import Iterator

from autorev.format import format_integer
from autorev.report import document as doc

_LARGEST_BATCHES = {"24 GB": (6, 58), "A100, 40 GB": (12, 119), "A6000": (15, 140), "H100, 80 GB": (26, 257)}
"""On one GPU, with activations stored and reversible."""
_GAINS = {16: 20.7, 32: 24.1, 64: 48.8, 96: 101.0}
"""By blocks, throughput of reversible over stored in percent, each at its largest batch, at width 512."""
_BATCHES = {96: (52, 874)}
"""By blocks, the batches at which that was, stored and reversible."""


def paper() -> Iterator[doc.Part]:
    """Its tables, and how much longer a reversible step took there at equal batch."""
    yield doc.text("The founding paper's own figures", kind="h3")
    yield doc.text(
        "arXiv 2512.02056, measured on other hardware: for reference. At equal batch a reversible step took 30 to 50 % "
        "longer there."
    )
    batches = [
        doc.Row(gpu, (format_integer(stored), format_integer(reversible), f"{reversible / stored:.1f}"))
        for gpu, (stored, reversible) in _LARGEST_BATCHES.items()
    ]
    gains = [
        doc.Row(format_integer(blocks), (doc.Cell(f"{gain:+.1f} %", _at(blocks)),)) for blocks, gain in _GAINS.items()
    ]
    heads = ("GPU", "activations stored", "reversible", "times")
    left = (
        doc.text("Largest batch", kind="h4"),
        doc.Table(heads, tuple(batches), "Largest batches of the founding paper"),
    )
    right = (
        doc.text("Reversible against stored, each at its largest batch", kind="h4"),
        doc.Table(
            ("Blocks (width 512)", "throughput at the largest batch"),
            tuple(gains),
            "Throughput gains of the founding paper",
        ),
    )
    yield doc.Grid((doc.stack(*left), doc.stack(*right)), kind="pair")


def _at(blocks: int) -> str:
    return "batch {} against {}".format(*_BATCHES[blocks]) if blocks in _BATCHES else ""
