"""How the figures of an analysis were obtained, as its report says it."""

from __future__ import annotations

from autorev.analysis import Analysis
from autorev.format import clean, format_bandwidth, format_bytes, format_flop_rate
from autorev.report import shared
from autorev.report.analysis.view import method_rows, shown_categories
from autorev.report.document import Facts, Terms

_BLOCKS = (
    "The model ran once on tensors that have shapes but no data, so no weights were read. The forward of every "
    "candidate block was traced in that run, and the residual additions were found in the trace; source lines name "
    "them. A block is eligible when the stream leaves it as what came in plus a branch. Blocks form a chain when each "
    "hands its tensor, unchanged, to the next."
)
_MEMORY = (
    "Predicted from shapes: forward, loss and backward ran on tensors without data, under each method, and every "
    "storage was counted from its birth to its death. Of equal blocks the first, the second and the last were run; the "
    "second stands for those between. Gradients and optimizer state follow from the parameters that train, on a warm "
    "step. A peak is the largest sum of live bytes at any moment. What a kernel needs inside, and what the driver and "
    "the allocator need beyond live tensors (context, fragmentation), is not included."
)
_REVERSIBLE = (
    "Counted with what their tape holds: two 32-bit streams, the side bits, and one block's working set. They are "
    "predictions of a conversion, not measurements of one."
)
_WORK = (
    "Floating-point operations of one step; a multiply-add counts as two. What a method computes again in the "
    "backward pass is included."
)
_KEEPS = (
    "Whether a pretrained model computes the same as before, to within noise, when it is converted this way. A "
    "coupling that does not keep it suits training from scratch, or needs fine-tuning to recover."
)


def method(analysis: Analysis) -> Facts:
    """What was run, counted and left out."""
    entries: list[tuple[str, str | Terms]] = [("Blocks", _BLOCKS)]
    if analysis.predictions:
        bits = {
            p.method: f" Side bits: {p.side_bits} per element and block." for p in analysis.predictions if p.side_bits
        }
        said = {p.method: bits.get(p.method, "") for p in analysis.predictions}
        entries += [
            ("Memory", _MEMORY),
            ("Categories", shared.categories(shown_categories(method_rows(analysis)))),
            ("Methods", shared.methods(said)),
            ("Reversible methods", _REVERSIBLE),
            (
                "Kept after forward",
                "Bytes kept between forward and backward beyond parameters, optimizer state and inputs.",
            ),
            ("Work", _WORK),
            ("Roofline time", _roofline(analysis)),
        ]
        if analysis.frontier and analysis.device:
            entries.append(
                (
                    "Largest batch, longest sequence",
                    "The largest value of which the predicted peak leaves 1 GiB of "
                    f"{format_bytes(analysis.device.memory_bytes)} free, everything else as set: proposed by a "
                    "polynomial through simulated sizes, settled by simulating the proposal.",
                )
            )
        entries.append(("Keeps the pretrained function", _KEEPS))
    return Facts(tuple(entries), "method")


def _roofline(analysis: Analysis) -> str:
    found = "The least time in which the device can do that work and move its data"
    if device := analysis.device:
        dtype = f" in {clean(analysis.setting.dtype)}" if analysis.setting else ""
        found += (
            f", at its published figures: {format_flop_rate(device.peak_flops)}{dtype}, "
            f"{format_bandwidth(device.bandwidth)} of memory bandwidth, {format_bandwidth(device.host_bandwidth)} to "
            "the host"
        )
    return found + ". A real step takes longer; the figure is for comparing methods."
