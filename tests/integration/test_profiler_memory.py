"""Measured memory and its cause: against the allocator, the prediction, torch's own tracker, and arithmetic by hand."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autorev.analysis import Category
from autorev.in_place import Blocks, in_place
from autorev.methods import Method
from autorev.pipeline import prepare
from autorev.profiler.job import Source
from autorev.profiler.passes.allocator import measure_memory
from autorev.profiler.passes.attribution import attribute
from autorev.profiler.passes.predicted import predict_method
from autorev.profiler.passes.prepare import find_blocks, prepare_model
from autorev.profiler.passes.step import TrainingStep, optimizer_for, storage_bytes, tensors_of
from autorev.profiler.passes.stopwatch import measure_work
from autorev.profiler.passes.watch import PeakWatch
from autorev.profiler.readings import PHASES, Memory
from autorev.setting import Setting
from autorev.workload import Call
from tests.integration.test_prediction import FAMILIES, workload_of

BATCH, SEQUENCE = 4, 64
WIDTH, DEPTH = FAMILIES["llama"][2]["hidden_size"], FAMILIES["llama"][2]["num_hidden_layers"]
STREAM = 4 * BATCH * SEQUENCE * WIDTH
"""Bytes of one fp32 stream."""
HOOKED = ("plain", "checkpoint", "sac", "offload", "momentum:k=3", "momentum:k=3,keep_last=4", "leapfrog")


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Measured:
    """What was measured of one warm step."""

    memory: Memory
    flops: int
    host_bytes: int
    standing: int
    """Bytes alive before the step."""
    overhead: dict[str, float]
    parameters: int
    """Bytes."""


Sizes = tuple[tuple[str, int], ...]
WIDE: Sizes = (("vocab_size", 2000),)


def setting_of(batch: int, sequence: int | None, trains: str = "full", loss: str = "full") -> Setting:
    """The setting that everything here is measured in."""
    rank = 4 if trains == "lora" else None
    return Setting(batch, sequence, "fp32", "adamw", trains, rank, loss, "this machine")


def model_and_call(family: str, sizes: Sizes, batch: int, sequence: int | None) -> tuple[nn.Module, Call, Blocks]:
    """A family's model with random weights, a call, and its blocks."""
    model_cls, config_cls, usual, _, _ = FAMILIES[family]
    workload = workload_of(model_cls, config_cls(**usual | dict(sizes)))
    torch.manual_seed(0)
    model = workload.build(torch.float32).train()
    call = workload.example(batch, sequence)
    return model, call, find_blocks(model, call)


@cache
def measured(
    spec: str,
    family: str = "llama",
    sizes: Sizes = (),
    batch: int = BATCH,
    sequence: int | None = SEQUENCE,
    trains: str = "full",
) -> Measured:
    """One method's memory with its cause, as the worker measures it."""
    model, call, blocks = model_and_call(family, sizes, batch, sequence)
    source = Source(None, None, None, None, "cpu", 1)
    prepared = prepare_model(source, setting_of(batch, sequence, trains), blocks, (model, call))
    with in_place(prepared.model, Method.parse(spec), blocks, prepared.call) as placed:
        step = TrainingStep(prepared.model, prepared.call, optimizer_for(prepared.model, "adamw"))
        step.run()
        if placed.host:
            placed.host.peak = 0
        memory = measure_memory(step)
        host = placed.host.peak if placed.host else 0
        memory, flops = attribute(step, memory, blocks.paths)
        overhead = measure_work(step, blocks, flops).overhead
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return Measured(memory, flops, host, storage_bytes(step.standing()), overhead, parameters)


# -- the cause against the allocator


@pytest.mark.parametrize("spec", [*HOOKED, "plain:loss=chunked", "momentum:k=3,loss=chunked", "hamiltonian", "bdia"])
def test_the_traced_peak_is_the_allocators(spec: str) -> None:
    """Every byte of the peak is followed: both counts agree, here to the byte."""
    memory = measured(spec).memory
    assert memory.attributed_bytes == memory.peak_bytes


