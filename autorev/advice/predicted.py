"""The advice on an analysis: every method is predicted on one device, and what fits it is good enough."""

from __future__ import annotations

from dataclasses import replace

from autorev.advice.case import TITLES, Candidate, Case, Possible
from autorev.advice.recommend import recommend
from autorev.analysis import Analysis, Prediction, Recommendation
from autorev.format import format_bytes, unit_for
from autorev.methods import Method
from autorev.setting import Setting


def recommend_for(analysis: Analysis, possible: Possible | None = None) -> Recommendation:
    """The method for this setting on its device, with its reason and further advice."""
    setting, device = analysis.setting, analysis.device
    assert setting is not None and device is not None and analysis.predictions
    unit = unit_for(prediction.peak_bytes for prediction in analysis.predictions)
    known = tuple(_of_analysis(prediction, setting) for prediction in analysis.predictions)
    irreversible = "no chain is long enough to reverse" if analysis.chains else "no block can be made reversible"
    return recommend(
        Case(
            setting=setting,
            known=known,
            measured=False,
            room=device.usable_bytes,
            there_is=f"the {format_bytes(device.usable_bytes)} to use on {device.title}",
            reaches={reach.method: reach for reach in analysis.frontier},
            irreversible="" if any(c.method.reversible for c in known) else irreversible,
            possible=possible or Possible(),
            size=lambda count: f"{unit.number(count)} {unit.name}",
        )
    )


def _of_analysis(prediction: Prediction, setting: Setting) -> Candidate:
    name = prediction.method
    method = replace(Method.parse(name), loss=setting.loss)
    title = TITLES.get(method.name, f"the {method.name} coupling")
    return predicted(prediction, method, setting, name, title if method.tile is None else f"{title} with tiles")


def predicted(prediction: Prediction, method: Method, setting: Setting, name: str, title: str) -> Candidate:
    """A candidate that was not measured; how many blocks it stores is part of what was predicted."""
    if len(set(prediction.keep_last)) == 1 and method.keep_last == "auto":  # else convert chooses, chain by chain
        method = replace(method, keep_last=prediction.keep_last[0])
    seconds = float(f"{prediction.step_seconds:.3g}")  # as they are shown: what lies beyond is no difference
    return Candidate(
        name=name,
        title=title,
        method=method,
        peak_bytes=prediction.peak_bytes,
        phase=prediction.phase,
        categories=prediction.categories,
        phase_peaks=prediction.phase_peaks,
        seconds=prediction.step_seconds,
        rate=setting.batch * (setting.sequence or 1) / seconds if seconds else None,
        batch=setting.batch,
    )
