"""What the analysis predicts for the variants of a profile, so that prediction and measurement stand side by side."""

from __future__ import annotations

from dataclasses import replace

from autorev.analysis import Prediction
from autorev.predict.forecast import Forecaster
from autorev.predict.strategies import STRATEGIES, Strategy
from autorev.rewrite.request import Request
from autorev.variants import Variant, coupling_options, keep_last


def predict_variant(forecaster: Forecaster, variant: Variant) -> Prediction | None:
    """The prediction for `variant` at the setting's size; None where none is made.

    Not predicted is torch.compile, which chooses what it keeps itself.
    """
    strategy = _strategy(variant)
    if strategy is None or (variant.reversible and not forecaster.reversible):
        return None
    setting = forecaster.setting
    forecaster = replace(forecaster, setting=replace(setting, loss=variant.loss), probed={}, simulated={})
    if variant.reversible and keep_last(variant) == "auto":
        strategy = forecaster.settled(strategy)
    trace = forecaster.trace(strategy, setting.batch, setting.sequence)
    return forecaster.prediction(strategy, trace)


def _strategy(variant: Variant) -> Strategy | None:
    if variant.strategy == "sac":
        return Strategy("sac", "sac", note=variant.note)
    known = next((s for s in STRATEGIES if s.name == variant.strategy), None)
    if known is None or not variant.reversible:
        return known
    how = coupling_options(variant)
    stored = how.pop("keep_last")
    return replace(
        known,
        request=Request(**how),
        keep_last=0 if stored == "auto" else stored,
        preserves_function=variant.preserves_function,
        note=variant.note,
    )
