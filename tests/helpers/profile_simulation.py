"""A made-up training step for the examples of profiles: memory point by point, times, and what follows from them.

Everything is computed by small formulas and nothing is drawn at random, so the figures agree with each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sin

from autorev import methods
from autorev.analysis import Category, Prediction
from autorev.profiler.readings import BlockTime, Fidelity, Holder, Memory, Round, Timeline, Work

POINTS = {"forward": 100, "backward": 150, "optimizer": 50}
HEAD = 0.1
"""The share of forward (its end) and of backward (its beginning) in which logits and loss are alive."""
CHUNK = 8
"""The chunked loss holds one part in so many of the logits."""


@dataclass(frozen=True)
class Model:
    """What the step's figures are computed from."""

    parameters: int
    trained: int
    blocks: int
    width: int
    """Elements of the stream."""
    stored: int
    """Bytes per token and block that plain autograd keeps."""
    vocabulary: int
    flops_per_second: float
    path: str
    """Of the blocks, without their number."""
    bytes_per_element: int = 4
    idle_seconds: float = 0.004
    """Per block: what a step takes however small the batch."""
    gradients_stay: bool = False
    """Are gradients set to zero instead of being freed (`zero_grad(set_to_none=False)`)?"""


@dataclass(frozen=True)
class Method:
    """How a method stores what backward needs."""

    method: methods.Method
    kept: float
    """Of what plain autograd stores per block."""
    streams: float
    """Streams stored per block."""
    side_bits: int
    again: float
    """How much of forward runs once more in backward."""
    coupling: float = 0.0
    """Seconds of coupling arithmetic, as a share of forward."""
    keep_last: int = 0
    loss: float = 0.0
    """By how much the loss of the pretrained model changes."""

    @property
    def host(self) -> bool:
        """Are the stored streams on the host?"""
        return self.method.name == "offload"


def method(spec: str, kept: float, streams: float, again: float, **more: float | int) -> Method:
    """A method from its spec."""
    method = methods.Method.parse(spec)
    return Method(method, kept, streams, int(more.pop("side_bits", 0)), again, **more)  # type: ignore[arg-type]


METHODS = {
    m.method.spec: m
    for m in (
        method("plain", 1.0, 0.0, 0.0),
        method("checkpoint", 0.0, 1.0, 0.62),
        method("sac", 0.3, 1.0, 0.3),
        method("offload", 0.0, 1.0, 0.66),
        method("momentum:k=3", 0.0, 0.0, 0.7, side_bits=3, coupling=0.06, loss=0.011),
        method("momentum:k=2", 0.0, 0.0, 0.7, side_bits=2, coupling=0.06, loss=0.137),
        method("leapfrog", 0.0, 0.0, 0.7, coupling=0.04, loss=5.2),
        method("hamiltonian", 0.0, 0.0, 0.7, coupling=0.04, loss=6.1),
        method("momentum:k=3,keep_last=20", 0.0, 0.0, 0.24, side_bits=3, coupling=0.03, keep_last=20, loss=0.009),
        method("momentum:k=3,loss=chunked", 0.0, 0.0, 0.78, side_bits=3, coupling=0.06, loss=0.011),
    )
}


def block_bytes(model: Model, how: Method, tokens: int) -> tuple[int, ...]:
    """What each block keeps between forward and backward on the device."""
    stream = tokens * model.width * model.bytes_per_element
    one = int(how.kept * model.stored * tokens) + (0 if how.host else int(how.streams * stream))
    one += how.side_bits * tokens * model.width // 8
    last = model.stored * tokens
    return tuple(last if i >= model.blocks - how.keep_last else one for i in range(model.blocks))


