"""A made-up fine-tuning for the examples of reports: curves by small formulas, nothing drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import exp, sin

from autorev.finetuning.record import ChainState, Evaluation, Logged, Recipe

BLOCKS = 30
MIB = 2**20


def losses(start: float, end: float, steps: int) -> Callable[[int], float]:
    """A loss that falls ever more slowly from `start` at step 0 to `end`."""
    return lambda step: end + (start - end) * exp(-4.0 * step / steps) * (1 - step / (steps + 1e-9))


SEQUENCES = 16


def looked_at(
    step: int, loss: float, error: float = 0.11, agreement: float | None = None, divergence: float | None = None
) -> Evaluation:
    """On sequences some of which are harder than others for every model; the difference of two varies far less."""
    hard = [0.4 * sin(3 * n) + 0.01 * sin(7 * n * loss) for n in range(SEQUENCES)]
    losses = tuple(round(loss + each - sum(hard) / SEQUENCES, 6) for each in hard)
    return Evaluation(step, loss, error, agreement, divergence, losses, (191,) * SEQUENCES)


def evaluations(
    curve: Callable[[int], float], steps: int, every: int, distance: float | None
) -> tuple[Evaluation, ...]:
    """At step 0, in between, and at the end; both ends compared with the original where `distance` is given."""
    found = []
    for step in sorted({*range(0, steps, every), steps}):
        loss = round(curve(step), 4)
        compared = distance is not None and step in (0, steps)
        agreement = round(exp(-2 * (distance or 0) ** 0.5), 4) if compared else None
        found.append(looked_at(step, loss, 0.11, agreement, distance if compared else None))
    return tuple(found)


def steps_of(
    curve: Callable[[int], float],
    recipe: Recipe,
    *,
    gamma: Callable[[int], tuple[float | None, float]] | None = None,
    peak: int = 1_900 * MIB,
    seconds: float = 1.9,
    drift: float | None = 0.0,
) -> Iterator[Logged]:
    """Every optimiser step; the memory of every tenth is looked at. `gamma` gives gamma and side bits of a step."""
    for step in range(1, recipe.steps + 1):
        noise = 0.3 * (sin(12.9898 * step * step) + 0.4 * sin(78.233 * step))
        cross_entropy, divergence = None, None
        loss = curve(step) + noise
        if recipe.distill_weight:
            cross_entropy, divergence = loss, 0.4 * loss - 0.6
            loss = (1 - recipe.distill_weight) * loss + recipe.distill_weight * divergence
        numbers = gamma(step - 1) if gamma else (None, None)
        looked = step % 10 == 2
        yield Logged(
            step=step,
            loss=round(loss, 5),
            learning_rate=recipe.learning_rate * (1 - (step - 1) / recipe.steps),
            gradient_norm=round(3 + 2 * sin(step), 3),
            seconds=round(seconds * (1.3 if looked else 1 + 0.03 * sin(5 * step)), 4),
            tokens=recipe.sequence * recipe.batch * recipe.accumulate,
            drift=drift,
            gamma=numbers[0],
            side_bits=numbers[1],
            peak_bytes=peak + step % 3 * MIB if looked else None,
            cross_entropy=cross_entropy,
            divergence=divergence,
        )


def chain(gammas: list[float], factors: list[float], bits: list[int], name: str = "model.layers") -> ChainState:
    """A chain at the end."""
    return ChainState(name, tuple(gammas), tuple(factors), tuple(bits), 10)


def moving(step: int) -> tuple[float, float]:
    """gamma and side bits of a schedule of 40 steps."""
    if step >= 40:
        return 1.0, 0.0
    bits = 3 + step // 20
    return round((0.125 + 0.84 * (step / 40) ** 0.5) * 2**bits) / 2**bits, float(bits)


def needs(block: int, bits: int) -> float:
    """By how much the loss rises with one block at so few side bits: most at both ends."""
    weight = 0.02 * exp(-block / 2) + 0.012 * exp(-(BLOCKS - 1 - block) / 4) + 2e-4 * (1 + sin(3 * block))
    return weight * 4.0 ** (3 - bits) - 4e-4
