"""`autorev.profile`: measured memory, speed and fidelity of every way to train a model, as a record."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autorev.errors import SettingError
from autorev.files import path_of, why_not_written
from autorev.integrations.optimizers import check_runs
from autorev.lock import held
from autorev.methods import Method, parse_methods
from autorev.models.load import load_model
from autorev.optimizers import Optimizer
from autorev.prediction.training import DTYPES
from autorev.profiler.environment import device_profile, environment, parse_memory
from autorev.profiler.options import check_options, check_sweeps, parse_sweeps
from autorev.profiler.passes.sweep import standing_bytes
from autorev.profiler.record import Environment, Profile, Result, Status
from autorev.profiler.schedule import Progress, Schedule
from autorev.profiler.scratch import scratch
from autorev.profiler.subject import Subject, live_subject, named_subject
from autorev.records import drop_parts
from autorev.setting import resolve_lora

RECORDS = Path("profiles/recorded")


def profile(
    model: torch.nn.Module | str | None = None,
    batch: Any = None,
    *,
    methods: Iterable[str] = ("default",),
    sequence: int | None = None,
    dtype: str | None = None,
    autocast: str | None = None,
    optimizer: str | None = None,
    trains: str | None = None,
    lora_rank: int | None = None,
    lora_dropout: float = 0.0,
    adapter_dtype: str | None = None,
    depth: int | None = None,
    text: str | Path | None = None,
    rounds: int = 2,
    timed_steps: int = 3,
    sweeps: Iterable[str] = (),
    memory: str | None = None,
    longest_step: float = 60.0,
    goal: str = "memory",
    device: str | None = None,
    predict: bool = False,
    name: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    command: str = "autorev.profile(...)",
    progress: Progress = lambda what, fraction: None,
) -> Profile:
    """Measure real training steps of a model under every method, in fresh processes that take turns.

    Args:
        model: a model of yours, or what the command line calls MODEL; None: the embedded SmolLM2.
        batch: for a model of yours, what it is called with (a dict, a tuple, or one tensor); for MODEL, samples.
        methods: methods as `autorev.methods` spells them, `default` or `all`.
        sequence: tokens per sample.
        dtype: fp32, bf16 or fp16; default fp32 on a CPU and under autocast, bf16 on a GPU.
        autocast: bf16 to compute in it over fp32 weights.
        optimizer: as `autorev.optimizers` spells it; default: adamw.
        trains: full, lora or head; default: full.
        lora_rank: of the adapters; implies LoRA; default: 16.
        lora_dropout: of the adapters' inputs.
        adapter_dtype: fp32, as PEFT has it beside 16-bit weights; default: the weights' own.
        depth: so many blocks, with random weights.
        text: a file whose tokens are trained on; default: CPython's language reference, where there is a tokenizer.
        rounds: fresh processes per method, which take turns.
        timed_steps: in each process, after two that are not.
        sweeps: `batch`, `sequence` (up to the largest that fits), `batch=1,2,4`, `depth=8,16`.
        memory: the budget: `2GiB`, or `+128MiB` beside parameters, gradients and optimiser state.
        longest_step: seconds at which a sweep's search ends.
        goal: memory, throughput or context: what the recommendation is for.
        device: a device profile that utilisation and predictions are relative to; default: this machine's.
        predict: predict every method, and measure none.
        name: of the record; default: made of model and setting.
        out: the folder where the record is written after every process; None: nowhere.
        resume: go on with the record of the same name; what it holds is not measured again.
        trust_remote_code: code that stands beside MODEL's config, or that the config names, may run.
        command: what the record says made it.
        progress: is told what is being done, and the fraction done.

    Raises:
        AutorevError: the model cannot be built or trained that way, or an option makes no sense. What goes wrong in
            a method is part of the record.
    """
    wanted = parse_methods(methods)
    requests = parse_sweeps(sweeps)
    folder = None if out is None else path_of(out)
    if folder is not None and (why := why_not_written(folder)):
        raise SettingError(f"{folder} cannot be written to: {why}; name another `out`")
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
        raise SettingError(f"the name of a record is letters, digits, dots, - and _, not {name!r}")
    trains, lora_rank = resolve_lora(trains, lora_rank)
    check_options(goal, rounds, timed_steps, trains, longest_step, progress)
    limit = None if memory is None else parse_memory(memory)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    optimizer = optimizer or "adamw"
    if not predict:
        check_runs(Optimizer.parse(optimizer), on)
    hardware = device_profile(on, device)
    setting = {
        "batch": batch,
        "sequence": sequence,
        "dtype": dtype or ("bf16" if on == "cuda" and not autocast else "fp32"),
        "autocast": autocast,
        "optimizer": optimizer,
        "trains": trains,
        "lora_rank": lora_rank,
        "lora_dropout": lora_dropout,
        "adapter_dtype": adapter_dtype,
        "loss": "full",
    }
    progress("analysing the model", 0.0)
    if isinstance(model, torch.nn.Module):
        given = {"depth": depth, "text": text}
        for option in (option for option, value in given.items() if value is not None):
            raise SettingError(f"a model in user code is profiled as it is; leave {option} out")
        subject = live_subject(model, batch, hardware, setting)
    else:
        if batch is not None and not isinstance(batch, int):
            raise SettingError("with MODEL by name, batch is a number of samples; a batch of tensors needs the model")
        file = None if text is None else path_of(text)
        subject = named_subject(model, depth, file, hardware, setting, trust_remote_code)
    check_sweeps(requests, subject)
    if subject.pretrained and subject.live is None and not predict:
        _check_weights(model, subject, trust_remote_code)
    blank = _blank(subject, wanted, name, depth, goal, memory, limit, command, environment(on, torch.get_num_threads()))
    with ExitStack() as stack:
        if folder is not None:
            what, instead = f"the record {folder / blank.name}.json", "give this one another `name`"
            stack.enter_context(held(folder, blank.name, what, instead))
            drop_parts(folder / f"{blank.name}.json")
        record = _resumed(blank, folder, resume)
        place = stack.enter_context(scratch(folder, blank.name))
        named = model if isinstance(model, str) else None
        run = Schedule(subject, record, place, folder, on, depth, named, progress, trust_remote_code)
        run.predict()
        run.write()
        if not predict:
            run.measure(rounds, timed_steps)
            for request in requests:
                run.sweep(request, limit, longest_step)
        return run.finish(predict)


def _check_weights(model: Any, subject: Subject, trust_remote_code: bool) -> None:
    """Load them once here: otherwise each process that measures would find out, and say it to a log.

    Raises:
        ModelBuildError: they are not those of the config.
    """
    setting = subject.setting
    with suppress(SettingError):  # too large for this machine: what can be predicted is of use
        size = setting.batch, setting.sequence
        load_model(model, DTYPES[setting.dtype], *size, trust_remote_code=trust_remote_code)


def _blank(
    subject: Subject,
    methods: list[Method],
    name: str | None,
    depth: int | None,
    goal: str,
    memory: str | None,
    limit: tuple[int, bool] | None,
    command: str,
    where: Environment,
) -> Profile:
    """The record before anything is measured."""
    setting = subject.setting
    budget = None
    if limit is not None:
        budget = limit[0] + (_standing(subject) if limit[1] else 0)
    return Profile(
        name=name or _name_of(subject, depth),
        model=subject.info,
        pretrained=subject.pretrained,
        blocks=subject.count,
        setting=setting,
        device=subject.device,
        text=subject.text,
        command=command,
        environment=where,
        memory_limit=memory,
        budget_bytes=budget,
        goal=goal,
        results=tuple(Result(method, Status.PENDING) for method in methods),
        notes=subject.notes,
    )


def _standing(subject: Subject) -> int:
    if subject.forecaster is not None:
        return standing_bytes(subject.forecaster.twin, subject.setting.optimizer)
    assert subject.live is not None
    return standing_bytes(subject.live[0], subject.setting.optimizer)


def _name_of(subject: Subject, depth: int | None) -> str:
    setting = subject.setting
    parts = [subject.info.name.lower(), f"{depth}-blocks" if depth else "", setting.trains]
    parts += [f"b{setting.batch}", f"s{setting.sequence}" if setting.sequence else "", setting.dtype]
    return re.sub(r"[^\w.-]+", "-", "_".join(filter(None, parts))).strip("-.") or "profile"


def _resumed(blank: Profile, folder: Path | None, resume: bool) -> Profile:
    """The record of the same run that is gone on with, or `blank`.

    Raises:
        SettingError: there is an interrupted record, and it was not asked for; or it is of another run.
    """
    path = None if folder is None else folder / f"{blank.name}.json"
    if path is None or not path.is_file():
        if resume:
            raise SettingError(f"there is no record {path or blank.name} to go on with; leave `resume` out")
        return blank
    if not resume:
        if not Profile.read(path).complete:
            raise SettingError(
                f"{path} is an interrupted run: go on with it (`resume`), give this one another `name`, or delete it"
            )
        return blank
    found = Profile.read(path)
    same = ("name", "model", "setting", "text", "budget_bytes", "goal", "pretrained")
    different = [key for key in same if getattr(found, key) != getattr(blank, key)]
    where, here = found.environment, blank.environment
    if (where.machine, where.versions) != (here.machine, here.versions):
        different.append("machine or versions")  # times of two machines are not one sample
    if different:
        what = ", ".join(different)
        raise SettingError(f"{path} is of another run (its {what} differ); give this one another `name`")
    for result in blank.results:
        if found.result(result.method.spec) is None:
            found = found.with_result(result)
    commands = dict.fromkeys((*found.command.splitlines(), blank.command))
    # What is there is not measured again.
    return replace(found, complete=False, command="\n".join(commands))
