"""The recommendation, from predictions made up to stand at each turn of the road."""

from __future__ import annotations

import dataclasses

import pytest

from autorev.analysis import Analysis, Category, Recommendation
from autorev.plan import recommend
from tests import analysis_examples

GIB = 2**30
ROOM = 79 * GIB


def planned(*, loss: str = "full", trains: str = "lora", **peaks: dict[str, float]) -> Recommendation:
    """The recommendation where each strategy's peak is made of these categories, in GiB."""
    base: Analysis = analysis_examples.llama_lora()
    assert base.setting is not None
    predictions = []
    for prediction in base.predictions:
        given = peaks.get(prediction.strategy) or peaks["checkpoint"]
        categories = {c.value: round(given.get(c.value, 0) * GIB) for c in Category}
        total = sum(categories.values())
        predictions.append(dataclasses.replace(prediction, categories=categories, peak_bytes=total, phase="backward"))
    setting = dataclasses.replace(base.setting, loss=loss, trains=trains)
    return recommend(dataclasses.replace(base, predictions=tuple(predictions), setting=setting), ROOM)


def test_what_fits_is_not_converted() -> None:
    """Plain training that fits is recommended, in so many words."""
    found = planned(plain={"parameters": 40, "stored_activations": 20}, checkpoint={"parameters": 41})
    assert found.strategy == "plain"
    assert "do not convert" in found.why


def test_checkpointing_is_enough_where_it_fits() -> None:
    """Where checkpointing fits with room to spare, no conversion is advised, whatever it would save."""
    found = planned(
        plain={"parameters": 15, "stored_activations": 200},
        checkpoint={"parameters": 15, "stored_activations": 30},
        momentum={"parameters": 15, "streams": 2},
    )
    assert found.strategy == "checkpoint"
    assert "checkpointing is enough" in found.why


def test_conversion_where_only_it_fits() -> None:
    """The stored inputs of checkpointing do not fit, and the reversible chain does."""
    found = planned(
        plain={"parameters": 15, "stored_activations": 900},
        checkpoint={"parameters": 15, "stored_activations": 70},
        momentum={"parameters": 15, "streams": 2, "side_bits": 10},
    )
    assert found.strategy == "momentum"
    assert "70.0 GiB are one stored input per block" in found.why


def test_offloading_where_nothing_on_the_device_fits() -> None:
    """Only the variant that keeps inputs in host memory fits."""
    found = planned(
        plain={"stored_activations": 900},
        checkpoint={"stored_activations": 100},
        momentum={"side_bits": 90},
        offload={"working_set": 60},
    )
    assert found.strategy == "offload"


@pytest.mark.parametrize(
    ("category", "told"),
    [
        ("parameters", "weights, gradients and optimiser state alone take"),
        ("logits_and_loss", "your logits dominate"),
        ("working_set", "what a single block holds"),
    ],
)
def test_nothing_fits_and_why(category: str, told: str) -> None:
    """When nothing fits, what dominates the best peak is named."""
    assert told in planned(checkpoint={category: 200}).why


def test_logits_are_advised_to_be_chunked_once() -> None:
    """The chunked loss is advised where logits are a fifth of the peak, and not where it is used already."""
    peaks = {"checkpoint": {"logits_and_loss": 40, "parameters": 20}, "plain": {"stored_activations": 300}}
    assert any("--loss chunked" in text for text in planned(**peaks).advice)
    assert not any("--loss chunked" in text for text in planned(loss="chunked", **peaks).advice)


def test_lora_is_advised_where_optimiser_state_dominates() -> None:
    """Full fine-tuning whose weights, gradients and optimiser state make the peak is told what frees them."""
    peaks = {"checkpoint": {"parameters": 15, "gradients": 15, "optimizer_state": 30}, "plain": {"parameters": 100}}
    assert any("--trains lora" in text for text in planned(trains="full", **peaks).advice)
    assert not any("--trains lora" in text for text in planned(trains="lora", **peaks).advice)
