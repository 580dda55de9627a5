"""`autorev.analyze`: capture, detect, and (for a workload) predict and recommend, in that order."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from autorev import __version__
from autorev.advice.case import Possible
from autorev.advice.predicted import recommend_for
from autorev.analysis import Analysis, ModelInfo, Prediction, Reach
from autorev.capture.fake import DATA_DEPENDENT, new_fake_mode
from autorev.capture.quantised import linear_sizes
from autorev.capture.record import record
from autorev.capture.source import raised_line
from autorev.chunked_loss import head_of
from autorev.commands import training_command
from autorev.detect.chains import Detection, detect
from autorev.detection import call_of, detect_in, forward_failed, refuse_converted
from autorev.errors import AutorevError, CaptureError, NoBlocksError, SettingError, first_line
from autorev.given import no_function
from autorev.models.load import has_weights
from autorev.models.quantization import chosen_scheme, predicted_quantised
from autorev.models.resolve import resolve
from autorev.optimizers import Optimizer
from autorev.prediction.example_step import plan_without_chains
from autorev.prediction.forecast import PROBES, Forecaster, walks_through_sequence
from autorev.prediction.frontier import Exploration, explore, sweeps
from autorev.prediction.layout import layout_of
from autorev.prediction.sharding import division_of, notes_on
from autorev.prediction.training import DTYPES, choose_trained
from autorev.profiles import load_device
from autorev.setting import Setting, resolve_lora
from autorev.workload import Call, Workload, check_step

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction that is done."""


