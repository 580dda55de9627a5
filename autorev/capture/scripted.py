"""What `torch.jit.script` compiled: functions as their author wrote them, and a word on modules, which have no code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from autorev.patching import patched_here


def scripted_as_written() -> AbstractContextManager[None]:
    """This thread's calls of scripted functions (Megatron's `bias_dropout_add`) run the Python they were made of."""

    def calling(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(scripted: Any, *args: Any, **kwargs: Any) -> Any:
            written = getattr(scripted, "_torchdynamo_inline", None)
            return original(scripted, *args, **kwargs) if written is None else written(*args, **kwargs)

        return call

    return patched_here(torch.jit.ScriptFunction, "__call__", calling)


def said_of_scripted(model: nn.Module) -> str:
    """A sentence on the modules of whose code nothing can be seen; empty where there are none."""
    modules = model.named_modules()
    hidden = next((path for path, module in modules if isinstance(module, torch.jit.ScriptModule)), None)
    if hidden is None:
        return ""
    return (
        f"{hidden or type(model).__name__} was compiled by torch.jit.script, and what its code does with its input "
        "cannot be followed; convert the model as it was before that"
    )
