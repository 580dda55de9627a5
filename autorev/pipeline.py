"""`autorev.analyze`: capture, detect, and (for a workload) predict and recommend, in that order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from autorev.analysis import Analysis, ModelInfo
from autorev.errors import AutorevError, CaptureError, NoBlocksError
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
        from autorev.example_call import example_call_for

        return example_call_for(model, 1, 128)
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
