"""The residual blocks of a live model: a call of it, and what is found in that call."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autorev.capture.fake import DATA_DEPENDENT, fake_copy, new_fake_mode
from autorev.capture.generators import shared_generators_left
from autorev.capture.plain import refuse_flattened
from autorev.capture.record import record
from autorev.capture.scripted import said_of_scripted
from autorev.capture.source import raised_line
from autorev.capture.wrapped import own_forward
from autorev.detect.chains import Detection, detect
from autorev.detect.idle import named_inputs
from autorev.errors import AutorevError, CaptureError, ConversionError, first_line, message_of
from autorev.integrations.accelerate import fetched
from autorev.integrations.example_call import example_call_for
from autorev.integrations.transformers import is_transformers, without_cache
from autorev.rewrite.replacement import replacements_of
from autorev.workload import Call


def call_of(model: nn.Module, batch: Any, function: str) -> Call:
    """What `model` is called with on `batch`; `function` is the one of autorev's that the user called.

    Args:
        model: of any kind; a `transformers` model needs no batch, which is then derived from its config.
        batch: a dict of keyword arguments, a tuple (or list) of positional ones, a pair `(args, kwargs)` of both, one
            tensor, or None. A `transformers` model is told to fill no cache where the batch does not say.

    Raises:
        CaptureError: there is no batch and it is a model of another kind, FSDP1 has flattened its parameters, or the
            names of keyword arguments are no text.
    """
    if batch is not None:
        return without_cache(model, _given(batch, function))

    refuse_flattened(model)
    if is_transformers(model):
        return example_call_for(model, 1, None)
    raise CaptureError(
        f"autorev.{function}({type(model).__name__}) needs a batch: pass what you would pass to the model itself, "
        f"autorev.{function}(model, batch), as a dict of keyword arguments, a tuple of positional ones, or one tensor"
    )


def _given(batch: Any, function: str) -> Call:
    args: tuple[Any, ...]
    if isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    elif isinstance(batch, tuple | list):
        both = len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict)
        args, kwargs = batch if both else (tuple(batch), {})
    else:
        args, kwargs = (batch,), {}
    if not all(isinstance(name, str) for name in kwargs):
        raise CaptureError(f"a batch of keyword arguments for autorev.{function} has names, not {[*kwargs]!r}")
    return args, kwargs


def refuse_converted(model: nn.Module, function: str) -> None:
    """Raise where blocks of `model` are reversible already: what they were before is what is asked of.

    Raises:
        ConversionError: they are; `function` is the one of autorev's that the user called.
    """
    if any(replacements_of(model)):
        raise ConversionError(
            f"{type(model).__name__} is converted, and autorev.{function} is of plain models; call "
            f"autorev.revert(model) first, or autorev.{function} before autorev.convert"
        )


def detect_in(model: nn.Module, args: Any, kwargs: Any) -> tuple[Detection, nn.Module]:
    """Detection on a fake copy; where the model must see its data to run, on a real copy."""
    # Tensors made in inference mode count no writes.
    with torch.inference_mode(False), own_forward(model), shared_generators_left(model):
        return _detect_in(model, args, kwargs)


def _detect_in(model: nn.Module, args: Any, kwargs: Any) -> tuple[Detection, nn.Module]:
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
        brought = {id(tensor) for _, tensor in fetched(model)}
        if any(p.is_meta and id(p) not in brought for p in model.parameters()):
            raise CaptureError(
                f"the forward of {type(model).__name__} looks at the values of its tensors ({where}), and a model on "
                "the meta device has none; analyse it with its weights loaded"
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


def forward_failed(model: nn.Module, error: Exception) -> str:
    """One line on a forward that raised: where, what, and what to check."""
    if "TorchScript interpreter" in message_of(error) and (said := said_of_scripted(model)):
        return said
    inputs = ", ".join(named_inputs(model))
    return (
        f"the forward of {type(model).__name__} failed at {raised_line(error)}: {first_line(error)}; "
        "check that the example arguments are those the model takes"
        + (f" ({inputs}): give them as a batch, or by package.module:function" if inputs else "")
    )
