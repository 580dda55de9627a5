"""DDP and FSDP2 on the cards there are, one rank each, by NCCL; on a CPU two ranks, by gloo."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import autorev
from autorev.engine.mode import running
from autorev.format import format_bytes
from autorev.methods import Method
from autorev.verification import compare
from benchmarks.gpu.correctness import EXACT, TOLERANCE, llama
from benchmarks.gpu.device import Device
from benchmarks.gpu.record import Record, Row
from benchmarks.gpu.setting import ready
from benchmarks.gpu.size import Size
from tests.helpers.one_step import gradients_of

TITLE = "DDP and FSDP2"
WHAT = (
    "Each rank has rows of its own. The gradient error is that of a small model, against the oracle on all rows in one "
    "process. A world of one rank exchanges nothing: that is looked at where there are more."
)
SHARE = 3
HEADS = ("wrapper and method", "ranks", "gradient error", "drift", "peak of a rank", "s a step")
WRAPPERS = ("ddp", "fsdp2")
METHODS = (EXACT, "checkpoint")
ROWS = 2
"""Of each rank."""
STEPS = 3
"""The first arranges DDP's buckets."""


def run(device: Device, size: Size, record: Record) -> None:
    """One world for each wrapper and method: a rank that dies ends all of them."""
    for wrapper in WRAPPERS:
        for method in METHODS[: 1 if device.quick else None]:
            record.piece(f"{wrapper}, `{method}`", world, size, wrapper, method)


def world(device: Device, size: Size, wrapper: str, method: str) -> Row:
    """What the ranks found, the worst of them."""
    ranks = 2 if device.kind == "cpu" else device.count
    with tempfile.TemporaryDirectory() as folder:
        # A rank on a CPU is forked from what is imported already; a GPU's context outlives no fork.
        how = "fork" if device.kind == "cpu" else "spawn"
        try:
            torch.multiprocessing.start_processes(
                rank_of, (ranks, folder, device, size, wrapper, method), nprocs=ranks, start_method=how
            )
        except torch.multiprocessing.ProcessRaisedException as error:
            said = str(error).strip().splitlines()
            status = "out of memory" if "OutOfMemoryError" in str(error) else "failed"
            print(error, file=sys.stderr)
            return {"status": status, "reason": f"{said[0].strip('- ')} {said[-1]}"}
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    error, drift = (max(each[name] for each in found) for name in ("error", "drift"))
    return {
        "ranks": ranks,
        "error": error,
        "drift": drift,
        "peak": max(each["peak"] for each in found),
        "step": max(each["step"] for each in found),
        "passed": error <= TOLERANCE["fp32"] and drift == 0,
    }


def rank_of(rank: int, ranks: int, folder: str, device: Device, size: Size, wrapper: str, method: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    if device.kind != "cpu":
        device.module.set_device(rank)
    store = (Path(folder) / "rendezvous").as_uri()
    how: dict[str, Any] = {"backend": "gloo"}
    if device.kind != "cpu":
        how = {"backend": "nccl", "device_id": torch.device(device.kind, rank)}
    dist.init_process_group(init_method=store, rank=rank, world_size=ranks, **how)
    try:
        found = {**_gradients(device, wrapper, method), **_cost(device, size, wrapper, method)}
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def wrapped(model: nn.Module, blocks: list[nn.Module], device: Device, wrapper: str) -> nn.Module:
    """As it is trained on several ranks."""
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh(device.kind, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _gradients(device: Device, wrapper: str, method: str) -> Row:
    single, call = _small(device, method)
    reversible = Method.parse(method).reversible
    with running("oracle") if reversible else nullcontext():
        single(**call).loss.backward()
    expected = gradients_of(single)
    model, _ = _small(device, method)
    inner: Any = model
    parallel = wrapped(model, list(inner.model.layers), device, wrapper)
    mine = slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)
    for _ in range(2):
        parallel.zero_grad()
        parallel(input_ids=call["input_ids"][mine], labels=call["labels"][mine], use_cache=False).loss.backward()
    found = {
        name: g.full_tensor() if hasattr(g, "full_tensor") else g  # type: ignore[operator]  # a DTensor's method
        for name, g in gradients_of(model).items()
    }
    drift = max(autorev.drift(model).values()) if reversible else 0.0
    return {"error": compare(found, expected).error, "drift": drift}


def _small(device: Device, method: str) -> tuple[nn.Module, dict[str, Any]]:
    model, call = llama(device)
    ids = torch.randint(128, (ROWS * dist.get_world_size(), 48), generator=torch.Generator().manual_seed(0)).to(
        device.torch
    )
    autorev.convert(model, call, method=method)
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def _cost(device: Device, size: Size, wrapper: str, method: str) -> Row:
    """Of a step of the larger model: adapters trained, forward and backward."""
    prepared = ready(device, size)
    autorev.convert(prepared.model, prepared.call, method=method)
    blocks = [prepared.model.get_submodule(path) for path in prepared.blocks.paths]
    parallel = wrapped(prepared.model, blocks, device, wrapper)

    def step() -> None:
        parallel.zero_grad()
        parallel(*prepared.call[0], **prepared.call[1]).loss.backward()

    for _ in range(STEPS - 1):
        step()
    parallel.zero_grad()
    here = [p.to_local() if hasattr(p, "to_local") else p for p in parallel.parameters()]
    return {"peak": device.peak(step, here), "step": min(device.seconds(step) for _ in range(STEPS))}


def cells(row: Row, rows: list[Row]) -> list[tuple[str, ...]]:
    """As the report shows it."""
    figures = f"{row['error']:.2g}", f"{row['drift']:g}", format_bytes(row["peak"]), f"{row['step']:.3f} s"
    return [(row["piece"], str(row["ranks"]), *figures)]
