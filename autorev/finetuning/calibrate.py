"""Side bits where they are needed: the blocks whose gamma may grow without the loss noticing, found by looking.

One block at a time is given a larger gamma 2^-k (fewer side bits), and the loss is measured. The moves that cost least
per bit are then made in that order; how many of them together stay within the budget is measured too, as they do not
just add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

from torch import nn

from autorev.conversion.config_entry import KEY
from autorev.conversion.convert import chains_of
from autorev.conversion.recouple import recouple
from autorev.couplings.velocity import Bdia, Velocity
from autorev.errors import ConversionError, FixedPointRangeError, SettingError
from autorev.finetuning.record import Assignment, Calibration, Sensitivity
from autorev.finetuning.teacher import as_original
from autorev.given import is_count, is_number, no_function

MOST_BITS = 4
"""All blocks begin with gamma = 1/16."""
Bits = dict[str, int]
"""k of gamma = 2^-k, by block."""


def calibrate(
    model: nn.Module,
    loss: Callable[[], float],
    *,
    check: Callable[[], float] | None = None,
    max_loss_increase: float = 0.02,
    tokens: int = 0,
    progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> Calibration:
    """Give each block of a converted model as few side bits as keep its loss within the budget, in place.

    Args:
        model: converted with momentum, in exact arithmetic.
        loss: evaluates `model` as it is at that moment, on always the same text, in nats; called four times a block.
        check: likewise, on more text: what is held to the budget. Default: `loss`.
        max_loss_increase: the budget, against the model before conversion.
        tokens: of that text, for the record.
        progress: is told what is being done, and the fraction done.

    Raises:
        ConversionError: the model is not converted, its gammas are fixed, or 4 side bits everywhere exceed the budget;
            its numbers are then as they were.
        SettingError: an argument makes no sense.
    """
    check = loss if check is None else check
    if wrong := no_function(loss=loss, check=check, progress=progress):
        raise SettingError(wrong)
    if not (is_number(max_loss_increase) and max_loss_increase >= 0):
        raise SettingError(f"max_loss_increase is a number of nats, 0 or more, not {max_loss_increase!r}")
    if not is_count(tokens, 0):
        raise SettingError(f"tokens is a whole number, 0 or more, not {tokens!r}")
    before = [list(chain.couplings) for chain in chains_of(model)]
    config = getattr(model, "config", None)
    remembered = getattr(config, KEY, None)
    try:
        return _calibrated(model, loss, check, max_loss_increase, tokens, progress)
    except BaseException:
        for chain, couplings in zip(chains_of(model), before, strict=True):
            chain.couplings[:] = couplings
        if remembered is not None:
            setattr(config, KEY, remembered)
        raise


def _calibrated(
    model: nn.Module,
    loss: Callable[[], float],
    check: Callable[[], float],
    budget: float,
    tokens: int,
    progress: Callable[[str, float], None],
) -> Calibration:
    blocks = [path for chain in chains_of(model) for path in dict.fromkeys(chain.paths)]
    finest: Bits = dict.fromkeys(blocks, MOST_BITS)

    def measured_with(bits: Bits, by: Callable[[], float]) -> float:
        recouple(model, gamma={path: 2.0**-k for path, k in bits.items()})
        try:
            return _nats(by())
        except FixedPointRangeError:
            return inf  # too large a gamma for this grid

    progress("calibrating", 0.0)
    with as_original(model):
        original = _nats(check())
    least = measured_with(finest, check) - original
    measured = {MOST_BITS * len(blocks): Assignment(_mean_bits(model), least)}
    if not least <= budget:  # NaN included
        raise ConversionError(
            f"with {MOST_BITS} side bits in every block the loss rises by {least:.3f} already, and the "
            f"budget is {budget:g}; allow more, or train with plain checkpointing"
        )
    reference = measured_with(finest, loss)
    found: list[Sensitivity] = []
    for n, path in enumerate(blocks):
        progress(f"calibrating {path}", n / len(blocks))
        for k in range(MOST_BITS - 1, -1, -1):
            increase = measured_with({**finest, path: k}, loss) - reference
            found.append(Sensitivity(path, 2.0**-k, k, increase))
    moves = _in_order(found)
    low, high = 0, len(moves)  # that many moves are known to fit; more than that many are not tried
    while low < high:
        middle = (low + high + 1) // 2
        bits = _after(finest, moves[:middle])
        increase = measured_with(bits, check) - original
        measured[sum(bits.values())] = Assignment(_mean_bits(model), increase)
        low, high = (middle, high) if increase <= budget else (low, middle - 1)
    chosen = _after(finest, moves[:low])
    recouple(model, gamma={path: 2.0**-k for path, k in chosen.items()})
    total = sum(chosen.values())
    rows = [replace(row, chosen=at == total) for at, row in sorted(measured.items(), reverse=True)]
    return Calibration(budget, tokens, tuple(found), tuple(rows))


def _nats(found: Any) -> float:
    """What `loss` or `check` returned, be it a tensor of one number."""
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        raise SettingError(f"loss and check return a number, not a {type(found).__name__}") from None


def _in_order(found: list[Sensitivity]) -> list[tuple[str, int]]:
    """(block, k) by the loss per side bit that the move saves; a block's own moves stay in order."""
    lost: dict[tuple[str, int], float] = {}
    worst: dict[str, float] = {}
    for row in found:  # by descending k within each block
        # What a smaller gamma does, a larger one does as well: less is noise.
        worst[row.block] = max(worst.get(row.block, 0.0), row.increase)
        lost[row.block, row.side_bits] = worst[row.block]
    price: dict[tuple[str, int], float] = {}
    for (path, k), increase in lost.items():
        before = lost.get((path, k + 1), 0.0)
        marginal = inf if increase == inf else increase - before
        price[path, k] = max(marginal, price.get((path, k + 1), 0.0))
    return sorted(price, key=lambda move: (price[move], -move[1]))


def _after(bits: Bits, moves: list[tuple[str, int]]) -> Bits:
    after = dict(bits)
    for path, k in moves:
        after[path] = min(after[path], k)
    return after


def _mean_bits(model: nn.Module) -> float:
    couplings = [c for chain in chains_of(model) for c in chain.couplings]
    if any(not isinstance(c, Velocity) or isinstance(c, Bdia) for c in couplings):
        raise ConversionError("this coupling has no gamma of its own to calibrate; convert with momentum")
    return sum(c.side_bits for c in couplings) / len(couplings)
