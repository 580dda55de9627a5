"""What to do about a model's memory, and why: a pure function of the predictions.

The recommended method is the fastest of those that fit; of equally fast ones the simplest. Where nothing fits, none
is. Every figure that a sentence names stands in the table of predictions, in the table's unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autorev.analysis import Analysis, Category, Prediction, Reach, Recommendation
from autorev.commands import SPEC
from autorev.format import format_bytes, format_integer, format_seconds, plural, unit_for
from autorev.offers import CHUNKED, Offer, Possible, offers, what_dominates
from autorev.words import CATEGORY_TITLES

COMFORT = 0.9
"""Share of the device's memory up to which a step is said to fit without worry."""
SIMPLEST = ("plain", "checkpoint", "offload", "momentum")
"""Methods that keep a pretrained model's function, the simplest first: PyTorch's own come before a conversion."""
_TITLES = {
    "plain": "plain training",
    "checkpoint": "checkpointing",
    "offload": "offloaded checkpointing",
    "momentum": "the momentum coupling",
}

_USUAL = {"coupling": "momentum", "gamma": 0.125, "arithmetic": "exact", "granularity": "block", "keep_last": "auto"}


def recommend(analysis: Analysis, possible: Possible | None = None) -> Recommendation:
    """The method for this setting on its device, with its reason and further advice."""
    assert analysis.device is not None and analysis.predictions
    plan = _Plan(analysis, possible or Possible())
    return plan.nothing_fits() if plan.chosen is None else plan.recommendation()


