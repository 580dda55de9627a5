"""What the analysis predicts for the methods of a profile, so that prediction and measurement stand side by side."""

from __future__ import annotations

from dataclasses import replace

from autorev.analysis import Prediction
from autorev.methods import Method
from autorev.prediction.forecast import Forecaster


def predict_method(forecaster: Forecaster, method: Method) -> Prediction | None:
    """The prediction for `method` at the setting's size; None where none is made.

    Not predicted is torch.compile, which chooses what it keeps itself.
    """
    if method.name == "compile" or (method.reversible and not forecaster.reversible):
        return None
    setting = forecaster.setting
    forecaster = replace(forecaster, setting=replace(setting, loss=method.loss), probed={}, simulated={})
    method = forecaster.settled(method)
    trace = forecaster.trace(method, setting.batch, setting.sequence)
    return forecaster.prediction(method, trace)
