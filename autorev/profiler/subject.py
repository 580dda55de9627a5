"""What is profiled: MODEL by name or a model in user code, with what analysis says of it before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorev.analysis import DeviceInfo, ModelInfo
from autorev.capture.fake import fake_copy
from autorev.capture.quantised import parameters_of
from autorev.conversion.checkpointing import SWITCH_OFF, checkpoints_itself
from autorev.detection import call_of, detect_in, refuse_converted
from autorev.errors import AutorevError, SettingError, UnreadableError
from autorev.files import read_bytes
from autorev.in_place import Blocks
from autorev.models.load import has_weights, tokenizer_of
from autorev.models.quantization import cannot_train
from autorev.models.resolve import is_embedded, resolve
from autorev.pipeline import prepare
from autorev.prediction.forecast import Forecaster
from autorev.profiler.passes.prepare import find_blocks, in_order
from autorev.profiler.passes.step import tensors_of
from autorev.profiles import DeviceProfile
from autorev.setting import Setting
from autorev.workload import Call, Workload


@dataclass(frozen=True, eq=False)
class Subject:
    """A model before it is measured."""

    info: ModelInfo
    pretrained: bool
    setting: Setting
    blocks: Blocks
    count: int
    """Residual blocks, turns of loops included."""
    device: DeviceInfo
    forecaster: Forecaster | None
    """For predictions; None where there are none, and `notes` says why."""
    tokens: torch.Tensor | None
    """Token ids of the whole text [tokens]; None: inputs are random."""
    text: str
    longest_sequence: int | None
    resizable: bool
    live: tuple[nn.Module, Call] | None
    """A model of the user's own."""
    notes: tuple[str, ...] = ()


def named_subject(
    model: str | None,
    depth: int | None,
    text: Path | None,
    profile: DeviceProfile,
    wanted: dict[str, Any],
    trust_remote_code: bool = False,
) -> Subject:
    """MODEL as on the command line. `wanted` is what `pipeline.prepare` takes as a setting.

    Raises:
        AutorevError: there is no such model, or it cannot be trained that way.
    """
    pretrained = depth is None and has_weights(model)
    if depth is not None and has_weights(model) and not is_embedded(model):
        raise SettingError(f"{model} has weights of its own depth; leave `depth` out, or give its config.json")
    workload = resolve(model, depth, trust_remote_code)
    if workload.scheme is not None and not pretrained:
        said = f"its config has quantised weights ({workload.scheme.title}); random ones are not quantised"
        workload = replace(workload, scheme=None, notes=(*workload.notes, said))
    elif workload.scheme is not None and wanted["trains"] == "full":
        raise cannot_train(workload.name, workload.scheme.title, "`lora_rank=16` (or `trains=head`)")
    if wanted["sequence"] is None and workload.default_sequence is not None:
        wanted = {**wanted, "sequence": min(workload.default_sequence, 256)}
    analysis, forecaster = prepare(workload, device=profile.name, **wanted)
    assert analysis.setting is not None and analysis.device is not None
    twin = forecaster.twin
    found = [*(block for chain in analysis.chains for block in chain.blocks), *analysis.refused]
    sites = forecaster.layout.sites
    inline = {id(site.module) for site in sites if site.turn is not None}
    paths = [block.path for block in found if _is_module(twin, block.path, inline)]
    if analysis.setting.sequence is None and text is not None:
        raise SettingError(f"{analysis.model.name} reads no text, so there is no use for {text}; leave `text` out")
    tokens, words = None, "random inputs"
    if analysis.setting.sequence is not None and (pretrained or text is not None):
        tokens, words = text_tokens(model, text, trust_remote_code)
    return Subject(
        info=analysis.model,
        pretrained=pretrained,
        setting=analysis.setting,
        blocks=Blocks(in_order(twin, paths), bool(inline), any(block.draws_random for block in found)),
        count=len(found),
        device=analysis.device,
        forecaster=forecaster,
        tokens=tokens,
        text=words,
        longest_sequence=workload.longest_sequence,
        resizable=workload.resizable,
        live=None,
        notes=analysis.notes,
    )


