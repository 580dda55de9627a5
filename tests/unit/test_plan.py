"""The recommendation: at each turn of the road, and against any table of predictions."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autorev.advice.case import SIMPLEST, Possible
from autorev.advice.predicted import recommend_for
from autorev.analysis import Analysis, Category, Prediction, Reach, Recommendation
from autorev.format import format_bytes, format_seconds, unit_for
from autorev.report.render import render_text
from tests.helpers import analysis_examples

GIB = 2**30
LOSSES = {"momentum", "bdia", "leapfrog", "midpoint", "midpoint_a", "hamiltonian", "revnet"}
TIMES = {"plain": 1.0, "checkpoint": 1.3, "offload": 1.3, "momentum": 1.4}


def planned(
    *,
    possible: Possible | None = None,
    times: dict[str, float] | None = None,
    batch: int = 2,
    loss: str = "full",
    trains: str = "lora",
    phase: str = "backward",
    **peaks: dict[str, float],
) -> Recommendation:
    """The recommendation where each method's peak is made of these categories, in GiB."""
    base: Analysis = analysis_examples.llama_lora()
    assert base.setting is not None
    predictions = []
    for prediction in base.predictions:
        given = peaks.get(prediction.method) or peaks["checkpoint"]
        categories = {c.value: round(given.get(c.value, 0) * GIB) for c in Category}
        predictions.append(
            dataclasses.replace(
                prediction,
                categories=categories,
                peak_bytes=sum(categories.values()),
                phase=phase,
                step_seconds=(times or TIMES).get(prediction.method, 1.4),
                keep_last=(0,) if prediction.method in LOSSES else (),
            )
        )
    setting = dataclasses.replace(base.setting, loss=loss, trains=trains, batch=batch)
    return recommend_for(dataclasses.replace(base, predictions=tuple(predictions), setting=setting), possible)


def test_what_fits_is_not_converted() -> None:
    """Plain training that fits is recommended, in so many words."""
    found = planned(plain={"parameters": 40, "stored_activations": 20}, checkpoint={"parameters": 41})
    assert found.method == "plain"
    assert "do not convert" in found.why


def test_checkpointing_is_enough_where_it_fits() -> None:
    """Where checkpointing fits, no conversion is advised, whatever it would save; that is told."""
    found = planned(
        plain={"parameters": 15, "stored_activations": 200},
        checkpoint={"parameters": 15, "stored_activations": 30},
        momentum={"parameters": 15, "streams": 2},
    )
    assert found.method == "checkpoint"
    assert found.why.startswith("checkpointing is enough: it peaks at 45.0 GiB of the 78.6 GiB to use")
    assert "the momentum coupling takes longer, 1.40 s instead of 1.30 s a step, though at 17.0 GiB" in found.why


def test_one_that_is_as_fast_and_lower_is_told() -> None:
    """Simplicity decided, and what it costs is said."""
    found = planned(
        plain={"stored_activations": 900},
        checkpoint={"logits_and_loss": 70},
        offload={"logits_and_loss": 60},
        momentum={"logits_and_loss": 65},
    )
    assert found.method == "checkpoint"
    assert "offloaded checkpointing is no faster, though at 60.0 GiB" in found.why
    assert "needs the host's memory" in found.why


def test_conversion_where_only_it_fits() -> None:
    """The stored inputs of checkpointing do not fit, and the reversible chain does; with the very call."""
    found = planned(
        plain={"parameters": 15, "stored_activations": 900},
        checkpoint={"parameters": 15, "stored_activations": 70},
        offload={"parameters": 15, "stored_activations": 70},
        momentum={"parameters": 15, "streams": 2, "side_bits": 10},
        possible=Possible(command="python cli.py finetune m --method {spec}"),
    )
    assert found.method == "momentum"
    assert "of which 70.0 GiB are stored, one input per block" in found.why
    assert found.advice[0] == (
        "autorev.convert(model, method='momentum:k=3,keep_last=0') does it in user code, and autorev.verify(model) "
        "checks the gradients (from the command line: python cli.py finetune m --method momentum:k=3,keep_last=0)"
    )


