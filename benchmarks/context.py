"""The longest context that a card trains, predicted, beside what Unsloth and ALST publish.

    python -m benchmarks.context > benchmarks/context_predicted_DATE.md

Llama-3.1-8B and Llama-3.3-70B (whose shape is that of the profile llama-3.1-70b) with adapters of rank 32 on all linear
layers of the blocks, weights in nf4 with scales quantised, too, one sample, a chunked loss, 8-bit AdamW, adapters and
activations in bf16. The longest sequences of the smallest and of the largest card are simulated at that length; those
between are on straight lines between simulated steps. No weights are read and no GPU is needed. Ten minutes
on one core.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from autorev.analysis import RESERVE_BYTES, Category, Prediction
from autorev.methods import Method
from autorev.models.resolve import resolve
from autorev.pipeline import prepare
from autorev.prediction.forecast import Forecaster

GIB, TOKENS, RANK = 2**30, 65536, 32
"""TOKENS: where every method is simulated first."""
CARDS = {"llama-3.1-8b": (8, 12, 16, 24, 40, 48, 80), "llama-3.1-70b": (48, 80)}
"""In GB as vendors write them, which is 2^30 bytes to within 0.5 %: an H100 of 80 GB has 79.6 GiB."""
ALONE = (
    "plain",
    "checkpoint",
    "checkpoint:tile=auto",
    "momentum:k=3,keep_last=0,tile=auto",
)
BITS = (
    "momentum:k=3,keep_last=0,tile=auto,host=side_bits",
    "momentum:k=3,granularity=sublayer,keep_last=0,tile=auto,host=side_bits",
)
OFFLOAD, SCRATCH = ("offload:tile=auto",), ("leapfrog:keep_last=0,tile=auto",)
METHODS = (*ALONE, *BITS, *OFFLOAD, *SCRATCH)
UNSLOTH = {
    "llama-3.1-8b": (2972, 21848, 40724, 78475, 153977, 191728, 342733),
    "llama-3.1-70b": (12106, 89389),
}
FLASH = {"llama-3.1-8b": (None, 932, 2551, 5789, 12264, 15502, 28454)}
"""Transformers with FlashAttention 2, as Unsloth measured it; None: out of memory."""
ALST = {
    "checkpoint": (258.0, 0),
    "+ Liger's fused loss": (54.9, 0),
    "+ checkpoints on the host": (23.8, 32),
    "+ TiledMLP": (13.8, 32),
}
"""Hidden states on the device and on the host: the gigabytes that ArcticTraining's recipes state, by their tokens."""
CLOSE, MOST_TRIES = 0.001, 8
"""A sequence is the longest where at most this share of the room is left."""
STANDING = (Category.PARAMETERS, Category.OPTIMIZER_STATE, Category.GRADIENTS)

HEAD = """\
# The longest context that a card trains, predicted

`python -m benchmarks.context`, {date}, {versions}.

QLoRA: weights nf4, scales quantised, too; adapters of rank 32 in bf16 on all linear layers of the blocks; one sample,
chunked loss, 8-bit AdamW. A card of N GB has N x 2^30 bytes, as vendors count them, of which 1 GiB is left to the
framework. The models' own limit of 131,072 tokens is lifted. Unsloth's figures are measured, and published by it; all
others are **predicted**: the longest sequence whose simulated step fits, of the smallest and the largest card simulated
at that length, of those between on a straight line between simulated steps. What an allocator loses to fragments
beyond 1 GiB, and temporaries inside kernels, are not in a prediction. `leapfrog` changes a model's function: it is for
training from scratch, and stands here as a bound."""
LADDER = """
## ALST's ladder, Llama-3.1-8B

Ours at {tokens:,} tokens, predicted, without weights, gradients and states. ALST's are measured: all that the card of
its recipes (an H200) holds, in full fine-tuning with weights and states on the host."""


