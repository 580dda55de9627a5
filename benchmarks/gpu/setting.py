"""A model of the kit's size as its sections train it: adapters beside frozen weights, a loss in chunks, AdamW."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from autorev.errors import ProfileError
from autorev.methods import Method
from autorev.pipeline import prepare
from autorev.prediction.forecast import Forecaster
from autorev.profiler.environment import device_profile
from autorev.profiler.job import Source
from autorev.profiler.passes.prepare import Prepared, prepare_model
from autorev.setting import Setting
from autorev.workload import Call
from benchmarks.gpu.device import Device
from benchmarks.gpu.size import Size

ANY_CARD = "h100-80gb"
"""Memory is predicted alike for every card; this one's figures stand for cards that have no profile."""


def source_of(device: Device, size: Size, tokens: str | None = None) -> Source:
    """Of a model at hand; `tokens`: a file with token ids, of which calls of other lengths are cut."""
    return Source(model=None, pickled=None, depth=None, tokens=tokens, on=device.kind, threads=size.threads)


def setting_of(size: Size) -> Setting:
    """What trains, and how."""
    return Setting(1, size.tokens, size.dtype, "adamw", "lora", size.rank, "chunked", ANY_CARD)


def method_of(spec: str) -> Method:
    """With a loss in chunks."""
    return replace(Method.parse(spec), loss="chunked")


def ready(device: Device, size: Size, live: tuple[nn.Module, Call] | None = None) -> Prepared:
    """With adapters, on its device. `live`: another model than the usual one."""
    return prepare_model(source_of(device, size), setting_of(size), None, live or size.built(device))


def forecaster_of(device: Device, size: Size) -> Forecaster:
    """For what the allocator is compared with."""
    try:
        profile = device_profile(device.kind, None).name
    except ProfileError:
        profile = ANY_CARD
    how = {"batch": 1, "sequence": size.tokens, "dtype": size.dtype, "lora_rank": size.rank, "loss": "chunked"}
    return prepare(size.workload, device=profile, **how)[1]