def analyze(model: nn.Module, batch: Any = None) -> Analysis:
    """Find the residual blocks of `model` and say which of them can be made reversible.

    `model` is run once on fake tensors in the place of `batch` (a dict of keyword arguments, a tuple of positional
    ones, or one tensor): nothing is computed, and `model`, its buffers, its weights and
    the random streams stay as they are. A `transformers` model needs no batch: a call is derived from its config.
    What training would do is analysed: a model in eval mode is looked at as after `.train()`. Where no block can be
    reversed, `recommendation` says what helps them instead, with its figures in a step of the call.

    Raises:
        CaptureError: the model cannot be copied, or its forward raises on this batch.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise CaptureError(f"autorev.analyze needs a torch.nn.Module instance, and got {what}")
    refuse_converted(model, "analyze")
    args, kwargs = call_of(model, batch, "analyze")
    detection, twin = detect_in(model, args, kwargs)  # whose quantised weights have their own number of elements
    analysis = _analysis(detection, twin, type(model).__name__, "a model in user code")
    if detection.chains or not detection.refused:
        return analysis
    return replace(analysis, recommendation=plan_without_chains(twin, (args, kwargs), detection.refused))


def analyze_workload(
    workload: Workload, *, named: str | None = None, progress: Progress = lambda what, fraction: None, **setting: Any
) -> Analysis:
    """Analyse a workload, predict a training step of it under every method, and recommend one.

    `named` is MODEL as the command line has it, for the commands in the advice. `setting` is what `prepare` takes.
    `progress` is told what is being done, and the fraction done.

    Raises:
        SettingError: the model cannot be trained that way (a chunked loss without a vocabulary head, ...).
        CaptureError: the model's forward or backward fails.
        NoBlocksError: the model has no residual block, reversible or not.
    """
    analysis, forecaster = prepare(workload, progress=progress, **setting)
    try:
        return _forecast(analysis, forecaster, named, progress)
    except AutorevError:
        raise
    except Exception as error:
        remedy = "if the model trains outside autorev, please report this"
        if type(error).__name__ == "CheckpointError":
            remedy = "it seems to checkpoint its blocks itself: switch that off, autorev compares with and without"
        raise CaptureError(
            f"a training step of {analysis.model.class_name} could not be simulated: {first_line(error)}; {remedy}"
        ) from error


def prepare(
    workload: Workload,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    dtype: str | None = None,
    autocast: str | None = None,
    accumulate: int = 1,
    optimizer: str | None = None,
    trains: str | None = None,
    lora_rank: int | None = None,
    lora_dropout: float = 0.0,
    adapter_dtype: str | None = None,
    weights: str | None = None,
    loss: str = "full",
    gpus: int = 1,
    shard: str = "none",
    sequence_parallel: int = 1,
    device: str = "h100-80gb",
    progress: Progress = lambda what, fraction: None,
) -> tuple[Analysis, Forecaster]:
    """The analysis without predictions, and the fake twin that they are made with.

    `batch` and `sequence` default to the workload's own, `dtype` to bf16, and to fp32 under autocast, `optimizer` to
    adamw. Raises what
    `analyze_workload` raises.
    """

    if wrong := no_function(progress=progress):
        raise SettingError(wrong)
    profile = load_device(device)
    notes = _check_sizes(workload, batch, sequence)
    trains, lora_rank = resolve_lora(trains, lora_rank)
    setting = Setting(
        batch=batch or workload.default_batch,
        sequence=sequence or workload.default_sequence,
        dtype=dtype or ("fp32" if autocast else "bf16"),
        optimizer=optimizer or "adamw",
        trains=trains,
        lora_rank=lora_rank,
        loss=loss,
        device=profile.name,
        autocast=autocast,
        accumulate=accumulate,
        lora_dropout=lora_dropout,
        adapter_dtype=adapter_dtype,
        weights=weights,
        gpus=gpus,
        shard=shard,
        sequence_parallel=sequence_parallel,
    )
    Optimizer.parse(setting.optimizer).check_device(profile.kind)
    scheme = chosen_scheme(workload.name, workload.scheme, weights)
    if setting.trains == "lora" and setting.dtype != "fp32" and adapter_dtype is None:
        if scheme is not None and scheme.adapters_in_fp32:
            setting = replace(setting, adapter_dtype="fp32")
            notes.append(f"adapters are predicted in fp32, as PEFT has them beside {scheme.title} weights")
        else:
            kept = "peft.get_peft_model keeps them in fp32 (`adapter_dtype` fp32)"
            notes.append(f"adapters are predicted in {setting.dtype}; {kept}")
    device_info = profile.info(setting.autocast or setting.dtype)

    progress("building the model without its weights", 0.0)
    mode = new_fake_mode()
    with mode:
        twin = workload.build(DTYPES[setting.dtype]).train()
        if scheme is not None:
            asked = workload.scheme is None
            notes.append(predicted_quantised(twin, scheme, setting.trains, setting.dtype, asked))
        progress("recording one call", 0.1)
        walks = setting.sequence is not None and walks_through_sequence(twin, workload.example, setting.batch)
        length = setting.sequence
        if walks and length is not None and length > PROBES[-1]:
            length = PROBES[0]
            notes.append(
                f"the model walks through its tokens one at a time; figures for more than {PROBES[-1]} tokens are "
                f"extrapolated from {', '.join(map(str, PROBES))}"
            )
        detection = _detect_on_twin(twin, workload.example(setting.batch, length), progress)
    analysis = _analysis(detection, twin, workload.name, workload.source)
    if not analysis.chains and not analysis.refused:
        why = detection.nearest or (
            "nowhere is a module's or a loop's input added to its output, so there is nothing to reverse"
        )
        found = "no residual block was found in it" if detection.nearest else "it has no residual block"
        raise NoBlocksError(
            f"{workload.name} ({analysis.model.class_name}): {found}: {why}; if you know of one, please report it"
        )
    layout = layout_of(detection.chains, detection.refused, twin)
    if setting.sequence_parallel > 1:
        _check_tokens_can_be_divided(analysis)
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
        walks=walks,
        walks_batch=workload.walks_batch,
        division=division_of(twin, layout, setting),
    )
    notes += notes_on(setting)
    return replace(analysis, setting=setting, device=device_info, notes=(*notes, *analysis.notes)), forecaster


def _check_tokens_can_be_divided(analysis: Analysis) -> None:
    blocks = [*(block for chain in analysis.chains for block in chain.blocks), *analysis.refused]
    kinds = {step.kind for block in blocks for step in block.steps}
    for kind in sorted(kinds & {"convolution", "state-space"}):
        raise SettingError(
            f"{analysis.model.name} mixes tokens by {kind}, and `sequence_parallel` divides attention's heads alone; "
            "leave it out"
        )


def _detect_on_twin(twin: nn.Module, call: Call, progress: Progress) -> Detection:

    try:
        recorded = record(twin, *call)
    except DATA_DEPENDENT as error:
        raise CaptureError(
            f"the forward of {type(twin).__name__} looks at the values of its tensors ({raised_line(error)}), and "
            "a prediction has none; of a model that is there, autorev.analyze(model, batch) finds the blocks, and "
            "autorev.profile(model, batch) measures its steps"
        ) from None
    except AutorevError:
        raise
    except Exception as error:
        raise CaptureError(forward_failed(twin, error)) from error
    progress("tracing the blocks", 0.2)
    return detect(recorded)


def predict(
    model: str | os.PathLike[str] | Workload | None = None, *, trust_remote_code: bool = False, **setting: Any
) -> Analysis:
    """What `autorev analyze MODEL` does, as a function: MODEL by name, or a workload of your own.

    `setting` is any of batch, sequence, dtype, autocast, accumulate, optimizer, trains, lora_rank, lora_dropout,
    adapter_dtype, weights, loss, gpus, shard, sequence_parallel and device; see `analyze_workload` and
    `autorev.setting.Setting`.
    `trust_remote_code`: code that stands beside MODEL's config, or that the config names, may run.
    """

    if isinstance(model, nn.Module):
        raise SettingError(
            "autorev.predict builds its model without weights, from a name, a folder or a Workload. Of a model "
            "that is there already, autorev.analyze(model) finds the blocks, and autorev.profile(model, batch, "
            "predict=True) predicts a step"
        )
    if not isinstance(model, Workload):
        model = resolve(
            os.fspath(model) if isinstance(model, os.PathLike) else model, trust_remote_code=trust_remote_code
        )
    return analyze_workload(model, **setting)


def _check_sizes(workload: Workload, batch: int | None, sequence: int | None) -> list[str]:
    """Notes on sizes that the workload takes.

    Raises:
        SettingError: it does not take these.
    """
    check_step(batch, sequence)
    notes = list(workload.notes)
    if sequence is not None and workload.default_sequence is None:
        raise SettingError(f"{workload.name} has no sequence axis; leave `sequence` out")
    if batch is not None and not workload.resizable and batch != workload.default_batch:
        raise SettingError(f"the example inputs of {workload.name} share no batch axis; leave `batch` out")
    limit = workload.longest_sequence
    if sequence is not None and limit is not None and sequence > limit:
        raise SettingError(
            f"{workload.name} takes at most {limit:,} tokens (its position embeddings end there), and {sequence:,} "
            f"were asked for; use `sequence={limit}` or fewer"
        )
    if limit is not None and workload.default_sequence is not None:
        notes.append(f"sequence lengths end at the model's own limit of {limit:,} tokens")
    return notes


def _forecast(analysis: Analysis, forecaster: Forecaster, named: str | None, progress: Progress) -> Analysis:
    """Predictions, frontier, sweeps and recommendation."""
    setting, methods = forecaster.setting, forecaster.methods()
    predictions: dict[str, Prediction] = {}
    frontier: dict[str, Reach] = {}
    explored: list[Exploration] = []
    for number, method in enumerate(methods):
        progress(f"simulating {method.known_as}", 0.3 + 0.65 * number / len(methods))
        here = forecaster.trace(method, setting.batch, setting.sequence)
        predictions[method.known_as] = forecaster.prediction(method, here)
        explored.append(explore(forecaster, method, here))
        frontier[method.known_as] = explored[-1].reach()
    progress("comparing", 0.95)
    problems = [problem for exploration in explored for problem in exploration.problems]
    analysis = replace(
        analysis,
        predictions=tuple(predictions.values()),
        frontier=tuple(frontier.values()),
        sweeps=tuple(sweeps(forecaster, explored)),
        notes=(*analysis.notes, *dict.fromkeys(problems)),
    )
    return replace(analysis, recommendation=recommend_for(analysis, _possible(analysis, forecaster, named)))


def _possible(analysis: Analysis, forecaster: Forecaster, named: str | None) -> Possible:

    assert analysis.setting is not None
    causal = any(word in analysis.model.class_name for word in ("CausalLM", "LMHead"))
    inside = (module for site in forecaster.layout.sites for module in site.module.modules())
    return Possible(
        chunked=head_of(forecaster.twin) is not None,
        lora=any(linear_sizes(module) is not None for module in inside),
        command="" if named is None else training_command(named, analysis.setting, causal and has_weights(named)),
    )


def _analysis(detection: Detection, model: nn.Module, name: str, source: str) -> Analysis:
    chains, refused = detection.public()
    info = ModelInfo(
        name=name,
        class_name=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        source=source,
    )
    notes = [f"no residual block was found: {detection.nearest}"] if detection.nearest else []
    return Analysis(info, chains, refused, notes=(*notes, *detection.idle), versions=_versions())


def _versions() -> dict[str, str]:

    found = {"autorev": __version__}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
