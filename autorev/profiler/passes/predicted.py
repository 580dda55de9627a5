"""What the analysis predicts for the variants of a profile, so that prediction and measurement stand side by side."""

from __future__ import annotations

from dataclasses import replace

from autorev.analysis import Prediction
from autorev.predict.forecast import Forecaster
from autorev.predict.strategies import STRATEGIES, Strategy
from autorev.profiler.record import Variant
from autorev.variants import coupling_options, keep_last, side_bits


def predict_variant(forecaster: Forecaster, variant: Variant) -> Prediction | None:
    """The prediction for `variant` at the setting's size; None where none is made.

    Not predicted are torch.compile, which chooses what it keeps itself, and steps smaller than a block.
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
    if coupling_options(variant).get("granularity") == "sublayer":
        return None
    stored = keep_last(variant)
    return replace(
        known,
        side_bits=side_bits(variant),
        keep_last=0 if stored == "auto" else stored,
        preserves_function=variant.preserves_function,
        note=variant.note,
    )
