"""What an analysis says, as frozen data: blocks, chains, refusals, and the predictions made from them.

Nothing here needs torch: a report is rendered from these objects, or from their JSON, on any machine.
Sizes are bytes, times seconds, work floating-point operations (a multiply-add counts as two).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from autorev.records import Record
from autorev.setting import Setting

if TYPE_CHECKING:
    import pandas as pd

RESERVE_BYTES = 2**30
"""What a framework's context and fragmentation take from a device before the first tensor; an estimate."""


class Verdict(StrEnum):
    """May this block be made reversible?"""

    ELIGIBLE = "eligible"
    CAVEAT = "caveat"
    """Eligible, and `reasons` says what to know about it."""
    REFUSED = "refused"


class Category(StrEnum):
    """What a byte of device memory is there for."""

    PARAMETERS = "parameters"
    """Parameters and buffers."""
    GRADIENTS = "gradients"
    OPTIMIZER_STATE = "optimizer_state"
    STORED_ACTIVATIONS = "stored_activations"
    """What the blocks keep between forward and backward."""
    WORKING_SET = "working_set"
    """Temporaries of the block being computed, and what a recomputed block holds for its backward."""
    STREAMS = "streams"
    """The chain's running state: h and v (or q and p), and their gradients."""
    SIDE_BITS = "side_bits"
    """The k bits per element that exact arithmetic keeps for gamma = n / 2^k."""
    LOGITS_AND_LOSS = "logits_and_loss"
    """Everything computed after the last block."""
    OTHER = "other"
    """Inputs, embeddings, masks, and the optimiser's temporaries."""


@dataclass(frozen=True, slots=True)
class Step:
    """One residual step `h <- h + f(h)` of a block."""

    kind: str
    """attention, mlp, moe, convolution, state-space, parallel or other."""
    branch: tuple[str, ...]
    """Sub-modules the branch calls, in order, by path below the block."""
    source: str
    """`file.py:line` of the add."""


@dataclass(frozen=True, slots=True)
class Block:
    """One call of a module (or one inline step of a loop) on the residual stream."""

    path: str
    """The module's full name in the model."""
    class_name: str
    """JSON: `class`."""
    verdict: Verdict
    reasons: tuple[str, ...]
    """`code: sentence (file.py:line)`; empty for a block eligible without a caveat."""
    steps: tuple[Step, ...]
    stream: str
    """Argument that carries the stream, by name."""
    shape: tuple[int, ...]
    """The stream's shape in the recorded call."""
    dtype: str
    extra_inputs: tuple[str, ...]
    """Further tensors the block reads: masks, rotary embeddings, encoder states, caches."""
    buffers_written: tuple[str, ...]
    draws_random: bool
    parameters: int
    """Number of parameter elements."""
    source: str
    """`file.py:line` of the block's forward."""
    call: int = 0
    """0 for the first call of this module in a forward pass, 1 for the second (shared weights), ..."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Blocks that hand one tensor, unchanged, from each to the next."""

    name: str
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model was analysed."""

    name: str
    class_name: str
    """JSON: `class`."""
    parameters: int
    source: str
    """Where it came from: a profile, a file, a factory."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The peak of one training step under one method, and what it costs."""

    method: str
    peak_bytes: int
    phase: str
    """forward, backward or optimizer: where the peak stands."""
    categories: dict[str, int]
    """Bytes alive at the peak by `Category`; they sum to `peak_bytes`."""
    phase_peaks: dict[str, int]
    kept_bytes: int
    """Bytes kept between forward and backward beyond parameters, optimiser state and inputs."""
    step_flops: int
    step_seconds: float
    """Roofline time: a lower bound, at the device's published peak figures."""
    side_bits: int
    """Bits stored per stream element and block."""
    preserves_function: bool
    """Does a pretrained model keep its function when it is converted this way?"""
    host_bytes: int = 0
    """On the host between forward and backward; not part of the peak."""
    note: str = ""
    keep_last: tuple[int, ...] = ()
    """Blocks at the end of each chain that are stored, chain by chain; empty for what is no coupling."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far one method gets on the device."""

    method: str
    largest_batch: int | None
    """At the setting's sequence length; 0 when not even one sample fits; None where the batch cannot be varied."""
    longest_sequence: int | None
    """At the setting's batch, in tokens; None for a model without a sequence axis."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Predicted peaks of one method along one axis."""

    axis: str
    """batch or sequence."""
    method: str
    values: tuple[int, ...]
    peak_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to do, in words."""

    method: str | None
    """What to train with; None: nothing fits, or nothing is known."""
    why: str
    advice: tuple[str, ...] = ()
    """Further steps that would help, most effective first."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The part of a device profile that the figures rest on."""

    name: str
    title: str
    memory_bytes: int
    peak_flops: float
    """FLOP/s in the setting's dtype, dense."""
    bandwidth: float
    """Bytes per second of device memory."""
    host_bandwidth: float
    """Bytes per second between host and device, one direction."""

    @property
    def usable_bytes(self) -> int:
        """What a step may take."""
        return max(self.memory_bytes - RESERVE_BYTES, 0)


@dataclass(frozen=True, slots=True)
class Analysis(Record):
    """Everything `autorev analyze` found out. The last six fields are empty until a setting is predicted."""

    model: ModelInfo
    chains: tuple[Chain, ...]
    refused: tuple[Block, ...]
    setting: Setting | None = None
    device: DeviceInfo | None = None
    predictions: tuple[Prediction, ...] = ()
    frontier: tuple[Reach, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    recommendation: Recommendation | None = None
    notes: tuple[str, ...] = ()
    """What the reader should know of this run: options without effect, bounds used, fallbacks taken."""
    versions: dict[str, str] = field(default_factory=dict)
    """autorev, torch and transformers."""
    kind: str = "analysis"
    schema_version: int = 3

    def prediction(self, method: str) -> Prediction | None:
        """The prediction for `method`, if it was made."""
        return next((p for p in self.predictions if p.method == method), None)

    def to_frame(self) -> pd.DataFrame:
        """One row per block, refused ones included, in the order of the chains."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for chain in self.chains:
            rows += [_row(block, chain.name) for block in chain.blocks]
        rows += [_row(block, None) for block in self.refused]
        return pd.DataFrame(rows, columns=list(_row_fields))

    def __str__(self) -> str:
        from autorev.report.render import render_text

        return render_text(self)


_row_fields = (
    *("chain", "path", "class", "verdict", "reasons", "steps", "stream", "shape", "dtype", "extra_inputs"),
    *("buffers_written", "draws_random", "parameters", "source", "call"),
)


def _row(block: Block, chain: str | None) -> dict[str, Any]:
    row = {name: getattr(block, name) for name in _row_fields if name not in ("chain", "class", "steps")}
    kinds = " + ".join(step.kind for step in block.steps)
    return {**row, "chain": chain, "class": block.class_name, "steps": kinds, "verdict": block.verdict.value}