def test_garbage_of_an_earlier_model_is_not_the_steps(request: pytest.FixtureRequest) -> None:
    """A ring that Python's collector comes upon in the middle of the step, and not before."""
    request.addfinalizer(gc.enable)
    gc.disable()

    def at_peak(earlier: int) -> tuple[int, int]:
        model, call, _ = model_and_call("llama", (), BATCH, SEQUENCE)
        step = TrainingStep(model, call, optimizer_for(model, "adamw"))
        step.run()
        model.register_forward_pre_hook(collect)
        watch = PeakWatch(torch.device("cpu"))
        leave_a_ring(earlier)
        watch.begin(step.standing())
        step.run()
        watched = watch.end()
        leave_a_ring(earlier)
        return measure_memory(step).peak_bytes, watched

    assert at_peak(earlier=10_000_000) == at_peak(earlier=0)


def collect(module: nn.Module, args: Any) -> None:
    """What Python does by itself, at a time of its own."""
    gc.collect()


def leave_a_ring(size: int) -> None:
    """Of `size` bytes, which nothing but the collector frees. The allocator tells of the freeing only what it has told
    of the making."""
    with torch.profiler.profile(profile_memory=True):
        ring: list[object] = [torch.zeros(size // 4)]
    ring.append(ring)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "t5", "vit"])
def test_the_traced_peak_of_other_models_is_the_allocators(family: str) -> None:
    """Within 0.1 %, with dropout, experts, two chains and images."""
    _, _, _, batch, sequence = FAMILIES[family]
    for spec in ("plain", "checkpoint"):
        memory = measured(spec, family, batch=batch, sequence=sequence).memory
        assert memory.attributed_bytes == pytest.approx(memory.peak_bytes, rel=1e-3), spec


@pytest.mark.parametrize("spec", HOOKED)
def test_everything_at_the_peak_is_told_three_ways(spec: str) -> None:
    """Categories, holders and the time line's highest point sum to the traced peak, which stands in the phase said."""
    memory = measured(spec).memory
    line = memory.timeline
    assert line is not None
    assert sum(memory.categories.values()) == memory.attributed_bytes
    assert sum(holder.bytes for holder in memory.holders) == memory.attributed_bytes
    assert all(holder.bytes > 0 and holder.path for holder in memory.holders)
    totals = [sum(at) for at in zip(*line.categories.values(), strict=True)]
    assert max(totals) == totals[line.peak_at] == memory.attributed_bytes
    at_peak = {category: values[line.peak_at] for category, values in line.categories.items() if values[line.peak_at]}
    assert at_peak == {category: size for category, size in memory.categories.items() if size}
    assert list(line.seconds) == sorted(line.seconds)
    assert len(line.seconds) <= 2000
    phase = next(name for name, begin, end in line.marks if begin <= line.seconds[line.peak_at] <= end)
    assert phase == memory.phase
    assert [name for name, _, _ in line.marks] == list(PHASES)
    assert memory.phase_peaks[memory.phase] == memory.peak_bytes == max(memory.phase_peaks.values())


def test_holders_are_the_modules_that_allocated() -> None:
    """Weights belong to their module, the blocks' numbers are one star, and the optimiser's state to its parameter."""
    memory = measured("plain").memory
    held = {(holder.path, holder.category): holder.bytes for holder in memory.holders}
    projection = 4 * WIDTH * 128
    assert held["model.layers.*.mlp.gate_proj", "parameters"] == DEPTH * projection
    assert held["model.layers.*.mlp.gate_proj", "optimizer_state"] == DEPTH * (2 * projection + 4)
    assert held["(inputs)", "other"] == 2 * 8 * BATCH * SEQUENCE
    assert not any(path.startswith("model.layers.0") for path, _ in held)


@pytest.mark.parametrize("spec", ["plain", "checkpoint", "momentum:k=3"])
def test_a_step_begins_and_ends_with_what_stands(spec: str) -> None:
    """The first point of the time line is parameters, inputs and optimiser state, and so is the last."""
    found = measured(spec)
    line = found.memory.timeline
    assert line is not None
    first, last = (sum(values[at] for values in line.categories.values()) for at in (0, -1))
    assert first == found.standing
    assert last == found.standing


# -- what blocks keep


def kept(spec: str) -> tuple[int, ...]:
    """Bytes of each block."""
    blocks = measured(spec).memory.block_bytes
    assert len(blocks) == DEPTH
    return blocks


def test_a_checkpointed_block_keeps_one_stream() -> None:
    """Its input, which the block before made; the last one's output is kept by the final norm."""
    assert kept("checkpoint") == (STREAM,) * DEPTH


