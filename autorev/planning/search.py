"""Find the fastest way to train in the memory there is: simulate the families, then store as many blocks as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from autorev.analysis import Category, Prediction
from autorev.errors import AutorevError, SettingError
from autorev.format import plural
from autorev.methods import Method
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
                    if name != "plain" and (self.forecaster.setting.sequence or 0) >= LONG:
                        found.append(replace(base, tile="auto", keep="attention"))
                    if name in PRESERVING and self.host:
                        found.append(replace(base, tile="auto", host="side_bits"))
        return found

    def all(self) -> list[Option]:
        """Every family, and those that may be fastest with as many stored blocks as fit; fastest first."""
        families = self.families()
        for number, method in enumerate(families):
            self.progress(f"simulating {method.spec}", 0.3 + 0.4 * number / len(families))
            self.option(method)
        bases = sorted(self.seen.values(), key=self.rank)
        for number, base in enumerate(bases):
            self.progress(f"storing blocks of {base.method.spec}", 0.7 + 0.25 * number / len(bases))
            if base.fits and base.method.name != "plain":
                self._store(base)
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

    def _store(self, base: Option) -> None:
        """Store as many blocks as fit: each is one that backward need not run again."""
        lengths = self.forecaster.layout.lengths
        if not lengths:
            return
        low, high = 0, max(lengths)
        plain = self.option(Method("plain", loss=base.method.loss, tile=base.method.tile))
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
            option = self.option(replace(base.method, keep_last=number))
            if option is None:
                return
            if option.fits:
                low, at_low = number, option.peak_bytes
            else:
                high, at_high = number, option.peak_bytes

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
            changes.append(("attention not computed twice", here))
        if method.host is not None:
            here = replace(here, host=method.host)
            changes.append(("side bits on the host", here))
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
        families = [method for method in self.families() if method.loss == self.families()[-1].loss]
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
