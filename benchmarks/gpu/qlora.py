"""QLoRA by bitsandbytes: nf4 weights with scales quantised, too, and adapters beside them."""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from autorev.format import NOTHING, format_bytes, format_seconds
from autorev.in_place import in_place
from autorev.packages import how_to_install, is_installed
from autorev.prediction.training import DTYPES
from autorev.profiler.passes.allocator import measure_memory
from autorev.profiler.passes.fidelity import measure_fidelity
from autorev.profiler.passes.step import TrainingStep, optimizer_for
from autorev.profiler.schedule import WARM_UP
from autorev.workload import Call
from benchmarks.gpu.device import Device, NoTwin
from benchmarks.gpu.record import Record, Row
from benchmarks.gpu.setting import method_of, ready, setting_of
from benchmarks.gpu.size import Size, size_for

TITLE = "QLoRA"
WHAT = (
    "Linear layers in nf4 with double quantisation, by bitsandbytes, every block with the same random weights. The "
    "gradient error is that of a model of two blocks, against the oracle (couplings) or plain autograd (others)."
)
SHARE = 3
HEADS = ("method", "gradient error", "peak", "reserved", "s a step")
METHODS = (
    *("checkpoint", "momentum:k=3,keep_last=0", "momentum:k=3,keep_last=0,tile=auto", "offload:tile=auto", "plain"),
)
QUICK = ("momentum:k=3,keep_last=0",)
STEPS = 5


def run(device: Device, size: Size, record: Record) -> None:
    """A larger model than elsewhere, as its weights are smaller."""
    quantised = size_for(device, "nf4")
    for spec in QUICK if device.quick else METHODS:
        record.piece(spec, step, quantised, spec)


def step(device: Device, size: Size, spec: str) -> Row:
    """Is it right, and what does it cost?"""
    if not is_installed("bitsandbytes"):
        raise NoTwin(f"bitsandbytes is not installed: {how_to_install('bitsandbytes')}")
    method = method_of(spec)
    small = replace(size, blocks=2, tokens=min(size.tokens, 512))
    prepared = ready(device, small, quantised(device, small))
    fidelity = measure_fidelity(prepared.model, prepared.call, method, prepared.blocks, [])
    del prepared
    device.free()
    prepared = ready(device, size, quantised(device, size))
    model, call = prepared.model, prepared.call
    with in_place(model, method, prepared.blocks, call):
        training = TrainingStep(model, call, optimizer_for(model, setting_of(size).optimizer), None)
        for _ in range(WARM_UP):
            training.run()
        memory = measure_memory(training)
        seconds = [device.seconds(training.run) for _ in range(1 if device.quick else STEPS)]
    return {
        "error": fidelity.gradient_error,
        "against": fidelity.against,
        "drift": fidelity.drift,
        "passed": fidelity.gradient_error < 0.02,
        "peak": memory.peak_bytes,
        "reserved": memory.reserved_bytes,
        "seconds": seconds,
        "tokens": size.tokens,
        "model": f"{size.blocks} x {size.width}",
    }


def quantised(device: Device, size: Size) -> tuple[nn.Module, Call]:
    """One block is made and quantised, and the others are copies of it: nowhere lies an unquantised model."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    config = replace(size, blocks=1).config
    torch.manual_seed(0)
    with device.torch:
        model: Any = LlamaForCausalLM._from_config(config, dtype=DTYPES[size.dtype])
    first = model.model.layers[0]
    for path, layer in [(name, m) for name, m in first.named_modules() if isinstance(m, nn.Linear)]:
        sizes = layer.in_features, layer.out_features
        packed = Linear4bit(*sizes, bias=False, compute_dtype=DTYPES[size.dtype], quant_type="nf4", device="meta")
        packed.weight = Params4bit(
            layer.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
        )
        first.set_submodule(path, packed.to(device.torch))  # which quantises
    layers = [first]
    for number in range(1, size.blocks):
        layers.append(copy.deepcopy(first))
        layers[-1].self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = size.blocks
    model.is_loaded_in_4bit = True  # which PEFT looks at
    return model.train(), size.call(device)


def cells(row: Row, rows: list[Row]) -> list[tuple[str, ...]]:
    """As the report shows it."""
    return [
        (
            f"`{row['piece']}`, {row['model']}, {row['tokens']:,} tokens",
            f"{row['error']:.2g} against {row['against']}",
            format_bytes(row["peak"]),
            NOTHING if row["reserved"] is None else format_bytes(row["reserved"]),
            format_seconds(statistics.median(row["seconds"])),
        )
    ]
