"""What the allocator hands out, beside what was predicted: the second step of every method, in a process of its own."""

from __future__ import annotations

from autorev.format import NOTHING, format_bytes
from autorev.in_place import in_place
from autorev.profiler.passes.allocator import measure_memory
from autorev.profiler.passes.predicted import predict_method
from autorev.profiler.passes.step import TrainingStep, optimizer_for
from autorev.profiler.schedule import WARM_UP
from benchmarks.gpu.device import Device
from benchmarks.gpu.record import Record, Row
from benchmarks.gpu.setting import forecaster_of, method_of, ready, setting_of
from benchmarks.gpu.size import Size

TITLE = "Memory: allocated and predicted"
WHAT = (
    "Peak: the most that the allocator handed out in a warm step. Reserved: what it took from the device for that, "
    "fragments and cached blocks included. Kept: between forward and backward, beside weights, inputs and states."
)
SHARE = 6
HEADS = ("method", "peak", "predicted", "error", "reserved", "of the peak", "kept", "predicted", "on the host")
COUPLINGS = ("leapfrog", "midpoint", "midpoint_a", "bdia", "hamiltonian", "revnet")
METHODS = (
    *("plain", "checkpoint", "momentum:k=3,keep_last=0", "offload", "checkpoint:tile=auto"),
    *("momentum:k=3,keep_last=0,tile=auto", "momentum:k=3,keep_last=0,tile=auto,host=side_bits", "offload:tile=auto"),
    *("sac", "momentum:k=3", "momentum:k=3,granularity=sublayer,keep_last=0"),
    *(f"{name}:keep_last=0" for name in COUPLINGS),
    *("checkpoint:keep=attention,host=attention", "momentum:k=3,keep_last=0,keep=attention", "plain:tile=auto"),
    "compile:budget=0.5",
)
"""Every name there is; those first that people choose of."""
QUICK = ("plain", "momentum:k=3,keep_last=0,tile=auto,host=side_bits")


def run(device: Device, size: Size, record: Record) -> None:
    """Every method."""
    for spec in QUICK if device.quick else METHODS:
        record.piece(spec, peak, size, spec)


def peak(device: Device, size: Size, spec: str) -> Row:
    """Bytes of a warm step, measured and predicted."""
    forecaster = forecaster_of(device, size)
    method = forecaster.settled(method_of(spec))
    predicted = predict_method(forecaster, method)
    prepared = ready(device, size)
    model, call = prepared.model, prepared.call
    with in_place(model, method, prepared.blocks, call) as placed:
        step = TrainingStep(model, call, optimizer_for(model, setting_of(size).optimizer), None)
        for _ in range(WARM_UP):
            step.run()
        if placed.host is not None:
            placed.host.peak = 0
        memory = measure_memory(step)
    return {
        "method": method.spec,
        "peak": memory.peak_bytes,
        "phase": memory.phase,
        "reserved": memory.reserved_bytes,
        "kept": memory.kept_bytes,
        "host": placed.host.peak if placed.host else 0,
        "predicted": predicted and predicted.peak_bytes,
        "predicted_kept": predicted and predicted.kept_bytes,
        "predicted_host": predicted and predicted.host_bytes,
    }


def cells(row: Row, rows: list[Row]) -> list[tuple[str, ...]]:
    """As the report shows it."""
    peak, reserved, predicted = row["peak"], row["reserved"], row["predicted"]
    return [
        (
            f"`{row['piece']}`",
            format_bytes(peak),
            NOTHING if predicted is None else format_bytes(predicted),
            NOTHING if predicted is None else f"{predicted / peak - 1:+.2%}",
            NOTHING if reserved is None else format_bytes(reserved),
            NOTHING if reserved is None else f"{reserved / peak:.2f}x",
            format_bytes(row["kept"]),
            NOTHING if predicted is None else format_bytes(row["predicted_kept"]),
            format_bytes(row["host"]),
        )
    ]