def test_plain_blocks_keep_all_and_selective_ones_some() -> None:
    """Selective checkpointing is between the two."""
    plain, sac = kept("plain"), kept("sac")
    assert len(set(plain)) == 1
    assert all(STREAM < some < every / 2 for some, every in zip(sac, plain, strict=True))
    assert plain[0] > 10 * STREAM


@pytest.mark.parametrize(
    ("spec", "bits"), [("leapfrog:", 0), *((f"momentum:k={k},", k) for k in (1, 2, 3)), ("bdia:", 1)]
)
def test_a_reversible_block_keeps_its_side_bits(spec: str, bits: int) -> None:
    """k / 8 bytes an element; the last block is stored, and the one before makes its input."""
    side = BATCH * SEQUENCE * WIDTH * bits // 8
    spec += "keep_last=1"
    assert kept(spec) == (*(side,) * (DEPTH - 2), side + STREAM, kept("plain")[0])
    assert measured(spec).memory.categories["side_bits"] <= side * DEPTH


def test_blocks_that_are_stored_keep_what_plain_ones_do() -> None:
    """keep_last=4: four blocks as under plain autograd, three with side bits."""
    side = BATCH * SEQUENCE * WIDTH * 3 // 8
    assert kept("momentum:k=3,keep_last=4") == (side, side, side + STREAM, *(kept("plain")[0],) * 4)


@pytest.mark.parametrize("spec", ["momentum:k=3", "leapfrog"])
def test_streams_are_two_int32_tensors(spec: str) -> None:
    """Whatever the depth, a chain's streams are one state."""
    for sizes in ((), (("num_hidden_layers", 4),)):
        assert measured(spec, sizes=sizes).memory.categories["streams"] == 2 * STREAM


@pytest.mark.parametrize("k", [1, 3])
def test_side_bits_have_a_category_of_their_own(k: int) -> None:
    """At a peak in the loss, between forward and backward, all of them are alive: one set for each block recomputed."""
    memory = measured(f"momentum:k={k},keep_last=1", sizes=WIDE).memory
    assert memory.phase == "backward"
    assert memory.categories["side_bits"] == (DEPTH - 1) * BATCH * SEQUENCE * WIDTH * k // 8
    assert memory.categories["streams"] == 2 * STREAM


def test_offloading_moves_every_blocks_input_and_nothing_else() -> None:
    """The host holds blocks x stream, exactly: Llama's masks and rotary tables go by keyword and stay on the device."""
    found = measured("offload")
    assert found.host_bytes == DEPTH * STREAM
    assert kept("offload") == (*(0,) * (DEPTH - 1), STREAM)  # the final norm's input
    saved = measured("checkpoint").memory.kept_bytes - found.memory.kept_bytes
    assert saved == DEPTH * STREAM


def test_what_lies_between_forward_and_backward_is_counted() -> None:
    """The allocator's kept bytes differ by side bits from one k to the next, and by one stream for each depth."""
    bits = {
        k: measured(spec).memory.kept_bytes
        for k, spec in enumerate(["leapfrog:keep_last=1", "momentum:k=1,keep_last=1"])
    }
    bits[3] = measured("momentum:k=3,keep_last=1").memory.kept_bytes
    each = (DEPTH - 1) * BATCH * SEQUENCE * WIDTH // 8
    assert [bits[1] - bits[0], bits[3] - bits[0]] == [each, 3 * each]
    shallow = measured("checkpoint", sizes=(("num_hidden_layers", 4),)).memory.kept_bytes
    random_state = torch.get_rng_state().numel()  # which checkpointing keeps for each block
    assert measured("checkpoint").memory.kept_bytes - shallow == (DEPTH - 4) * (STREAM + random_state)


# -- against other counts


