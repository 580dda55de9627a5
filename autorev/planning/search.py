"""Find the fastest way to train in the memory there is: simulate the families, then choose numbers of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from autorev.analysis import Category, Prediction
from autorev.errors import AutorevError, SettingError
from autorev.format import plural
from autorev.methods import Method
from autorev.plan import Option, Reached, Rung
from autorev.planning.levers import ATTENTION, STORED, best_number, levers_of
from autorev.prediction.forecast import Forecaster
from autorev.prediction.frontier import explore

Progress = Callable[[str, float], None]
PRESERVING = ("momentum:k=3,keep_last=0",)
CHANGING = ("leapfrog:keep_last=0",)
"""Couplings for a model that has no function yet."""
ORDER = ("plain", "checkpoint", "momentum", "leapfrog", "offload")
"""Of two that are as fast, the simpler: what PyTorch does by itself, and what needs no host."""
LONG = 4096
"""Tokens from which on attention costs enough for its results to be worth keeping."""
FIXED = (Category.PARAMETERS, Category.OPTIMIZER_STATE)


@dataclass(eq=False)
class Search:
    """One question: a model, a training step, and so much memory."""

    forecaster: Forecaster
    room: int
    pretrained: bool = True
    host: bool = True
    """May host memory be used?"""
    chunked: bool = True
    """Can the loss be computed in chunks?"""
    progress: Progress = lambda what, fraction: None
    seen: dict[Method, Option] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)
    """Why there are no figures of a method."""
    _forecasters: dict[str, Forecaster] = field(default_factory=dict)

    # -- one way to train

    def option(self, method: Method) -> Option | None:
        """Its figures; None where this model cannot train so."""
        if method not in self.seen and method.spec not in self.impossible:
            try:
                found = self.prediction(method)
            except AutorevError as error:
                self.impossible[method.spec] = str(error)
                return None
            self.seen[method] = Option(
                method, found.peak_bytes, found.host_bytes, found.step_seconds, found.peak_bytes <= self.room
            )
        return self.seen.get(method)

    def prediction(self, method: Method) -> Prediction:
        """A step at the setting's size."""
        forecaster, setting = self.forecaster_for(method.loss), self.forecaster.setting
        simulated = replace(method, loss="full")
        return forecaster.prediction(simulated, forecaster.trace(simulated, setting.batch, setting.sequence))

    def forecaster_for(self, loss: str) -> Forecaster:
        """One that simulates with that loss."""
        if loss not in self._forecasters:
            setting = replace(self.forecaster.setting, loss=loss)
            self._forecasters[loss] = replace(self.forecaster, setting=setting, probed={}, simulated={})
        return self._forecasters[loss]

    # -- all of them

    def families(self) -> list[Method]:
        """The ways that are looked at, before blocks are stored."""
        names = ["plain", "checkpoint"]
        if self.forecaster.reversible:
            names += PRESERVING if self.pretrained else (*PRESERVING, *CHANGING)
        if self.host:
            names.append("offload")
        losses = ["chunked"] if self.forecaster.setting.loss == "chunked" or self.chunked else ["full"]
        if self.forecaster.setting.loss == "full" and self.chunked:
            losses.insert(0, "full")
        found = []
        for loss in losses:
            for name in names:
                base = replace(Method.parse(name), loss=loss)
                found.append(base)
                if loss == losses[-1]:
                    found.append(replace(base, tile="auto"))
                    bits = ["side_bits"] if name in PRESERVING else []
                    if name != "plain" and self._is_long:
                        found.append(replace(base, tile="auto", keep="attention"))
                        if self.host:
                            there = "+".join([*bits, "attention"])
                            found.append(replace(base, tile="auto", keep="attention", host=there))
                    if bits and self.host:
                        found.append(replace(base, tile="auto", host="side_bits"))
        return found

    def all(self) -> list[Option]:
        """Every family, and what may be fastest with as many blocks stored, kept or moved as fit; fastest first."""
        families = self.families()
        for number, method in enumerate(families):
            self.progress(f"simulating {method.spec}", 0.3 + 0.4 * number / len(families))
            self.option(method)
        bases = sorted(self.seen.values(), key=self.rank)
        for number, base in enumerate(bases):
            self.progress(f"block by block: {base.method.spec}", 0.7 + 0.25 * number / len(bases))
            if base.fits and base.method.name != "plain":
                self._fill(base)
        return sorted(self.seen.values(), key=self.rank)

    def best(self) -> Option | None:
        """The fastest of those that fit."""
        plain = self.seen.get(Method("plain", loss=self.forecaster.setting.loss))
        if plain is not None and plain.fits:
            return plain  # whatever is said of chunks: nothing has to be done
        fitting = [option for option in self.seen.values() if option.fits]
        return min(fitting, key=self.rank, default=None)

    def rank(self, option: Option) -> tuple[float, int, int, int]:
        """The faster first; of two that are as fast, the simpler."""
        method = option.method
        return float(f"{option.seconds:.3g}"), option.host_bytes, ORDER.index(method.name), len(method.spec)

    def _fill(self, base: Option) -> None:
        """Of each lever as many blocks as fit: first of the one that saves most time for its bytes."""
        method, blocks = base.method, max(self.forecaster.layout.lengths, default=0)
        plain = self.option(Method("plain", loss=method.loss, tile=method.tile))
        kept = self.seen.get(replace(method, keep="attention")) if method.keep is None else None
        best = self.best()
        if blocks < 2 or plain is None or plain.fits or best is None:
            return
        least = base if kept is None or kept.seconds > base.seconds else kept
        share = min((self.room - base.peak_bytes) / max(plain.peak_bytes - base.peak_bytes, 1), 1)
        if least.seconds - share * max(least.seconds - plain.seconds, 0) >= best.seconds:
            return  # even with attention kept for nothing it would not be the fastest
        levers = levers_of(method, kept is not None)
        levers.sort(key=lambda lever: -_worth(base, plain if lever == STORED else kept if lever == ATTENTION else None))
        for lever in levers:
            method = best_number(method, lever, blocks, self._cost)
        self.option(method)
        if method.stored_of(0) + 1 < blocks:
            self.option(replace(method, keep_last=method.stored_of(0) + 1))  # what one more would take

    def _cost(self, method: Method) -> tuple[float, ...] | None:
        """Seconds, and then bytes on the host and at the peak; None where it does not fit."""
        found = self.prediction(method)
        return (found.step_seconds, found.host_bytes, found.peak_bytes) if found.peak_bytes <= self.room else None

    @property
    def _is_long(self) -> bool:
        return (self.forecaster.setting.sequence or 0) >= LONG

    def refuse(self, option: Option, measured: int) -> None:
        """`option` does not hold: what was predicted is as far off for all others."""
        for method, other in self.seen.items():
            peak = max(other.peak_bytes, round(other.peak_bytes * measured / option.peak_bytes))
            self.seen[method] = replace(other, peak_bytes=peak, fits=peak <= self.room)

    # -- in words

    def rungs(self, chosen: Option) -> Iterator[Rung]:
        """From plain training with the setting's loss to `chosen`, one change at a time."""
        method = chosen.method
        here = Method("plain", loss=self.forecaster.setting.loss)
        changes: list[tuple[str, Method]] = [("plain training", here)]
        if method.loss != here.loss:
            here = replace(here, loss=method.loss)
            changes.append(("the loss in chunks", here))
        if method.name != "plain":
            here = replace(method, tile=None, keep=None, host=None, keep_last=0 if method.reversible else "auto")
            changes.append((_WORDS.get(method.name, method.name), here))
        if method.tile is not None:
            here = replace(here, tile=method.tile)
            changes.append(("what acts on each token alone, a tile at a time", here))
        if method.keep is not None:
            here = replace(here, keep=method.keep)
            changes.append((f"attention{_blocks(method.keep)} not computed twice", here))
        if method.host is not None:
            here = replace(here, host=method.host)
            changes.append((f"{' and '.join(map(_moved, method.host.split('+')))} on the host", here))
        if method != here:
            changes.append((f"{plural(int(str(method.keep_last)), 'block')} at the end stored", method))
        for what, step in changes:
            option = self.option(step)
            if option is not None:
                yield Rung(what, option)

    def why(self, chosen: Option | None) -> str:
        """One sentence."""
        if chosen is None:
            return self._why_nothing()
        method = chosen.method
        if method == Method("plain", loss=self.forecaster.setting.loss):
            return "nothing is needed: plain training fits"
        if method.name == "plain" and method.tile is None:
            return "a loss in chunks is enough"
        if method.name == "checkpoint":
            stored = method.keep_last if isinstance(method.keep_last, int) else 0
            rest = f"; {plural(stored, 'block')} at the end can be stored" if stored else ""
            return f"checkpointing is enough{'' if method.tile is None else ', with tiles'}{rest}"
        rivals = [o for o in self.seen.values() if o.fits and not o.method.reversible and o.method != method]
        if not rivals:
            return "nothing that PyTorch does by itself fits"
        rival = min(rivals, key=self.rank)
        return (
            f"it is the fastest that fits: {rival.method.spec} takes {rival.seconds / chosen.seconds:.3g} times as long"
        )

    def _why_nothing(self) -> str:
        method = Method("plain", loss=self.forecaster.setting.loss)
        fixed = sum(self.prediction(method).categories[category] for category in FIXED)
        least = min(self.seen.values(), key=lambda option: option.peak_bytes)
        if fixed >= self.room:
            return "does not fit: the weights and the optimiser's state alone take more than there is"
        return f"does not fit: {least.method.spec}, which takes least, peaks above it; shorten the sequence"

    # -- the other way round

    def reach(self, axis: str) -> list[Reached]:
        """How far each family gets along `axis`, farthest first.

        Raises:
            SettingError: the model has no such axis, or it cannot be varied.
        """
        found: list[tuple[Reached, Option]] = []
        losses = {method.loss: method.loss for method in self.families()}
        families = [m for m in self.families() if m.loss == [*losses][-1] and m.keep is None]  # which takes memory
        problem = ""
        for number, method in enumerate(families):
            self.progress(f"how far {method.spec} reaches", 0.3 + 0.6 * number / len(families))
            option = self.option(method)
            if option is None:
                continue
            forecaster, simulated = self.forecaster_for(method.loss), replace(method, loss="full")
            setting = forecaster.setting
            here = forecaster.trace(simulated, setting.batch, setting.sequence)
            explored = explore(forecaster, simulated, here, (axis,), self.room)
            problem = problem or next(iter(explored.problems), "")
            if axis in explored.limits:
                found.append((Reached(method, explored.limits[axis]), option))
        if not found:
            raise SettingError(f"the {axis} of {type(self.forecaster.twin).__name__} cannot be varied: {problem}")
        return [reached for reached, _ in sorted(found, key=lambda one: (-one[0].size, *self.rank(one[1])))]


_WORDS = {"checkpoint": "a checkpoint around every block", "offload": "checkpoints, whose inputs wait on the host"}


def _blocks(amount: str) -> str:
    """` of 8 blocks` of `attention:8`."""
    number = amount.partition(":")[2]
    return f" of {plural(int(number), 'block')}" if number else ""


def _moved(amount: str) -> str:
    return f"{amount.partition(':')[0].replace('_', ' ')}{_blocks(amount)}"


def _worth(base: Option, most: Option | None) -> float:
    """Seconds for a byte of what costs memory; what costs none comes last."""
    if most is None:
        return -math.inf
    return (base.seconds - most.seconds) / max(most.peak_bytes - base.peak_bytes, 1)
