"""`autorev.fit`: the fastest way to train a model in the memory there is; or, the other way round, how much fits."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from autorev.analysis import Analysis
from autorev.chunked_loss import head_of
from autorev.errors import SettingError
from autorev.given import is_count
from autorev.models.resolve import resolve
from autorev.optimizers import Optimizer
from autorev.pipeline import prepare
from autorev.plan import Measured, Option, Plan, Reached
from autorev.planning.search import Search
from autorev.prediction.forecast import Forecaster
from autorev.prediction.update import update_of, updated_by
from autorev.profiler.environment import parse_memory
from autorev.profiler.passes.sweep import standing_bytes
from autorev.profiler.run import profile
from autorev.profiler.subject import live_subject
from autorev.profiles import load_device
from autorev.setting import Setting, resolve_lora
from autorev.workload import Workload

Progress = Callable[[str, float], None]
Size = int | Literal["auto"] | None
ADAMW = ("adamw", "adamw-fused", "adamw-fused:step=backward", "adamw-host", "adamw-host:gradients=host")
"""Ways to run it, each of which makes more room than the one before."""
MOST_TIGHTENED = 3
"""Plans that are run before there is said to be none."""


def fit(
    model: nn.Module | str | os.PathLike[str] | Workload | None = None,
    batch: Any = None,
    *,
    memory: str | int | None = None,
    device: str = "h100-80gb",
    sequence: Size = None,
    host: bool = True,
    pretrained: bool = True,
    optimizer: str | None = None,
    measure: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda what, fraction: None,
    **setting: Any,
) -> Plan:
    """The fastest way to train `model` that fits.

    Args:
        model: a model of yours, a name as the command line has it, or a workload; None: the embedded SmolLM2.
        batch: for a model of yours what it is called with (a dict, a tuple, or one tensor), for a name the number of
            samples, or "auto" for as many as fit.
        memory: what a step may take in all, as in `24GiB`, or in bytes; `+2GiB` is beside weights and optimiser state.
            Default: what `device` has to use.
        device: a device profile, whose speed the times are of.
        sequence: tokens per sample, or "auto" for as many as fit.
        host: may plans use the host's memory?
        pretrained: does the model have a function that has to be kept?
        optimizer: as `autorev.optimizers` spells it. Default: AdamW, fused, stepping in backward or on the host where
            that makes room: its numbers are the same.
        measure: run the plan here, and take a tighter one where it does not hold.
        trust_remote_code: code that stands beside MODEL's config, or that the config names, may run.
        progress: is told what is being done, and the fraction done.
        setting: dtype, autocast, accumulate, trains, lora_rank, lora_dropout, adapter_dtype,
            weights, loss, gpus, shard, sequence_parallel.

    Raises:
        SettingError: an option makes no sense, or the axis that is asked for cannot be varied.
        AutorevError: the model cannot be built, called or trained that way.
    """
    room = None if memory is None else _bytes_of(memory)
    for name, given in (("batch", batch), ("sequence", sequence)):
        if isinstance(given, str) and given != "auto":
            raise SettingError(f"{name} is a whole number, or 'auto' for as many as fit, not {given!r}")
    if sequence not in (None, "auto") and not is_count(sequence, 1):
        raise SettingError(f"sequence is a whole number, or 'auto' for as many as fit, not {sequence!r}")
    auto = [name for name, given in (("batch", batch), ("sequence", sequence)) if isinstance(given, str)]
    if len(auto) == 2:
        raise SettingError("batch and sequence cannot both be as large as fits; give one of them")
    if measure and setting.get("weights"):
        raise SettingError("a plan is run with the weights as they are; leave `measure` out, or `weights`")
    if measure and setting.get("gpus", 1) != 1:
        raise SettingError("a plan for several GPUs is not run here; leave `measure` out, or `gpus`")
    axis = auto[0] if auto else None
    setting["optimizer"] = optimizer or ADAMW[0]
    progress("analysing the model", 0.0)
    if isinstance(model, nn.Module):
        if auto or sequence is not None:
            raise SettingError("a model of yours is planned for on the batch that it is given; leave `sequence` out")
        if setting.get("sequence_parallel", 1) != 1:
            raise SettingError("`sequence_parallel` divides the tokens of a model by name; leave it out")
        analysis, forecaster = _live(model, batch, device, setting)
    else:
        if batch is not None and axis != "batch" and not is_count(batch, 1):
            raise SettingError("with a model by name, batch is a number of samples; a batch of tensors needs the model")
        workload = model if isinstance(model, Workload) else resolve(_named(model), trust_remote_code=trust_remote_code)
        sizes: dict[str, Any] = {
            "batch": None if axis == "batch" else batch,
            "sequence": None if axis == "sequence" else sequence,
        }
        analysis, forecaster = prepare(workload, device=device, progress=progress, **sizes, **setting)
    assert analysis.device is not None
    chunked = head_of(forecaster.twin) is not None
    limit = analysis.device.usable_bytes if room is None else room[0] + (_standing(forecaster) if room[1] else 0)
    optimizers = (forecaster.setting.optimizer,) if optimizer else _equal(forecaster, host)
    search = Search(forecaster, limit, pretrained, host, chunked, optimizers, progress)
    longest: tuple[Reached, ...] = ()
    if axis is not None:
        longest = tuple(search.reach(axis))
        size = longest[0].size
        if size:
            sized: Any = {axis: size}
            forecaster = replace(forecaster, setting=replace(forecaster.setting, **sized), probed={}, simulated={})
            search = Search(forecaster, limit, pretrained, host, chunked, optimizers, progress)
    search.all()
    plan = _plan(analysis, search, longest, axis)
    return _measured(plan, search, model, batch, trust_remote_code, setting) if measure else plan


def _plan(analysis: Analysis, search: Search, longest: tuple[Reached, ...], axis: str | None) -> Plan:
    assert analysis.device is not None
    chosen = search.best()
    rungs = () if chosen is None else tuple(search.rungs(chosen))
    options = tuple(sorted(search.seen.values(), key=search.rank))
    impossible = [f"{spec}: {reason}" for spec, reason in search.impossible.items()]
    return Plan(
        model=analysis.model,
        setting=search.forecaster.setting if chosen is None else _with(search, chosen.optimizer),
        device=analysis.device,
        memory_bytes=search.room,
        method=None if chosen is None else chosen.method,
        why=search.why(chosen),
        options=options,
        rungs=rungs,
        longest=longest,
        axis=axis,
        notes=(*analysis.notes, *impossible, *_not_clipped(chosen)),
        versions=analysis.versions,
    )


def _with(search: Search, optimizer: str) -> Setting:
    return replace(search.forecaster.setting, optimizer=optimizer)


def _not_clipped(chosen: Option | None) -> list[str]:
    if chosen is None or not Optimizer.parse(chosen.optimizer).during_backward:
        return []
    return [
        f"{chosen.optimizer} takes gradients one by one, so they are not clipped; `optimizer=adamw-fused` clips them"
    ]


def _equal(forecaster: Forecaster, host: bool) -> tuple[str, ...]:
    """The optimisers of AdamW's numbers that can take such a step on such a device."""
    found = []
    for spec in ADAMW:
        optimizer = Optimizer.parse(spec)
        with suppress(SettingError):
            replace(forecaster.setting, optimizer=spec)
            optimizer.check_device(forecaster.device_kind)
            if host or not optimizer.on_host:
                found.append(spec)
    return tuple(found)