@pytest.mark.parametrize(
    ("spec", "trains"),
    [
        *((spec, "full") for spec in (*HOOKED, "checkpoint:loss=chunked", "momentum:k=3,loss=chunked")),
        *((spec, "full") for spec in ("bdia", "midpoint", "midpoint_a", "hamiltonian", "revnet")),
        *((spec, "full") for spec in ("momentum:granularity=sublayer", "leapfrog:arithmetic=float")),
        *((spec, "lora") for spec in ("plain", "checkpoint", "momentum:k=3", "revnet")),
        ("momentum:k=3,keep_last=1,keep=attention:3,host=attention:2+side_bits:4", "full"),
        ("offload:keep_last=1,keep=attention:3,host=inputs:4+attention", "lora"),
    ],
)
def test_measured_is_what_was_predicted(spec: str, trains: str) -> None:
    """The peak within 0.3 %, for every method and coupling, stored blocks, the chunked loss and LoRA."""
    model_cls, config_cls, sizes, _, _ = FAMILIES["llama"]
    workload = workload_of(model_cls, config_cls(**sizes | dict(WIDE)))
    rank = 4 if trains == "lora" else None
    _, forecaster = prepare(
        workload, batch=8, sequence=SEQUENCE, dtype="fp32", device="cpu", trains=trains, lora_rank=rank
    )
    predicted = predict_method(forecaster, Method.parse(spec))
    assert predicted is not None
    found = measured(spec, sizes=WIDE, batch=8, trains=trains)
    memory = found.memory
    assert predicted.host_bytes == found.host_bytes
    assert predicted.peak_bytes == pytest.approx(memory.peak_bytes, rel=3e-3)
    assert predicted.phase == memory.phase


@pytest.mark.parametrize("spec", ["plain", "checkpoint"])
def test_torchs_own_tracker_finds_the_same_peak(spec: str) -> None:
    """`torch.distributed._tools.mem_tracker`, which knows nothing of autorev, within 2 %."""
    from torch.distributed._tools.mem_tracker import MemTracker

    model, call, blocks = model_and_call("llama", (), BATCH, SEQUENCE)
    with in_place(model, Method.parse(spec), blocks, call):
        step = TrainingStep(model, call, optimizer_for(model, "adamw"))
        step.run()
        tracker = MemTracker()
        tracker.track_external(model, step.optimizer, *tensors_of(call))
        with tracker:
            step.run()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert measured(spec).memory.peak_bytes == pytest.approx(peak, rel=0.02)


def test_the_peak_stands_in_the_phase_that_binds() -> None:
    """On a short sequence the update is the peak, with every gradient alive; on a long one backward's."""
    short = measured("checkpoint", sizes=WIDE, batch=1, sequence=8)
    memory = short.memory
    assert memory.phase == "optimizer"
    assert memory.categories["gradients"] == short.parameters
    assert memory.categories["optimizer_state"] == 2 * short.parameters + 4 * len(set(adam_steps()))
    assert measured("plain").memory.phase == "backward"
    assert memory.peak_bytes >= 4 * short.parameters


def adam_steps() -> list[str]:
    """AdamW counts the steps of each parameter in one fp32 number."""
    model, _, _ = model_and_call("llama", WIDE, 1, 8)
    return [name for name, _ in model.named_parameters()]


# -- work


def test_work_is_ordered_and_plains_is_torchs_count() -> None:
    """Plain < selective < full recomputation; plain's products are those of `FlopCounterMode`, attention added."""
    flops = {spec: measured(spec).flops for spec in ("plain", "sac", "checkpoint", "momentum:k=3", "leapfrog")}
    assert flops["plain"] < flops["sac"] < flops["checkpoint"] < 4 / 3 * flops["plain"]
    assert flops["momentum:k=3"] == flops["leapfrog"] < 4 / 3 * flops["plain"]
    model, call, _ = model_and_call("llama", (), BATCH, SEQUENCE)
    step = TrainingStep(model, call, optimizer_for(model, "adamw"))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step.run()
    heads, head = 4, 16
    attention = DEPTH * BATCH * heads * 2 * SEQUENCE * SEQUENCE * head
    # torch's formula for fused attention counts five products in backward, where the score is computed again.
    assert flops["plain"] - counter.get_total_flops() == attention


def test_overhead_is_told_by_what_it_is_spent_on() -> None:
    """Plain has none; momentum recomputes, couples and packs; leapfrog packs nothing."""
    assert measured("plain").overhead == {}
    assert set(measured("momentum:k=3").overhead) == {"recomputation", "coupling", "packing"}
    assert set(measured("leapfrog").overhead) == {"recomputation", "coupling"}


def test_categories_are_those_of_the_analysis() -> None:
    """Predicted and measured figures stand side by side, so they have the same names."""
    assert set(measured("plain").memory.categories) == {category.value for category in Category}


def test_a_time_line_says_which_block_was_at_work() -> None:
    """The blocks in their order, and back."""
    line = measured("momentum:k=3").memory.timeline
    assert line is not None
    at_work = [number for number, _ in groupby(line.blocks) if number >= 0]
    assert at_work == [*range(DEPTH), *reversed(range(DEPTH))]