def live_subject(model: nn.Module, batch: Any, profile: DeviceProfile, wanted: dict[str, Any]) -> Subject:
    """A model in user code, on the batch that it is given.

    Raises:
        AutorevError: the model cannot be called with that batch, or is converted already.
    """
    refuse_converted(model, "profile")
    call = call_of(model, batch, "profile")
    if wanted["sequence"] is not None:
        raise SettingError("a model in user code is profiled on the batch that it is given; leave sequence out")
    if checkpoints_itself(model):
        raise SettingError(
            f"{type(model).__name__} checkpoints its blocks by itself, and a profile compares ways to train with and "
            f"without that; first {SWITCH_OFF}"
        )
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    if floating not in names:
        raise SettingError(f"profiles know fp32, bf16 and fp16, and {type(model).__name__} is {floating}")
    ids = call[1].get("input_ids")
    first = next(iter(tensors_of(call)), None)
    wanted = {
        **wanted,
        "batch": int(first.shape[0]) if first is not None and first.dim() else 1,
        "sequence": int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None,
        "dtype": names[floating],
    }
    workload = _workload_of(model, call, wanted)
    notes: tuple[str, ...] = ()
    try:
        analysis, forecaster = prepare(workload, device=profile.name, **wanted)
        assert analysis.setting is not None
        info, setting, forecast = analysis.model, analysis.setting, forecaster
    except AutorevError as error:
        # Prediction needs more of a model than measuring does.
        info = ModelInfo(type(model).__name__, type(model).__name__, parameters_of(model), "a model in user code")
        setting = Setting(**{**wanted, "device": profile.name})
        forecast, notes = None, (f"nothing is predicted: {error}",)
    blocks = find_blocks(model, call)
    detection, _ = detect_in(model, *call)
    return Subject(
        info=info,
        pretrained=True,  # for all that is known: a coupling that changes the function is not recommended
        setting=setting,
        blocks=blocks,
        count=sum(map(len, detection.chains)) + len(detection.refused),
        device=profile.info(setting.dtype),
        forecaster=forecast,
        tokens=None,
        text="the batch that was given",
        longest_sequence=None,
        resizable=False,
        live=(model, call),
        notes=notes,
    )


def text_tokens(model: str | None, text: Path | None, trust_remote_code: bool = False) -> tuple[torch.Tensor, str]:
    """Token ids of a text file (default: the language reference that CPython carries), and where they come from.

    Raises:
        SettingError: the file is empty or no text, or MODEL has no tokenizer.
    """
    if text is None:
        from pydoc_data.topics import topics

        content, words = "\n".join(topics[key] for key in sorted(topics)), "CPython's pydoc_data.topics"
    else:
        try:
            content, words = read_bytes(text).decode(), str(text)
        except UnreadableError as error:
            raise SettingError(f"the text {text} {error}") from None
        except UnicodeDecodeError:
            raise SettingError(f"the text {text} cannot be read: it is not UTF-8 text") from None
        if not content.strip():
            raise SettingError(f"the text {text} is empty; give a file with some text in it")
    tokenizer = tokenizer_of(model, trust_remote_code)
    if tokenizer is None:
        raise SettingError(
            f"{model} has no tokenizer that could read {words}; leave `text` out: inputs are random then"
        )
    ids = tokenizer(content, return_tensors="pt", verbose=False).input_ids[0]
    return ids, words


def _is_module(twin: nn.Module, path: str, inline: set[int]) -> bool:
    try:
        return id(twin.get_submodule(path)) not in inline
    except AttributeError:
        return False


def _workload_of(model: nn.Module, call: Call, wanted: dict[str, Any]) -> Workload:

    def mode() -> Any:
        return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)

    return Workload(
        name=type(model).__name__,
        source="a model in user code",
        build=lambda dtype: fake_copy(model, mode()),
        example=lambda batch, sequence: fake_copy(call, mode()),
        default_batch=wanted["batch"],
        default_sequence=wanted["sequence"],
        longest_sequence=None,
        resizable=False,
    )