@dataclass
class Found:
    """One model by all methods."""

    forecaster: Forecaster
    rooms: tuple[int, ...]
    """Bytes that a step may take, by card."""
    simulated: dict[tuple[str, str], dict[int, Prediction]] = field(default_factory=dict)
    """Method and loss -> tokens -> a step."""
    longest: dict[str, list[int]] = field(default_factory=dict)
    """Of each method on each card."""

    def at(self, spec: str, tokens: int, loss: str = "chunked") -> Prediction:
        """A step of that many tokens."""
        known = self.simulated.setdefault((spec, loss), {})
        if tokens not in known:
            setting, method = replace(self.forecaster.setting, loss=loss), Method.parse(spec)
            forecaster = replace(self.forecaster, setting=setting, probed={}, simulated={})
            known[tokens] = forecaster.prediction(method, forecaster.trace(method, 1, tokens))
        return known[tokens]

    def line(self, spec: str, room: int) -> int:
        """The tokens of that peak, on a straight line between two simulated steps. Peaks bend upwards: between two of
        them the line is above, and the tokens are too few rather than too many."""
        points = sorted((one.peak_bytes, tokens) for tokens, one in self.simulated[spec, "chunked"].items())
        around = [pair for pair in pairwise(points) if room < pair[1][0]]
        (p, a), (q, b) = around[0] if around else points[-2:]
        return max(a + (room - p) * (b - a) // (q - p), 1)

    def reach(self, spec: str, room: int) -> int:
        """The longest sequence, simulated."""
        for _ in range(MOST_TRIES):
            size = self.line(spec, room)
            if 0 <= room - self.at(spec, size).peak_bytes <= CLOSE * room:
                return size
        raise SystemExit(f"no length of {spec} peaks at {room} bytes")

    def best(self, specs: Iterable[str], card: int) -> int:
        """The longest of some methods."""
        return max(self.longest[spec][card] for spec in specs)


def search(model: str) -> Found:
    """The longest sequences of `model`, whatever its own limit is."""
    workload = replace(resolve(model), longest_sequence=None)
    how: dict[str, Any] = {"batch": 1, "sequence": TOKENS, "lora_rank": RANK, "optimizer": "adamw-8bit"}
    _, forecaster = prepare(workload, weights="nf4-double", loss="chunked", **how)
    found = Found(forecaster, tuple(card * GIB - RESERVE_BYTES for card in CARDS[model]))
    first, *between, last = found.rooms
    for spec in METHODS:
        began = time.perf_counter()
        for tokens in (TOKENS // 8, TOKENS):
            found.at(spec, tokens)
        ends = found.reach(spec, first), found.reach(spec, last)
        found.longest[spec] = [ends[0], *(found.line(spec, room) for room in between), ends[1]]
        took = time.perf_counter() - began
        print(f"{model} {spec}: {found.longest[spec]}, {took:.0f} s", file=sys.stderr, flush=True)
    return found


def unit(found: Found, tokens: int) -> int:
    """Bytes of one hidden state."""
    config: Any = found.forecaster.twin.config
    return tokens * 2 * int(config.hidden_size)


def table(heads: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Print it as Markdown."""
    heads = list(heads)
    print(f"\n| {' | '.join(heads)} |\n|---{'|---:' * (len(heads) - 1)}|")
    for name, cells in rows:
        print(f"| {' | '.join([name, *cells])} |")
    sys.stdout.flush()


def context(model: str, found: Found) -> None:
    """Longest sequences, and what they need of the host."""
    cards, theirs = CARDS[model], UNSLOTH[model]
    heads = ["tokens", *(f"{card} GB" for card in cards)]
    rows = [(f"`{spec}`", [f"{size:,}" for size in sizes]) for spec, sizes in found.longest.items()]
    rows.append(("Unsloth, with the host (measured)", [f"{size:,}" for size in theirs]))
    if model in FLASH:
        cells = ["out of memory" if size is None else f"{size:,}" for size in FLASH[model]]
        rows.append(("transformers + FlashAttention 2 (measured by Unsloth)", cells))
    groups = {"no host memory": ALONE, "side bits on the host": BITS, "offloaded checkpoints, tiled": OFFLOAD}
    for what, specs in groups.items():
        ratios = [f"{found.best(specs, n) / size:.2f}x" for n, size in enumerate(theirs)]
        rows.append((f"**{what}: of Unsloth's**", ratios))
    table(heads, rows)
    print("\nHost memory at that length:")
    table(
        ["GiB", *(f"{card} GB" for card in cards)],
        [
            (f"`{spec}`", [f"{found.at(spec, TOKENS).host_bytes * n / TOKENS / GIB:.1f}" for n in found.longest[spec]])
            for spec in (*BITS, *OFFLOAD)
        ],
    )


def peaks(model: str, found: Found) -> None:
    """What is alive at the peak on the largest card."""
    rows = []
    for spec in METHODS:
        size = found.longest[spec][-1]
        one = found.at(spec, size)
        standing = sum(one.categories[name] for name in STANDING) / GIB
        cells = [f"{one.categories[name] / unit(found, size):.2f}" for name in Category if name not in STANDING]
        rows.append((f"`{spec}`", [f"{size:,}", f"{standing:.1f} GiB", *cells, f"{one.peak_bytes / GIB:.1f} GiB"]))
    names = [name.value.replace("_", " ") for name in Category if name not in STANDING]
    print(f"\nWhat is alive at the peak on {CARDS[model][-1]} GB, in U but for the weights and what they need:")
    table(["method", "tokens", "weights, gradients, states", *names, "in all"], rows)


def ladder(found: Found) -> None:
    """ALST's steps, and the methods here, in hidden states."""
    size = unit(found, TOKENS)
    rows = [(f"ALST: {what}", [f"{device:.1f}", f"{host:.1f}"]) for what, (device, host) in ALST.items()]
    for spec, loss in [("checkpoint", "full"), *((spec, "chunked") for spec in METHODS)]:
        one = found.at(spec, TOKENS, loss)
        device = one.peak_bytes - sum(one.categories[name] for name in STANDING)
        rows.append((f"`{spec}`, {loss} loss", [f"{device / size:.1f}", f"{one.host_bytes / size:.1f}"]))
    table(["U = batch x tokens x width x 2 bytes", "on the device", "on the host"], rows)


def main() -> None:
    """Print the page."""
    warnings.filterwarnings("ignore")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(HEAD.format(date=date.today(), versions=versions))
    print("\n## Llama-3.1-8B")
    small = search("llama-3.1-8b")
    context("llama-3.1-8b", small)
    peaks("llama-3.1-8b", small)
    print(LADDER.format(tokens=TOKENS))
    ladder(small)
    print("\n## Llama-3.3-70B")
    large = search("llama-3.1-70b")
    context("llama-3.1-70b", large)
    peaks("llama-3.1-70b", large)


if __name__ == "__main__":
    main()