def held(model: Model, how: Method, tokens: int, phase: str, progress: float) -> dict[Category, int]:
    """Live bytes by category at `progress` (0 to 1) of a phase."""
    size, stream = model.bytes_per_element, tokens * model.width * model.bytes_per_element
    in_head = progress > 1 - HEAD if phase == "forward" else progress < HEAD
    of_blocks = progress / (1 - HEAD) if phase == "forward" else (progress - HEAD) / (1 - HEAD)
    passed = min(1.0, max(0.0, of_blocks)) * model.blocks
    done = int(passed) if phase == "forward" else model.blocks - int(passed)
    kept = block_bytes(model, how, tokens)
    within = 1 - abs(2 * (passed % 1) - 1)
    busy = phase != "optimizer" and not in_head
    again = phase == "backward" and how.again > 0
    bits = how.side_bits * tokens * model.width // 8
    plain_blocks = max(0, min(done, model.blocks) - (model.blocks - how.keep_last)) if how.keep_last else 0
    found = dict.fromkeys(Category, 0)
    found[Category.PARAMETERS] = size * model.parameters
    found[Category.OPTIMIZER_STATE] = 2 * size * model.trained
    found[Category.GRADIENTS] = size * model.trained
    if not model.gradients_stay and phase != "optimizer":
        found[Category.GRADIENTS] = int(size * model.trained * passed / model.blocks) if phase == "backward" else 0
    if phase == "optimizer":
        found[Category.OTHER] = int(size * model.trained * 0.05 * (1 - abs(2 * progress - 1))) + 16 * tokens
        return found
    found[Category.SIDE_BITS] = bits * (done - plain_blocks)
    found[Category.STORED_ACTIVATIONS] = sum(kept[:done]) - found[Category.SIDE_BITS]
    if busy:
        found[Category.WORKING_SET] = int(tokens * model.stored * (1.0 if again else 0.25) * (0.3 + 0.7 * within))
    if how.method.reversible:
        found[Category.STREAMS] = stream * (2 if phase == "forward" else 4)
    if in_head:
        logits = tokens * model.vocabulary * size // (CHUNK if how.method.loss == "chunked" else 1)
        found[Category.LOGITS_AND_LOSS] = logits * (2 if phase == "forward" else 3)
    found[Category.OTHER] = 2 * stream + 16 * tokens
    return found


def memory(model: Model, how: Method, tokens: int) -> Memory:
    """The memory of one step, with its cause."""
    points: list[tuple[str, dict[Category, int]]] = []
    for phase, count in POINTS.items():
        points += [(phase, held(model, how, tokens, phase, i / (count - 1))) for i in range(count)]
    sums = [sum(point.values()) for _, point in points]
    peak_at = max(range(len(sums)), key=sums.__getitem__)
    phase, at_peak = points[peak_at]
    seconds = phase_seconds(model, how, tokens)
    stamps: list[float] = []
    marks: list[tuple[str, float, float]] = []
    begin = 0.0
    for name, count in POINTS.items():
        # Following every tensor makes the traced step slower.
        long = 1.3 * seconds[name]
        stamps += [begin + long * i / count for i in range(count)]
        marks.append((name, begin, begin + long))
        begin += long
    peaks = {name: max(s for s, (p, _) in zip(sums, points, strict=True) if p == name) for name in POINTS}
    after_forward = points[POINTS["forward"] - 1][1]
    fixed = (Category.PARAMETERS, Category.OPTIMIZER_STATE, Category.GRADIENTS)
    stream = tokens * model.width * model.bytes_per_element
    return Memory(
        peak_bytes=sums[peak_at],
        phase=phase,
        phase_peaks=peaks,
        kept_bytes=sum(count for category, count in after_forward.items() if category not in fixed) - 16 * tokens,
        process_bytes=sums[peak_at] + 640 * 2**20,
        host_bytes=model.blocks * stream if how.host else 0,
        attributed_bytes=sums[peak_at],
        categories={category.value: count for category, count in at_peak.items()},
        holders=holders(model, at_peak),
        block_bytes=block_bytes(model, how, tokens),
        timeline=Timeline(
            seconds=tuple(stamps),
            categories={c.value: tuple(p[c] for _, p in points) for c in Category if any(p[c] for _, p in points)},
            marks=tuple(marks),
            blocks=tuple(at % (model.blocks + 1) - 1 for at in range(len(stamps))),
            peak_at=peak_at,
        ),
    )