def test_offloading_that_is_faster_and_smaller_is_recommended() -> None:
    """Not the coupling, which also fits: that, with its call, is for who has no host memory to spare."""
    found = planned(
        plain={"stored_activations": 900},
        checkpoint={"stored_activations": 100},
        momentum={"side_bits": 68},
        offload={"working_set": 53.5},
    )
    assert found.method == "offload"
    assert "without the host's memory the momentum coupling fits, too, with 68.0 GiB" in found.advice
    assert any("autorev.convert(model, method='momentum:k=3,keep_last=0')" in text for text in found.advice)


@pytest.mark.parametrize(
    ("category", "told"),
    [
        ("parameters", "200 GiB of weights are there whatever is done with the activations"),
        ("logits_and_loss", "your logits dominate"),
        ("working_set", "what a single block holds"),
        ("side_bits", "are side bits"),
    ],
)
def test_nothing_fits_and_why(category: str, told: str) -> None:
    """When nothing fits, nothing is recommended, and what dominates the best peak is named."""
    found = planned(checkpoint={category: 200})
    assert found.method is None
    assert told in found.why


def test_logits_are_advised_to_be_chunked_once() -> None:
    """The chunked loss is advised where logits are a fifth of the peak, and not where it is used or cannot be."""
    peaks = {"checkpoint": {"logits_and_loss": 40, "parameters": 20}, "plain": {"stored_activations": 300}}
    assert any("--loss chunked" in text for text in planned(**peaks).advice)
    assert not any("--loss chunked" in text for text in planned(loss="chunked", **peaks).advice)
    assert not any("--loss chunked" in text for text in planned(possible=Possible(chunked=False), **peaks).advice)


def test_lora_is_advised_where_optimiser_state_dominates() -> None:
    """Full fine-tuning whose weights, gradients and optimiser state make the peak is told what frees them."""
    peaks = {"checkpoint": {"parameters": 15, "gradients": 15, "optimizer_state": 30}, "plain": {"parameters": 100}}
    assert any("--trains lora" in text for text in planned(trains="full", **peaks).advice)
    assert not any("--trains lora" in text for text in planned(trains="lora", **peaks).advice)
    without = planned(trains="full", possible=Possible(lora=False), **peaks).advice
    assert not any("--trains lora" in text for text in without)


def test_a_batch_of_one_is_not_made_smaller() -> None:
    """Fewer tokens then."""
    peaks = {"checkpoint": {"working_set": 75}, "plain": {"stored_activations": 300}}
    assert any("a smaller batch" in text for text in planned(batch=2, **peaks).advice)
    alone = planned(batch=1, **peaks).advice
    assert not any("a smaller batch" in text for text in alone) and any("fewer tokens" in text for text in alone)


# -- any table

_sizes = st.sampled_from([0, 1, 2**20, 3 * GIB, 20 * GIB, 50 * GIB]) | st.integers(0, 60 * GIB)
_times = st.sampled_from([0.01, 1.0, 1.001, 1.5]) | st.floats(1e-4, 1e3)


