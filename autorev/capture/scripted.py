"""Functions compiled by `torch.jit.script` as their author wrote them: only then can be seen what they do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from autorev.patching import patched_here


def scripted_as_written() -> AbstractContextManager[None]:
    """This thread's calls of scripted functions (Megatron's `bias_dropout_add`) run the Python they were made of."""

    def calling(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(scripted: Any, *args: Any, **kwargs: Any) -> Any:
            written = getattr(scripted, "_torchdynamo_inline", None)
            return original(scripted, *args, **kwargs) if written is None else written(*args, **kwargs)

        return call

    return patched_here(torch.jit.ScriptFunction, "__call__", calling)
