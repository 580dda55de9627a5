"""What the analysis predicts for the methods of a profile, so that prediction and measurement stand side by side."""

from __future__ import annotations

from dataclasses import replace

from autorev.analysis import Prediction
from autorev.predict.forecast import Forecaster
from autorev.predict.methods import METHODS, Method
from autorev.rewrite.request import Request
from autorev.methods import Method, coupling_options, keep_last


def predict_method(forecaster: Forecaster, method: Method) -> Prediction | None:
    """The prediction for `method` at the setting's size; None where none is made.

    Not predicted is torch.compile, which chooses what it keeps itself.
    """
    method = _method(method)
    if method is None or (method.reversible and not forecaster.reversible):
        return None
    setting = forecaster.setting
    forecaster = replace(forecaster, setting=replace(setting, loss=method.loss), probed={}, simulated={})
    if method.reversible and keep_last(method) == "auto":
        method = forecaster.settled(method)
    trace = forecaster.trace(method, setting.batch, setting.sequence)
    return forecaster.prediction(method, trace)


def _method(method: Method) -> Method | None:
    if method.name == "sac":
        return Method("sac", "sac", note=method.note)
    known = next((s for s in METHODS if s.name == method.name), None)
    if known is None or not method.reversible:
        return known
    how = coupling_options(method)
    stored = how.pop("keep_last")
    return replace(
        known,
        request=Request(**how),
        keep_last=0 if stored == "auto" else stored,
        preserves_function=method.preserves_function,
        note=method.note,
    )