def _measured(
    plan: Plan, search: Search, model: Any, batch: Any, trust_remote_code: bool, setting: dict[str, Any]
) -> Plan:
    """The plan with what a real step of it takes here; a tighter one where that is more than there is."""
    for attempt in range(MOST_TIGHTENED):
        chosen = search.best()
        if chosen is None:
            why = "no plan that was predicted to fit holds when it is run"
            return plan if plan.measured is None else replace(plan, method=None, why=why, measured=None)
        search.progress(f"running {chosen.method.spec}", 0.95)
        size = batch if isinstance(model, nn.Module) else search.forecaster.setting.batch
        how = {name: value for name, value in setting.items() if name not in ("loss", "accumulate")}
        how["optimizer"] = chosen.optimizer
        sequence = None if isinstance(model, nn.Module) else search.forecaster.setting.sequence
        dtype = {} if isinstance(model, nn.Module) else {"dtype": search.forecaster.setting.dtype}
        record = profile(
            model if isinstance(model, nn.Module) else _named(model),
            size,
            methods=[chosen.method.spec],
            sequence=sequence,
            rounds=1,
            timed_steps=1,
            trust_remote_code=trust_remote_code,
            **{**how, **dtype},
        )
        (result,) = record.results
        if result.memory is None:
            raise SettingError(f"{chosen.method.spec} could not be run here: {result.reason or result.status.value}")
        found = Measured(
            result.memory.peak_bytes,
            result.memory.host_bytes,
            result.step_seconds or 0.0,
            result.memory.peak_bytes <= search.room,
        )
        plan = replace(
            plan,
            method=chosen.method,
            setting=_with(search, chosen.optimizer),
            why=search.why(chosen),
            rungs=tuple(search.rungs(chosen)),
            measured=found,
        )
        if found.holds or attempt == MOST_TIGHTENED - 1:
            return plan
        search.refuse(chosen, found.peak_bytes)
    return plan


def _live(model: nn.Module, batch: Any, device: str, setting: dict[str, Any]) -> tuple[Analysis, Forecaster]:
    trains, lora_rank = resolve_lora(setting.get("trains"), setting.get("lora_rank"))
    wanted = {
        "autocast": None,
        "lora_dropout": 0.0,
        "adapter_dtype": None,
        "weights": None,
        "loss": "full",
        **setting,
        "batch": None,
        "sequence": None,
        "dtype": None,
        "trains": trains,
        "lora_rank": lora_rank,
    }
    subject = live_subject(model, batch, load_device(device), wanted)
    if subject.forecaster is None:
        raise SettingError("; ".join(subject.notes) or "nothing can be predicted of this model")
    return (
        Analysis(subject.info, (), (), setting=subject.setting, device=subject.device, notes=subject.notes),
        subject.forecaster,
    )


def _named(model: Any) -> str | None:
    named: str | None = os.fspath(model) if isinstance(model, os.PathLike) else model
    return named


def _bytes_of(memory: str | int) -> tuple[int, bool]:
    return (int(memory), False) if is_count(memory, 1) else parse_memory(str(memory))


def _standing(forecaster: Forecaster) -> int:
    optimizer, division = forecaster.setting.optimizer, forecaster.division
    whole = standing_bytes(forecaster.twin, optimizer)
    if division is None:
        return whole
    whole -= update_of(updated_by(forecaster.twin, Optimizer.parse(optimizer), "cpu")).state
    whole -= 0 if division.accumulated else division.gradients
    return whole + forecaster.update().state + division.standing().total()