def holders(model: Model, at_peak: dict[Category, int]) -> tuple[Holder, ...]:
    """The bytes at the peak, by the module that allocated them; small ones together."""
    blocks = [f"{model.path}.{i}" for i in range(model.blocks)]
    owners = {
        Category.PARAMETERS: ["model.embed_tokens", *blocks],
        Category.GRADIENTS: ["model.embed_tokens", *blocks],
        Category.OPTIMIZER_STATE: ["(optimizer)"],
        Category.STORED_ACTIVATIONS: blocks,
        Category.WORKING_SET: [f"{blocks[-1]}.mlp", f"{blocks[-1]}.self_attn"],
        Category.STREAMS: [blocks[-1]],
        Category.SIDE_BITS: blocks,
        Category.LOGITS_AND_LOSS: ["lm_head", "(loss)"],
        Category.OTHER: ["(inputs)"],
    }
    found: list[Holder] = []
    for category, count in at_peak.items():
        paths = owners[category]
        # Later ones get a little more, as layers differ.
        weights = [100 + i for i in range(len(paths))]
        parts = [count * w // sum(weights) for w in weights]
        parts[0] += count - sum(parts)
        shown = [Holder(p, category.value, b) for p, b in zip(paths, parts, strict=True) if b]
        shown.sort(key=lambda holder: -holder.bytes)
        found += shown[:12]
        if rest := sum(holder.bytes for holder in shown[12:]):
            found.append(Holder("(others)", category.value, rest))
    return tuple(sorted(found, key=lambda holder: -holder.bytes))


def phase_seconds(model: Model, how: Method, tokens: int) -> dict[str, float]:
    """What each phase takes, without jitter."""
    forward = 2 * model.parameters * tokens / model.flops_per_second + model.blocks * model.idle_seconds
    # A gradient with respect to the weights is computed for what trains only.
    backward = forward * (1 + model.trained / model.parameters + how.again + how.coupling)
    forward *= 1 + how.coupling / 3
    return {"forward": forward, "backward": backward, "optimizer": model.trained / 1.1e9}


def jitter(number: int, width: float) -> float:
    """A factor near 1, the same every time."""
    return 1 + width * sin(2.3 * number)


def rounds(model: Model, how: Method, tokens: int, count: int = 2, steps: int = 4, width: float = 0.02) -> list[Round]:
    """`count` rounds of `steps` timed steps."""
    seconds = phase_seconds(model, how, tokens)
    seed = sum(map(ord, how.method.spec))
    made = []
    for number in range(count):
        factors = [jitter(seed + 31 * number + i, width) for i in range(steps)]
        columns = ([seconds[phase] * factor for factor in factors] for phase in POINTS)
        made.append(Round(number, *(tuple(column) for column in columns)))
    return made


def step_flops(model: Model, how: Method, tokens: int) -> int:
    """Of a whole step, what runs twice included."""
    return int(2 * model.parameters * tokens * (2 + model.trained / model.parameters + how.again))


def work(model: Model, how: Method, tokens: int) -> Work:
    """Where an instrumented step spends its time: 90 % of forward and backward in the blocks."""
    seconds = phase_seconds(model, how, tokens)
    forward, backward = (0.9 * seconds[phase] / model.blocks for phase in ("forward", "backward"))
    blocks = [
        BlockTime(f"{model.path}.{i}", forward * jitter(i, 0.05), backward * jitter(i + 7, 0.05))
        for i in range(model.blocks)
    ]
    overhead = {
        "recomputation": how.again * seconds["forward"],
        "coupling": how.coupling * seconds["forward"],
        "packing": how.side_bits / 100 * seconds["forward"],
    }
    return Work(
        flops=step_flops(model, how, tokens),
        instrumented_seconds=1.08 * sum(seconds.values()),
        overhead={name: value for name, value in overhead.items() if value},
        blocks=tuple(blocks),
    )


def fidelity(how: Method, original: float, chain: str, tokens: int = 4096) -> Fidelity:
    """Exact but for rounding."""
    error = 3.1e-7 if how.method.reversible else 0.0
    return Fidelity(
        against="oracle" if how.method.reversible else "plain",
        gradient_error=error,
        gradient_cosine=1 - error**2,
        drift={chain: 0.0} if how.method.reversible else {},
        loss=original + how.loss,
        original_loss=original,
        tokens=tokens,
    )


def prediction(model: Model, how: Method, tokens: int) -> Prediction | None:
    """What an analysis predicts: a little less than is measured; none for what it does not know."""
    if how.method.name == "sac" or how.keep_last or "k=2" in how.method.spec:
        return None
    found = memory(model, how, tokens)
    categories = {name: count - count // 200 for name, count in found.categories.items()}
    flops = step_flops(model, how, tokens)
    peak = sum(categories.values())
    return Prediction(
        method=how.method.name,
        peak_bytes=peak,
        phase=found.phase,
        categories=categories,
        phase_peaks={
            phase: peak if phase == found.phase else count - count // 200 for phase, count in found.phase_peaks.items()
        },
        kept_bytes=found.kept_bytes - found.kept_bytes // 200,
        step_flops=flops,
        step_seconds=flops / model.flops_per_second * 0.6,
        side_bits=how.side_bits,
        preserves_function=how.method.preserves_function,
        note="",
    )
