"""`autorev.analyze`: capture, detect, and (for a workload) predict and recommend, in that order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from autorev.analysis import Analysis, ModelInfo, Prediction, Reach, Setting, Sweep
from autorev.errors import AutorevError, CaptureError, NoBlocksError, SettingError
from autorev.plan import recommend
from autorev.predict.forecast import RESERVE_BYTES, Forecaster, powers_around, rename
from autorev.predict.scaling import ScaledTrace
from autorev.predict.strategies import Strategy
from autorev.workload import Call, Workload

if TYPE_CHECKING:
    import torch

    from autorev.detect.chains import Detection

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction that is done."""


def analyze(model: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Analysis:
    """Find the residual blocks of `model` and say which of them can be made reversible.

    `model(*args, **kwargs)` is run once on fake tensors: nothing is computed, and `model`, its buffers, its weights and
    the random streams stay as they are. A `transformers` model needs no arguments: a call is derived from its config.
    What training would do is analysed: a model in eval mode is looked at as after `.train()`.

    Raises:
        CaptureError: the model cannot be copied, or its forward raises on these arguments.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise CaptureError(f"autorev.analyze needs a torch.nn.Module instance, and got {what}")
    if not args and not kwargs:
        args, kwargs = _example_call(model)
    detection, _ = _detect(model, args, kwargs)
    return _analysis(detection, model, type(model).__name__, "a model in user code")


def _example_call(model: torch.nn.Module) -> Call:
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        from autorev.models.example_call import example_call_for

        return example_call_for(model, 1, None)
    raise CaptureError(
        f"autorev.analyze({type(model).__name__}) needs example arguments: pass what you would pass to the model itself, "
        "autorev.analyze(model, *args, **kwargs)"
    )


def _detect(model: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Detection, torch.nn.Module]:
    """Detection on a fake copy; where the model must see its data to run, on a real copy."""
    import copy

    from autorev.capture.fake import DATA_DEPENDENT, fake_copy, new_fake_mode
    from autorev.capture.record import record
    from autorev.capture.source import raised_line
    from autorev.detect.chains import detect

    mode = new_fake_mode()
    twin = fake_copy(model, mode)
    fake_args, fake_kwargs = fake_copy((args, kwargs), mode)
    if not any(module.training for module in twin.modules()):
        twin.train()
    try:
        with mode:
            return detect(record(twin, fake_args, fake_kwargs)), twin
    except DATA_DEPENDENT as error:
        where = raised_line(error)
        if any(p.is_meta for p in model.parameters()):
            raise CaptureError(
                f"the forward of {type(model).__name__} looks at the values of its tensors ({where}), and a model on the "
                "meta device has none; analyse it with its weights loaded"
            ) from None
    except AutorevError:
        raise
    except Exception as error:
        raise CaptureError(forward_failed(model, error)) from error
    real = copy.deepcopy(model)
    if not any(module.training for module in real.modules()):
        real.train()
    real_args, real_kwargs = copy.deepcopy((args, kwargs))
    try:
        return detect(record(real, real_args, real_kwargs)), twin
    except Exception as error:
        raise CaptureError(forward_failed(model, error)) from error


def analyze_workload(
    workload: Workload,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    dtype: str = "bf16",
    optimizer: str = "adamw",
    trains: str = "full",
    lora_rank: int | None = None,
    loss: str = "full",
    device: str = "h100-80gb",
    progress: Progress = lambda what, fraction: None,
) -> Analysis:
    """Analyse a workload, predict a training step of it under every strategy, and recommend one.

    `batch` and `sequence` default to the workload's own. `progress` is told what is being done, and the fraction done.

    Raises:
        SettingError: the model cannot be trained that way (a chunked loss without a vocabulary head, ...).
        CaptureError: the model's forward fails.
        NoBlocksError: the model has no residual block, reversible or not.
    """
    from autorev.capture.fake import DATA_DEPENDENT, new_fake_mode
    from autorev.capture.record import record
    from autorev.capture.source import raised_line
    from autorev.detect.chains import detect
    from autorev.predict.simulate import layout_of
    from autorev.predict.training import DTYPES, choose_trained
    from autorev.profiles import load_device

    profile = load_device(device)
    device_info = profile.info(dtype)
    setting, notes = _setting(workload, batch, sequence, dtype, optimizer, trains, lora_rank, loss, device_info.name)

    progress("building the model without its weights", 0.0)
    mode = new_fake_mode()
    with mode:
        twin = workload.build(DTYPES[dtype]).train()
    progress("recording one call", 0.1)
    with mode:
        args, kwargs = workload.example(setting.batch, setting.sequence)
        try:
            recorded = record(twin, args, kwargs)
        except DATA_DEPENDENT as error:
            raise CaptureError(
                f"the forward of {type(twin).__name__} looks at the values of its tensors ({raised_line(error)}), and "
                "on the command line there are none; call autorev.analyze(model, ...) with the real model instead"
            ) from None
        except AutorevError:
            raise
        except Exception as error:
            raise CaptureError(forward_failed(twin, error)) from error
        progress("tracing the blocks", 0.2)
        detection = detect(recorded)
    del recorded
    analysis = _analysis(detection, twin, workload.name, workload.source)
    if not analysis.chains and not analysis.refused:
        raise NoBlocksError(
            f"{workload.name} ({analysis.model.class_name}) has no residual block: nowhere is a module's or a loop's "
            "input added to its output; autorev has nothing to say about such a model"
        )
    layout = layout_of(detection.chains, detection.refused, twin)
    with mode:
        notes += choose_trained(twin, [site.module for site in layout.sites], setting)
    forecaster = Forecaster(
        twin=twin,
        mode=mode,
        layout=layout,
        example=workload.example,
        setting=setting,
        device=device_info,
        device_kind=profile.kind,
        reversible=any(site.chain is not None for site in layout.sites),
        resizable=workload.resizable,
        longest_sequence=workload.longest_sequence,
    )
    return _forecast(replace(analysis, setting=setting, device=device_info, notes=tuple(notes)), forecaster, progress)


def predict(model: str | Workload | None = None, **setting: Any) -> Analysis:
    """What `autorev analyze MODEL` does, as a function: MODEL by name, or a workload of your own.

    `setting` is any of batch, sequence, dtype, optimizer, trains, lora_rank, loss and device; see `analyze_workload`.
    """
    from autorev.models.resolve import resolve

    return analyze_workload(model if isinstance(model, Workload) else resolve(model), **setting)


def _setting(
    workload: Workload,
    batch: int | None,
    sequence: int | None,
    dtype: str,
    optimizer: str,
    trains: str,
    lora_rank: int | None,
    loss: str,
    device: str,
) -> tuple[Setting, list[str]]:
    notes = []
    if sequence is not None and workload.default_sequence is None:
        raise SettingError(f"{workload.name} has no sequence axis; leave --sequence out")
    if batch is not None and not workload.resizable and batch != workload.default_batch:
        raise SettingError(f"the example inputs of {workload.name} share no batch axis; leave --batch out")
    limit = workload.longest_sequence
    if sequence is not None and limit is not None and sequence > limit:
        raise SettingError(
            f"{workload.name} takes at most {limit:,} tokens (its position embeddings end there), and {sequence:,} were "
            f"asked for; use --sequence {limit} or fewer"
        )
    if limit is not None and workload.default_sequence is not None:
        notes.append(f"sequence lengths end at the model's own limit of {limit:,} tokens")
    setting = Setting(
        batch=batch or workload.default_batch,
        sequence=sequence or workload.default_sequence,
        dtype=dtype,
        optimizer=optimizer,
        trains=trains,
        lora_rank=lora_rank if trains == "lora" else None,
        loss=loss,
        device=device,
    )
    return setting, notes


def _forecast(analysis: Analysis, forecaster: Forecaster, progress: Progress) -> Analysis:
    """Predictions, frontier, sweeps and recommendation."""
    setting, strategies = forecaster.setting, forecaster.strategies()
    predictions: dict[str, Prediction] = {}
    frontier: dict[str, Reach] = {}
    scaled: list[tuple[str, Strategy, ScaledTrace]] = []
    for number, strategy in enumerate(strategies):
        if strategy.like:
            predictions[strategy.name] = rename(predictions[strategy.like], strategy)
            frontier[strategy.name] = replace(frontier[strategy.like], strategy=strategy.name)
            continue
        progress(f"simulating {strategy.name}", 0.3 + 0.6 * number / len(strategies))
        here = forecaster.trace(strategy, setting.batch, setting.sequence)
        predictions[strategy.name] = forecaster.prediction(strategy, here)
        curves = {}
        if forecaster.resizable:
            curves["batch"] = forecaster.along_batch(strategy, here)
        if setting.sequence is not None:
            curves["sequence"] = forecaster.along_sequence(strategy, here)
        limits: dict[str, int] = {}
        for axis, curve in curves.items():
            limits[axis], sharpened = forecaster.limit(strategy, curve, axis)
            scaled.append((axis, strategy, sharpened))
        frontier[strategy.name] = Reach(strategy.name, limits.get("batch"), limits.get("sequence"))
    progress("comparing", 0.95)
    analysis = replace(
        analysis,
        predictions=tuple(predictions.values()),
        frontier=tuple(frontier.values()),
        sweeps=tuple(_sweeps(forecaster, scaled, frontier)),
    )
    room = forecaster.device.memory_bytes - RESERVE_BYTES
    return replace(analysis, recommendation=recommend(analysis, room))


def _sweeps(
    forecaster: Forecaster, scaled: list[tuple[str, Strategy, ScaledTrace]], frontier: dict[str, Reach]
) -> Iterator[Sweep]:
    """Every strategy over the same sizes, up to a little beyond what the best of them reaches."""
    setting = forecaster.setting
    for axis, here in (("batch", setting.batch), ("sequence", setting.sequence)):
        if here is None:
            continue
        reached = [
            (r.largest_batch if axis == "batch" else r.longest_sequence) or 0 for r in frontier.values()
        ]
        most = min(max([2 * here, *(2 * r for r in reached)]), 256 * here)
        if axis == "sequence" and forecaster.longest_sequence is not None:
            most = min(most, forecaster.longest_sequence)
        values = powers_around(here, most)
        for along, strategy, trace in scaled:
            if along == axis:
                yield forecaster.sweep(axis, strategy, trace, values)


def forward_failed(model: torch.nn.Module, error: Exception) -> str:
    """One line on a forward that raised: where, what, and what to check."""
    from autorev.capture.source import raised_line

    text = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return (
        f"the forward of {type(model).__name__} raised {type(error).__name__} at {raised_line(error)}: {text}; "
        "check that the example arguments are those the model takes"
    )


def _analysis(detection: Detection, model: torch.nn.Module, name: str, source: str) -> Analysis:
    chains, refused = detection.public()
    info = ModelInfo(
        name=name,
        class_name=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        source=source,
    )
    return Analysis(info, chains, refused, versions=_versions())


def _versions() -> dict[str, str]:
    import autorev

    found = {"autorev": autorev.__version__}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