@st.composite
def tables(draw: st.DrawFn) -> Analysis:
    """Any predictions of any of the methods, with or without a frontier, in any setting."""
    base = analysis_examples.llama_lora()
    assert base.setting is not None
    names = ["plain", *draw(st.lists(st.sampled_from(["checkpoint", "offload", "momentum", "leapfrog"]), unique=True))]
    predictions = []
    for name in names:
        categories = {c.value: draw(_sizes) for c in Category}
        predictions.append(
            Prediction(
                method=name,
                peak_bytes=sum(categories.values()),
                phase=draw(st.sampled_from(["forward", "backward", "optimizer"])),
                categories=categories,
                phase_peaks={"backward": sum(categories.values())},
                kept_bytes=0,
                step_flops=1,
                step_seconds=draw(_times),
                side_bits=0,
                preserves_function=name != "leapfrog",
                keep_last=draw(st.sampled_from([(0,), (1,), (0, 1)])) if name in LOSSES else (),
            )
        )
    reaches = [
        Reach(name, draw(st.none() | st.integers(0, 99)), draw(st.none() | st.integers(0, 9999)))
        for name in names
        if draw(st.booleans())
    ]
    setting = dataclasses.replace(
        base.setting,
        batch=draw(st.sampled_from([1, 2, 64])),
        sequence=draw(st.sampled_from([None, 1, 2048])),
        trains=draw(st.sampled_from(["full", "lora", "head"])),
        loss=draw(st.sampled_from(["full", "chunked"])),
        optimizer=draw(st.sampled_from(["adamw", "adamw-8bit", "sgd", "sgd-momentum"])),
        dtype=draw(st.sampled_from(["fp32", "bf16"])),
    )
    return dataclasses.replace(
        base, predictions=tuple(predictions), frontier=tuple(reaches), sweeps=(), setting=setting
    )


@settings(max_examples=300, deadline=None)
@given(tables(), st.booleans(), st.booleans())
def test_the_recommendation_never_contradicts_its_table(table: Analysis, chunked: bool, lora: bool) -> None:
    """The fastest that fits or none, no figure that is not there, no advice that cannot be taken."""
    assert table.device is not None and table.setting is not None
    found = recommend_for(table, Possible(chunked, lora))
    room = table.device.usable_bytes
    fitting = [p for p in table.predictions if p.preserves_function and p.peak_bytes <= room]
    chosen = table.prediction(found.method or "")
    if not fitting:
        assert found.method is None and found.why.startswith("nothing fits")
    else:
        assert chosen in fitting
        for rival in fitting:
            seconds = [float(f"{p.step_seconds:.3g}") for p in (rival, chosen)]
            simpler = SIMPLEST.index(rival.method) < SIMPLEST.index(chosen.method)
            assert seconds[0] >= seconds[1] and not (seconds[0] == seconds[1] and simpler)
    told = " ".join([found.why, *found.advice])
    assert figures(told) <= figures_of(table)
    setting = table.setting
    assert "smaller batch" not in told or setting.batch > 1
    assert "fewer tokens" not in told or (setting.sequence or 0) > 1
    assert "--loss chunked" not in told or (chunked and setting.loss == "full" and setting.sequence)
    assert "LoRA" not in told or (lora and setting.trains == "full")
    assert "adamw-8bit" not in told or setting.optimizer == "adamw"
    assert "fused" not in told or setting.optimizer == "adamw"
    for number, axis in re.findall(r"fits (?:a batch of )?([\d,]+)( token)?", told):
        name = "longest_sequence" if axis else "largest_batch"
        assert int(number.replace(",", "")) in {getattr(reach, name) for reach in table.frontier}
    if found.method is None:
        assert "convert(" not in told
        assert "Recommendation  None" in render_text(dataclasses.replace(table, recommendation=found))


def figures(text: str) -> set[str]:
    """Every size and time that is named."""
    return set(re.findall(r"[\d.,]*\d (?:[GMK]iB|m?s|us|min)\b", text))


def figures_of(table: Analysis) -> set[str]:
    """Every size in the table, in its unit, every time, and what the device has."""
    assert table.device is not None
    unit = unit_for(p.peak_bytes for p in table.predictions)
    sizes = [n for p in table.predictions for n in (p.peak_bytes, *p.categories.values())]
    known = {f"{unit.number(n)} {unit.name}" for n in sizes}
    return (
        known
        | {format_seconds(p.step_seconds) for p in table.predictions}
        | {
            format_bytes(table.device.usable_bytes),
            format_bytes(table.device.memory_bytes),
        }
    )
