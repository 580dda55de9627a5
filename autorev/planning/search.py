"""Find the fastest way to train in the memory there is: simulate the families, then choose numbers of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from autorev.analysis import Category, Prediction
from autorev.errors import AutorevError, SettingError
from autorev.format import plural
from autorev.methods import Method
from autorev.optimizers import Optimizer
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
WORTH = 0.01
"""Of the memory: an optimiser that frees less is not looked at."""


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
    optimizers: tuple[str, ...] = ("adamw",)
    """Those that may be chosen, the simplest first; one on the host where nothing else fits."""
    progress: Progress = lambda what, fraction: None
    seen: dict[tuple[Method, str], Option] = field(default_factory=dict)
    """By method and optimiser."""
    impossible: dict[str, str] = field(default_factory=dict)
    """Why there are no figures of a method."""
    _forecasters: dict[tuple[str, str], Forecaster] = field(default_factory=dict)

    # -- one way to train

    def option(self, method: Method, optimizer: str | None = None) -> Option | None:
        """Its figures; None where this model cannot train so."""
        way = method, optimizer or self.optimizers[0]
        if way not in self.seen and method.spec not in self.impossible:
            try:
                found = self.prediction(*way)
            except AutorevError as error:
                self.impossible[method.spec] = str(error)
                return None
            fits = found.peak_bytes <= self.room
            self.seen[way] = Option(method, found.peak_bytes, found.host_bytes, found.step_seconds, fits, way[1])
        return self.seen.get(way)

    def prediction(self, method: Method, optimizer: str) -> Prediction:
        """A step at the setting's size."""
        forecaster, setting = self.forecaster_for(method.loss, optimizer), self.forecaster.setting
        simulated = replace(method, loss="full")
        return forecaster.prediction(simulated, forecaster.trace(simulated, setting.batch, setting.sequence))

    def forecaster_for(self, loss: str, optimizer: str) -> Forecaster:
        """One that simulates with that loss and optimiser; what happens before an update, whichever, once for all."""
        way = loss, optimizer
        if way not in self._forecasters:
            setting = replace(self.forecaster.setting, loss=loss, optimizer=optimizer)
            alike = (f for (of, by), f in self._forecasters.items() if of == loss and _steps_after(by, optimizer))
            found = next(alike, replace(self.forecaster, probed={}, simulated={}))
            self._forecasters[way] = replace(found, setting=setting)
        return self._forecasters[way]

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
        worth = self._worth_looking_at()
        for at, optimizer in enumerate(worth):
            best = self.best()
            as_it_is = best is not None and best.method.name == "plain" and best.method.tile is None
            if as_it_is or (best is not None and Optimizer.parse(optimizer).on_host):
                break  # nothing is faster; and of a step on the host no more is known than the time of the link
            share = 0.65 / len(worth)
            for number, method in enumerate(families):
                done = 0.3 + share * (at + 0.6 * number / len(families))
                if optimizer == worth[0] or self._may_win(method, optimizer):
                    self.progress(f"simulating {method.spec} with {optimizer}", done)
                    self.option(method, optimizer)
            bases = sorted((o for o in self.seen.values() if o.optimizer == optimizer), key=self.rank)
            for number, base in enumerate(bases):
                done = 0.3 + share * (at + 0.6 + 0.4 * number / len(bases))
                self.progress(f"block by block: {base.method.spec} with {optimizer}", done)
                if base.fits and base.method.name != "plain":
                    self._fill(base)
        return sorted(self.seen.values(), key=self.rank)

    def _may_win(self, method: Method, optimizer: str) -> bool:
        """Can it fit, and be faster than the best so far, with as many blocks stored as that takes? Judged by its
        figures under the first optimiser, less all that this one frees.
        """
        usual, best = self.option(method), self.best()
        plain = self.option(Method("plain", loss=method.loss, tile=method.tile))
        if usual is None or plain is None:
            return False
        stored = 0.0
        if best is not None and usual.seconds >= best.seconds:
            if best.seconds <= plain.seconds:
                return False
            stored = (usual.seconds - best.seconds) / (usual.seconds - plain.seconds)
        freed = self._holds(self.optimizers[0]) - self._holds(optimizer)
        return (1 - stored) * usual.peak_bytes + stored * plain.peak_bytes - freed <= self.room

    def _worth_looking_at(self) -> list[str]:
        """The optimisers, but for those that free next to nothing of what the ones before them hold."""
        first, *others = self.optimizers
        found = [first]
        for optimizer in others:
            if self._holds(found[-1]) - self._holds(optimizer) > WORTH * self.room:
                found.append(optimizer)
        return found

    def _holds(self, optimizer: str) -> int:
        """Bytes of gradients, states and temporaries, when all of them are there at once."""
        forecaster = self.forecaster_for(self.forecaster.setting.loss, optimizer)
        gradients = sum(each.size for each in forecaster.updated() if not each.frees_gradient)
        update = forecaster.update()
        return gradients + update.state + update.temporary

    def best(self) -> Option | None:
        """The fastest of those that fit."""
        plain = self.seen.get((Method("plain", loss=self.forecaster.setting.loss), self.optimizers[0]))
        if plain is not None and plain.fits:
            return plain  # whatever is said of chunks: nothing has to be done
        fitting = [option for option in self.seen.values() if option.fits]
        return min(fitting, key=self.rank, default=None)

    def rank(self, option: Option) -> tuple[float, int, int, int, int]:
        """The faster first; of two that are as fast, the simpler."""
        method, optimizer = option.method, self.optimizers.index(option.optimizer)
        seconds = float(f"{option.seconds:.3g}")
        return seconds, option.host_bytes, optimizer, ORDER.index(method.name), len(method.spec)

    def _fill(self, base: Option) -> None:
        """Of each lever as many blocks as fit: first of the one that saves most time for its bytes."""
        method, optimizer, blocks = base.method, base.optimizer, max(self.forecaster.layout.lengths, default=0)
        plain = self.option(Method("plain", loss=method.loss, tile=method.tile), optimizer)
        kept = self.seen.get((replace(method, keep="attention"), optimizer)) if method.keep is None else None
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
            method = best_number(method, lever, blocks, partial(self._cost, optimizer))
        self.option(method, optimizer)
        if method.stored_of(0) + 1 < blocks:
            self.option(replace(method, keep_last=method.stored_of(0) + 1), optimizer)  # what one more would take

    def _cost(self, optimizer: str, method: Method) -> tuple[float, ...] | None:
        """Seconds, and then bytes on the host and at the peak; None where it does not fit."""
        found = self.prediction(method, optimizer)
        return (found.step_seconds, found.host_bytes, found.peak_bytes) if found.peak_bytes <= self.room else None

    @property
    def _is_long(self) -> bool:
        return (self.forecaster.setting.sequence or 0) >= LONG

    def refuse(self, option: Option, measured: int) -> None:
        """`option` does not hold: what was predicted is as far off for all others."""
        for way, other in self.seen.items():
            peak = max(other.peak_bytes, round(other.peak_bytes * measured / option.peak_bytes))
            self.seen[way] = replace(other, peak_bytes=peak, fits=peak <= self.room)

    # -- in words

    def rungs(self, chosen: Option) -> Iterator[Rung]:
        """From plain training with the setting's loss to `chosen`, one change at a time."""
        method, first, last = chosen.method, self.optimizers[0], chosen.optimizer
        here = Method("plain", loss=self.forecaster.setting.loss)
        changes: list[tuple[str, Method, str]] = [("plain training", here, first)]
        if method.loss != here.loss:
            here = replace(here, loss=method.loss)
            changes.append(("the loss in chunks", here, first))
        if method.name != "plain":
            here = replace(method, tile=None, keep=None, host=None, keep_last=0 if method.reversible else "auto")
            changes.append((_WORDS.get(method.name, method.name), here, first))
        if method.tile is not None:
            here = replace(here, tile=method.tile)
            changes.append(("what acts on each token alone, a tile at a time", here, first))
        if method.keep is not None:
            here = replace(here, keep=method.keep)
            changes.append((f"attention{_blocks(method.keep)} not computed twice", here, first))
        if method.host is not None:
            here = replace(here, host=method.host)
            changes.append((f"{' and '.join(map(_moved, method.host.split('+')))} on the host", here, first))
        if last != first:
            changes.append((Optimizer.parse(last).title, here, last))
        if method != here:
            changes.append((f"{plural(int(str(method.keep_last)), 'block')} at the end stored", method, last))
        for what, step, optimizer in changes:
            option = self.option(step, optimizer)
            if option is not None:
                yield Rung(what, option)

    def why(self, chosen: Option | None) -> str:
        """One sentence."""
        if chosen is None:
            return self._why_nothing()
        method, optimizer = chosen.method, chosen.optimizer
        other = "" if optimizer == self.optimizers[0] else f" with {Optimizer.parse(optimizer).title}"
        if method == Method("plain", loss=self.forecaster.setting.loss):
            return f"plain training fits{other}" if other else "nothing is needed: plain training fits"
        if method.name == "plain" and method.tile is None:
            return f"a loss in chunks is enough{other}"
        if method.name == "checkpoint":
            stored = method.keep_last if isinstance(method.keep_last, int) else 0
            rest = f"; {plural(stored, 'block')} at the end can be stored" if stored else ""
            rest += other and f",{other}"
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
        weights = self.prediction(method, self.optimizers[0]).categories[Category.PARAMETERS]
        fixed = weights + min(self.forecaster_for(method.loss, o).update().state for o in self._worth_looking_at())
        least = min(self.seen.values(), key=lambda option: option.peak_bytes)
        if fixed >= self.room:
            return "does not fit: the weights and the optimiser's state alone take more than there is"
        with_ = "" if least.optimizer == self.optimizers[0] else f" with {least.optimizer}"
        return f"does not fit: {least.method.spec}{with_}, which takes least, peaks above it; shorten the sequence"

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
        ways = [(method, optimizer) for optimizer in self._worth_looking_at() for method in families]
        for number, (method, optimizer) in enumerate(ways):
            self.progress(f"how far {method.spec} reaches with {optimizer}", 0.3 + 0.6 * number / len(ways))
            option = self.option(method, optimizer)
            if option is None:
                continue
            forecaster, simulated = self.forecaster_for(method.loss, optimizer), replace(method, loss="full")
            setting = forecaster.setting
            here = forecaster.trace(simulated, setting.batch, setting.sequence)
            explored = explore(forecaster, simulated, here, (axis,), self.room)
            problem = problem or next(iter(explored.problems), "")
            if axis in explored.limits:
                found.append((Reached(method, explored.limits[axis], optimizer), option))
        if not found:
            raise SettingError(f"the {axis} of {type(self.forecaster.twin).__name__} cannot be varied: {problem}")
        return [reached for reached, _ in sorted(found, key=lambda one: (-one[0].size, *self.rank(one[1])))]


def _steps_after(one: str, other: str) -> bool:
    """Do both leave every gradient until the update?"""
    return not any(Optimizer.parse(spec).frees_gradients for spec in (one, other))


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