class _Plan:
    """A table of predictions, and the words that it is told in."""

    def __init__(self, analysis: Analysis, possible: Possible) -> None:
        assert analysis.setting is not None and analysis.device is not None
        self.analysis, self.possible = analysis, possible
        self.setting, self.device = analysis.setting, analysis.device
        self.room = analysis.device.usable_bytes
        self.unit = unit_for(prediction.peak_bytes for prediction in analysis.predictions)
        self.known = sorted((p for p in analysis.predictions if p.method in SIMPLEST), key=_simplicity)
        self.fitting = [p for p in self.known if p.peak_bytes <= self.room]
        self.chosen = min(self.fitting, key=_time, default=None)  # of equals the first, which is the simplest
        self.reaches = {reach.method: reach for reach in analysis.frontier}

    def size(self, count: int) -> str:
        """As the table has it."""
        return f"{self.unit.number(count)} {self.unit.name}"

    @property
    def usable(self) -> str:
        """What there is."""
        return f"the {format_bytes(self.room)} to use on {self.device.title}"

    # -- something fits

    def recommendation(self) -> Recommendation:
        """The fastest that fits."""
        chosen = self.chosen
        assert chosen is not None
        peak = f"{self.size(chosen.peak_bytes)} of {self.usable}"
        why = {
            "plain": f"do not convert: plain training peaks at {peak}, and nothing that fits is faster",
            "checkpoint": f"checkpointing is enough: it peaks at {peak}",
            "offload": f"checkpoint, and keep the blocks' inputs in host memory: that peaks at {peak}",
            "momentum": f"convert with the momentum coupling (exact, gamma = 1/8): it peaks at {peak}",
        }[chosen.method]
        others = [self._against(other, chosen) for other in self.known if self._is_rival(other, chosen)]
        if chosen.method != "plain" and not any(p.method == "momentum" for p in self.known):
            alone = "no chain is long enough to reverse" if self.analysis.chains else "no block can be made reversible"
            others.append(alone)
        return Recommendation(chosen.method, "; ".join([why, *others]), tuple(self._advice(chosen)))

    def _is_rival(self, other: Prediction, chosen: Prediction) -> bool:
        """Why not the others: those that are simpler, the reversible one, and one that is lower and as fast."""
        if other is chosen:
            return False
        simpler = _simplicity(other) < _simplicity(chosen)
        lower = other in self.fitting and other.peak_bytes < chosen.peak_bytes and _time(other) <= _time(chosen)
        return simpler or lower or (other.method == "momentum" and chosen.method != "plain")

    def _against(self, other: Prediction, chosen: Prediction) -> str:
        title, peak = _TITLES[other.method], self.size(other.peak_bytes)
        if other.peak_bytes > self.room:
            text = f"{title} does not fit, at {peak}"
            inputs = other.categories.get(Category.STORED_ACTIVATIONS, 0)
            if other.method == "checkpoint" and inputs >= 0.2 * other.peak_bytes:
                text += f", of which {self.size(inputs)} are stored, one input per block"
            return text
        if _time(other) > _time(chosen):
            faster, slower = format_seconds(chosen.step_seconds), format_seconds(other.step_seconds)
            text = f"{title} takes longer, {slower} instead of {faster} a step"
        else:
            text = f"{title} is no faster"
        lower = "at" if other.peak_bytes >= chosen.peak_bytes else "though at"
        host = ", and needs the host's memory" if other.method == "offload" else ""
        return f"{text}, {lower} {peak}{self._because_of(other, chosen)}{host}"

    def _because_of(self, other: Prediction, chosen: Prediction) -> str:
        """Why a reversible chain saves little."""
        name = max(chosen.categories, key=lambda c: chosen.categories[c], default=None)
        saves_little = 0.9 * chosen.peak_bytes < other.peak_bytes < chosen.peak_bytes
        if other.method != "momentum" or name is None or not saves_little:
            return ""
        category, count = Category(name), chosen.categories[name]
        if count < 0.25 * chosen.peak_bytes or category in (Category.STORED_ACTIVATIONS, Category.STREAMS):
            return ""
        return f", as {self.size(count)} of {_TITLES[chosen.method]}'s peak are {CATEGORY_TITLES[category]}"

    def _advice(self, chosen: Prediction) -> Iterator[str]:
        if chosen.method == "momentum":
            yield from self._how(chosen)
        narrow = chosen.peak_bytes > COMFORT * self.room
        roomier = min((p for p in self.fitting if p.peak_bytes <= COMFORT * self.room), key=_time, default=None)
        if narrow and roomier is not None:
            at = f"{self.size(roomier.peak_bytes)}, at {format_seconds(roomier.step_seconds)} a step"
            yield f"it fits narrowly: {_TITLES[roomier.method]} leaves room to spare with {at}"
        elif narrow:
            yield "it fits narrowly: measure it before you rely on it"
        beside = next((p for p in self.fitting if p.method == "momentum"), None)
        if chosen.method == "offload" and beside is not None:
            yield f"without the host's memory the momentum coupling fits, too, with {self.size(beside.peak_bytes)}"
            yield from self._how(beside)
        yield from self._further(chosen)
        yield from (offer.text for offer in self._offers(chosen) if narrow or offer.name != "smaller")

    def _how(self, prediction: Prediction) -> Iterator[str]:
        """The very call that was predicted."""
        stored = set(prediction.keep_last)
        options = {"keep_last": stored.pop()} if len(stored) == 1 else {}  # chain by chain, convert chooses the same
        spec = ",".join(["momentum:k=3", *(f"{name}={value}" for name, value in options.items())])
        text = how(options, self.setting.loss)
        if self.possible.command:
            text += f" (from the command line: {self.possible.command.replace(SPEC, spec)})"
        yield text

    def _further(self, chosen: Prediction) -> Iterator[str]:
        """How much further another method would get, when the chosen one is enough for now."""
        mine = self.reaches.get(chosen.method)
        for axis in ("largest_batch", "longest_sequence"):
            now = getattr(mine, axis, None)
            best = self._farthest(axis)
            most = getattr(best, axis, None)
            if now and most and most > now and best is not None:
                number = format_integer(most)
                what = f"a batch of {number}" if axis == "largest_batch" else f"{number} tokens"
                yield f"should you want more: {_TITLES[best.method]} fits {what} instead of {format_integer(now)}"

    def _farthest(self, axis: str) -> Reach | None:
        reached = [r for p in self.known if (r := self.reaches.get(p.method)) and getattr(r, axis)]
        return max(reached, key=lambda reach: getattr(reach, axis), default=None)

    def _offers(self, prediction: Prediction) -> list[Offer]:
        whose = f"{_TITLES[prediction.method]}'s peak"
        at = prediction.categories, prediction.peak_bytes, prediction.phase
        return offers(*at, self.setting, whose, self.possible, self.size)

    # -- nothing fits

    def nothing_fits(self) -> Recommendation:
        """Why, and what would make something fit."""
        best = min(self.known, key=lambda p: p.peak_bytes)
        why = (
            f"nothing fits {self.device.title}: even {_TITLES[best.method]} needs {self.size(best.peak_bytes)} of "
            f"{format_bytes(self.room)} to use; {what_dominates(best.categories, best.peak_bytes, self.size)}"
        )
        advice = [offer.text for offer in self._offers(best) if offer.name != "smaller"]
        return Recommendation(None, why, (*advice, *self._smaller()))

    def _smaller(self) -> Iterator[str]:
        """How far the device's memory reaches."""
        batch, tokens = self._farthest("largest_batch"), self._farthest("longest_sequence")
        batches, lengths = batch and batch.largest_batch, tokens and tokens.longest_sequence
        found = False
        if batch is not None and batches and batches < self.setting.batch:
            title = _TITLES[batch.method]
            yield f"{title} fits a batch of {format_integer(batches)}: accumulate gradients over several"
            found = True
        if tokens is not None and lengths and lengths < (self.setting.sequence or 0):
            yield f"{_TITLES[tokens.method]} fits {plural(lengths, 'token')} a sample"
            found = True
        if not found:
            yield "use a device with more memory"


def how(options: Mapping[str, Any], loss: str) -> str:
    """The calls that train as it was predicted, or measured. `options`: of `convert`."""
    given = ", ".join(f"{name}={value!r}" for name, value in options.items() if _USUAL.get(name) != value)
    call = f"autorev.convert({', '.join(filter(None, ['model', given]))})"
    if loss == "chunked":
        call = f"{CHUNKED} and then {call}"
    return f"{call} does it in user code, and autorev.verify(model) checks the gradients"


def _simplicity(prediction: Prediction) -> int:
    return SIMPLEST.index(prediction.method)


def _time(prediction: Prediction) -> float:
    """Seconds to three digits, as they are shown: what lies beyond is no difference."""
    return float(f"{prediction.step_seconds:.3g}")
