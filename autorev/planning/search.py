"""Find the fastest way to train in the memory there is: simulate the families, then store as many blocks as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from autorev.analysis import Category, Prediction
from autorev.errors import AutorevError, SettingError
from autorev.format import plural
from autorev.methods import Method
from autorev.optimizers import Optimizer
from autorev.plan import Option, Reached, Rung
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
MOST_TRIES = 5
"""Simulated steps to find how many blocks can be stored."""
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
                    if name != "plain" and (self.forecaster.setting.sequence or 0) >= LONG:
                        found.append(replace(base, tile="auto", keep="attention"))
                    if name in PRESERVING and self.host:
                        found.append(replace(base, tile="auto", host="side_bits"))
        return found

    def all(self) -> list[Option]:
        """Every family, and those that may be fastest with as many stored blocks as fit; fastest first."""
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
            for base in bases:
                self.progress(f"storing blocks of {base.method.spec}", 0.3 + share * (at + 0.8))
                if base.fits and base.method.name != "plain":
                    self._store(base)
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

    def _store(self, base: Option) -> None:
        """Store as many blocks as fit: each is one that backward need not run again."""
        lengths = self.forecaster.layout.lengths
        if not lengths:
            return
        low, high = 0, max(lengths)
        plain = self.option(Method("plain", loss=base.method.loss, tile=base.method.tile), base.optimizer)
        best = self.best()
        if plain is None or best is None or plain.seconds >= best.seconds:
            return  # even with nothing run twice it would not be faster
        at_high = max(plain.peak_bytes, base.peak_bytes + 1)
        at_low = base.peak_bytes
        if plain.fits:
            return
        for _ in range(MOST_TRIES):
            share = min((self.room - base.peak_bytes) / (plain.peak_bytes - base.peak_bytes), 1)
            if high - low <= 1 or base.seconds - share * (base.seconds - plain.seconds) >= best.seconds:
                return  # no room, or it would not be the fastest
            guess = low + int((self.room - at_low) / (at_high - at_low) * (high - low))
            number = min(max(guess, low + 1), high - 1)
            option = self.option(replace(base.method, keep_last=number), base.optimizer)
            if option is None:
                return
            if option.fits:
                low, at_low = number, option.peak_bytes
            else:
                high, at_high = number, option.peak_bytes

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
            changes.append(("attention not computed twice", here, first))
        if method.host is not None:
            here = replace(here, host=method.host)
            changes.append(("side bits on the host", here, first))
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
        families = [method for method in self.families() if method.loss == self.families()[-1].loss]
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
